"""Page summaries and a probe of them, ragged: what the kernels that score pages are tried on, by whoever runs them."""

from __future__ import annotations

import torch
from torch import Tensor


def ragged_bounds(
    dtype: torch.dtype, head_dim: int, group: int, num_pages: int
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The probe, bounds, pages and counts of `gathered_products`, and which of the pages a head has. Those that it does
    not have are NaN."""
    generator = torch.Generator().manual_seed(num_pages)
    bounds = torch.randn(2000, 2 * head_dim, generator=generator).to(dtype)
    bounds[1000:] = torch.nan
    pages = torch.randint(1000, (3, 2, num_pages), generator=generator, dtype=torch.int32)
    num_stored = torch.randint(1, num_pages + 1, (3, 2), generator=generator)
    is_stored = torch.arange(num_pages) < num_stored[..., None]
    pages[~is_stored] = 1500
    probe = torch.randn(3, 2, group, 2 * head_dim, generator=generator)
    return (probe, bounds, pages, num_stored), is_stored[:, :, None].expand(-1, -1, group, -1)
