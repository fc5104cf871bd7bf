"""Taking in one shipment: from the events of a `Prefill` call to pages of a holding.

Knows the checks a foreign shipment must pass before a byte of it is believed, and where its layers go. Does not know
the batch, queues or retries. Raises ShipmentIncompatible or ShipmentCorrupt naming what was wrong, and what
`DecodeMemory.claim` raises.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import partial

from packlight.compress.evict import mass_bytes, split_mass
from packlight.compress.recipes import codec_of
from packlight.core.errors import ShipmentCorrupt, ShipmentIncompatible
from packlight.core.shipping import Accepted, FirstToken, Manifest, ShipFrame, Shipped
from packlight.decode.memory import DecodeMemory, Holding
from packlight.decode.unpack import Unpacker
from packlight.transfer.base import KVReceiver, KVTransport, ReceivedLayer
from packlight.transfer.registry import wish
from packlight.wire.manifest import decode_manifest


class Intake:
    """One shipment into `holding` of `memory`. `max_tokens` bounds the tokens of one head: the prompt's length.
    `pool_codec` is the codec that packed KV lies in. Holds what its receivers hold until `release`."""

    def __init__(
        self,
        memory: DecodeMemory,
        holding: Holding,
        *,
        compatibility: str,
        transports: Mapping[str, KVTransport],
        pool_codec: str,
        max_tokens: int,
    ) -> None:
        self._memory, self._holding, self._pool = memory, holding, memory.pool
        self._compatibility, self._max_tokens = compatibility, max_tokens
        self._unpacker = Unpacker(self._pool, codec_of(holding.pack), pool_codec=pool_codec)
        self._receivers = self._make_receivers(transports)
        self._receiver: KVReceiver | None = None
        self._has_begun = False
        self.num_layers = 0
        self.num_bytes = 0

    def accept(self, accepted: Accepted) -> str:
        """The transport that was chosen."""
        if accepted.compatibility != self._compatibility:
            raise ShipmentIncompatible(
                f"the prefill worker's compatibility hash is {accepted.compatibility}, ours is {self._compatibility}: "
                "the two run other releases, models, page sizes or dtypes"
            )
        manifest = decode_manifest(accepted.manifest)
        self._check(manifest)
        self._receiver = self._receivers[manifest.transport]
        for receiver in self._receivers.values():
            if receiver is not self._receiver:
                receiver.release(unused=True)
        return manifest.transport

    @property
    def wishes(self) -> tuple[str, ...]:
        """The transports to ask for, best first."""
        return tuple(wish(name, receiver) for name, receiver in self._receivers.items())

    def take(self, frame: ShipFrame) -> None:
        if self._receiver is None:
            raise ShipmentCorrupt("a layer arrived before the manifest")
        received = self._receiver.take(frame)
        if received is not None:
            self._store(received)

    def begin(self, first: FirstToken) -> None:
        """A token that the model does not have would fail a whole step, not one request."""
        token_id, vocab_size = first.token.token_id, self._memory.spec.vocab_size
        if self._has_begun:
            raise ShipmentCorrupt(f"token {token_id} came as the first of the answer, which had one")
        if not 0 <= token_id < vocab_size:
            raise ShipmentCorrupt(f"the first token is {token_id}, the vocabulary ends at {vocab_size - 1}")
        self._has_begun = True

    def finish(self, shipped: Shipped) -> None:
        if self.num_layers != self._pool.num_layers or shipped.num_layers != self.num_layers:
            raise ShipmentCorrupt(
                f"the shipment ended after {self.num_layers} of {self._pool.num_layers} layers "
                f"(the sender counted {shipped.num_layers})"
            )

    def refused(self) -> None:
        """The prefill worker does not want the request: if it had not accepted it before, nothing will ever be sent."""
        if self._receiver is None:
            for receiver in self._receivers.values():
                receiver.release(unused=True)

    def release(self) -> None:
        for receiver in self._receivers.values():
            receiver.release()

    def _make_receivers(self, transports: Mapping[str, KVTransport]) -> dict[str, KVReceiver]:
        """Those that this machine has, each ready for any layer that may come: a sender needs to know where."""
        num_kv_heads = self._pool.num_kv_heads
        most = self._unpacker.max_payload_bytes(self._max_tokens)
        most += mass_bytes(self._holding.pack, [self._max_tokens] * num_kv_heads)
        receivers = {}
        for name, transport in transports.items():
            with suppress(ShipmentIncompatible):
                receivers[name] = transport.receiver(num_layers=self._pool.num_layers, max_layer_bytes=most)
        return receivers

    def _check(self, manifest: Manifest) -> None:
        ours = (self._pool.page_size, self._pool.num_layers, self._pool.num_kv_heads, self._pool.head_dim)
        theirs = (manifest.page_size, manifest.num_layers, manifest.num_kv_heads, manifest.head_dim)
        if ours != theirs:
            raise ShipmentIncompatible(f"the shipment's layout (page, layers, heads, dim) is {theirs}, ours is {ours}")
        if manifest.transport not in self._receivers:
            raise ShipmentIncompatible(
                f"the shipment comes by {manifest.transport!r}, we take {', '.join(self._receivers)}"
            )
        codec = codec_of(self._holding.pack)
        if manifest.codec != codec:
            raise ShipmentIncompatible(f"the shipment's codec is {manifest.codec!r}, we asked for {codec!r}")
        if manifest.num_tokens > self._max_tokens:
            raise ShipmentCorrupt(f"the shipment holds {manifest.num_tokens} tokens of a prompt of {self._max_tokens}")

    def _store(self, received: ReceivedLayer) -> None:
        layer, lengths, payload = received.layer, received.lengths, received.payload
        least = 1 if self._holding.needs.evicts(layer) else 0  # the next token may take the place of another
        are_possible = all(least <= length <= self._max_tokens for length in lengths)
        if len(lengths) != self._pool.num_kv_heads or not are_possible:
            raise ShipmentCorrupt(f"layer {layer} claims lengths {lengths[:8]} for {self._pool.num_kv_heads} heads")
        mass_due = mass_bytes(self._holding.pack, lengths)
        due = self._unpacker.payload_bytes(lengths) + mass_due
        if payload.numel() != due:
            raise ShipmentCorrupt(f"layer {layer} has {payload.numel()} bytes, {due} are due")
        pages = self._memory.claim(self._holding, layer, lengths)
        if mass_due:
            payload, mass = split_mass(payload, lengths)
            self._memory.remember(self._holding, layer, lengths, mass)
        summaries = self._memory.summaries_for(self._holding)
        store = partial(self._unpacker.store, pages, lengths, summaries=summaries)
        self._memory.fill(self._holding, payload, store)
        self.num_layers += 1
        self.num_bytes += due
