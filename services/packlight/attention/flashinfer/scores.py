"""Asking a reader for its scores on the device. Legend as in `attention/base.py`, n rows that share a reader, Y = n * K
heads."""

from __future__ import annotations

from torch import Tensor

from packlight.attention.flashinfer.bounds import StoredBounds
from packlight.attention.flashinfer.heads import Field, LayerTable, SparseHeads
from packlight.kv.reading import PageQuery, PageReader


def page_scores(
    reader: PageReader,
    layer: int,
    q_XGD: Tensor,
    scale: float,
    bounds_NE: Tensor,
    table: LayerTable,
    heads: SparseHeads,
) -> Tensor:
    """fp32 `[Y, 1, M]`, finite where there is a page."""
    shape = (len(heads.rows), heads.num_kv_heads)
    q_nKGD = q_XGD.index_select(0, heads[Field.ASKED]).view(*shape, *q_XGD.shape[1:])
    pages_nKM, num_tokens_nKM = (x.view(*shape, -1) for x in (heads.pages_YM(table), heads.num_tokens_YM))
    bounds = StoredBounds(bounds_NE, pages_nKM, heads.num_stored_Y.view(shape))
    return reader.score(PageQuery(layer, heads.rows, q_nKGD, scale, bounds, num_tokens_nKM)).flatten(0, 1)[:, None]
