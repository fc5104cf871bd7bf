"""The reference backend: attention written out, one request and one head at a time, in float32.

Slow and obvious on purpose; every other backend is tested against it. Legend as in `attention/base.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from packlight.attention.base import AttentionPlan, DecodeBatch, LayerQueries, PrefillBatch
from packlight.attention.masks import causal_mask
from packlight.attention.stores import NewTokens, chunk_places
from packlight.kv.reading import PageQuery


class ReferenceAttention:
    def plan(self, batch: PrefillBatch | DecodeBatch) -> AttentionPlan:
        return ReferencePrefill(batch) if isinstance(batch, PrefillBatch) else ReferenceDecode(batch)


class ReferencePrefill:
    def __init__(self, batch: PrefillBatch) -> None:
        self._batch = batch
        self._blocks_T, self._offsets_T = chunk_places(batch)

    def attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, scale: float, sliding_window: int | None
    ) -> Tensor:
        pool = self._batch.pool
        pool.write_blocks(layer, self._blocks_T, self._offsets_T, k_TKD, v_TKD)
        out_THD, lse_TH = torch.empty_like(q_THD), q_THD.new_empty(q_THD.shape[:2], dtype=torch.float32)
        for chunk in self._batch.chunks:
            k_KSD, v_KSD = pool.read_blocks(layer, chunk.blocks, chunk.num_stored)
            rows = slice(chunk.start, chunk.start + chunk.num_tokens)
            scores_HTS = attention_scores(q_THD[rows], k_KSD, scale, causal_mask(chunk, sliding_window, q_THD.device))
            out_THD[rows] = softmax_attention(scores_HTS, v_KSD, q_THD.dtype)
            lse_TH[rows] = scores_HTS.logsumexp(-1).T
        if self._batch.on_layer is not None:
            self._batch.on_layer(layer, LayerQueries(q_THD, scale, lse_TH))
        return out_THD


class ReferenceDecode:
    def __init__(self, batch: DecodeBatch) -> None:
        self._batch = batch
        self._new_tokens = NewTokens(batch)
        self._lengths_BLK: list[list[list[int]]] = batch.table.new_lengths(list(batch.rows)).tolist()

    def attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, scale: float, sliding_window: int | None
    ) -> Tensor:
        self._new_tokens.store(layer, k_TKD, v_TKD, sliding_window)
        group = q_THD.shape[1] // k_TKD.shape[1]
        out_THD = torch.empty_like(q_THD)
        for index in range(len(self._batch.rows)):
            chosen = self._choose(index, layer, q_THD[index], scale, sliding_window)
            for head, ordinals in enumerate(chosen):
                k_1SD, v_1SD = self._read(index, layer, head, ordinals)
                start = max(0, k_1SD.shape[1] - sliding_window) if sliding_window else 0
                heads = slice(head * group, (head + 1) * group)
                q_1GD = q_THD[index : index + 1, heads]
                scores_G1S = attention_scores(q_1GD, k_1SD[:, start:], scale)
                out_THD[index, heads] = softmax_attention(scores_G1S, v_1SD[:, start:], q_THD.dtype)[0]
        if self._batch.on_layer is not None:
            self._batch.on_layer(layer, LayerQueries(q_THD, scale))
        return out_THD

    def _pages(self, index: int, layer: int) -> list[list[int]]:
        """The page ids of each head of the batch's row `index`."""
        pages_KM = self._batch.table.pages[self._batch.rows[index], layer].tolist()
        counts = [-(-length // self._batch.pool.page_size) for length in self._lengths_BLK[index][layer]]
        return [ids[:count] for ids, count in zip(pages_KM, counts, strict=True)]

    def _num_tokens(self, index: int, layer: int, head: int, ordinal: int) -> int:
        """On one page."""
        page_size = self._batch.pool.page_size
        return min(page_size, self._lengths_BLK[index][layer][head] - ordinal * page_size)

    def _read(self, index: int, layer: int, head: int, ordinals: list[int]) -> tuple[Tensor, Tensor]:
        """K and V `[1, S, D]` of a head's tokens on some of its pages, ascending."""
        pool, pages = self._batch.pool, self._pages(index, layer)[head]
        shape = (2, len(ordinals), pool.page_size, pool.head_dim)
        both = torch.empty(shape, dtype=pool.dtype, device=pool.device)
        pool.gather(torch.tensor([pages[ordinal] for ordinal in ordinals], device=pool.device), both[0], both[1])
        num_tokens = sum(self._num_tokens(index, layer, head, ordinal) for ordinal in ordinals)
        k_SD, v_SD = both.flatten(1, 2)[:, :num_tokens]
        return k_SD[None], v_SD[None]

    def _choose(
        self, index: int, layer: int, q_HD: Tensor, scale: float, sliding_window: int | None
    ) -> list[list[int]]:
        """The ordinals of the pages that each head reads, ascending."""
        pages = self._pages(index, layer)
        reading = self._batch.reads[index] if self._batch.reads else None
        is_dense = reading is None or layer < reading.num_dense_layers or sliding_window is not None
        if reading is None or is_dense or all(len(ids) <= reading.num_pages for ids in pages):
            return [list(range(len(ids))) for ids in pages]
        scores_KM = reading.reader.score(self._query(index, layer, q_HD, scale))[0].tolist()
        return [best_pages(row_M[: len(ids)], reading.num_pages) for row_M, ids in zip(scores_KM, pages, strict=True)]

    def _query(self, index: int, layer: int, q_HD: Tensor, scale: float) -> PageQuery:
        """What the reader is asked for this row alone."""
        pool, summaries = self._batch.pool, self._batch.summaries
        assert summaries is not None
        pages = self._pages(index, layer)
        width = max(map(len, pages))
        bounds_KME = torch.zeros(len(pages), width, 2 * pool.head_dim, device=pool.device)
        num_tokens_KM = torch.zeros(len(pages), width, dtype=torch.int64, device=pool.device)
        for head, ids in enumerate(pages):
            for ordinal, page in enumerate(ids):
                bounds_KME[head, ordinal] = summaries.read(torch.tensor([page], device=pool.device))[0]
                num_tokens_KM[head, ordinal] = self._num_tokens(index, layer, head, ordinal)
        q_KGD = q_HD.view(len(pages), -1, pool.head_dim)
        return PageQuery(layer, [self._batch.rows[index]], q_KGD[None], scale, bounds_KME[None], num_tokens_KM[None])


def best_pages(scores: list[float], num_pages: int) -> list[int]:
    """The first page, the last, and the best of the others; ties to the lower ordinal. Ascending."""
    between = sorted(range(1, len(scores) - 1), key=lambda ordinal: (-scores[ordinal], ordinal))
    return sorted({0, len(scores) - 1, *between[: num_pages - 2]})


def attention_scores(q_THD: Tensor, k_KSD: Tensor, scale: float, mask_TS: Tensor | None = None) -> Tensor:
    """scale * q.k in float32, -inf where the mask hides: `[H, T, S]`."""
    k_HSD = k_KSD.float().repeat_interleave(q_THD.shape[1] // k_KSD.shape[0], dim=0)
    scores_HTS = torch.einsum("thd,hsd->hts", q_THD.float(), k_HSD) * scale
    return scores_HTS if mask_TS is None else scores_HTS.masked_fill(~mask_TS, float("-inf"))


def softmax_attention(scores_HTS: Tensor, v_KSD: Tensor, dtype: torch.dtype) -> Tensor:
    """softmax(scores) v in float32, returned as `dtype`: `[T, H, D]`."""
    v_HSD = v_KSD.float().repeat_interleave(scores_HTS.shape[0] // v_KSD.shape[0], dim=0)
    return torch.einsum("hts,hsd->thd", scores_HTS.softmax(-1), v_HSD).to(dtype)
