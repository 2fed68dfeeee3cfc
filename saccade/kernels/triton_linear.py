"""Triton: linear layers with quantized weights, for few rows and for many. Dense ones are torch's own.

One kernel multiplies for all schemes. The weight is the left operand: what it becomes on the way (a nibble widened, an
integer made a float) stays in registers, and the few columns of a decoding batch fit the matrix unit's free dimension.
With few rows the columns are split among programs, to keep enough bytes in flight, and a second kernel adds the parts.
One row of weights that are dense or of 8 bits alone is multiplied without the matrix unit: a program goes through whole rows of the
weight, so that nothing is left to add.
Letters: T rows of x, O outputs, H columns, G columns in a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels import reference
from saccade.kernels.triton_common import FUSED, IS_INTERPRETED, ROUNDED_EACH, VARYING, dot, narrow, operand
from saccade.kernels.triton_cuts import FEW_ROWS, Cut, cut_for, has_one_row_kernel
from saccade.kernels.triton_rows import Rows, from_e4m3, gated, normed, quantized, rows_for
from saccade.schemes.affine import quantize_weight
from saccade.schemes.packing import RUN
from saccade.schemes.scheme import FP8, Static, Weight

SCALED_MM_CAPABILITY = (9, 0)  # from here on torch multiplies e4m3 with a scale for each row

_RUN = tl.constexpr(RUN)
_FLOATS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _spread(values, COUNT: tl.constexpr):
    """[O, groups] -> [O, groups * COUNT], each COUNT times."""
    wide = tl.broadcast_to(values[:, :, None], [values.shape[0], values.shape[1], COUNT])
    return tl.reshape(wide, [values.shape[0], values.shape[1] * COUNT])


@triton.jit
def _scaled(acc, o, is_output, t, is_row, scale_ptr, x_scale_ptr, bias_ptr, quant_bias_ptr):
    """What the record says is done to the sums: acc [O, T]. Returns [O, T] float32."""
    if quant_bias_ptr is not None:
        acc += tl.load(quant_bias_ptr + o, mask=is_output, other=0)[:, None]
    y = acc.to(tl.float32)
    if x_scale_ptr is not None:
        y *= tl.load(x_scale_ptr + t, mask=is_row, other=0.0)[None, :]
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + o, mask=is_output, other=0.0)[:, None]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + o, mask=is_output, other=0.0).to(tl.float32)[:, None]
    return y


@triton.jit
def _store_gated(gate, up, y_at, inside, out_scale_ptr, out_zero_ptr, DTYPE: tl.constexpr):
    """silu(gate) * up as numbers of DTYPE, or quantized by a scale and zero point that are given."""
    x = gated(narrow(gate, DTYPE).to(tl.float32), narrow(up, DTYPE).to(tl.float32), DTYPE)
    if out_scale_ptr is not None:
        tl.store(y_at, quantized(x, tl.load(out_scale_ptr), tl.load(out_zero_ptr)), mask=inside)
    else:
        tl.store(y_at, narrow(x, DTYPE), mask=inside)


@triton.jit
def _store(
    y, y_ptr, o, t, T, O, tile, out_scale_ptr, out_zero_ptr,  # noqa: E741
    GATED: tl.constexpr, DTYPE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """y: [BLOCK_O, BLOCK_T] float32, the tile's outputs o of rows t; GATED: as in _matmul."""
    is_row = t < T
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(y, [BLOCK_O // 2, 2, BLOCK_T]), [0, 2, 1]))
        pair = tile * (BLOCK_O // 2) + tl.arange(0, BLOCK_O // 2)
        y_at = y_ptr + t.to(tl.int64)[None, :] * (O // 2) + pair[:, None]
        _store_gated(gate, up, y_at, (pair < O // 2)[:, None] & is_row[None, :], out_scale_ptr, out_zero_ptr, DTYPE)
    else:
        y_at = y_ptr + t.to(tl.int64)[None, :] * O + o[:, None]
        tl.store(y_at, narrow(y, y_ptr.dtype.element_ty), mask=(o < O)[:, None] & is_row[None, :])


@triton.jit(do_not_specialize=VARYING)
def _matmul(
    x_ptr, w_ptr, group_scale_ptr, zero_ptr, scale_ptr, x_scale_ptr, bias_ptr, quant_bias_ptr, y_ptr, parts_ptr,
    out_scale_ptr, out_zero_ptr, T, O, H, x_stride, w_stride,  # noqa: E741
    GATED: tl.constexpr, DTYPE: tl.constexpr, PACKED: tl.constexpr, G: tl.constexpr,
    IS_TWO_STAGE: tl.constexpr, IS_INTEGER: tl.constexpr, IS_E4M3: tl.constexpr, DOT: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_H: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """IS_INTEGER: sums are int32. DOT: the type both operands are multiplied in. EVEN: BLOCK_H divides H.

    GATED: the first half of the outputs is the gate of the second, DTYPE what they would be stored as; a tile takes both in turn.
    4-bit weights: G >= BLOCK_H, or IS_TWO_STAGE, or both; a float group's sum is scaled when its tile is done.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    split = tl.program_id(2)
    is_row, is_output = t < T, o < O
    if GATED:
        o = o // 2 + o % 2 * (O // 2)
    x_row = x_ptr + t.to(tl.int64) * x_stride
    w_row = w_ptr + o.to(tl.int64) * w_stride
    acc = tl.zeros([BLOCK_O, BLOCK_T], dtype=tl.int32 if IS_INTEGER else tl.float32)
    share = tl.cdiv(tl.cdiv(H, SPLITS), BLOCK_H) * BLOCK_H
    begin = split * share
    for start in range(begin, tl.minimum(begin + share, H), BLOCK_H):
        if PACKED:
            # Byte b of a run holds column b in its low nibble and column b + 16 in its high one; a run is 32 columns.
            byte = tl.arange(0, BLOCK_H // 2)
            column = start + (byte // (_RUN // 2)) * _RUN + byte % (_RUN // 2)
            is_low, is_high = column < H, column + _RUN // 2 < H
            w_mask = is_output[:, None] if EVEN else is_output[:, None] & is_low[None, :]
            packed = tl.load(w_row[:, None] + (start // 2 + byte)[None, :], mask=w_mask, other=0)
            low, high = (packed << 4) >> 4, packed >> 4
            low_mask = is_row[None, :] if EVEN else is_row[None, :] & is_low[:, None]
            high_mask = is_row[None, :] if EVEN else is_row[None, :] & is_high[:, None]
            x_low = tl.load(x_row[None, :] + column[:, None], mask=low_mask, other=0)
            x_high = tl.load(x_row[None, :] + (column + _RUN // 2)[:, None], mask=high_mask, other=0)
            if IS_TWO_STAGE:
                GROUPS: tl.constexpr = BLOCK_H // G if BLOCK_H > G else 1
                group = start // G + tl.arange(0, GROUPS)
                at = group_scale_ptr + o.to(tl.int64)[:, None] * (H // G) + group[None, :]
                times = tl.load(at, mask=is_output[:, None] & (group < H // G)[None, :], other=0)
                if GROUPS > 1:
                    times = _spread(times, BLOCK_H // 2 // GROUPS)
                low, high = low * times, high * times
                acc = dot(operand(low, DOT), operand(x_low, DOT), acc)
                acc = dot(operand(high, DOT), operand(x_high, DOT), acc)
            else:
                at = o.to(tl.int64) * (H // G) + start // G
                if zero_ptr is not None:
                    zero = tl.load(zero_ptr + at, mask=is_output, other=0)[:, None]
                    low, high = low - zero, high - zero
                part = dot(operand(low, DOT), operand(x_low, DOT), tl.zeros([BLOCK_O, BLOCK_T], dtype=tl.float32))
                part = dot(operand(high, DOT), operand(x_high, DOT), part)
                acc += part * tl.load(group_scale_ptr + at, mask=is_output, other=0.0)[:, None]
        else:
            column = start + tl.arange(0, BLOCK_H)
            is_column = column < H
            w_mask = is_output[:, None] if EVEN else is_output[:, None] & is_column[None, :]
            x_mask = is_row[None, :] if EVEN else is_row[None, :] & is_column[:, None]
            w = tl.load(w_row[:, None] + column[None, :], mask=w_mask, other=0)
            x = tl.load(x_row[None, :] + column[:, None], mask=x_mask, other=0)
            if IS_E4M3:
                w, x = from_e4m3(w), from_e4m3(x)
            acc = dot(operand(w, DOT), operand(x, DOT), acc)
    if IS_E4M3:
        acc *= 65536.0  # what from_e4m3 leaves out of both factors
    if SPLITS == 1:
        y = _scaled(acc, o, is_output, t, is_row, scale_ptr, x_scale_ptr, bias_ptr, quant_bias_ptr)
        _store(y, y_ptr, o, t, T, O, tl.program_id(1), out_scale_ptr, out_zero_ptr, GATED, DTYPE, BLOCK_T, BLOCK_O)
    else:
        inside = is_output[:, None] & is_row[None, :]
        tl.store(parts_ptr + (split * T + t).to(tl.int64)[None, :] * O + o[:, None], acc, mask=inside)


@triton.jit
def _wide(w):
    """As float32. int8 by its bits, as what it adds to 2^23: a card converts fewer numbers in a cycle than it adds."""
    if w.dtype == tl.int8:
        w = (((w.to(tl.int32) & 0xFF) ^ 0x80) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0
    return w.to(tl.float32)


@triton.jit
def _one_row(
    x_ptr, w_ptr, scale_ptr, bias_ptr, y_ptr, out_scale_ptr, out_zero_ptr, gain_ptr, squares_ptr, residual_ptr, y_squares_ptr,
    O, H, w_stride, num_squares, eps,  # noqa: E741
    GATED: tl.constexpr, DTYPE: tl.constexpr, SQUARES: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """As in _matmul, of a single row. The next tile is asked for before this one is multiplied, so that bytes are always on the way.

    gain_ptr: x is normed first, the sum of its squares being that of the numbers at squares_ptr. residual_ptr: is added to y, and
    the program's share of its squares is left at y_squares_ptr.
    """
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    is_output = o < O
    if GATED:
        o = o // 2 + o % 2 * (O // 2)
    w_row = w_ptr + o.to(tl.int64) * w_stride
    column = tl.arange(0, BLOCK_H)
    w_mask = is_output[:, None] & (column < H)[None, :]
    w = tl.load(w_row[:, None] + column[None, :], mask=w_mask, other=0, eviction_policy="evict_first")
    x = tl.load(x_ptr + column, mask=column < H, other=0.0)
    if gain_ptr is not None:
        gain = tl.load(gain_ptr + column, mask=column < H, other=0.0)
        part = tl.arange(0, SQUARES)
        squares = tl.load(squares_ptr + part, mask=part < num_squares, other=0.0)
        factor = tl.math.rsqrt(tl.sum(squares, axis=0) / H + eps)
    acc = tl.zeros([BLOCK_O, BLOCK_H], dtype=tl.float32)
    for start in range(BLOCK_H, H + BLOCK_H, BLOCK_H):
        column = start + tl.arange(0, BLOCK_H)
        w_mask = is_output[:, None] & (column < H)[None, :]
        next_w = tl.load(w_row[:, None] + column[None, :], mask=w_mask, other=0, eviction_policy="evict_first")
        next_x = tl.load(x_ptr + column, mask=column < H, other=0.0)
        if gain_ptr is not None:
            next_gain = tl.load(gain_ptr + column, mask=column < H, other=0.0)
            x = normed(x.to(tl.float32), factor, gain, x.dtype)
            gain = next_gain
        acc += _wide(w) * x.to(tl.float32)[None, :]
        w, x = next_w, next_x
    t = tl.arange(0, 1)
    y = _scaled(tl.sum(acc, axis=1)[:, None], o, is_output, t, t < 1, scale_ptr, None, bias_ptr, None)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + o, mask=is_output, other=0.0).to(tl.float32)
        y = narrow(y, y_ptr.dtype.element_ty).to(tl.float32) + residual[:, None]
        y = narrow(y, y_ptr.dtype.element_ty).to(tl.float32)
        tl.store(y_squares_ptr + tl.program_id(0), tl.sum(tl.sum(y * y, axis=1), axis=0))
    _store(y, y_ptr, o, t, 1, O, tl.program_id(0), out_scale_ptr, out_zero_ptr, GATED, DTYPE, 1, BLOCK_O)


@triton.jit
def _sum_of_parts(
    parts_ptr, o, is_output, t, is_row, scale_ptr, x_scale_ptr, bias_ptr, quant_bias_ptr, T, O, SPLITS: tl.constexpr  # noqa: E741
):  # fmt: skip
    inside = is_output[:, None] & is_row[None, :]
    at = t[None, :] * O + o[:, None]  # few rows: far from 2^31, with all parts
    acc = tl.load(parts_ptr + at, mask=inside, other=0)
    for split in range(1, SPLITS):
        acc += tl.load(parts_ptr + split * T * O + at, mask=inside, other=0)
    return _scaled(acc, o, is_output, t, is_row, scale_ptr, x_scale_ptr, bias_ptr, quant_bias_ptr)


@triton.jit(do_not_specialize=VARYING)
def _add_parts(
    parts_ptr, scale_ptr, x_scale_ptr, bias_ptr, quant_bias_ptr, y_ptr, out_scale_ptr, out_zero_ptr, T, O,  # noqa: E741
    GATED: tl.constexpr, DTYPE: tl.constexpr, SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """As in _matmul; each program has BLOCK_O outputs of y."""
    t = tl.arange(0, BLOCK_T)
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    width = O // 2 if GATED else O
    is_row, is_output = t < T, o < width
    inside = is_output[:, None] & is_row[None, :]
    y_at = y_ptr + t[None, :] * width + o[:, None]
    y = _sum_of_parts(
        parts_ptr, o, is_output, t, is_row, scale_ptr, x_scale_ptr, bias_ptr, quant_bias_ptr, T, O, SPLITS
    )
    if GATED:
        up = _sum_of_parts(
            parts_ptr, o + width, is_output, t, is_row, scale_ptr, x_scale_ptr, bias_ptr, quant_bias_ptr, T, O, SPLITS
        )
        _store_gated(y, up, y_at, inside, out_scale_ptr, out_zero_ptr, DTYPE)
    else:
        tl.store(y_at, narrow(y, y_ptr.dtype.element_ty), mask=inside)


# --- the product -------------------------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Weight) -> Tensor:
    return product(rows_for(x, weight), weight, x.dtype)


def product(rows: Rows, weight: Weight, dtype: torch.dtype) -> Tensor:
    """rows: [T, H] as the weight multiplies them. Returns [T, O] in `dtype`: see Linear in the record."""
    x, x_scale = rows.values, rows.scale
    cut = cut_for(len(x), weight, x.element_size(), x.device)
    if cut is None:
        return reference.linear(x, weight)
    if weight.scheme.is_float and _is_torch_faster(x, weight, dtype):
        return _scaled_mm(x, x_scale, weight, dtype)
    out = torch.empty(len(x), weight.out_features, dtype=dtype, device=x.device)
    if out.numel():
        multiply(x, x_scale, weight, out, cut)
    return out


def gated_rows(rows: Rows, gate_up: Weight, down: Weight, dtype: torch.dtype) -> Rows:
    """silu(gate) * up, [T, I] as `down` multiplies it, of the product of rows [T, H] with the stacked `gate_up`, in `dtype`.

    With few rows the product's own launch does it, unless a scale for the whole row has to be found first.
    """
    x = rows.values
    cut = cut_for(len(x), gate_up, x.element_size(), x.device)
    if cut is None or not 0 < len(x) <= FEW_ROWS or down.scheme.activation == "dynamic":
        return rows_for(product(rows, gate_up, dtype), down, is_gated=True)
    kind = dtype if down.static is None else torch.int8
    out = torch.empty(len(x), gate_up.out_features // 2, dtype=kind, device=x.device)
    multiply(x, rows.scale, gate_up, out, cut, Gate(dtype, down.static))
    return Rows(out)


@dataclass(frozen=True)
class Gate:
    """What is done with a product whose outputs are a gate's and what it lets through, each rounded to `dtype`."""

    dtype: torch.dtype
    static: Static | None  # how the result is quantized; None: not


def multiply(
    x: Tensor, x_scale: Tensor | None, weight: Weight, out: Tensor, cut: Cut, gate: Gate | None = None
) -> None:
    """The product by our kernel, cut so. Fills out [T, O]; through a gate, [T, O / 2].

    x: [T, H] as the scheme multiplies it, x_scale: [T] float32 where activations are dynamic.
    """
    scheme = weight.scheme
    (num_rows, num_columns), num_outputs = x.shape, weight.out_features
    if cut.is_for_one_row:
        _multiply_one_row(x, weight, out, cut, gate)
        return
    static = gate.static if gate is not None else None
    out_scale, out_zero = (None, None) if static is None else (static.scale, static.zero)
    dtype = _FLOATS[gate.dtype] if gate is not None else None
    is_packed = scheme.weight_bits == 4
    has_float_groups = weight.scale is not None and weight.scale.ndim == 2
    is_integer = x.dtype == torch.int8 and not has_float_groups
    if is_integer:
        dot = tl.int8
    elif x.dtype in (torch.int8, torch.float8_e4m3fn):
        dot = tl.float16  # holds each of their numbers, and the sums are float32
    else:
        dot = _FLOATS[x.dtype]
    group_scale = weight.scale if has_float_groups else weight.group_scale
    scale: Tensor | None
    bias: Tensor | None
    quant_bias: Tensor | None
    if weight.static is not None:
        scale, bias, quant_bias = weight.static.deq_scale, None, weight.static.quant_bias
    else:
        scale, bias, quant_bias = None if has_float_groups else weight.scale, weight.bias, None
    parts = out
    if cut.splits > 1:
        kind = torch.int32 if is_integer else torch.float32
        parts = torch.empty(cut.splits, num_rows, num_outputs, dtype=kind, device=x.device)
    grid = (triton.cdiv(num_rows, cut.block_t), triton.cdiv(num_outputs, cut.block_o), cut.splits)
    if scheme.is_float:
        x = x.view(torch.int8)  # read as bytes, for a masked read fills up with whole numbers
    values = weight.values.view(torch.int8) if is_packed or scheme.is_float else weight.values
    _matmul[grid](
        x, values, group_scale, weight.zero, scale, x_scale, bias, quant_bias, out, parts, out_scale, out_zero,
        num_rows, num_outputs, num_columns, x.stride(0), values.stride(0), GATED=gate is not None, DTYPE=dtype,
        PACKED=is_packed, G=scheme.group_size or 0, IS_TWO_STAGE=weight.group_scale is not None,
        IS_INTEGER=is_integer, IS_E4M3=scheme.is_float, DOT=dot, EVEN=num_columns % cut.block_h == 0,
        BLOCK_T=cut.block_t, BLOCK_O=cut.block_o, BLOCK_H=cut.block_h, SPLITS=cut.splits,
        num_warps=cut.num_warps, num_stages=cut.num_stages, **ROUNDED_EACH,
    )  # fmt: skip
    if cut.splits > 1:
        block_t = triton.next_power_of_2(num_rows)
        block_o = 256 // block_t
        _add_parts[(triton.cdiv(out.shape[1], block_o),)](
            parts, scale, x_scale, bias, quant_bias, out, out_scale, out_zero, num_rows, num_outputs,
            GATED=gate is not None, DTYPE=dtype, SPLITS=cut.splits, BLOCK_T=block_t, BLOCK_O=block_o, num_warps=2,
            **ROUNDED_EACH,
        )  # fmt: skip


# --- one row and its stream --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stream:
    """The residual stream of one row: total [1, H]; squares [P] float32, which add up to the sum of its squares."""

    total: Tensor
    squares: Tensor


@dataclass(frozen=True)
class Norm:
    """What norms a row of the stream before it is multiplied: gain [H]."""

    gain: Tensor
    eps: float
    squares: Tensor


def goes_with_stream(weight: Weight, dtype: torch.dtype) -> bool:
    """Whether one row's product with `weight` can norm its input, and add its output to the stream."""
    cut = cut_for(1, weight, dtype.itemsize, weight.values.device) if has_one_row_kernel(weight) else None
    return cut is not None and cut.is_for_one_row


def of_stream(stream: Stream, gain: Tensor, eps: float, weight: Weight, gate: Gate | None = None) -> Tensor:
    """The product of the normed row with `weight`, [1, O]; through a gate, [1, O / 2]."""
    x = stream.total
    cut = cut_for(1, weight, x.element_size(), x.device)
    assert cut is not None, "cuBLAS norms nothing"
    out = torch.empty(1, weight.out_features // (1 if gate is None else 2), dtype=x.dtype, device=x.device)
    _multiply_one_row(x, weight, out, cut, gate, norm=Norm(gain, eps, stream.squares))
    return out


def into_stream(x: Tensor, weight: Weight, total: Tensor) -> Stream:
    """The stream behind `total` [1, O] and the product of x [1, H] with `weight`."""
    cut = cut_for(1, weight, x.element_size(), x.device)
    assert cut is not None, "cuBLAS counts no squares"
    num_programs = triton.cdiv(weight.out_features, cut.block_o)
    stream = Stream(torch.empty_like(total), torch.empty(num_programs, dtype=torch.float32, device=x.device))
    _multiply_one_row(x, weight, stream.total, cut, None, residual=total, squares=stream.squares)
    return stream


def _multiply_one_row(
    x: Tensor,
    weight: Weight,
    out: Tensor,
    cut: Cut,
    gate: Gate | None,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    squares: Tensor | None = None,
) -> None:
    static = gate.static if gate is not None else None
    out_scale, out_zero = (None, None) if static is None else (static.scale, static.zero)
    gain, norm_squares, num_squares = (None, None, 0) if norm is None else (norm.gain, norm.squares, len(norm.squares))
    _one_row[(triton.cdiv(weight.out_features, cut.block_o),)](
        x, weight.values, weight.scale, weight.bias, out, out_scale, out_zero, gain, norm_squares, residual, squares,
        weight.out_features, weight.in_features, weight.values.stride(0), num_squares, 0.0 if norm is None else norm.eps,
        GATED=gate is not None, DTYPE=None if gate is None else _FLOATS[gate.dtype],
        SQUARES=triton.next_power_of_2(max(1, num_squares)), BLOCK_O=cut.block_o, BLOCK_H=cut.block_h,
        num_warps=cut.num_warps, **FUSED,
    )  # fmt: skip


# --- e4m3 by cuBLAS ----------------------------------------------------------------------------------------------------


def _is_torch_faster(x: Tensor, weight: Weight, dtype: torch.dtype) -> bool:
    """cuBLAS multiplies e4m3 at twice the rate of 16 bits; it wants columns and outputs in sixteens and gives bfloat16."""
    return (
        len(x) > FEW_ROWS
        and dtype == torch.bfloat16
        and weight.in_features % 16 == 0
        and weight.out_features % 16 == 0
        and not IS_INTERPRETED
        and _torch_multiplies_e4m3(x.device)
    )


@cache
def _torch_multiplies_e4m3(device: torch.device) -> bool:
    """With a scale for each row, that is: not every build of torch does on every card."""
    if torch.cuda.get_device_capability(device) < SCALED_MM_CAPABILITY:
        return False
    weight = quantize_weight(Weight(torch.ones(32, 32, device=device)), FP8)
    rows = torch.ones(32, 32, device=device).to(torch.float8_e4m3fn)
    try:
        _scaled_mm(rows, torch.ones(32, device=device), weight, torch.bfloat16)
    except (RuntimeError, ValueError):
        return False
    return True


def _scaled_mm(x: Tensor, x_scale: Tensor | None, weight: Weight, dtype: torch.dtype) -> Tensor:
    assert weight.scale is not None, "e4m3 weights have scales"
    assert x_scale is not None, "e4m3 activations have scales"
    y: Tensor = torch._scaled_mm(
        x, weight.values.t(), scale_a=x_scale[:, None], scale_b=weight.scale[None, :], out_dtype=dtype
    )
    return y if weight.bias is None else y + weight.bias
