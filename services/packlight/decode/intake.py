"""Taking in one shipment: from the events of a `Prefill` call to pages of a table row.

Knows the checks a foreign shipment must pass before a byte of it is believed, and where its layers go. Does not know
the batch, queues or retries. Raises ShipmentIncompatible or ShipmentCorrupt naming what was wrong.
"""

from __future__ import annotations

import torch

from packlight.compress.base import Codec
from packlight.compress.recipes import CODECS
from packlight.core.errors import ShipmentCorrupt, ShipmentIncompatible
from packlight.core.shipping import Accepted, Manifest, ShipFrame, Shipped
from packlight.kv.pool import KVPool
from packlight.kv.table import HeadPageTable
from packlight.transfer.base import KVReceiver, ReceivedLayer
from packlight.transfer.registry import build_transport
from packlight.wire.manifest import decode_manifest


class Intake:
    """One shipment into `row` of `table`. `max_tokens` bounds the tokens of one head: the prompt's length."""

    def __init__(
        self,
        pool: KVPool,
        table: HeadPageTable,
        row: int,
        *,
        compatibility: str,
        transports: tuple[str, ...],
        max_tokens: int,
    ) -> None:
        self._pool, self._table, self._row = pool, table, row
        self._compatibility, self._transports, self._max_tokens = compatibility, transports, max_tokens
        self._receiver: KVReceiver | None = None
        self._codec: Codec | None = None
        self.num_layers = 0
        self.num_bytes = 0

    def accept(self, accepted: Accepted) -> None:
        if accepted.compatibility != self._compatibility:
            raise ShipmentIncompatible(
                f"the prefill worker's compatibility hash is {accepted.compatibility}, ours is {self._compatibility}: "
                "the two run other releases, models, page sizes or dtypes"
            )
        manifest = decode_manifest(accepted.manifest)
        self._check(manifest)
        self._codec = CODECS.load(manifest.codec)()
        self._receiver = build_transport(manifest.transport).receiver(
            num_layers=self._pool.num_layers, max_layer_bytes=self._max_layer_bytes(self._codec)
        )

    def take(self, frame: ShipFrame) -> None:
        if self._receiver is None:
            raise ShipmentCorrupt("a layer arrived before the manifest")
        received = self._receiver.take(frame)
        if received is not None:
            self._store(received)

    def finish(self, shipped: Shipped) -> None:
        if self.num_layers != self._pool.num_layers or shipped.num_layers != self.num_layers:
            raise ShipmentCorrupt(
                f"the shipment ended after {self.num_layers} of {self._pool.num_layers} layers "
                f"(the sender counted {shipped.num_layers})"
            )

    def release(self) -> None:
        if self._receiver is not None:
            self._receiver.release()

    def _check(self, manifest: Manifest) -> None:
        ours = (self._pool.page_size, self._pool.num_layers, self._pool.num_kv_heads, self._pool.head_dim)
        theirs = (manifest.page_size, manifest.num_layers, manifest.num_kv_heads, manifest.head_dim)
        if ours != theirs:
            raise ShipmentIncompatible(f"the shipment's layout (page, layers, heads, dim) is {theirs}, ours is {ours}")
        if manifest.transport not in self._transports:
            raise ShipmentIncompatible(
                f"the shipment comes by {manifest.transport!r}, we take {', '.join(self._transports)}"
            )
        if manifest.num_tokens > self._max_tokens:
            raise ShipmentCorrupt(f"the shipment holds {manifest.num_tokens} tokens of a prompt of {self._max_tokens}")

    def _max_layer_bytes(self, codec: Codec) -> int:
        pool = self._pool
        num_pages = pool.num_kv_heads * -(-self._max_tokens // pool.page_size)
        return codec.payload_bytes(num_pages, pool.page_size, pool.head_dim, pool.dtype)

    def _store(self, received: ReceivedLayer) -> None:
        assert self._codec is not None
        pool, lengths = self._pool, received.lengths
        if len(lengths) != pool.num_kv_heads or not all(0 <= length <= self._max_tokens for length in lengths):
            raise ShipmentCorrupt(f"layer {received.layer} claims lengths {lengths[:8]} for {pool.num_kv_heads} heads")
        num_pages = sum(-(-length // pool.page_size) for length in lengths)
        due = self._codec.payload_bytes(num_pages, pool.page_size, pool.head_dim, pool.dtype)
        if received.payload.numel() != due:
            raise ShipmentCorrupt(f"layer {received.layer} has {received.payload.numel()} bytes, {due} are due")
        pages = torch.from_numpy(self._table.fill_layer(self._row, received.layer, list(lengths))).long()
        k_pages, v_pages = self._codec.decode(received.payload, num_pages, pool.page_size, pool.head_dim, pool.dtype)
        pool.write_pages(pages.to(pool.k.device), k_pages, v_pages)
        self.num_layers += 1
        self.num_bytes += due
