"""The Triton kernels behind `ops.py`. Imported only where Triton is; `TorchLayerOps` says what each must do.

Bound by memory or by their launch. Products and sums are not fused where the twin rounds between them
(`enable_fp_fusion`): a turn and a gate then come out as torch's do, to the bit but for its exponential; a norm differs
by the order of its sum. No number of tokens is a reason to compile anew. Legend as in `ops.py`, R heads of a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from packlight.models.fused.ops import Turn

_ELEMENTS_PER_WARP, _MIN_WARPS, _MAX_WARPS = 512, 4, 16
# Numbers of q and k that one program turns at once, and of gates that one program has.
_TURN_TILE, _GATE_TILE = 1024, 1024


# Triton reads annotations, and knows no types but its own.
@triton.jit  # type: ignore[untyped-decorator]
def _add_norm(  # type: ignore[no-untyped-def]
    hidden_TC,
    delta_TC,
    weight_C,
    sum_TC,
    normed_TC,
    epsilon,
    size: tl.constexpr,
    padded_size: tl.constexpr,
    has_delta: tl.constexpr,
) -> None:
    """One token per program."""
    at_C = tl.arange(0, padded_size)
    is_there_C = at_C < size
    start = tl.program_id(0).to(tl.int64) * size
    x_C = tl.load(hidden_TC + start + at_C, mask=is_there_C, other=0.0).to(tl.float32)
    if has_delta:
        x_C += tl.load(delta_TC + start + at_C, mask=is_there_C, other=0.0).to(tl.float32)
        rounded_C = x_C.to(sum_TC.dtype.element_ty)
        tl.store(sum_TC + start + at_C, rounded_C, mask=is_there_C)
        x_C = rounded_C.to(tl.float32)
    normed_C = x_C * tl.rsqrt(tl.sum(x_C * x_C, axis=0) / size + epsilon)
    normed_C = normed_C * tl.load(weight_C + at_C, mask=is_there_C, other=0.0).to(tl.float32)
    tl.store(normed_TC + start + at_C, normed_C.to(normed_TC.dtype.element_ty), mask=is_there_C)


@triton.jit  # type: ignore[untyped-decorator]
def _turn(  # type: ignore[no-untyped-def]
    qkv_TX,
    cosines_TE,
    sines_TE,
    q_norm_D,
    k_norm_D,
    q_THD,
    k_TKD,
    epsilon,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    half_dim: tl.constexpr,
    padded_half: tl.constexpr,
    tile_heads: tl.constexpr,
    has_norm: tl.constexpr,
) -> None:
    """Some heads of one token per program, those of q before those of k. An element turns with the one half a head
    further on."""
    token = tl.program_id(0).to(tl.int64)
    head_R = tl.program_id(1) * tile_heads + tl.arange(0, tile_heads)
    at_E = tl.arange(0, padded_half)
    is_half_E, is_q_R = at_E < half_dim, head_R < num_heads
    is_there_RE = (head_R < num_heads + num_kv_heads)[:, None] & is_half_E[None, :]
    left_at_RE = (head_R * 2 * half_dim)[:, None] + at_E[None, :]
    x_X = qkv_TX + token * (num_heads + 2 * num_kv_heads) * 2 * half_dim
    left_RE = tl.load(x_X + left_at_RE, mask=is_there_RE, other=0.0).to(tl.float32)
    right_RE = tl.load(x_X + left_at_RE + half_dim, mask=is_there_RE, other=0.0).to(tl.float32)
    if has_norm:
        squares_R = tl.sum(left_RE * left_RE, axis=1) + tl.sum(right_RE * right_RE, axis=1)
        share_R1 = tl.rsqrt(squares_R / (2 * half_dim) + epsilon)[:, None]
        q_left_E = tl.load(q_norm_D + at_E, mask=is_half_E, other=0.0).to(tl.float32)
        k_left_E = tl.load(k_norm_D + at_E, mask=is_half_E, other=0.0).to(tl.float32)
        q_right_E = tl.load(q_norm_D + half_dim + at_E, mask=is_half_E, other=0.0).to(tl.float32)
        k_right_E = tl.load(k_norm_D + half_dim + at_E, mask=is_half_E, other=0.0).to(tl.float32)
        left_RE = left_RE * share_R1 * tl.where(is_q_R[:, None], q_left_E[None, :], k_left_E[None, :])
        right_RE = right_RE * share_R1 * tl.where(is_q_R[:, None], q_right_E[None, :], k_right_E[None, :])
        left_RE = left_RE.to(qkv_TX.dtype.element_ty).to(tl.float32)
        right_RE = right_RE.to(qkv_TX.dtype.element_ty).to(tl.float32)
    cosine_1E = tl.load(cosines_TE + token * half_dim + at_E, mask=is_half_E, other=0.0)[None, :]
    sine_1E = tl.load(sines_TE + token * half_dim + at_E, mask=is_half_E, other=0.0)[None, :]
    turned_left_RE = (left_RE * cosine_1E - right_RE * sine_1E).to(qkv_TX.dtype.element_ty)
    turned_right_RE = (right_RE * cosine_1E + left_RE * sine_1E).to(qkv_TX.dtype.element_ty)
    is_q_RE, is_k_RE = is_there_RE & is_q_R[:, None], is_there_RE & (head_R >= num_heads)[:, None]
    q_at_RE = q_THD + token * num_heads * 2 * half_dim + left_at_RE
    k_at_RE = k_TKD + (token * num_kv_heads - num_heads) * 2 * half_dim + left_at_RE
    tl.store(q_at_RE, turned_left_RE, mask=is_q_RE)
    tl.store(q_at_RE + half_dim, turned_right_RE, mask=is_q_RE)
    tl.store(k_at_RE, turned_left_RE, mask=is_k_RE)
    tl.store(k_at_RE + half_dim, turned_right_RE, mask=is_k_RE)


@triton.jit  # type: ignore[untyped-decorator]
def _gate(  # type: ignore[no-untyped-def]
    gate_up_TX, out_TI, size: tl.constexpr, tile: tl.constexpr
) -> None:
    """Some gates of one token per program."""
    token, at_I = tl.program_id(0).to(tl.int64), tl.program_id(1) * tile + tl.arange(0, tile)
    is_there_I = at_I < size
    gate_at_I = gate_up_TX + token * 2 * size + at_I
    gate_I = tl.load(gate_at_I, mask=is_there_I, other=0.0).to(tl.float32)
    up_I = tl.load(gate_at_I + size, mask=is_there_I, other=0.0).to(tl.float32)
    opened_I = (gate_I / (1.0 + tl.exp(-gate_I))).to(out_TI.dtype.element_ty).to(tl.float32)
    tl.store(out_TI + token * size + at_I, (opened_I * up_I).to(out_TI.dtype.element_ty), mask=is_there_I)


class TritonLayerOps:
    """A `LayerOps`."""

    def add_norm(
        self, hidden_TC: Tensor, delta_TC: Tensor | None, weight_C: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        hidden_TC = hidden_TC.contiguous()
        num_tokens, size = hidden_TC.shape
        normed_TC = torch.empty_like(hidden_TC)
        sum_TC = torch.empty_like(hidden_TC) if delta_TC is not None else hidden_TC
        padded_size = triton.next_power_of_2(size)
        if num_tokens:  # a chunk of a prompt may ask for no logits
            _add_norm[(num_tokens,)](
                hidden_TC,
                delta_TC.contiguous() if delta_TC is not None else hidden_TC,
                weight_C,
                sum_TC,
                normed_TC,
                epsilon,
                size,
                padded_size,
                delta_TC is not None,
                num_warps=min(max(padded_size // _ELEMENTS_PER_WARP, _MIN_WARPS), _MAX_WARPS),
                enable_fp_fusion=False,
            )
        return sum_TC, normed_TC

    def turn(self, qkv_TX: Tensor, num_heads: int, num_kv_heads: int, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        qkv_TX = qkv_TX.contiguous()
        x_TND = qkv_TX.view(len(qkv_TX), num_heads + 2 * num_kv_heads, -1)
        num_tokens, _, head_dim = x_TND.shape
        q_THD, k_TKD = (qkv_TX.new_empty(num_tokens, count, head_dim) for count in (num_heads, num_kv_heads))
        padded_half = triton.next_power_of_2(head_dim // 2)
        tile_heads = max(1, _TURN_TILE // (2 * padded_half))
        _turn[(num_tokens, triton.cdiv(num_heads + num_kv_heads, tile_heads))](
            qkv_TX,
            turn.cosines_TE.contiguous(),
            turn.sines_TE.contiguous(),
            turn.q_norm_D if turn.q_norm_D is not None else qkv_TX,
            turn.k_norm_D if turn.k_norm_D is not None else qkv_TX,
            q_THD,
            k_TKD,
            turn.epsilon,
            num_heads,
            num_kv_heads,
            head_dim // 2,
            padded_half,
            tile_heads,
            turn.q_norm_D is not None,
            enable_fp_fusion=False,
        )
        return q_THD, k_TKD, x_TND[:, num_heads + num_kv_heads :]

    def gate(self, gate_up_TX: Tensor) -> Tensor:
        gate_up_TX = gate_up_TX.contiguous()
        num_tokens, size = len(gate_up_TX), gate_up_TX.shape[1] // 2
        out_TI = gate_up_TX.new_empty(num_tokens, size)
        grid = (num_tokens, triton.cdiv(size, _GATE_TILE))
        _gate[grid](gate_up_TX, out_TI, size, _GATE_TILE, enable_fp_fusion=False)
        return out_TI
