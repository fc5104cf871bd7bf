"""The values of a KV shipment: what a prefill worker streams back to the decode worker that called it.

Knows the order of events and the manifest. Does not know tensors, protobuf, or how bytes move (`transfer/`).

    Waiting*                       every few seconds until then, as long as the worker gets on with its work
    Accepted                       once, when the last chunk starts: compatibility hash, then the manifest's bytes
    LayerHeader Chunk*             per layer, in order, while the next layer computes
    FirstToken                     as soon as it is sampled: it may overtake layers that are still waiting
    Shipped                        once, last: totals and timings

The stream is the response of one `Prefill` call, so it also is the shipment's lifetime: ending the call, from either
end and for whatever reason, frees everything on both.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from packlight.core.kept_map import KeptMap
from packlight.core.types import ModelSpec, PrefillRequest, Token

WIRE_VERSION = 4


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a shipment holds. `codec` names how pages became bytes; lengths travel with each layer, because budgets
    that differ by head are known only when the layer's scores are."""

    request_id: str
    transport: str
    recipe: str
    codec: str
    dtype: str
    page_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """Nothing of this prompt yet, but the worker steps: a queue is not a silence."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """`compatibility` is compared before `manifest` is parsed: a foreign manifest may mean anything."""

    compatibility: str
    manifest: bytes


@dataclass(frozen=True, slots=True)
class LayerHeader:
    """One layer's share: `num_bytes` of payload, holding `lengths[head]` tokens of each KV head. They follow in chunks,
    or lie at `offset` of the memory that the transport shares."""

    layer: int
    lengths: tuple[int, ...]
    num_bytes: int
    checksum: int
    offset: int | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some next bytes of the current layer's payload."""

    data: memoryview | bytes


@dataclass(frozen=True, slots=True)
class FirstToken:
    token: Token
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class Shipped:
    """The end of a complete shipment. `shipped_bytes` counts payload, `exact_bytes` the exact KV of the same tokens.
    `num_grown_tokens` of those kept were added to hold the fidelity floor. `kept_map` is there if it was asked for.
    `ship_s` is how long the prefill worker was passing layers on."""

    num_layers: int
    shipped_bytes: int
    exact_bytes: int
    num_kept_tokens: float
    retained_mass: float | None
    queue_s: float
    prefill_s: float
    select_s: float
    num_grown_tokens: float = 0.0
    kept_map: KeptMap | None = None
    ship_s: float = 0.0


ShipFrame = LayerHeader | Chunk
PrefillEvent = Waiting | Accepted | LayerHeader | Chunk | FirstToken | Shipped


class PrefillClient(Protocol):
    """A prefill worker as seen by a decode worker. Closing the iterator cancels the work and frees the pages."""

    def prefill(self, request: PrefillRequest) -> AsyncGenerator[PrefillEvent, None]: ...


def compatibility_hash(spec: ModelSpec, page_size: int, dtype: str) -> str:
    """Two workers whose hashes are equal may exchange KV: wire version, model, layout and dtype all agree."""
    facts = (WIRE_VERSION, spec.fingerprint, spec.num_layers, spec.num_kv_heads, spec.head_dim, page_size, dtype)
    return hashlib.blake2b("\0".join(map(str, facts)).encode(), digest_size=16).hexdigest()
