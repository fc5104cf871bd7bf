"""Weight matrices as the compiled kernels read them: in tiles, in bfloat16, int8 or int4.

Knows layouts and rounding. A tile is sixteen outputs (rows of W), 32 of the depth; two such panels of sixteen lie tile
by tile in turn, a block, which is one stream of memory: `[block][depth / 32][2][tile]`.

- bf16: tiles `[16][16 outputs][2]`. A line is one vector load, a tile what AMX multiplies with.
- int8: tiles `[16][2][16 outputs]`; one float32 scale per output, symmetric. The largest weight of a row is 127.
- int4: tiles `[16][16 outputs]`, two to a byte, each with a bfloat16 scale and least value per output, as llama.cpp's
  Q4_1: a model that was quantised so comes back unchanged but for the rounding of these two. 5 bits a weight.

Legend: N outputs, padded to blocks; C inputs; G = C / 32 groups; P two panels of a block; B blocks.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight.core.config import Weights
from packlight.native.linear import BLOCK, PANEL, TILE_DEPTH, Format, Linear

_MOST_INT8, _MOST_INT4 = 127, 15
_TINY = 1e-30


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """Owns the memory that `struct` points to."""

    panels: Tensor
    scales: Tensor | None
    bias_N: Tensor | None
    struct: Linear

    @property
    def num_bytes(self) -> int:
        """What one product reads."""
        return self.panels.nbytes + (self.scales.nbytes if self.scales is not None else 0)


def packed(weight_NC: Tensor, bias_N: Tensor | None, weights: Weights) -> PackedMatrix:
    """`weight_NC` (C a multiple of 32) in tiles, as `weights` says."""
    num_outputs, depth = weight_NC.shape
    assert depth % TILE_DEPTH == 0, f"the depth {depth} is no multiple of {TILE_DEPTH}"
    padded_NC = F.pad(weight_NC, (0, 0, 0, -num_outputs % BLOCK))
    kind, panels, scales = _FORMS[weights](padded_NC)
    bias_N = bias_N.float().contiguous() if bias_N is not None else None
    struct = Linear(panels.data_ptr(), _address(scales), _address(bias_N), num_outputs, depth, kind)
    return PackedMatrix(panels, scales, bias_N, struct)


def interleaved(gate_up: Tensor) -> Tensor:
    """Gate above up, `[2I, ...]`, as sixteen rows of one, sixteen of the other, and so on: a thread that has finished
    sixteen gates has what they gate at hand."""
    return gate_up.view(2, -1, PANEL, *gate_up.shape[1:]).transpose(0, 1).flatten(0, 2)


def _bf16(weight_NC: Tensor) -> tuple[Format, Tensor, None]:
    return Format.BF16, _in_tiles(weight_NC.bfloat16()), None


def _int8(weight_NC: Tensor) -> tuple[Format, Tensor, Tensor]:
    weight_NC = weight_NC.float()
    scales_N = weight_NC.abs().amax(dim=1).clamp_min(_TINY) / _MOST_INT8
    codes_NC = (weight_NC / scales_N[:, None]).round().to(torch.int8)
    return Format.INT8, _in_tiles(codes_NC).transpose(-1, -2).contiguous(), scales_N


def _int4(weight_NC: Tensor) -> tuple[Format, Tensor, Tensor]:
    groups_NGX = weight_NC.float().view(len(weight_NC), -1, TILE_DEPTH)
    least_NG1 = groups_NGX.amin(dim=2, keepdim=True).bfloat16()
    scales_NG1 = ((groups_NGX.amax(dim=2, keepdim=True) - least_NG1) / _MOST_INT4).clamp_min(_TINY).bfloat16()
    codes_NGX = ((groups_NGX - least_NG1) / scales_NG1.float()).round().clamp(0, _MOST_INT4)
    tiles = _in_tiles(codes_NGX.to(torch.uint8).flatten(1))
    scales_NG2 = torch.cat((scales_NG1, least_NG1), dim=2)
    scales_BGP2 = scales_NG2.view(-1, 2, PANEL, *scales_NG2.shape[1:]).permute(0, 3, 1, 4, 2).contiguous()
    return Format.INT4, tiles[..., 0] | tiles[..., 1] << 4, scales_BGP2


def _in_tiles(values_NC: Tensor) -> Tensor:
    """`[B, G, 2, 16, 16, 2]`."""
    split = values_NC.view(-1, 2, PANEL, values_NC.shape[1] // TILE_DEPTH, TILE_DEPTH // 2, 2)
    return split.permute(0, 3, 1, 4, 2, 5).contiguous()


def _address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr() if tensor is not None else None)


_FORMS = {Weights.NATIVE: _bf16, Weights.INT8: _int8, Weights.INT4: _int4}
