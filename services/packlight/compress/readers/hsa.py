"""Hybrid sparse attention, the second stage of RocketKV (arXiv 2502.14051, v3): attention over page summaries.

Shapes: B rows, K KV heads, G query heads per KV head, D head dim, E = 2 * D, M pages per head.

Attention is estimated in the dims where the group's queries are largest, from one representative key per page: its
largest or smallest element, by the sign of the group's summed query. The temperature accounts for the dims left out, as
in SparQ (arXiv 2312.04985). The pages read are those with the largest share of the estimated attention, mean over the
group.

The paper's pages are 1 to 4 tokens and its choice is of tokens; here both are pages of the pool. The number of dims is
the paper's for that page size, and with pages of 7 tokens or more it comes out as all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from packlight.compress.budgets.rocket import read_dims
from packlight.compress.readers.bounds import page_mass, page_products
from packlight.compress.readers.site import ReaderSite
from packlight.core.types import PackSpec
from packlight.kv.reading import PageQuery, PageRating, PageRule


class HSAReader:
    """`num_dims` of the head dim, chosen anew for every KV head and step, estimate a page's attention."""

    def __init__(self, num_dims: int) -> None:
        self.num_dims = num_dims
        self.rule = PageRule(PageRating.MASS_OF_REPRESENTATIVES, num_dims)

    @staticmethod
    def constants(spec: PackSpec, num_prompt_tokens: int, site: ReaderSite) -> dict[str, int]:
        return {"num_dims": read_dims(spec, num_prompt_tokens, page_size=site.page_size, head_dim=site.head_dim)}

    def score(self, query: PageQuery) -> Tensor:
        q_BKGD = query.q_BKGD.float()
        kept_BKGD = self._largest_dims(q_BKGD)
        is_high_BK1D = (q_BKGD.sum(dim=2) > 0)[:, :, None]
        probe_BKGE = torch.cat([kept_BKGD * ~is_high_BK1D, kept_BKGD * is_high_BK1D], dim=-1)
        share_BKG1 = _l1_norm(kept_BKGD) / _l1_norm(q_BKGD)
        logits_BKGM = page_products(probe_BKGE * (query.scale * share_BKG1.rsqrt()), query.bounds_BKME)
        return page_mass(logits_BKGM, query.num_tokens_BKM)

    def forget(self, row: int) -> None:
        """Nothing is remembered."""

    def _largest_dims(self, q_BKGD: Tensor) -> Tensor:
        """The query in the `num_dims` where the group's sum of |q| is largest, 0 elsewhere; ties to the lower dim."""
        if self.num_dims >= q_BKGD.shape[-1]:
            return q_BKGD
        order_BKD = q_BKGD.abs().sum(dim=2).sort(dim=-1, descending=True, stable=True).indices
        is_kept_BKD = torch.zeros_like(order_BKD, dtype=torch.bool)
        is_kept_BKD.scatter_(-1, order_BKD[..., : self.num_dims], True)
        return q_BKGD * is_kept_BKD[:, :, None]


def _l1_norm(x_BKGD: Tensor) -> Tensor:
    """`[B, K, G, 1]`; never 0, so that a query of zeros estimates uniform attention."""
    return x_BKGD.abs().sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
