"""Quest (arXiv 2406.10774): the pages that may hold the largest product with the query.

Shapes: B rows, K KV heads, G query heads per KV head, D head dim, M pages per head.

A page's score is its upper bound of q.k. The paper chooses for each query head; here the heads of a group read the same
pages, as their KV is read once, and their bounds are added up.
"""

from __future__ import annotations

from torch import Tensor

from packlight.compress.readers.bounds import bound_probe, page_products
from packlight.compress.readers.site import ReaderSite
from packlight.core.types import PackSpec
from packlight.kv.reading import PageQuery, PageRating, PageRule


class QuestReader:
    """Sum over the group of sum_j max(q_j * low_j, q_j * high_j)."""

    rule = PageRule(PageRating.SUM_OF_BOUNDS)

    def score(self, query: PageQuery) -> Tensor:
        # The products of a sum are the sum of the products: one row instead of G.
        probe_BK1E = bound_probe(query.q_BKGD.float()).sum(dim=2, keepdim=True)
        return page_products(probe_BK1E, query.bounds_BKME)[:, :, 0]

    @staticmethod
    def constants(spec: PackSpec, num_prompt_tokens: int, site: ReaderSite) -> dict[str, float]:
        return {}

    def forget(self, row: int) -> None:
        """Nothing is remembered."""
