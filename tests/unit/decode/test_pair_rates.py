"""What is remembered of links, and for how many."""

from dataclasses import replace

import pytest

from packlight.core.rate import LEAST_SHIPPED_BYTES
from packlight.core.shipping import Shipped
from packlight.core.workers import Role, WorkerInfo, WorkerLoad
from packlight.decode.pair_rates import FRESH_S, MOST_PAIRS, PairRates
from packlight.fleet.card import decode_worker, encode_worker
from packlight.wire.frames import event_from_bytes, event_to_bytes

MIB, NOW = 1 << 20, 1000.0


def test_a_pairs_pace_is_that_of_its_shipments():
    pairs = PairRates()
    assert pairs.note("p0", "grpc", 10 * MIB, 0.1, NOW) == pytest.approx(100 * MIB)
    assert pairs.note("p1", "shm", 10 * MIB, 0.01, NOW) == pytest.approx(1000 * MIB)
    assert pairs.note("p0", "grpc", 30 * MIB, 0.1, NOW) == pytest.approx(200 * MIB, rel=0.01)
    assert pairs.bytes_per_s(NOW) == pytest.approx({"p0": 200 * MIB, "p1": 1000 * MIB}, rel=0.01)


def test_small_shipments_say_nothing_of_a_link():
    pairs = PairRates()
    assert pairs.note("p0", "grpc", LEAST_SHIPPED_BYTES - 1, 1.0, NOW) is None
    assert pairs.note("p0", "inproc", MIB, 0.0, NOW) is None
    assert pairs.bytes_per_s(NOW) == {}


def test_another_transport_is_another_link():
    pairs = PairRates()
    pairs.note("p0", "grpc", 10 * MIB, 1.0, NOW)
    assert pairs.note("p0", "nixl", 10 * MIB, 0.01, NOW) == pytest.approx(1000 * MIB)
    assert pairs.transport_of("p0") == "nixl"


def test_the_pair_not_heard_of_for_longest_goes_first():
    pairs = PairRates()
    for number in range(MOST_PAIRS):
        pairs.note(f"p{number}", "grpc", MIB, 1.0, NOW)
        assert pairs.forget_oldest() is None
    pairs.note("p0", "grpc", MIB, 1.0, NOW)
    pairs.note("new", "grpc", MIB, 1.0, NOW)
    assert pairs.forget_oldest() == ("p1", "grpc")
    assert len(pairs.bytes_per_s(NOW)) == MOST_PAIRS
    assert pairs.forget_oldest() is None


def test_who_looked_slow_long_ago_gets_another_chance():
    pairs = PairRates()
    pairs.note("p0", "grpc", MIB, 10.0, NOW)
    pairs.note("p1", "grpc", MIB, 10.0, NOW + 1)
    assert set(pairs.bytes_per_s(NOW + FRESH_S)) == {"p0", "p1"}
    assert set(pairs.bytes_per_s(NOW + FRESH_S + 1)) == {"p1"}
    pairs.note("p0", "grpc", MIB, 0.01, NOW + FRESH_S + 1)
    assert pairs.bytes_per_s(NOW + FRESH_S + 1)["p0"] > 0.1 * MIB  # both, until the first has faded


def test_what_is_measured_crosses_the_wire():
    shipped = Shipped(2, 10, 20, 3.0, 1.0, 0.0, 0.0, 0.0, ship_s=0.25)
    assert event_from_bytes(event_to_bytes(shipped)) == shipped


def test_and_the_fleets_board():
    load = WorkerLoad(link_bytes_per_s={"prefill-0": 1e9, "prefill-1": 2.5e7})
    info = WorkerInfo("decode-0", 1, Role.DECODE, "host:1", "m", "f", "c", 16, load=load)
    assert decode_worker(encode_worker(info)) == info
    earlier = encode_worker(replace(info, load=WorkerLoad())).replace(',"link_bytes_per_s":{}', "")
    assert decode_worker(earlier).load.link_bytes_per_s == {}
