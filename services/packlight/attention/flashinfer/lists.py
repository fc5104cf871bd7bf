"""Page lists of a kernel call, written on the device: the lists of all (row, KV head) one after the other.

Knows where list entries come from. An entry is a place in the mirrored table: its head's place in layer 0, plus the
layer, plus the ordinal of the page. Of densely read heads ordinals follow from lengths; of sparse ones they are looked
up among those chosen. So a layer costs one sum and one lookup, whatever the mixture.

Legend: B rows, K KV heads, N = B * K requests of the kernel, J entries of all lists, C pages chosen per head at most,
L layers, M columns of the table.
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

    def __init__(self, mirror: TableMirror, *, num_rows: int, num_entries: int, max_chosen: int) -> None:
        self._mirror = mirror
        device = mirror.pages_RLKM.device
        _, _, num_kv_heads, _ = mirror.pages_RLKM.shape
        self._max_chosen = max_chosen
        # The last place stays 0: that is the ordinal which dense entries look up.
        self._chosen = torch.zeros(num_rows * num_kv_heads * max_chosen + 1, dtype=torch.int64, device=device)
        self.chosen_BKC = self._chosen[:-1].view(num_rows, num_kv_heads, max_chosen)
        self._entry_J = torch.arange(num_entries, device=device)
        self._start_J, self._lookup_J = torch.zeros_like(self._entry_J), torch.zeros_like(self._entry_J)

    def load(self, reads: HeadReads, rows: list[int]) -> None:
        """The lists of these rows of the table."""
        requests = self._requests(reads, np.asarray(rows))
        end_N, base_N, first_N, is_sparse_N = upload(requests, self._entry_J.device)
        entry_J = torch.minimum(self._entry_J, end_N[-1] - 1)
        request_J = torch.searchsorted(end_N, entry_J, right=True)
        begin_N = torch.cat([end_N.new_zeros(1), end_N[:-1]])
        offset_J = entry_J - begin_N[request_J]
        is_sparse_J = is_sparse_N[request_J].bool()
        dense_J = first_N[request_J] + offset_J
        self._start_J.copy_(base_N[request_J] + dense_J.masked_fill(is_sparse_J, 0))
        lookup_J = request_J * self._max_chosen + offset_J
        self._lookup_J.copy_(torch.where(is_sparse_J, lookup_J, self._chosen.shape[0] - 1))

    def write(self, layer: int, indices_J: Tensor) -> None:
        """The page ids of a layer; of sparse heads, those in `chosen_BKC`."""
        pages_RLKM = self._mirror.pages_RLKM
        _, _, num_kv_heads, num_columns = pages_RLKM.shape
        place_J = self._start_J + layer * num_kv_heads * num_columns
        if self._max_chosen:
            place_J = place_J + self._chosen[self._lookup_J]
        torch.index_select(pages_RLKM.view(-1), 0, place_J, out=indices_J)

    def _requests(self, reads: HeadReads, rows_B: np.ndarray) -> np.ndarray:
        """int64 `[4, N]`: of each request the end of its list, the place of its head in layer 0, the first page it
        reads, and whether it is sparse."""
        _, num_layers, num_kv_heads, num_columns = self._mirror.pages_RLKM.shape
        base_BK = (rows_B[:, None] * num_layers * num_kv_heads + np.arange(num_kv_heads)) * num_columns
        is_sparse_BK = np.broadcast_to(reads.is_sparse_B[:, None], base_BK.shape)
        parts = (np.cumsum(reads.num_read_BK), base_BK.ravel(), reads.first_BK.ravel(), is_sparse_BK.ravel())
        return np.stack(parts).astype(np.int64)
