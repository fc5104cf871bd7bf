"""The head-page table on the device: what changed since the last step is copied, and nothing else.

Knows tables of page ids. Does not know what is on the pages or who reads them. A step of a long batch would otherwise
send megabytes of page ids that the device has had for a thousand steps.

Legend: R rows of the table, L layers, K KV heads, M columns (pages per head at most), B rows of a step.
"""

from __future__ import annotations

import numpy as np
import torch

from packlight.attention.flashinfer.heads import LayerTable
from packlight.attention.upload import upload
from packlight.kv.table import HeadPageTable, Int32s


class TableMirror:
    """Follows one table. Entries behind a head's last page are old ids, of pages that may be another's by now."""

    def __init__(self, table: HeadPageTable, page_size: int, device: torch.device) -> None:
        num_rows, num_layers, num_kv_heads = table.lengths.shape
        self._page_size = page_size
        self._num_pages_RLK: Int32s = np.zeros((num_rows, num_layers, num_kv_heads), dtype=np.int32)
        self._lives_R = np.full(num_rows, -1, dtype=np.int64)
        self.pages_RLKM = torch.zeros((num_rows, num_layers, num_kv_heads, 1), dtype=torch.int32, device=device)

    def layer(self, layer: int) -> LayerTable:
        return LayerTable(self.pages_RLKM.view(-1), layer * self.pages_RLKM.stride(1))

    @property
    def num_columns(self) -> int:
        """M."""
        return self.pages_RLKM.shape[-1]

    def reserve(self, num_columns: int) -> None:
        """Make room for so many pages per head; the memory stays where it is if there is room already."""
        if num_columns > self.num_columns:
            wider = self.pages_RLKM.new_zeros((*self.pages_RLKM.shape[:-1], max(num_columns, 2 * self.num_columns)))
            wider[..., : self.num_columns] = self.pages_RLKM
            self.pages_RLKM = wider

    def follow(self, table: HeadPageTable, rows: list[int]) -> None:
        """Bring `rows` up to date, with the pages that the next token of each is stored in (`table.grow`)."""
        num_pages_BLK = -(-table.new_lengths(rows) // self._page_size)
        self.reserve(int(num_pages_BLK.max()))
        num_new_BLK = num_pages_BLK - self._num_pages_RLK[rows]
        is_whole_B = (self._lives_R[rows] != table.lives[rows]) | np.any(num_new_BLK > 1, axis=(1, 2))
        for row in np.unique(np.asarray(rows)[is_whole_B]).tolist():
            self._copy_row(table, row)
        self._append(table, rows, (num_new_BLK == 1) & ~is_whole_B[:, None, None])
        self._num_pages_RLK[rows], self._lives_R[rows] = num_pages_BLK, table.lives[rows]

    def _copy_row(self, table: HeadPageTable, row: int) -> None:
        width = min(self.num_columns, table.pages.shape[-1])
        pages_LKM = np.ascontiguousarray(table.pages[row, ..., :width])
        self.pages_RLKM[row, ..., :width].copy_(upload(pages_LKM, self.pages_RLKM.device))

    def _append(self, table: HeadPageTable, rows: list[int], is_new_BLK: np.ndarray) -> None:
        """One more page of each of these heads."""
        place, layer, head = np.nonzero(is_new_BLK)
        if len(place) == 0:
            return
        row = np.asarray(rows)[place]
        index = (row, layer, head, self._num_pages_RLK[row, layer, head])
        flat = np.ravel_multi_index(index, tuple(self.pages_RLKM.shape)).astype(np.int64)
        both = upload(np.stack([flat, table.pages[index].astype(np.int64)]), self.pages_RLKM.device)
        self.pages_RLKM.view(-1).index_copy_(0, both[0], both[1].int())
