"""Triton: the ops that go through rows of the stream once. RMS norm, gating, and activations to 8 bits, alone or with either.

All arithmetic is float32 and rounds where the reference rounds. Knows no matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.triton_common import IS_INTERPRETED, ROUNDED_EACH, VARYING, narrow, unbroken, whole
from saccade.schemes.affine import E4M3_MAX, TINY
from saccade.schemes.scheme import Static, Weight

ROWS = 16 if IS_INTERPRETED else 1  # of a program; the interpreter pays for programs, not for numbers
PIECE = 2048  # columns of a row held at once where a row may be longer than registers allow

_TINY = tl.constexpr(TINY)


# --- activations to 8 bits -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """What a product takes: values [T, H] in the type they are multiplied in; scale [T] float32 where it follows from the row."""

    values: Tensor
    scale: Tensor | None = None


@triton.jit
def to_e4m3(x):
    """float32 within 448 to the bits of the nearest e4m3 number, half to even; int8. By arithmetic: cards before Ada lack the type."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -1048576).to(tl.float32, bitcast=True)
    steps = whole(x * 512) * 0.001953125  # below 2^-6 numbers lie 2^-9 apart
    rounded = tl.where(tl.abs(x) < 0.015625, steps, normal)
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
def gated(gate, up, dtype: tl.constexpr):
    """silu(gate) * up of float32 numbers of `dtype`, rounded as tensors of them would be; float32."""
    silu = narrow(gate / (1.0 + tl.exp(-gate)), dtype).to(tl.float32)
    return narrow(silu * up, dtype).to(tl.float32)


@triton.jit
def normed(x, factor, gain, dtype: tl.constexpr):
    """float32 x times factor, cast to `dtype`, times gain; in `dtype`."""
    return narrow(narrow(x * factor, dtype).to(tl.float32) * gain.to(tl.float32), dtype)


@triton.jit
def _load(x_at, inside, width, GATED: tl.constexpr):
    """Numbers of rows as float32. GATED: silu of each, times the one `width` further."""
    x = tl.load(x_at, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    if GATED:
        wide = gated(wide, tl.load(x_at + width, mask=inside, other=0.0).to(tl.float32), x.dtype)
    return wide


@triton.jit
def _scale_of(largest, LIMIT: tl.constexpr):
    # div_rn: an ordinary division is off by a unit in the last place on the card, and a scale shared with the file is not.
    return tl.maximum(tl.div_rn(largest, tl.zeros_like(largest) + LIMIT), _TINY)


@triton.jit
def _dynamic(x, divisor, IS_FLOAT: tl.constexpr, LIMIT: tl.constexpr):
    x = tl.div_rn(tl.where(tl.abs(x) < float("inf"), x, 0.0), divisor)
    x = tl.minimum(tl.maximum(x, -LIMIT), LIMIT)
    if IS_FLOAT:
        return to_e4m3(x)
    return whole(x).to(tl.int8)


@triton.jit
def quantized(x, scale, zero):
    """float32 to int8 by a scale and zero point that are given."""
    x = tl.div_rn(x, tl.zeros_like(x) + scale) + zero
    return whole(tl.minimum(tl.maximum(x, -128.0), 127.0)).to(
        tl.int8
    )  # the bounds are whole: to clamp first gives the same


@triton.jit(do_not_specialize=VARYING)
def _quantize_rows(
    x_ptr, q_ptr, scale_ptr, x_stride, T, H,
    IS_FLOAT: tl.constexpr, LIMIT: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    x_row = x_ptr + row[:, None] * x_stride
    largest = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    num_unfit = tl.zeros([ROWS, BLOCK], dtype=tl.int32)
    for start in range(0, H, BLOCK):
        column = (start + tl.arange(0, BLOCK))[None, :]
        magnitude = tl.abs(_load(x_row + column, (row < T)[:, None] & (column < H), H, GATED))
        is_finite = magnitude < float("inf")
        num_unfit += tl.where(is_finite, 0, 1)
        largest = tl.maximum(largest, tl.where(is_finite, magnitude, 0.0))
    scale = _scale_of(tl.max(largest, axis=1), LIMIT)
    tl.store(scale_ptr + row, tl.where(tl.sum(num_unfit, axis=1) > 0, float("nan"), scale), mask=row < T)
    divisor = tl.broadcast_to(scale[:, None], [ROWS, BLOCK])
    for start in range(0, H, BLOCK):
        column = (start + tl.arange(0, BLOCK))[None, :]
        inside = (row < T)[:, None] & (column < H)
        x = _load(x_row + column, inside, H, GATED)
        tl.store(q_ptr + row[:, None] * H + column, _dynamic(x, divisor, IS_FLOAT, LIMIT), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def _each(
    x_ptr, y_ptr, scale_ptr, zero_ptr, x_stride, T, H, GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Number by number: gated, or quantized by a scale and zero point that are given, or both."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (row < T) & (column < H)
    x = _load(x_ptr + row * x_stride + column, inside, H, GATED)
    if scale_ptr is not None:
        tl.store(y_ptr + row * H + column, quantized(x, tl.load(scale_ptr), tl.load(zero_ptr)), mask=inside)
    else:
        tl.store(y_ptr + row * H + column, narrow(x, y_ptr.dtype.element_ty), mask=inside)


def rows_for(x: Tensor, weight: Weight, is_gated: bool = False) -> Rows:
    """x: [T, H] as `weight` multiplies it; of x [T, 2H], gate first, silu(gate) * up where it `is_gated`.

    A row with a NaN or an infinity has the scale NaN, so it comes out as NaN.
    """
    x = unbroken(x)
    num_rows, width = len(x), x.shape[1] // 2 if is_gated else x.shape[1]
    if weight.scheme.activation == "dynamic":
        rows = _dynamic_rows(num_rows, width, weight, x.device)
        if num_rows:
            _quantize_rows[(triton.cdiv(num_rows, ROWS),)](
                x, rows.values.view(torch.int8), rows.scale, x.stride(0), num_rows, width,
                IS_FLOAT=weight.scheme.is_float, LIMIT=_limit(weight), GATED=is_gated,
                ROWS=ROWS, BLOCK=min(PIECE, triton.next_power_of_2(width)), num_warps=4, **ROUNDED_EACH,
            )  # fmt: skip
        return rows
    return (
        Rows(_number_by_number(x, width, weight.static, is_gated)) if is_gated or weight.static is not None else Rows(x)
    )


def _number_by_number(x: Tensor, width: int, static: Static | None, is_gated: bool) -> Tensor:
    y = torch.empty(len(x), width, dtype=x.dtype if static is None else torch.int8, device=x.device)
    if len(x):
        block = min(1024, triton.next_power_of_2(width))
        scale, zero = (None, None) if static is None else (static.scale, static.zero)
        _each[(triton.cdiv(len(x), ROWS), triton.cdiv(width, block))](
            x,
            y,
            scale,
            zero,
            x.stride(0),
            len(x),
            width,
            GATED=is_gated,
            ROWS=ROWS,
            BLOCK=block,
            num_warps=4,
            **ROUNDED_EACH,
        )
    return y


def _dynamic_rows(num_rows: int, width: int, weight: Weight, device: torch.device) -> Rows:
    dtype = torch.float8_e4m3fn if weight.scheme.is_float else torch.int8
    return Rows(
        torch.empty(num_rows, width, dtype=dtype, device=device),
        torch.empty(num_rows, dtype=torch.float32, device=device),
    )


def _limit(weight: Weight) -> float:
    return E4M3_MAX if weight.scheme.is_float else 127.0


# --- gate and norm ---------------------------------------------------------------------------------------------------


def silu_mul(gate_up: Tensor) -> Tensor:
    gate_up = unbroken(gate_up)
    return _number_by_number(gate_up, gate_up.shape[1] // 2, None, is_gated=True)


@triton.jit(do_not_specialize=VARYING)
def _rms_norm(
    x_ptr, residual_ptr, gain_ptr, y_ptr, total_ptr, row_scale_ptr, scale_ptr, zero_ptr, x_stride, residual_stride, T, H, eps,
    IS_FLOAT: tl.constexpr, LIMIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """row_scale_ptr: quantized, a scale for each row. scale_ptr and zero_ptr: quantized by those."""
    line = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row, column = line[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (row < T) & (column < H)
    dtype = x_ptr.dtype.element_ty
    wide = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0)
        total = narrow(wide + residual.to(tl.float32), dtype)
        tl.store(total_ptr + row * H + column, total, mask=inside)
        wide = total.to(tl.float32)
    mean = tl.sum(wide * wide, axis=1) / H
    gain = tl.load(gain_ptr + column, mask=column < H, other=0.0)
    y = normed(wide, tl.math.rsqrt(mean + eps)[:, None], gain, dtype)
    y_at = y_ptr + row * H + column
    if row_scale_ptr is not None:
        y = y.to(tl.float32)
        is_finite = tl.abs(y) < float("inf")
        scale = _scale_of(tl.max(tl.where(is_finite, tl.abs(y), 0.0), axis=1), LIMIT)
        is_unfit = tl.max(tl.where(is_finite, 0, 1), axis=1) > 0
        tl.store(row_scale_ptr + line, tl.where(is_unfit, float("nan"), scale), mask=line < T)
        tl.store(y_at, _dynamic(y, tl.broadcast_to(scale[:, None], [ROWS, BLOCK]), IS_FLOAT, LIMIT), mask=inside)
    elif scale_ptr is not None:
        tl.store(y_at, quantized(y.to(tl.float32), tl.load(scale_ptr), tl.load(zero_ptr)), mask=inside)
    else:
        tl.store(y_at, y, mask=inside)


def rms_norm(x: Tensor, gain: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    rows, total = norm_rows(x, gain, eps, residual, None)
    return rows.values, total


def norm_rows(
    x: Tensor, gain: Tensor, eps: float, residual: Tensor | None, weight: Weight | None
) -> tuple[Rows, Tensor]:
    """RmsNorm of the record, with the normed rows as `weight` multiplies them; None: as they are."""
    x = unbroken(x)
    residual = None if residual is None else unbroken(residual)
    (num_rows, num_columns), static = x.shape, None if weight is None else weight.static
    if weight is not None and weight.scheme.activation == "dynamic":
        rows = _dynamic_rows(num_rows, num_columns, weight, x.device)
    else:
        dtype = x.dtype if static is None else torch.int8
        rows = Rows(torch.empty(num_rows, num_columns, dtype=dtype, device=x.device))
    total = x if residual is None else torch.empty(num_rows, num_columns, dtype=x.dtype, device=x.device)
    is_float = rows.values.dtype == torch.float8_e4m3fn
    if num_rows:
        block = triton.next_power_of_2(num_columns)
        scale, zero = (None, None) if static is None else (static.scale, static.zero)
        _rms_norm[(triton.cdiv(num_rows, ROWS),)](
            x, residual, gain, rows.values.view(torch.int8) if is_float else rows.values, total, rows.scale, scale, zero,
            x.stride(0), 0 if residual is None else residual.stride(0), num_rows, num_columns, eps,
            IS_FLOAT=is_float, LIMIT=E4M3_MAX if is_float else 127.0,
            ROWS=ROWS, BLOCK=block, num_warps=min(16, max(1, block // 512)), **ROUNDED_EACH,
        )  # fmt: skip
    return rows, total
