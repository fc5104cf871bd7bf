"""How a record is laid out: fields of numbers as bytes, one after another, and codes of a few bits packed densely.

Shapes: P records, N codes of one record, R bytes of a record.

Knows bytes, alignment and bit positions. Does not know what a field means: that is the codec's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CODES_PER_GROUP = 8  # 8 codes of b bits are exactly b bytes, whatever b is


def packed_bytes(num_codes: int, bits: int) -> int:
    """Bytes of `num_codes` codes; the last group of 8 is filled up."""
    return -(-num_codes // CODES_PER_GROUP) * bits


def pack_bits(codes_PN: Tensor, bits: int) -> Tensor:
    """uint8 codes below 2^bits as uint8 `[P, packed_bytes(N, bits)]`, for 1 to 8 bits.

    The codes are cut into 8 equal runs and byte j holds parts of the j-th code of each run: neighbours of a run lie in
    neighbouring bytes, so packing and unpacking are shifts of whole runs, and a kernel can do the same with vectors."""
    padded_PN = F.pad(codes_PN, (0, -codes_PN.shape[1] % CODES_PER_GROUP))
    runs = padded_PN.view(len(padded_PN), CODES_PER_GROUP, padded_PN.shape[1] // CODES_PER_GROUP)
    packed = runs.new_zeros(len(runs), bits, runs.shape[2])
    for run in range(CODES_PER_GROUP):
        byte, shift = divmod(run * bits, 8)
        packed[:, byte] |= runs[:, run] << shift
        if shift + bits > 8:
            packed[:, byte + 1] |= runs[:, run] >> (8 - shift)
    return packed.flatten(1)


def unpack_bits(packed_PB: Tensor, num_codes: int, bits: int) -> Tensor:
    """The codes that `pack_bits` packed, uint8 `[P, num_codes]`."""
    packed = torch.unflatten(packed_PB, 1, (bits, packed_PB.shape[1] // bits))
    runs = packed.new_empty(len(packed), CODES_PER_GROUP, packed.shape[2])
    for run in range(CODES_PER_GROUP):
        byte, shift = divmod(run * bits, 8)
        torch.bitwise_right_shift(packed[:, byte], shift, out=runs[:, run])
        if shift + bits > 8:
            runs[:, run] |= packed[:, byte + 1] << (8 - shift)
    return runs.bitwise_and_(2**bits - 1).flatten(1)[:, :num_codes]


def join_fields(*fields: Tensor) -> Tensor:
    """Records uint8 `[P, R]` of fields `[P, ...]` of any dtype, side by side in the order given."""
    return torch.cat([field.contiguous().view(torch.uint8).flatten(1) for field in fields], dim=1)


def numbers(field: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes uint8 `[P, B]` of one field as numbers `[P, B / itemsize]`.

    Copied only where they lie at addresses at which such numbers cannot lie."""
    size = dtype.itemsize
    steps = (field.storage_offset(), field.stride(0), field.data_ptr())
    if field.stride(1) != 1 or any(step % size for step in steps):
        field = field.clone(memory_format=torch.contiguous_format)
    return field.view(dtype)


def to_dtype(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` in `dtype`, those beyond its largest number as that number: coding may lift one a hair past it, and an
    infinite key would take all of the attention."""
    largest = torch.finfo(dtype).max
    if largest < torch.finfo(values.dtype).max:
        values = values.float().clamp(-largest, largest)  # the limit itself may not exist in the values' own dtype
    return values.to(dtype)
