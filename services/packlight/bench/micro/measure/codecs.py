"""Encoding and decoding one layer of packed KV, codec by codec, the copies of the payload's rules included.

Knows codecs and payloads. Rates count the bytes that the KV has in its own dtype, so codecs can be compared.

Legend: P head pages, T tokens per page, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from packlight.bench.timing import Spread, slices_of, take_turns
from packlight.compress.base import Codec
from packlight.compress.pack import PackedLayer
from packlight.compress.parts import CODECS
from packlight.compress.payload import decode_layer, encode_layer


@dataclass(frozen=True, slots=True)
class LayerShape:
    num_kv_heads: int
    num_tokens: int
    page_size: int
    head_dim: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Coded:
    """Seconds for one layer, and its bytes before and after. `max_error` is that of the decoded values, which are
    drawn from a standard normal distribution."""

    encode_s: Spread
    decode_s: Spread
    native_bytes: int
    payload_bytes: int
    max_error: float


def measure(
    names: Sequence[str], shape: LayerShape, *, num_rounds: int, slice_s: float, seed: int = 0
) -> dict[str, Coded]:
    """All codecs on the same layer, in turns."""
    packed = _layer(shape, seed)
    codecs: dict[str, Codec] = {name: CODECS.load(name)() for name in names}
    payloads = {name: encode_layer(codec, packed) for name, codec in codecs.items()}
    dims = (packed.lengths, shape.page_size, shape.head_dim, shape.dtype)
    calls: dict[str, Callable[[], object]] = {}
    for name, codec in codecs.items():
        calls[f"{name} encode"] = partial(encode_layer, codec, packed)
        calls[f"{name} decode"] = partial(decode_layer, codec, payloads[name], *dims)
    seconds = take_turns({name: slices_of(call, slice_s) for name, call in calls.items()}, num_rounds)
    return {
        name: Coded(
            encode_s=seconds[f"{name} encode"],
            decode_s=seconds[f"{name} decode"],
            native_bytes=packed.pages.numel() * packed.pages.element_size(),
            payload_bytes=payloads[name].numel(),
            max_error=_max_error(packed, decode_layer(codec, payloads[name], *dims)),
        )
        for name, codec in codecs.items()
    }


def _layer(shape: LayerShape, seed: int) -> PackedLayer:
    num_pages = shape.num_kv_heads * -(-shape.num_tokens // shape.page_size)
    generator = torch.Generator().manual_seed(seed)
    pages = torch.randn(num_pages, 2, shape.page_size, shape.head_dim, generator=generator).to(shape.dtype)
    return PackedLayer(pages, (shape.num_tokens,) * shape.num_kv_heads)


def _max_error(packed: PackedLayer, decoded: tuple[torch.Tensor, torch.Tensor]) -> float:
    pairs = zip((packed.k_pages, packed.v_pages), decoded, strict=True)
    return max(float((before.float() - after.float()).abs().max()) for before, after in pairs)
