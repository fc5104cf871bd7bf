"""Every layer and head keep the same number: SnapKV (arXiv 2404.14469), StreamingLLM (arXiv 2309.17453)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from packlight.compress.budget import Site, base_budget
from packlight.core.types import PackSpec

if TYPE_CHECKING:
    from packlight.compress.base import Candidates


class UniformBudget:
    def max_kept(self, spec: PackSpec, num_tokens: int, site: Site) -> int:
        return base_budget(spec, num_tokens)

    def max_kept_in_layer(self, spec: PackSpec, num_tokens: int, site: Site) -> int:
        return base_budget(spec, num_tokens) * site.num_kv_heads

    def allot(self, spec: PackSpec, candidates: Candidates) -> list[int]:
        return [base_budget(spec, candidates.num_tokens)] * candidates.site.num_kv_heads
