"""One arrived layer into head pages of a pool: decoded, or as the records it came in.

Knows a codec and a pool. Does not know requests, nor where a payload came from.

Legend: X head pages of the layer, head by head, P page size, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from packlight.compress.base import Codec
from packlight.compress.codecs.native import NativeCodec
from packlight.compress.parts import CODECS
from packlight.compress.payload import decode_layer, max_payload_bytes, payload_bytes, split_payload, tokens_per_page
from packlight.kv.coded import CodedPool
from packlight.kv.pool import PackedPool
from packlight.kv.side_stream import moved
from packlight.kv.summaries import SummaryWriter


class Unpacker:
    """Payloads of one codec into one pool. A pool that is coded by the same codec takes the records as they are: they
    are not decoded, and what the codec lost it loses once."""

    def __init__(self, pool: PackedPool, codec_name: str, *, pool_codec: str) -> None:
        """`pool_codec` is the name of the pool's own."""
        self._pool: PackedPool = pool
        self._coded = pool if isinstance(pool, CodedPool) else None
        self._keeps_records = self._coded is not None and codec_name == pool_codec
        self._codec: Codec = CODECS.load(codec_name)()

    def payload_bytes(self, lengths: Sequence[int]) -> int:
        pool = self._pool
        return payload_bytes(self._codec, lengths, pool.page_size, pool.head_dim, pool.dtype)

    def max_payload_bytes(self, num_tokens_per_head: int) -> int:
        pool = self._pool
        num_heads = pool.num_kv_heads
        return max_payload_bytes(self._codec, num_tokens_per_head, num_heads, pool.page_size, pool.head_dim, pool.dtype)

    def store(
        self, pages_X: Tensor, lengths: Sequence[int], payload: Tensor, *, summaries: SummaryWriter | None
    ) -> None:
        """Fill `pages_X`, `lengths[head]` tokens of each head, from `payload`, which is flat uint8 of `payload_bytes`.
        The pages are empty, their numbers lie on the host. `summaries` of the pages are made if they are given.

        Everything is given to the device's current stream; the host waits for none of it, if `payload` is pinned."""
        pool, payload = self._pool, payload.to(self._pool.device, non_blocking=True)
        pages_X, num_tokens_X = moved(pages_X, pool.device), tokens_per_page(lengths, pool.page_size)
        if self._keeps_records:
            self._store_records(pages_X, lengths, payload)
            if summaries is None:
                return
        k_XPD, v_XPD = decode_layer(self._codec, payload, lengths, pool.page_size, pool.head_dim, pool.dtype)
        if self._coded is not None and not self._keeps_records:
            self._coded.fill_pages(pages_X, k_XPD, v_XPD, num_tokens_X)  # sorted on the host
        num_tokens_X = moved(num_tokens_X, pool.device)
        if self._coded is None:
            pool.write_pages(pages_X, k_XPD, v_XPD, num_tokens_X)
        if summaries is not None:
            summaries.build(pages_X, k_XPD, num_tokens_X)

    def _store_records(self, pages_X: Tensor, lengths: Sequence[int], payload: Tensor) -> None:
        """Whole pages as they are; open ones exact, which is how they travel."""
        assert self._coded is not None
        dims = (self._coded.page_size, self._coded.head_dim, self._coded.dtype)
        split = split_payload(self._codec, payload, lengths, *dims)
        self._coded.fill_records(pages_X[split.pages], split.records)
        self._coded.fill_open(pages_X[split.open_pages], *NativeCodec().decode(split.open_records, *dims))
