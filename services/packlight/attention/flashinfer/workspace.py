"""How much memory FlashInfer's schedule of a captured step takes, and the partial results of lists that it splits.

Knows arithmetic alone. It follows FlashInfer's scheduler (`scheduler.cuh` of 0.6.13), which raises where there is too
little: of a captured step every slot that it may ever schedule has its place, whether this step's lists are split or
not. On the CUDA cores a multiprocessor takes up to 16 blocks and a slot holds one query row per head of a group; on the
tensor cores it takes 2, and a slot holds a tile of rows.

Legend: N requests of a kernel, G query heads per KV head, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

# What the lists of eager steps, which are split only when they are few, never exceed.
LEAST_BYTES = 128 << 20
_BLOCKS_ON_CUDA_CORES, _BLOCKS_ON_TENSOR_CORES = 16, 2
_SMALL_TILE, _LARGE_TILE, _LARGEST_TILE, _WIDE_HEAD = 16, 64, 128, 256
_SLOT_BYTES, _REQUEST_BYTES, _ALIGNMENT_BYTES = 13, 8, 4096


@dataclass(frozen=True, slots=True)
class Workspace:
    """`schedule_bytes`: lists of slots, one buffer per kernel. `partial_bytes`: what kernels may share."""

    schedule_bytes: int
    partial_bytes: int


def fixed_workspace(
    num_requests: int, group: int, head_dim: int, *, on_tensor_cores: bool, num_multiprocessors: int
) -> Workspace:
    """Of a decode kernel that is captured for N = `num_requests`."""
    if on_tensor_cores:
        tile = _tile_rows(group, head_dim)
        num_tiles = -(-num_requests * group // tile) + num_requests - 1
        num_slots = max(_BLOCKS_ON_TENSOR_CORES * num_multiprocessors, num_tiles)
    else:
        tile, num_slots = 1, max(_BLOCKS_ON_CUDA_CORES * num_multiprocessors, num_requests)
    partial_bytes = group * num_slots * tile * (head_dim + 1) * 4
    schedule_bytes = num_slots * _SLOT_BYTES + num_requests * _REQUEST_BYTES
    return Workspace(schedule_bytes + _ALIGNMENT_BYTES, max(LEAST_BYTES, partial_bytes + _ALIGNMENT_BYTES))


def _tile_rows(group: int, head_dim: int) -> int:
    """Query rows of a tile on the tensor cores, where a request has one token."""
    if group <= _SMALL_TILE:
        return _SMALL_TILE
    return _LARGE_TILE if group <= _LARGE_TILE or head_dim >= _WIDE_HEAD else _LARGEST_TILE
