"""What a run says, from answers whose times are known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.summary import LATENCIES, figures, least_samples, quantile, spread
from tests.unit.loadtest.made_up import KV, answer, failure, plain, run_of


@pytest.mark.parametrize(("share", "least"), [(0.5, 2), (0.9, 10), (0.99, 100), (0.999, 1000)])
def test_a_percentile_needs_one_value_beyond_it(share, least):
    assert least_samples(share) == least
    assert quantile([1.0] * (least - 1), share) is None
    assert quantile([1.0] * least, share) == 1.0


def test_percentiles_of_a_hundred():
    values = [float(value) for value in range(1, 101)]
    assert spread(values) == {"p50": 50, "p90": 90, "p99": 99, "max": 100, "num": 100}


def test_there_is_no_empty_percentile():
    assert spread([]) == {"num": 0}
    assert spread([3.0]) == {"max": 3.0, "num": 1}
    found = figures(run_of([failure(), failure()]))
    assert all(found[latency.key] == {"num": 0} for latency in LATENCIES)


@given(values=st.lists(st.floats(0, 1e6), min_size=1))
def test_percentiles_ascend(values):
    found = spread(values)
    told = [found[name] for name in ("p50", "p90", "p99", "max") if name in found]
    assert told == sorted(told)


def test_latencies_are_those_of_bench_serve():
    found = figures(run_of([answer(ttft_s=0.5, tpot_s=0.1), answer(due_s=2, ttft_s=1.5, tpot_s=0.3)]))
    assert found["ttft_s"] == {"p50": 0.5, "max": 1.5, "num": 2}
    assert found["tpot_s"]["max"] == pytest.approx(0.3)
    assert found["itl_s"]["num"] == 8
    assert found["e2e_s"]["max"] == pytest.approx(2.7)


def test_a_late_start_counts_from_when_it_was_due_and_both_are_told():
    """Due at 0, sent at 3 because no slot was free, answered half a second later."""
    late = answer(due_s=0, ttft_s=3.5, sent_s=3.0)
    found = figures(run_of([late, answer()], waits=[3.0]))
    assert found["ttft_s"]["max"] == 3.5
    assert found["ttft_from_sent_s"]["max"] == 0.5
    assert (found["num_late"], found["max_slot_wait_s"]) == (1, 3.0)
    assert found["max_send_delay_s"] == 0


def test_the_clients_own_lateness_is_told_apart():
    found = figures(run_of([answer(sent_s=0.25)]))
    assert (found["num_late"], found["max_send_delay_s"]) == (0, 0.25)


def test_goodput_counts_answers_within_slo_over_all_requests():
    answers = [answer(), answer(ttft_s=1.1), answer(tpot_s=0.3), failure()]
    found = figures(run_of(answers))
    assert found["slo_share"] == 0.25
    assert found["goodput_per_s"] == pytest.approx(1 / 1.7)
    assert (found["num_failed"], found["failed_share"]) == (1, 0.25)


def test_packing_is_weighed_by_size():
    large = KV | {"kept_tokens": 200.0, "prompt_tokens": 900, "shipped_bytes": 700, "exact_bytes": 9000}
    found = figures(run_of([answer(), answer(kv=large, num_prompt_tokens=900, num_cached_tokens=0)]))
    assert found["shipped_share"] == pytest.approx(0.1)
    assert found["kept_share"] == pytest.approx(0.225)
    assert found["cached_share"] == pytest.approx(0.04)
    assert found["kept_tokens"] == 112.5


def test_a_server_that_says_nothing_of_packing_has_no_such_figures():
    found = figures(run_of([plain()]))
    assert not {"shipped_share", "kept_share", "cached_share", "kept_tokens"} & found.keys()
    assert found["output_tokens_per_s"] > 0


def test_a_run_without_any_request_failed():
    found = figures(run_of([]))
    assert found["failed_share"] == 1.0
