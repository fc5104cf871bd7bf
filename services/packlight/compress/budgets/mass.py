"""As many tokens per head as retain a target share of the window's attention mass, and no more.

No paper: the fidelity is chosen and the size follows, where other budgets have it the other way round. Heads whose
attention is sharp keep few tokens, heads that look everywhere keep many.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from packlight.compress.budget import Site, base_budget, least_kept
from packlight.compress.recipes import param_of
from packlight.core.types import PackSpec

if TYPE_CHECKING:
    from packlight.compress.base import Candidates


class MassBudget:
    """The base budget is an upper bound: the target is missed rather than the budget."""

    def max_kept(self, spec: PackSpec, num_tokens: int, site: Site) -> int:
        return base_budget(spec, num_tokens)

    def max_kept_in_layer(self, spec: PackSpec, num_tokens: int, site: Site) -> int:
        return base_budget(spec, num_tokens) * site.num_kv_heads

    def allot(self, spec: PackSpec, candidates: Candidates) -> list[int]:
        # Not at the top: bounds are known without torch.
        from packlight.compress.coverage import tokens_for_share

        most = base_budget(spec, candidates.num_tokens)
        wanted = tokens_for_share(candidates, param_of(spec, "target"))
        return [min(max(num, least_kept(spec)), most) for num in wanted]
