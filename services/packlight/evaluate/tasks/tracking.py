"""Variable tracking: chains of assignments scattered over noise (RULER `vt`, arXiv 2404.06654).

`VAR A = 12345`, later `VAR B = VAR A`, and so on; asked for are all variables that hold the first chain's value.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice, pairwise
from random import Random

from packlight.evaluate.tasks.base import Draft, Drafter, user
from packlight.evaluate.tasks.haystack import hide, sentences
from packlight.evaluate.tasks.words import distinct, draw_variable

_INTRODUCTION = "The following text hides assignments of variables. Follow which variable gets which value."


@dataclass(frozen=True, slots=True)
class VariableTracking:
    """Each chain assigns a number to one variable and hands it on `num_hops` times."""

    num_chains: int = 1
    num_hops: int = 4
    max_new_tokens: int = 30

    @property
    def has_depth(self) -> bool:
        return False

    def drafter(self, length: int, depth: float, rng: Random) -> Drafter:
        names = distinct(draw_variable, rng)
        chains = [list(islice(names, self.num_hops + 1)) for _ in range(self.num_chains)]
        values = rng.sample(range(10_000, 100_000), self.num_chains)
        needles = [
            placed
            for chain, value in zip(chains, values, strict=True)
            for placed in zip(_ascending(len(chain), rng), _assignments(chain, value), strict=True)
        ]
        question = f"Question: Find all variables that are assigned the value {values[0]} in the text above."
        answer_prefix = f"The {len(chains[0])} variables that are assigned the value {values[0]} are:"

        def draft(num_units: int) -> Draft:
            text = hide(needles, sentences("noise", num_units, seed=0))
            return Draft((user(f"{_INTRODUCTION}\n{text}\n{question}"),), answer_prefix, tuple(chains[0]))

        return draft


def _assignments(names: list[str], value: int) -> list[str]:
    return [f"VAR {names[0]} = {value}.", *(f"VAR {name} = VAR {source}." for source, name in pairwise(names))]


def _ascending(num_depths: int, rng: Random) -> list[float]:
    """Depths at random in the order of the text: a variable has its value before it hands it on."""
    return sorted(rng.random() for _ in range(num_depths))
