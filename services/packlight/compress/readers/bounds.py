"""Scoring pages by the bounds of their keys: the products that page-sparse readers have in common.

Shapes: B rows, K KV heads, G query heads per KV head, D head dim, E = 2 * D, M pages per head.

For each dim either the smallest or the largest key element of a page is taken, which is linear in the page's summary:
a *probe* has a query's element on the side that is wanted, and 0 on the other. So rating all pages is one matrix
product, whatever the method.
"""

from __future__ import annotations

import torch
from torch import Tensor

from packlight.kv.reading import PageBounds


def bound_probe(q_BKGD: Tensor) -> Tensor:
    """`[B, K, G, E]` whose product with a page is sum_j max(q_j * low_j, q_j * high_j) >= q.k of each key there."""
    return torch.cat([q_BKGD.clamp(max=0), q_BKGD.clamp(min=0)], dim=-1)


def page_products(probe_BKGE: Tensor, bounds_BKME: Tensor | PageBounds) -> Tensor:
    """fp32 `[B, K, G, M]`. Bounds lie close together: the rounding of a shorter format would decide among pages."""
    if not isinstance(bounds_BKME, Tensor):
        return bounds_BKME.products(probe_BKGE)
    return torch.matmul(probe_BKGE, bounds_BKME.transpose(-1, -2))


def page_mass(logits_BKGM: Tensor, num_tokens_BKM: Tensor) -> Tensor:
    """`[B, K, M]`: softmax over stored tokens, each with the logit of its page, summed by page; mean over the group."""
    # A page of n tokens is n times the exponential: log n more. log 0 leaves out pages that are not there.
    return (logits_BKGM + num_tokens_BKM.float().log()[:, :, None]).softmax(dim=-1).mean(dim=2)
