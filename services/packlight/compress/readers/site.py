"""Where a reader works."""

from __future__ import annotations

from typing import NamedTuple


class ReaderSite(NamedTuple):
    """One decode worker: pages of `page_size` tokens of `head_dim` numbers, of requests in `num_rows` table rows."""

    page_size: int
    head_dim: int
    num_rows: int
