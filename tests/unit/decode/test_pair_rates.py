"""What is remembered of links, and for how many."""

import pytest

from packlight.decode.pair_rates import LEAST_BYTES, MOST_PAIRS, PairRates

MIB = 1 << 20


def test_a_pairs_pace_is_that_of_its_shipments():
    pairs = PairRates()
    assert pairs.note("p0", "grpc", 10 * MIB, 0.1) == pytest.approx(100 * MIB)
    assert pairs.note("p1", "shm", 10 * MIB, 0.01) == pytest.approx(1000 * MIB)
    assert pairs.note("p0", "grpc", 30 * MIB, 0.1) == pytest.approx(200 * MIB, rel=0.01)
    assert pairs.bytes_per_s() == pytest.approx({"p0": 200 * MIB, "p1": 1000 * MIB}, rel=0.01)


def test_small_shipments_say_nothing_of_a_link():
    pairs = PairRates()
    assert pairs.note("p0", "grpc", LEAST_BYTES - 1, 1.0) is None
    assert pairs.note("p0", "inproc", MIB, 0.0) is None
    assert pairs.bytes_per_s() == {}


def test_another_transport_is_another_link():
    pairs = PairRates()
    pairs.note("p0", "grpc", 10 * MIB, 1.0)
    assert pairs.note("p0", "nixl", 10 * MIB, 0.01) == pytest.approx(1000 * MIB)
    assert pairs.transport_of("p0") == "nixl"


def test_the_pair_not_heard_of_for_longest_goes_first():
    pairs = PairRates()
    for number in range(MOST_PAIRS):
        pairs.note(f"p{number}", "grpc", MIB, 1.0)
        assert pairs.forget_oldest() is None
    pairs.note("p0", "grpc", MIB, 1.0)
    pairs.note("new", "grpc", MIB, 1.0)
    assert pairs.forget_oldest() == ("p1", "grpc")
    assert len(pairs.bytes_per_s()) == MOST_PAIRS
    assert pairs.forget_oldest() is None
