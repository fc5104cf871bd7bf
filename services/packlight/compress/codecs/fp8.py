"""FP8 E4M3 (1 sign, 4 exponent, 3 fraction bits; no infinity) with one static scale per KV head, for K and V apart.

Shapes: P head pages, T tokens per page, D head dim. The format is the OCP 8-bit floating point specification's E4M3;
the scale maps the largest magnitude among the head's pages to 448, the format's largest number. A normal number keeps a
relative error of at most 2^-4, a smaller one at most scale x 2^-10.

A record is K [T, D], V [T, D], then the two scales in fp32, which are the same in every record of a head's shipment: so
a record can be read alone, and kernels that take FP8 pages with a scale read the codes as they lie.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from packlight.compress.codecs.records import join_fields, numbers, to_dtype
from packlight.kv.side_stream import moved

E4M3 = torch.float8_e4m3fn
SCALE_BYTES = torch.float32.itemsize


class FP8Codec:
    is_exact = False

    def record_bytes(self, page_size: int, head_dim: int, dtype: torch.dtype) -> int:
        return 2 * (page_size * head_dim * E4M3.itemsize + SCALE_BYTES)

    def encode(self, k_PTD: Tensor, v_PTD: Tensor, pages_per_head: Sequence[int]) -> Tensor:
        k_scale_P, v_scale_P = _scales(k_PTD, pages_per_head), _scales(v_PTD, pages_per_head)
        return join_fields(
            _to_e4m3(k_PTD, k_scale_P), _to_e4m3(v_PTD, v_scale_P), torch.stack((k_scale_P, v_scale_P), dim=1)
        )

    def decode(self, records: Tensor, page_size: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        codes, scales = torch.split(records, [2 * page_size * head_dim, 2 * SCALE_BYTES], dim=1)
        values = torch.unflatten(_from_e4m3(codes), 1, (2, page_size, head_dim))
        values *= numbers(scales, torch.float32)[:, :, None, None]
        k_PTD, v_PTD = to_dtype(values, dtype).unbind(1)
        return k_PTD, v_PTD


def _scales(x_PTD: Tensor, pages_per_head: Sequence[int]) -> Tensor:
    """The scale of each page: fp32 `[P]`, one value per head. A head of zeros has scale 1."""
    counts = torch.tensor(pages_per_head, dtype=torch.int64)
    head_P = moved(torch.arange(len(counts)).repeat_interleave(counts), x_PTD.device)
    largest_P = x_PTD.abs().amax(dim=(1, 2)).float()
    largest_K = largest_P.new_zeros(len(counts)).scatter_reduce(0, head_P, largest_P, "amax")
    scale_K = (largest_K / torch.finfo(E4M3).max).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(largest_K > 0, scale_K, 1.0)[head_P]


def _to_e4m3(x_PTD: Tensor, scale_P: Tensor) -> Tensor:
    """Needs no clamp: a rounded scale lifts the largest value a hair above 448 at most, and it rounds back."""
    return (x_PTD.float() / scale_P[:, None, None]).to(E4M3)


def _from_e4m3(codes: Tensor) -> Tensor:
    """The numbers behind uint8 codes, fp32.

    E4M3 is fp16 with fewer bits and another exponent bias, so a shift and a power of two are the conversion, subnormal
    numbers included. torch's own takes one number at a time on the CPU, which is several times slower."""
    as_fp16 = (codes.view(torch.int8).to(torch.int16) << 7) & ~0x4000  # sign bit, a cleared copy of it, 7 bits
    return as_fp16.view(torch.float16).float() * 2**8
