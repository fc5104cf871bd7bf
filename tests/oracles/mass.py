"""The mass budget: as few tokens per head as retain a wanted share of the window's attention."""

from __future__ import annotations

from tests.oracles.plain import Vector


def least(scores_N: Vector, mass_S: Vector, target: float, sinks: int = 0) -> int:
    """The smallest number of tokens, window and sinks included, whose mass reaches `target` of the whole, when the
    prefix is taken in the order of its scores and equal scores are not torn apart."""
    num_prefix = len(scores_N)
    always = [*range(sinks), *range(num_prefix, len(mass_S))]
    by_score = sorted(range(sinks, num_prefix), key=lambda token: (-scores_N[token], token))
    retained, wanted = sum(mass_S[token] for token in always), target * sum(mass_S)
    for num_taken, token in enumerate(by_score):
        is_new_score = num_taken == 0 or scores_N[token] != scores_N[by_score[num_taken - 1]]
        if retained >= wanted and is_new_score:
            return len(always) + num_taken
        retained += mass_S[token]
    return len(mass_S)
