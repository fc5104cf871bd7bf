"""Page lists of heads that are read densely, written on the device: those of all heads one after the other.

Knows where list entries come from. An entry is a place in the mirrored table: its head's place in layer 0, plus the
layer, plus the ordinal of the page, which follows from lengths. So a layer costs one lookup. Heads whose pages are
chosen by score have their places in the lists as well, which are written over (`site.py`).

Legend: B rows, K KV heads, N = B * K requests of the kernel, J entries of all lists, L layers, M columns of the table.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from packlight.attention.flashinfer.mirror import TableMirror
from packlight.attention.flashinfer.reads import HeadReads
from packlight.attention.upload import upload


class PageLists:
    """`num_entries` is J, or more where lists will be loaded whose sum is not known yet: what is too much repeats the
    last entry and is read by nobody. Memory stays where it is over all loads."""

    def __init__(self, mirror: TableMirror, num_entries: int) -> None:
        self._mirror = mirror
        self._entry_J = torch.arange(num_entries, device=mirror.pages_RLKM.device)
        self._place_J = torch.zeros_like(self._entry_J)

    def load(self, reads: HeadReads, rows: list[int]) -> None:
        """The lists of these rows of the table."""
        requests = self._requests(reads, np.asarray(rows))
        end_N, first_N = upload(requests, self._entry_J.device)
        entry_J = torch.minimum(self._entry_J, end_N[-1] - 1)
        request_J = torch.searchsorted(end_N, entry_J, right=True)
        begin_N = torch.cat([end_N.new_zeros(1), end_N[:-1]])
        self._place_J.copy_(first_N[request_J] + entry_J - begin_N[request_J])

    def write(self, layer: int, indices_J: Tensor) -> None:
        """The page ids of a layer."""
        table = self._mirror.layer(layer)
        torch.index_select(table.ids[table.before :], 0, self._place_J, out=indices_J)

    def _requests(self, reads: HeadReads, rows_B: np.ndarray) -> np.ndarray:
        """int64 `[2, N]`: of each request the end of its list, and the place of the first page it reads in layer 0."""
        _, num_layers, num_kv_heads, num_columns = self._mirror.pages_RLKM.shape
        base_BK = (rows_B[:, None] * num_layers * num_kv_heads + np.arange(num_kv_heads)) * num_columns
        return np.stack([np.cumsum(reads.num_read_BK), (base_BK + reads.first_BK).ravel()]).astype(np.int64)
