"""TurboQuant for the mean squared error (arXiv 2504.19874): rotate, then quantise each coordinate by the best codebook.

Shapes: P head pages, T tokens per page, D head dim, V = P * T vectors of one head's K or V.

Any vector, rotated at random, has coordinates of a known density, so one codebook computed beforehand is the best for
all of them and nothing but the vector's length is stored beside the codes. The squared error relative to the vector's
is 0.36, 0.12, 0.034, 0.0095 for 1, 2, 3, 4 bits as D grows; no quantiser can go below 4^-bits.

A record is K codes, V codes (packed bits), K norms [T], V norms [T] in fp16; a norm beyond fp16's range is clamped to
it. K has at least the bits of V: an error in K is magnified by the softmax, one in V is averaged. The paper's other
variant, an unbiased estimate of inner products from one more bit per coordinate, is left out for the same reason: its
variance goes through the softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from packlight.compress.codecs.lloyd_max import boundaries, codebook
from packlight.compress.codecs.records import join_fields, numbers, pack_bits, packed_bytes, to_dtype, unpack_bits
from packlight.compress.codecs.rotation import check_dim, hadamard_rotation

FP16_MAX = torch.finfo(torch.float16).max
NORM_BYTES = torch.float16.itemsize
# A coordinate is looked up in a table of narrow cells, many times faster than searched among the boundaries. A boundary
# that falls inside a cell moves by half a cell at most, which costs the second order of 1/512.
CELLS_PER_UNIT = 256
CELLS_END = 4  # beyond the outermost boundary of any codebook of up to 4 bits


@dataclass(frozen=True, eq=False, slots=True)
class SphereQuantiser:
    """Directions in D dimensions as `bits`-bit codes. Coordinates are in units of 1 / sqrt(D).

    rotation_DD: see `hadamard_rotation`. points: the codebook. code_of_cell: uint8, the nearest point of each cell."""

    bits: int
    rotation_DD: Tensor
    points: Tensor
    code_of_cell: Tensor

    @classmethod
    def build(cls, bits: int, head_dim: int, device: torch.device) -> SphereQuantiser:
        """Raises InvalidRequest unless `head_dim` is a power of two."""
        rotation_DD, points = hadamard_rotation(head_dim), codebook(bits, head_dim)
        edges = torch.from_numpy(boundaries(points))
        cells = (torch.arange(2 * CELLS_END * CELLS_PER_UNIT, dtype=torch.float64) + 0.5) / CELLS_PER_UNIT - CELLS_END
        codes = torch.bucketize(cells, edges).to(torch.uint8)
        return cls(bits, rotation_DD.to(device), torch.from_numpy(points).float().to(device), codes.to(device))

    def quantise(self, x_VD: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 vectors as (uint8 codes [V, D], fp16 norms [V])."""
        x_VD = x_VD.clamp(-FP16_MAX, FP16_MAX)
        norm_V = torch.linalg.vector_norm(x_VD, dim=1)
        unit_V1 = norm_V.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        cells = ((x_VD / unit_V1) @ self.rotation_DD).add_(CELLS_END).mul_(CELLS_PER_UNIT)
        cells = cells.clamp_(0, len(self.code_of_cell) - 1).to(torch.int32)
        codes_VD = self.code_of_cell.index_select(0, cells.flatten()).view(x_VD.shape)
        return codes_VD, norm_V.clamp(max=FP16_MAX).half()

    def restore(self, codes_VD: Tensor, norm_V: Tensor) -> Tensor:
        """fp32 vectors `[V, D]`."""
        dim = codes_VD.shape[1]
        unit_VD = self.points.index_select(0, codes_VD.flatten().to(torch.int32)).view(codes_VD.shape)
        return (unit_VD @ self.rotation_DD.T).mul_(norm_V.float()[:, None] / dim)


class TurboQuantCodec:
    """`k_bits` and `v_bits` per coordinate. Quantisers are computed once per head dim and kept."""

    is_exact = False
    k_bits: int
    v_bits: int

    def __init__(self) -> None:
        self._quantisers: dict[tuple[int, int, torch.device], SphereQuantiser] = {}

    def record_bytes(self, page_size: int, head_dim: int, dtype: torch.dtype) -> int:
        """Raises InvalidRequest unless `head_dim` is a power of two."""
        check_dim(head_dim)
        return sum(self._field_bytes(page_size, head_dim))

    def encode(self, k_PTD: Tensor, v_PTD: Tensor, pages_per_head: Sequence[int]) -> Tensor:
        k_codes, k_norms = self._encode_half(k_PTD, self.k_bits)
        v_codes, v_norms = self._encode_half(v_PTD, self.v_bits)
        return join_fields(k_codes, v_codes, k_norms, v_norms)

    def decode(self, records: Tensor, page_size: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        k_codes, v_codes, *norms = torch.split(records, self._field_bytes(page_size, head_dim), dim=1)
        k_norms, v_norms = (numbers(field, torch.float16) for field in norms)
        k_PTD = self._decode_half(k_codes, k_norms, head_dim, self.k_bits)
        v_PTD = self._decode_half(v_codes, v_norms, head_dim, self.v_bits)
        return to_dtype(k_PTD, dtype), to_dtype(v_PTD, dtype)

    def _encode_half(self, x_PTD: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        num_pages, page_size, head_dim = x_PTD.shape
        quantiser = self._quantiser(bits, head_dim, x_PTD.device)
        codes_VD, norm_V = quantiser.quantise(x_PTD.float().flatten(0, 1))
        return pack_bits(codes_VD.view(num_pages, page_size * head_dim), bits), norm_V.view(num_pages, page_size)

    def _decode_half(self, codes: Tensor, norms_PT: Tensor, head_dim: int, bits: int) -> Tensor:
        num_pages, page_size = norms_PT.shape
        codes_VD = unpack_bits(codes, page_size * head_dim, bits).reshape(-1, head_dim)
        x_VD = self._quantiser(bits, head_dim, codes.device).restore(codes_VD, norms_PT.flatten())
        return x_VD.view(num_pages, page_size, head_dim)

    def _field_bytes(self, page_size: int, head_dim: int) -> list[int]:
        codes = [packed_bytes(page_size * head_dim, bits) for bits in (self.k_bits, self.v_bits)]
        return [*codes, page_size * NORM_BYTES, page_size * NORM_BYTES]

    def _quantiser(self, bits: int, head_dim: int, device: torch.device) -> SphereQuantiser:
        key = (bits, head_dim, device)
        if key not in self._quantisers:
            self._quantisers[key] = SphereQuantiser.build(bits, head_dim, device)
        return self._quantisers[key]


class TurboQuant4(TurboQuantCodec):
    k_bits, v_bits = 4, 3


class TurboQuant3(TurboQuantCodec):
    k_bits, v_bits = 3, 2


class TurboQuant2(TurboQuantCodec):
    k_bits, v_bits = 2, 2
