"""Exit codes follow from figures."""

from __future__ import annotations

import pytest

from loadtest.summary import figures
from loadtest.verdict import check_slo, parse_requirements, shortfalls
from packlight.core.errors import ConfigError
from tests.unit.loadtest.made_up import answer, failure, run_of

GOOD, SLOW = answer(), answer(ttft_s=5.0)


@pytest.mark.parametrize(
    ("answers", "required", "max_failed", "told"),
    [
        ([GOOD, GOOD], [], 0.0, []),
        ([GOOD, SLOW], ["goodput=0.5"], 0.0, []),
        ([GOOD, SLOW], ["goodput=0.9"], 0.0, ["slo_share is 0.500, required is 0.9"]),
        ([GOOD, failure()], [], 0.0, ["1 of 2 requests failed; at most 0.0% may (--max-errors)"]),
        ([GOOD, failure()], [], 0.5, []),
        ([], [], 0.0, ["0 of 0 requests failed; at most 0.0% may (--max-errors)"]),
        ([GOOD], ["found=0.5"], 0.0, ["found_share is not known, required is 0.5"]),
    ],
)
def test_what_falls_short(answers, required, max_failed, told):
    assert shortfalls(figures(run_of(answers)), parse_requirements(required, max_failed)) == told


@pytest.mark.parametrize(
    ("required", "told"),
    [
        ("latency=1", "--require latency=1: must be one of goodput, found"),
        ("goodput=90", "--require goodput: got '90', must be a share from 0 to 1"),
        ("goodput", "--require goodput: got '', must be a share"),
    ],
)
def test_requirements_that_make_no_sense(required, told):
    with pytest.raises(ConfigError, match=told):
        parse_requirements([required], 0.0)


def test_a_share_of_errors_is_a_share():
    with pytest.raises(ConfigError, match="--max-errors: got '5'"):
        parse_requirements([], 5)


def test_goodput_needs_an_slo():
    requirements = parse_requirements(["goodput=0.9"], 0.0)
    check_slo(requirements, {"ttft": 1.0})
    with pytest.raises(ConfigError, match="the scenario has no slo"):
        check_slo(requirements, {})
