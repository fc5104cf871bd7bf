"""Asymmetric integers in KIVI's layout (arXiv 2402.02750): K per channel, V per token.

Shapes: P head pages, T tokens per page, D head dim, G groups of V channels, C channels of one group.

A few channels of K are large in every token, so K shares a scale along the tokens of a channel, here those of one page;
V has no such channels and shares one along up to 32 channels of a token. A group is stored as codes 0 .. 2^bits - 1 of

    x = low + code * scale,      |error| <= scale / 2,      scale = (max - min) / (2^bits - 1)

with `low` and `scale` in fp16. Codes are made with the rounded `low` and `scale`; `low` is rounded down, so that no
value lies below it, however far from zero the group is. Both are kept within fp16: values below -65504, or more than
2^bits - 1 steps of 65504 above `low`, are clamped to what remains, and a group whose values are all equal keeps the
smallest fp16 number as its scale, so that nothing divides by zero.

A record is K codes, V codes (packed bits), K scale [D], K low [D], V scale [T, G], V low [T, G]. The paper's residual,
recent tokens kept exact, is the open page of each head: see `payload.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from packlight.compress.codecs.records import join_fields, numbers, pack_bits, packed_bytes, to_dtype, unpack_bits
from packlight.kv.coded import IntegerRecords

FP16 = torch.finfo(torch.float16)
# Half a unit in the last place of fp16, relative, and a little more: no x - |x| * DOWN is rounded to more than x.
DOWN = 2**-11 * (1 + 2**-9)


class KiviCodec:
    """`bits` per code; `max_group` channels of a token of V share a scale (None: all of them)."""

    is_exact = False
    bits: int
    max_group: int | None = 32

    def record_bytes(self, page_size: int, head_dim: int, dtype: torch.dtype) -> int:
        return sum(self._field_bytes(page_size, head_dim))

    def integer_records(self, head_dim: int) -> IntegerRecords:
        """For kernels that read records as they lie."""
        return IntegerRecords(self.bits, self._group(head_dim))

    def encode(self, k_PTD: Tensor, v_PTD: Tensor, pages_per_head: Sequence[int]) -> Tensor:
        k_codes, k_scale, k_low = quantise(k_PTD.float(), self.bits, dim=1)
        v_codes, v_scale, v_low = quantise(self._grouped(v_PTD.float()), self.bits, dim=-1)
        codes = (pack_bits(x.flatten(1), self.bits) for x in (k_codes, v_codes))
        return join_fields(*codes, k_scale, k_low, v_scale, v_low)

    def decode(self, records: Tensor, page_size: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        k_codes, v_codes, *ranges = torch.split(records, self._field_bytes(page_size, head_dim), dim=1)
        k_scale, k_low, v_scale, v_low = (numbers(field, torch.float16) for field in ranges)
        k_PTD = dequantise(self._codes(k_codes, page_size, head_dim), k_scale[:, None], k_low[:, None])
        v_codes_PTGC = self._grouped(self._codes(v_codes, page_size, head_dim))
        v_ranges = (*v_codes_PTGC.shape[:3], 1)
        v_PTGC = dequantise(v_codes_PTGC, v_scale.view(v_ranges), v_low.view(v_ranges))
        return to_dtype(k_PTD, dtype), to_dtype(v_PTGC.flatten(2), dtype)

    def _codes(self, packed: Tensor, page_size: int, head_dim: int) -> Tensor:
        """`[P, T, D]`."""
        return unpack_bits(packed, page_size * head_dim, self.bits).view(-1, page_size, head_dim)

    def _field_bytes(self, page_size: int, head_dim: int) -> list[int]:
        codes = packed_bytes(page_size * head_dim, self.bits)
        k_range, v_range = head_dim, page_size * (head_dim // self._group(head_dim))
        return [codes, codes] + [2 * count for count in (k_range, k_range, v_range, v_range)]

    def _group(self, head_dim: int) -> int:
        """The most channels that share a scale and divide the head evenly."""
        limit = head_dim if self.max_group is None else self.max_group
        return max(size for size in range(1, limit + 1) if head_dim % size == 0)

    def _grouped(self, x_PTD: Tensor) -> Tensor:
        """`[P, T, G, C]`."""
        group = self._group(x_PTD.shape[2])
        return torch.unflatten(x_PTD, 2, (x_PTD.shape[2] // group, group))


class Int8Codec(KiviCodec):
    bits, max_group = 8, None


class Int4Codec(KiviCodec):
    bits = 4


class Int2Codec(KiviCodec):
    bits = 2


def quantise(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 `x` as (uint8 codes, fp16 scale, fp16 low). A group runs along `dim`, which has size 1 in scale and low."""
    num_steps = 2**bits - 1
    least, most = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    low = (least - least.abs() * DOWN).clamp_(FP16.min, FP16.max).half()
    scale = ((most - low.float()) / num_steps).clamp_(FP16.smallest_normal * FP16.eps, FP16.max).half()
    codes = ((x - low.float()) / scale.float()).round_().clamp_(0, num_steps)
    return codes.to(torch.uint8), scale, low


def dequantise(codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    """fp32; all three broadcast."""
    return torch.addcmul(low.float(), codes.float(), scale.float())
