"""What kernels have to know of heads whose pages are chosen by score: a few numbers each, the same for many layers.

Knows places in the mirrored table and in the page lists of a kernel call. Does not know how pages are rated.

Legend: B rows of the batch, K KV heads, Y heads whose pages one reader rates, M pages per head at most, R rows of the
table, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from packlight.attention.flashinfer.reads import HeadReads
from packlight.attention.stores import Int64s
from packlight.attention.upload import upload
from packlight.kv.table import Int32s


class LayerTable(NamedTuple):
    """The page ids of all layers, flat, int32; a head's in this layer are `before` entries behind its in layer 0."""

    ids: Tensor
    before: int


class Field(IntEnum):
    """Rows of `SparseHeads.fields_FY`, which kernels find by these numbers.

    TABLE: where the head's pages begin in the flat table, in layer 0. ASKED: its place among the B * K heads of the
    query. LENGTH: tokens stored. NUM_READ: pages it reads. BEGIN: where its page list begins among those of all."""

    TABLE = 0
    ASKED = 1
    LENGTH = 2
    NUM_READ = 3
    BEGIN = 4


class SparseHeads:
    """All KV heads of the rows at `places` in a batch. Memory stays where it is over all loads.

    No head holds more than M = `max_stored` pages, nor reads more than `max_read`."""

    def __init__(
        self,
        places: Sequence[int],
        num_kv_heads: int,
        page_size: int,
        device: torch.device,
        *,
        max_stored: int,
        max_read: int,
    ) -> None:
        self.places, self.num_kv_heads, self.page_size = list(places), num_kv_heads, page_size
        self.max_stored, self.max_read = max_stored, max_read
        shape = (len(Field), len(self.places) * num_kv_heads)
        self.fields_FY = torch.zeros(shape, dtype=torch.int64, device=device)

    def load(self, reads: HeadReads, rows: Sequence[int], table_shape: Sequence[int]) -> None:
        """`rows` are those of the whole batch, `table_shape` is `[R, L, K, M]` of the mirrored table."""
        _, num_layers, num_kv_heads, num_columns = table_shape
        head_K, place_n1 = np.arange(num_kv_heads), np.array(self.places)[:, None]
        self.rows = [rows[place] for place in self.places]
        end_BK = np.cumsum(reads.num_read_BK).reshape(reads.num_read_BK.shape)
        fields: dict[Field, Int32s | Int64s] = {
            Field.TABLE: (np.array(self.rows)[:, None] * num_layers * num_kv_heads + head_K) * num_columns,
            Field.ASKED: place_n1 * num_kv_heads + head_K,
            Field.LENGTH: reads.lengths_BK[self.places],
            Field.NUM_READ: reads.num_read_BK[self.places],
            Field.BEGIN: (end_BK - reads.num_read_BK)[self.places],
        }
        stacked = np.stack([fields[field].ravel() for field in Field]).astype(np.int64)
        self.fields_FY.copy_(upload(stacked, self.fields_FY.device))

    def __getitem__(self, field: Field) -> Tensor:
        """int64 `[Y]`."""
        return self.fields_FY[field]

    @property
    def num_stored_Y(self) -> Tensor:
        """int64: pages of each head."""
        return (self[Field.LENGTH] + self.page_size - 1) // self.page_size

    @property
    def num_tokens_YM(self) -> Tensor:
        """int64: how many tokens are on each page, 0 behind the last."""
        start_M = torch.arange(self.max_stored, device=self.fields_FY.device) * self.page_size
        return (self[Field.LENGTH][:, None] - start_M).clamp(0, self.page_size)

    def pages_YM(self, table: LayerTable) -> Tensor:
        """Page ids int32, the head's first where it has no page: what the table has there may be another's."""
        ordinal_M = torch.arange(self.max_stored, device=table.ids.device)
        ordinal_YM = torch.where(ordinal_M < self.num_stored_Y[:, None], ordinal_M, 0)
        place_YM = self[Field.TABLE][:, None] + table.before + ordinal_YM
        return table.ids.index_select(0, place_YM.flatten()).view(place_YM.shape)
