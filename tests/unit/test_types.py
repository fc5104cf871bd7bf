"""The small decisions that live on values."""

import pytest

from packlight.core.rate import Rate
from packlight.core.types import FinishReason, StopRules

END, STOP, OTHER = 2, 9, 5


@pytest.mark.parametrize(
    ("rules", "token", "num_generated", "reason"),
    [
        (StopRules(8, (END,)), END, 1, FinishReason.STOP),
        (StopRules(8, (END,)), OTHER, 7, None),
        (StopRules(8, (END,)), OTHER, 8, FinishReason.LENGTH),
        (StopRules(8, (END,)), END, 8, FinishReason.STOP),
        (StopRules(8, (END,), ignore_eos=True), END, 1, None),
        (StopRules(8, (END,), (STOP,), ignore_eos=True), STOP, 1, FinishReason.STOP),
    ],
)
def test_ends(rules, token, num_generated, reason):
    assert rules.ends(token, num_generated) is reason


@pytest.mark.parametrize(
    ("rules", "num_generated", "banned"),
    [
        (StopRules(8, (END,), (STOP,)), 0, ()),
        (StopRules(8, (END,), (STOP,), min_tokens=2), 1, (END, STOP)),
        (StopRules(8, (END,), (STOP,), min_tokens=2), 2, ()),
        (StopRules(8, (END,), (STOP,), ignore_eos=True, min_tokens=2), 1, (STOP,)),
    ],
)
def test_banned(rules, num_generated, banned):
    assert rules.banned(num_generated) == banned


def test_rate_weighs_by_time_and_fades():
    rate = Rate(half_life_s=10.0)
    assert rate.per_s == 0.0
    rate.add(1000, 1.0)
    rate.add(1, 0.1)  # a short slow step hardly matters
    assert 850 < rate.per_s < 1000
    for _ in range(100):
        rate.add(100, 1.0)
    assert abs(rate.per_s - 100) < 1
