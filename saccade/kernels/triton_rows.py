"""Triton: the ops that go through rows once. RMS norm, rotary, gating, quantized activations, storing keys and values.

All arithmetic is float32 and rounds where the reference rounds. Knows no matrices.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.record import PagedLayout
from saccade.schemes.affine import E4M3_MAX, TINY
from saccade.schemes.scheme import Static

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROWS = 16 if IS_INTERPRETED else 1  # of a program; the interpreter pays for programs, not for numbers
HEAD_ROWS = 64 if IS_INTERPRETED else 8  # the same where a row is a head
PIECE = 2048  # columns of a row held at once where a row may be longer than registers allow

_INTERPRETED = tl.constexpr(IS_INTERPRETED)
_TINY = tl.constexpr(TINY)
_E4M3_MAX = tl.constexpr(E4M3_MAX)
_ROUNDER = tl.constexpr(
    1.5 * 2**23
)  # added and subtracted, it leaves a float32 below 2^22 a whole number, half to even


# --- where the interpreter differs from the card ----------------------------------------------------------------------


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 to `dtype`, half to even. The card rounds so by itself; Triton's interpreter cuts bfloat16 off instead."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def whole(x):
    """The nearest whole number of a float32 below 2^22, half to even."""
    return (x + _ROUNDER) - _ROUNDER


@triton.jit
def operand(x, dtype: tl.constexpr):
    """x, whose numbers `dtype` holds, as what `dot` multiplies. The interpreter makes no bfloat16 of whole numbers."""
    if _INTERPRETED:
        return x.to(tl.float32)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc):
    """acc + a b, in the type of acc; float32 is not shortened. The interpreter knows no bfloat16 here, and floats are its fastest.

    A tile's sum of int8 products is exact in float32: at most 2^14 x 256.
    """
    if _INTERPRETED:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32)).to(acc.dtype)
    return tl.dot(a, b, acc, input_precision="ieee")


# --- norm, gate, rotary ----------------------------------------------------------------------------------------------


@triton.jit
def _rms_norm(
    x_ptr, residual_ptr, gain_ptr, y_ptr, total_ptr, x_stride, residual_stride, T, H, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < T) & (column < H)
    dtype = x_ptr.dtype.element_ty
    wide = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0)
        total = narrow(wide + residual.to(tl.float32), dtype)
        tl.store(total_ptr + row * H + column, total, mask=inside)
        wide = total.to(tl.float32)
    mean = tl.sum(wide * wide, axis=1) / H
    normed = narrow(wide * tl.math.rsqrt(mean + eps)[:, None], dtype).to(tl.float32)
    gain = tl.load(gain_ptr + column, mask=column < H, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * H + column, narrow(normed * gain, dtype), mask=inside)


def rms_norm(x: Tensor, gain: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    x = unbroken(x)
    residual = None if residual is None else unbroken(residual)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(y)
    num_rows, num_columns = x.shape
    if num_rows:
        block = triton.next_power_of_2(num_columns)
        _rms_norm[(triton.cdiv(num_rows, ROWS),)](
            x, residual, gain, y, total, x.stride(0), 0 if residual is None else residual.stride(0), num_rows, num_columns,
            eps, ROWS=ROWS, BLOCK=block, num_warps=min(16, max(1, block // 512)),
        )  # fmt: skip
    return y, total


@triton.jit
def _silu_mul(x_ptr, y_ptr, x_stride, T, I, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # noqa: E741
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (row < T) & (column < I)
    dtype = x_ptr.dtype.element_ty
    gate = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + I + column, mask=inside, other=0.0).to(tl.float32)
    silu = narrow(gate / (1.0 + tl.exp(-gate)), dtype).to(tl.float32)
    tl.store(y_ptr + row * I + column, narrow(silu * up, dtype), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    gate_up = unbroken(gate_up)
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty(num_rows, width, dtype=gate_up.dtype, device=gate_up.device)
    if num_rows:
        block = min(1024, triton.next_power_of_2(width))
        _silu_mul[(triton.cdiv(num_rows, ROWS), triton.cdiv(width, block))](
            gate_up, y, gate_up.stride(0), num_rows, width, ROWS=ROWS, BLOCK=block, num_warps=4
        )
    return y


@triton.jit
def _rotate(
    x_ptr, y_ptr, cos_ptr, sin_ptr, program, T, x_token, x_head,
    N: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (program * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]  # token by token, head by head
    token, head = row // N, row % N
    element = tl.arange(0, BLOCK)[None, :]
    inside = (token < T) & (element < HALF)
    dtype = x_ptr.dtype.element_ty
    cos = tl.load(cos_ptr + token * HALF + element, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + token * HALF + element, mask=inside, other=0.0)
    source = x_ptr + token * x_token + head * x_head + element
    low = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    target = y_ptr + row * (2 * HALF) + element
    tl.store(target, narrow(low * cos - high * sin, dtype), mask=inside)
    tl.store(target + HALF, narrow(high * cos + low * sin, dtype), mask=inside)


@triton.jit
def _rope(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, T, q_programs, q_token, q_head, k_token, k_head,
    N: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < q_programs:
        _rotate(q_ptr, q_out_ptr, cos_ptr, sin_ptr, program, T, q_token, q_head, N, HALF, ROWS, BLOCK)
    else:
        _rotate(k_ptr, k_out_ptr, cos_ptr, sin_ptr, program - q_programs, T, k_token, k_head, K, HALF, ROWS, BLOCK)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q, k = unbroken(q), unbroken(k)
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    num_tokens, num_heads, head_dim = q.shape
    if num_tokens:
        num_kv_heads, half = k.shape[1], head_dim // 2
        q_programs, k_programs = (triton.cdiv(num_tokens * heads, HEAD_ROWS) for heads in (num_heads, num_kv_heads))
        _rope[(q_programs + k_programs,)](
            q, k, cos.contiguous(), sin.contiguous(), q_out, k_out, num_tokens, q_programs,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1),
            N=num_heads, K=num_kv_heads, HALF=half, ROWS=HEAD_ROWS, BLOCK=triton.next_power_of_2(half), num_warps=4,
        )  # fmt: skip
    return q_out, k_out


# --- activations to 8 bits -------------------------------------------------------------------------------------------


@triton.jit
def to_e4m3(x):
    """float32 within 448 to the bits of the nearest e4m3 number, half to even; int8. By arithmetic: cards before Ada lack the type."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -1048576).to(tl.float32, bitcast=True)
    steps = (x * 512 + _ROUNDER) - _ROUNDER  # below 2^-6 numbers lie 2^-9 apart
    rounded = tl.where(tl.abs(x) < 0.015625, steps * 0.001953125, normal)
    half = (
        (rounded * 0.00390625).to(tl.float16).to(tl.int16, bitcast=True)
    )  # 2^-8 of it has the same bits, three zeros more
    return (((half >> 8) & 0x80) | ((half >> 7) & 0x7F)).to(tl.int8)


@triton.jit
def from_e4m3(bits):
    """The bits of e4m3 numbers, int8, as float16 numbers that are 2^-8 of them: exact, and two shifts."""
    wide = bits.to(tl.int16)
    return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def _quantize_rows(
    x_ptr, q_ptr, scale_ptr, x_stride, T, H, IS_FLOAT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    x_row = x_ptr + row[:, None] * x_stride
    largest = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    num_unfit = tl.zeros([ROWS, BLOCK], dtype=tl.int32)
    for start in range(0, H, BLOCK):
        column = (start + tl.arange(0, BLOCK))[None, :]
        magnitude = tl.abs(tl.load(x_row + column, mask=(row < T)[:, None] & (column < H), other=0.0).to(tl.float32))
        is_finite = magnitude < float("inf")
        num_unfit += tl.where(is_finite, 0, 1)
        largest = tl.maximum(largest, tl.where(is_finite, magnitude, 0.0))
    limit = _E4M3_MAX if IS_FLOAT else 127.0
    # div_rn: an ordinary division is off by a unit in the last place on the card, and a scale shared with the file is not.
    scale = tl.maximum(tl.div_rn(tl.max(largest, axis=1), tl.full([ROWS], limit, tl.float32)), _TINY)
    tl.store(scale_ptr + row, tl.where(tl.sum(num_unfit, axis=1) > 0, float("nan"), scale), mask=row < T)
    divisor = tl.broadcast_to(scale[:, None], [ROWS, BLOCK])
    for start in range(0, H, BLOCK):
        column = (start + tl.arange(0, BLOCK))[None, :]
        inside = (row < T)[:, None] & (column < H)
        x = tl.load(x_row + column, mask=inside, other=0.0).to(tl.float32)
        x = tl.div_rn(tl.where(tl.abs(x) < float("inf"), x, 0.0), divisor)
        x = tl.minimum(tl.maximum(x, -limit), limit)
        q_at = q_ptr + row[:, None] * H + column
        if IS_FLOAT:
            tl.store(q_at, to_e4m3(x), mask=inside)
        else:
            tl.store(q_at, whole(x).to(tl.int8), mask=inside)


def quantize_rows(x: Tensor, is_float: bool = False) -> tuple[Tensor, Tensor]:
    """x: [T, H]. Returns ([T, H] int8 or e4m3, scale [T] float32): see Linear in the record.

    A row with a NaN or an infinity has the scale NaN, so it comes out as NaN.
    """
    x = unbroken(x)
    q = torch.empty(x.shape, dtype=torch.float8_e4m3fn if is_float else torch.int8, device=x.device)
    scale = torch.empty(len(x), dtype=torch.float32, device=x.device)
    if len(x):
        _quantize_rows[(triton.cdiv(len(x), ROWS),)](
            x, q.view(torch.int8), scale, x.stride(0), len(x), x.shape[1],
            IS_FLOAT=is_float, ROWS=ROWS, BLOCK=min(PIECE, triton.next_power_of_2(x.shape[1])), num_warps=4,
        )  # fmt: skip
    return q, scale


@triton.jit
def _quantize_static(x_ptr, q_ptr, scale_ptr, zero_ptr, x_stride, T, H, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (row < T) & (column < H)
    scale, zero = tl.load(scale_ptr), tl.load(zero_ptr)
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    x = tl.div_rn(x, tl.zeros([ROWS, BLOCK], dtype=tl.float32) + scale) + zero
    x = whole(tl.minimum(tl.maximum(x, -128.0), 127.0))  # the bounds are whole: to clamp first gives the same
    tl.store(q_ptr + row * H + column, x.to(tl.int8), mask=inside)


def quantize_static(x: Tensor, static: Static) -> Tensor:
    """x: [T, H]. Returns [T, H] int8."""
    x = unbroken(x)
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    if len(x):
        block = min(1024, triton.next_power_of_2(x.shape[1]))
        _quantize_static[(triton.cdiv(len(x), ROWS), triton.cdiv(x.shape[1], block))](
            x, q, static.scale, static.zero, x.stride(0), len(x), x.shape[1], ROWS=ROWS, BLOCK=block, num_warps=4
        )
    return q


# --- the cache -------------------------------------------------------------------------------------------------------


@triton.jit
def _store_row(
    x_ptr, cache_ptr, scale_ptr, row, slot, T, x_token, x_head, K, D, ROW: tl.constexpr, BLOCK: tl.constexpr
):
    token, head = row // K, row % K
    element = tl.arange(0, BLOCK)[None, :]
    inside = (token < T)[:, None] & (element < D)
    x = tl.load(x_ptr + (token * x_token + head * x_head)[:, None] + element, mask=inside, other=0.0)
    at = slot * K + head
    if scale_ptr is not None:
        x = x.to(tl.float32)
        largest = tl.max(tl.abs(x), axis=1)
        scale = tl.maximum(tl.div_rn(largest, tl.zeros_like(largest) + 127.0), _TINY)
        tl.store(scale_ptr + at * (ROW // 4), scale, mask=token < T)
        x = tl.div_rn(x, tl.zeros_like(x) + scale[:, None])
        x = whole(tl.minimum(tl.maximum(x, -127.0), 127.0)).to(tl.int8)
    tl.store(cache_ptr + (at * ROW)[:, None] + element, x, mask=inside)


@triton.jit
def _store_kv(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, k_scale_ptr, v_scale_ptr, slots_ptr, T, k_token, k_head, v_token, v_head,
    K: tl.constexpr, D: tl.constexpr, ROW: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    slot = tl.load(slots_ptr + row // K, mask=row // K < T, other=0).to(tl.int64)
    _store_row(k_ptr, k_cache_ptr, k_scale_ptr, row, slot, T, k_token, k_head, K, D, ROW, BLOCK)
    _store_row(v_ptr, v_cache_ptr, v_scale_ptr, row, slot, T, v_token, v_head, K, D, ROW, BLOCK)


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, layout: PagedLayout) -> None:
    k, v = unbroken(k), unbroken(v)
    num_tokens, num_heads, head_dim = k.shape
    k_scale = v_scale = None
    if k_cache.dtype == torch.int8:  # a row's last four bytes are its scale
        k_scale, v_scale = (cache.view(torch.float32)[..., -1] for cache in (k_cache, v_cache))
    if num_tokens:
        _store_kv[(triton.cdiv(num_tokens * num_heads, HEAD_ROWS),)](
            k, v, k_cache, v_cache, k_scale, v_scale, layout.slots, num_tokens,
            k.stride(0), k.stride(1), v.stride(0), v.stride(1), K=num_heads, D=head_dim, ROW=k_cache.shape[-1],
            ROWS=HEAD_ROWS, BLOCK=triton.next_power_of_2(head_dim), num_warps=4,
        )  # fmt: skip


def unbroken(x: Tensor) -> Tensor:
    """The same with its last dimension contiguous; the others may have any stride."""
    return x if x.stride(-1) == 1 else x.contiguous()
