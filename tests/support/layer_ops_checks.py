"""What every `LayerOps` must do, against the twins in torch on a CPU: in Triton's interpreter, and on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from packlight.models.fused.ops import LayerOps, TorchLayerOps, Turn
from packlight.models.fused.rotary import turns

EPSILON = 1e-5
SIZES = [(1, 64), (3, 576), (5, 4096), (2, 40)]
# Query heads, KV heads, head dim.
HEADS = [(4, 2, 16), (32, 8, 128), (9, 3, 64), (14, 2, 96), (1, 1, 256)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
twin = TorchLayerOps()


def draw(seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
    return (2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def check_add_norm(
    ops: LayerOps, device: str, dtype: torch.dtype, num_tokens: int, size: int, *, has_delta: bool
) -> None:
    """The sum to the bit; the norm to one step of rounding."""
    hidden_TC, weight_C = draw(1, dtype, num_tokens, size), draw(2, dtype, size)
    delta_TC = draw(3, dtype, num_tokens, size) if has_delta else None
    expected = twin.add_norm(hidden_TC, delta_TC, weight_C, EPSILON)
    moved_TC = delta_TC.to(device) if delta_TC is not None else None
    given_TC = hidden_TC.to(device)
    got = ops.add_norm(given_TC, moved_TC, weight_C.to(device), EPSILON)
    assert torch.equal(got[0].cpu(), expected[0])
    assert torch.equal(given_TC.cpu(), hidden_TC), "what was given stays as it is"
    assert_nearly_equal(got[1].cpu(), expected[1])


def check_turn(ops: LayerOps, device: str, dtype: torch.dtype, heads: tuple[int, int, int], *, has_norm: bool) -> None:
    """To the bit where there is no norm."""
    (num_heads, num_kv_heads, head_dim), num_tokens = heads, 5
    qkv_TX = draw(4, dtype, num_tokens, (num_heads + 2 * num_kv_heads) * head_dim)
    positions_T = torch.tensor([0, 1, 77, 4095, 100_000])
    angles = turns(positions_T, 1.0 / 10_000 ** (torch.arange(0, head_dim, 2) / head_dim))
    norms = (draw(5, dtype, head_dim), draw(6, dtype, head_dim)) if has_norm else (None, None)
    moved = (x.to(device) if x is not None else None for x in norms)
    got = ops.turn(qkv_TX.to(device), num_heads, num_kv_heads, Turn(*(x.to(device) for x in angles), *moved, EPSILON))
    expected = twin.turn(qkv_TX, num_heads, num_kv_heads, Turn(*angles, *norms, EPSILON))
    for ours, theirs in zip(got, expected, strict=True):
        if has_norm:
            assert_nearly_equal(ours.cpu(), theirs)
        else:
            assert torch.equal(ours.cpu(), theirs)
    assert got[0].is_contiguous()
    assert got[1].is_contiguous()


def check_gate(ops: LayerOps, device: str, dtype: torch.dtype, num_tokens: int, size: int) -> None:
    gate_up_TX = draw(7, dtype, num_tokens, 2 * size)
    gate_up_TX[:, :2] = torch.tensor([-80.0, 80.0])
    assert_nearly_equal(ops.gate(gate_up_TX.to(device)).cpu(), twin.gate(gate_up_TX))


def check_no_tokens(ops: LayerOps, device: str) -> None:
    nothing, weight_C = draw(1, torch.float32, 0, 64).to(device), draw(2, torch.float32, 64).to(device)
    assert [x.shape for x in ops.add_norm(nothing, nothing, weight_C, EPSILON)] == [(0, 64), (0, 64)]


def assert_nearly_equal(got: Tensor, expected: Tensor) -> None:
    """Two steps of the dtype, where the twin's own float32 lies beside a border between two numbers; in float32 some
    more, by the order of sums. In steps of the largest number: what turns may cancel out."""
    steps, eps = (16 if got.dtype == torch.float32 else 2), torch.finfo(got.dtype).eps
    largest = float(expected.double().abs().max())
    torch.testing.assert_close(got, expected, atol=steps * eps * largest, rtol=0.0)
    is_other = got != expected
    assert got.dtype == torch.float32 or is_other.float().mean() < 0.02, "rounded at other places than the twin"
