"""RocketKV (arXiv 2502.14051, v3): how one budget is split between dropping tokens and reading few of the rest.

The budget counts all KV traffic of a decode step, half of it for estimating which tokens matter and half for attending
to them. For a compression c the first stage drops by c^r, the second reads one c^(1-r)th of what is left; r grows with
c. Knows numbers only.
"""

from __future__ import annotations

from math import ceil, log2
from typing import TYPE_CHECKING, NamedTuple

from packlight.compress.budget import Site, base_budget, keeps_all
from packlight.core.types import PackSpec

if TYPE_CHECKING:
    from packlight.compress.base import Candidates


class Split(NamedTuple):
    """factor: r. num_kept: tokens that the first stage keeps. sparsity: kept tokens per token of the budget, >= 1.
    page_size: tokens per page that is estimated as one. num_dims: of a page's summary that the estimate reads.
    num_read: tokens that are attended to."""

    factor: float
    num_kept: int
    sparsity: float
    page_size: int
    num_dims: int
    num_read: int


class RocketBudget:
    """The first stage. Generated tokens come on top, so that the answer's length need not be known beforehand."""

    def max_kept(self, spec: PackSpec, num_tokens: int, site: Site) -> int:
        base = base_budget(spec, num_tokens)
        _, first_stage = _compression(num_tokens, base)
        return max(int(num_tokens / first_stage), base)

    def max_kept_in_layer(self, spec: PackSpec, num_tokens: int, site: Site) -> int:
        return self.max_kept(spec, num_tokens, site) * site.num_kv_heads

    def allot(self, spec: PackSpec, candidates: Candidates) -> list[int]:
        kept = self.max_kept(spec, candidates.num_tokens, candidates.site)
        return [kept] * candidates.site.num_kv_heads


def split(num_tokens: int, budget: int, *, head_dim: int, num_new_tokens: int = 0) -> Split:
    """The published integers for `num_tokens`, `num_new_tokens` of them generated, and a `budget` <= `num_tokens`."""
    factor, first_stage = _compression(num_tokens, budget)
    num_kept = max(int(num_tokens / first_stage), min(2 * num_new_tokens, num_tokens))
    sparsity = max(1.0, num_kept / budget)
    page_size = ceil(sparsity**0.5)
    page_size = 1 if page_size > sparsity else page_size
    return Split(factor, num_kept, sparsity, page_size, int(head_dim * page_size / sparsity), budget // 2)


def read_dims(spec: PackSpec, num_tokens: int, *, page_size: int, head_dim: int) -> int:
    """Dimensions of a page summary that the estimate reads, of a prompt of `num_tokens` kept in pages of `page_size`.

    Larger pages than the published ones make the estimate cheaper by themselves, which leaves more dimensions."""
    if keeps_all(spec, num_tokens):
        return head_dim
    base = base_budget(spec, num_tokens)
    sparsity = split(num_tokens, base, head_dim=head_dim).sparsity
    return min(max(1, int(head_dim * page_size / sparsity)), head_dim)


def _compression(num_tokens: int, budget: int) -> tuple[float, float]:
    """(r, c^r)"""
    compression = num_tokens / budget
    factor = min(0.2 + 0.06 * log2(compression), 0.8)
    return factor, compression**factor
