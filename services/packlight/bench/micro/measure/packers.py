"""Packing a layer's kept tokens out of a pool, way by way, beside a plain copy of as many bytes.

Knows pools and packers. Layers take turns, as in a prefill step, so what is read does not lie in a cache.

Legend: K KV heads, P head pages, T tokens per page, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from types import MappingProxyType

import torch
from torch import Tensor

from packlight.bench.timing import Spread, slices_of, take_turns
from packlight.compress.base import Selection
from packlight.compress.packers import NativePacker, Packer, TorchPacker
from packlight.kv.pool import KVPool
from packlight.models.fake_spec import fake_spec
from packlight.native.compile import NativeUnavailable
from packlight.native.library import open_library

RUN_TOKENS = 64
SHARE = 8  # one token of so many is kept
COPY = "copy"


def _runs(num_tokens: int) -> Tensor:
    tokens = torch.arange(num_tokens)
    return tokens[tokens % (SHARE * RUN_TOKENS) < RUN_TOKENS]


KEPT: Mapping[str, Callable[[int], Tensor]] = MappingProxyType(
    {
        "everything": torch.arange,
        "an eighth in runs": _runs,
        "an eighth one by one": lambda num_tokens: torch.arange(0, num_tokens, SHARE),
    }
)


@dataclass(frozen=True, slots=True)
class PoolShape:
    num_layers: int
    num_kv_heads: int
    num_tokens: int
    page_size: int
    head_dim: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Packed:
    """`layer_s`: seconds for one layer, by way of packing, COPY among them; `num_bytes`: of its pages."""

    num_bytes: int
    layer_s: Mapping[str, Spread]


def measure(shape: PoolShape, *, num_rounds: int, slice_s: float) -> dict[str, Packed]:
    """By what is kept. The native way is left out where it cannot be had."""
    pool, num_blocks = _pool(shape)
    packers: dict[str, Packer] = {"torch": TorchPacker(pool)}
    with suppress(NativeUnavailable):
        packers["native"] = NativePacker(pool, open_library())
    blocks = torch.arange(num_blocks)
    return {name: _measure(pool, packers, blocks, kept(shape.num_tokens), num_rounds, slice_s)
            for name, kept in KEPT.items()}  # fmt: skip


def _measure(
    pool: KVPool, packers: Mapping[str, Packer], blocks: Tensor, kept: Tensor, num_rounds: int, slice_s: float
) -> Packed:
    selection = Selection((kept,) * pool.num_kv_heads, 1.0)
    pages_P2TD = packers["torch"].pack(0, blocks, selection).pages
    layers, size, flat = cycle(range(pool.num_layers)), pages_P2TD.numel(), pool.k.flatten()
    starts, room = cycle(range(0, len(flat) - size + 1, size)), torch.empty_like(pages_P2TD).flatten()

    def copy() -> None:
        start = next(starts)
        room.copy_(flat[start : start + size])

    def pack(packer: Packer) -> None:
        packer.pack(next(layers), blocks, selection)

    calls: dict[str, Callable[[], object]] = {COPY: copy}
    calls |= {name: partial(pack, packer) for name, packer in packers.items()}
    seconds = take_turns({name: slices_of(call, slice_s) for name, call in calls.items()}, num_rounds)
    return Packed(pages_P2TD.nbytes, seconds)


def _pool(shape: PoolShape) -> tuple[KVPool, int]:
    """A pool full of numbers, and its blocks. K alone is at least as large as one layer's pages."""
    spec, num_blocks = fake_spec(), -(-shape.num_tokens // shape.page_size)
    spec = replace(spec, num_layers=shape.num_layers, num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim)
    pool = KVPool(spec, num_blocks=num_blocks, page_size=shape.page_size, dtype=shape.dtype)
    pool.k.normal_()
    pool.v.normal_()
    return pool, num_blocks
