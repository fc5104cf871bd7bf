"""One layer of packed KV as bytes, and back: which pages a codec sees, and in what order records lie.

Shapes: P head pages of the layer, T tokens per page, D head dim, R bytes of a record.

The residual rule, for every codec: a head's last page travels exact (`native`) when it is only partly filled, because
decode goes on writing there; whole pages are coded. So no codec ever sees a slot that holds no token.

    exact codec    records of all pages: the memory of `pack` as it lies
    other codecs   records of the whole pages, then native records of the partly filled last pages; both head by head

Knows lengths and codecs. Knows neither transports nor pools.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from packlight.compress.base import Codec
from packlight.compress.codecs.native import NativeCodec
from packlight.compress.layout import pages_of, total_pages
from packlight.compress.pack import PackedLayer
from packlight.core.errors import ShipmentCorrupt
from packlight.kv.side_stream import moved


class SplitPayload(NamedTuple):
    """The two parts of a payload, as views, and which of the layer's pages they are. For an exact codec all are coded.

    records: uint8 [C, R] of the C coded pages. pages: int64 [C], ascending.
    open_records: native, of the O partly filled pages. open_pages: int64 [O], ascending."""

    records: Tensor
    pages: Tensor
    open_records: Tensor
    open_pages: Tensor


def payload_bytes(codec: Codec, lengths: Sequence[int], page_size: int, head_dim: int, dtype: torch.dtype) -> int:
    """The exact size of a layer whose heads hold `lengths` tokens."""
    record = codec.record_bytes(page_size, head_dim, dtype)
    if codec.is_exact:
        return total_pages(lengths, page_size) * record
    num_whole, num_open = sum(_whole_pages(lengths, page_size)), sum(length % page_size > 0 for length in lengths)
    return num_whole * record + num_open * NativeCodec().record_bytes(page_size, head_dim, dtype)


def max_payload_bytes(
    codec: Codec, num_tokens_per_head: int, num_kv_heads: int, page_size: int, head_dim: int, dtype: torch.dtype
) -> int:
    """No layer whose heads hold at most `num_tokens_per_head` tokens is larger. (One token less may be larger than one
    more: it leaves a page partly filled, which travels exact.)"""
    if num_tokens_per_head == 0:
        return 0
    record = codec.record_bytes(page_size, head_dim, dtype)
    last = max(record, NativeCodec().record_bytes(page_size, head_dim, dtype))
    return num_kv_heads * ((pages_of(num_tokens_per_head, page_size) - 1) * record + last)


def encode_layer(codec: Codec, packed: PackedLayer) -> Tensor:
    """The layer's payload, flat uint8. Shares the pages' memory when the codec is exact and they are contiguous."""
    page_size, lengths = packed.pages.shape[2], packed.lengths
    if codec.is_exact:
        counts = [pages_of(length, page_size) for length in lengths]
        return codec.encode(packed.k_pages, packed.v_pages, counts).flatten()
    whole, partial = _page_indices(codec, lengths, page_size, packed.pages.device)
    coded = packed.pages if len(partial) == 0 else packed.pages[whole]
    records = codec.encode(coded[:, 0], coded[:, 1], _whole_pages(lengths, page_size))
    residual = packed.pages[partial].flatten().view(torch.uint8)
    return torch.cat([records.flatten(), residual])


def decode_layer(
    codec: Codec, payload: Tensor, lengths: Sequence[int], page_size: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """K and V pages [P, T, D] in `dtype`, head by head. Raises ShipmentCorrupt unless the payload's size is right."""
    split = split_payload(codec, payload, lengths, page_size, head_dim, dtype)
    k_PTD, v_PTD = codec.decode(split.records, page_size, head_dim, dtype)
    if len(split.open_pages) == 0:
        return k_PTD, v_PTD
    coded, residual = (k_PTD, v_PTD), NativeCodec().decode(split.open_records, page_size, head_dim, dtype)
    num_pages = total_pages(lengths, page_size)
    both = payload.new_empty((2, num_pages, page_size, head_dim), dtype=dtype)
    for pages_PTD, whole, partial in zip(both, coded, residual, strict=True):
        pages_PTD[split.pages] = whole
        pages_PTD[split.open_pages] = partial
    return both[0], both[1]


def split_payload(
    codec: Codec, payload: Tensor, lengths: Sequence[int], page_size: int, head_dim: int, dtype: torch.dtype
) -> SplitPayload:
    """Where the payload's records lie and which pages they are, nothing decoded and nothing copied.

    For a pool that keeps records as they came. Raises ShipmentCorrupt unless the payload's size is `payload_bytes`."""
    due = payload_bytes(codec, lengths, page_size, head_dim, dtype)
    if payload.numel() != due:
        raise ShipmentCorrupt(
            f"a payload of {payload.numel()} bytes, expected {due}: {len(lengths)} heads of {sum(lengths)} tokens in "
            f"pages of {page_size} x {head_dim} {dtype}, coded by {type(codec).__name__}"
        )
    whole, partial = _page_indices(codec, lengths, page_size, payload.device)
    record = codec.record_bytes(page_size, head_dim, dtype)
    coded, residual = torch.split(payload, [len(whole) * record, due - len(whole) * record])
    native_record = NativeCodec().record_bytes(page_size, head_dim, dtype)
    return SplitPayload(coded.view(-1, record), whole, residual.view(-1, native_record), partial)


def tokens_per_page(lengths: Sequence[int], page_size: int) -> Tensor:
    """How many tokens each of the layer's pages holds, in page order, 1 to `page_size`: int64 [P] on the CPU."""
    tokens_K = np.array([length for length in lengths if length], dtype=np.int64)
    pages_K = -(-tokens_K // page_size)
    tokens_P = np.full(pages_K.sum(), page_size)
    tokens_P[pages_K.cumsum() - 1] -= pages_K * page_size - tokens_K
    return torch.from_numpy(tokens_P)


def _whole_pages(lengths: Sequence[int], page_size: int) -> list[int]:
    """Completely filled pages of each head."""
    return [length // page_size for length in lengths]


def _page_indices(codec: Codec, lengths: Sequence[int], page_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(coded, open) pages among all pages of the layer, ascending int64."""
    if codec.is_exact:
        return torch.arange(total_pages(lengths, page_size), device=device), torch.arange(0, device=device)
    is_open = tokens_per_page(lengths, page_size) < page_size
    coded, partial = (~is_open).nonzero()[:, 0], is_open.nonzero()[:, 0]
    return moved(coded, device), moved(partial, device)
