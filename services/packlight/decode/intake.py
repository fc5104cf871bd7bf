"""Taking in one shipment: from the events of a `Prefill` call to pages of a holding.

Knows the checks a foreign shipment must pass before a byte of it is believed, and where its layers go. Does not know
the batch, queues or retries. Raises ShipmentIncompatible or ShipmentCorrupt naming what was wrong, and what
`DecodeMemory.claim` raises.
"""

from __future__ import annotations

from packlight.compress.evict import mass_bytes, split_mass
from packlight.compress.recipes import CODECS
from packlight.core.errors import ShipmentCorrupt, ShipmentIncompatible
from packlight.core.shipping import Accepted, Manifest, ShipFrame, Shipped
from packlight.decode.memory import DecodeMemory, Holding
from packlight.decode.unpack import Unpacker
from packlight.transfer.base import KVReceiver, ReceivedLayer
from packlight.transfer.registry import build_transport
from packlight.wire.manifest import decode_manifest


class Intake:
    """One shipment into `holding` of `memory`. `max_tokens` bounds the tokens of one head: the prompt's length.
    `pool_codec` is the codec that packed KV lies in."""

    def __init__(
        self,
        memory: DecodeMemory,
        holding: Holding,
        *,
        compatibility: str,
        transports: tuple[str, ...],
        pool_codec: str,
        max_tokens: int,
    ) -> None:
        self._memory, self._holding, self._pool = memory, holding, memory.pool
        self._compatibility, self._transports, self._pool_codec = compatibility, transports, pool_codec
        self._max_tokens = max_tokens
        self._receiver: KVReceiver | None = None
        self._unpacker: Unpacker | None = None
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
        self._unpacker = unpacker = Unpacker(self._pool, manifest.codec, pool_codec=self._pool_codec)
        most = unpacker.max_payload_bytes(self._max_tokens)
        most += mass_bytes(self._holding.pack, [self._max_tokens] * self._pool.num_kv_heads)
        self._receiver = build_transport(manifest.transport).receiver(
            num_layers=self._pool.num_layers, max_layer_bytes=most
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
        if manifest.codec not in CODECS:
            raise ShipmentIncompatible(f"the shipment's codec is {manifest.codec!r}, we know {', '.join(CODECS)}")
        if manifest.num_tokens > self._max_tokens:
            raise ShipmentCorrupt(f"the shipment holds {manifest.num_tokens} tokens of a prompt of {self._max_tokens}")

    def _store(self, received: ReceivedLayer) -> None:
        assert self._unpacker is not None
        layer, lengths, payload = received.layer, received.lengths, received.payload
        if len(lengths) != self._pool.num_kv_heads or not all(0 <= length <= self._max_tokens for length in lengths):
            raise ShipmentCorrupt(f"layer {layer} claims lengths {lengths[:8]} for {self._pool.num_kv_heads} heads")
        mass_due = mass_bytes(self._holding.pack, lengths)
        due = self._unpacker.payload_bytes(lengths) + mass_due
        if payload.numel() != due:
            raise ShipmentCorrupt(f"layer {layer} has {payload.numel()} bytes, {due} are due")
        pages = self._memory.claim(self._holding, layer, lengths)
        if mass_due:
            payload, mass = split_mass(payload, lengths)
            self._memory.remember(self._holding, layer, lengths, mass)
        self._unpacker.store(pages, lengths, payload, self._memory.summaries_for(self._holding))
        self.num_layers += 1
        self.num_bytes += due
