"""Arithmetic in one fixed order: the same bits on every processor. Matrix products, causal attention, sums, softmax, gelu.

The order is that of torch 2.13 with one thread on a processor with AVX-512 and bfloat16 instructions but no AMX (AMD's Zen 4), which
wrote the reference quantizer's published results: docs/quantization-exact.md. In bfloat16 all of it is C++ (csrc/ordered*.cpp), as are
sums and softmax in float32. Everything else, and everything where the library is missing, is torch's, whose order is the processor's.
"""

from __future__ import annotations

import ctypes
import math
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.kernels.library import Library, load

LANES = 16  # of float32 in a vector of AVX-512


class _Product(ctypes.Structure):
    """SaccadeOrderedProduct of csrc/ordered.h."""

    _fields_ = (
        ("a", c_void_p),
        ("b", c_void_p),
        ("panels", c_void_p),
        ("bias", c_void_p),
        ("y", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("depth", c_int64),
        ("a_stride", c_int64),
        ("b_row_stride", c_int64),
        ("b_column_stride", c_int64),
    )


class _Panels(ctypes.Structure):
    """SaccadeOrderedPanels of csrc/ordered.h."""

    _fields_ = (
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("panels", c_void_p),
        ("bytes", POINTER(c_int64)),
        ("columns", c_int64),
        ("depth", c_int64),
    )


class _Levels(ctypes.Structure):
    """SaccadeOrderedLevels of csrc/ordered.h."""

    _fields_ = (
        ("x", c_void_p),
        ("scale", c_void_p),
        ("y", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("step", c_float),
        ("zero", c_float),
    )


class _GateUp(ctypes.Structure):
    """SaccadeOrderedGateUp of csrc/ordered.h."""

    _fields_ = (
        ("both", c_void_p),
        ("bias", c_void_p),
        ("silu", c_void_p),
        ("exact", c_void_p),
        ("distances", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
    )


class _Segments(ctypes.Structure):
    """SaccadeOrderedSegments of csrc/ordered.h."""

    _fields_ = (
        ("qkv", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("bounds", c_void_p),
        ("exact", c_void_p),
        ("y", c_void_p),
        ("distances", c_void_p),
        ("num_segments", c_int64),
        ("head_dim", c_int64),
        ("root", c_float),
    )


class _Causal(ctypes.Structure):
    """SaccadeOrderedCausal of csrc/ordered.h."""

    _fields_ = (
        ("logits", c_void_p),
        ("y", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("tokens", c_int64),
        ("first", c_int64),
    )


class _Attention(ctypes.Structure):
    """SaccadeOrderedAttention of csrc/ordered.h."""

    _fields_ = (
        ("q", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("y", c_void_p),
        ("heads", c_int64),
        ("tokens", c_int64),
        ("head_dim", c_int64),
        ("lanes", c_int32),
    )


class _Rows(ctypes.Structure):
    """SaccadeOrderedRows of csrc/ordered.h."""

    _fields_ = (
        ("x", c_void_p),
        ("y", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("lanes", c_int32),
        ("is_bf16", c_int32),
    )


def _library(*tensors: Tensor) -> Library | None:
    library = load()
    return library if isinstance(library, Library) and all(t.device.type == "cpu" for t in tensors) else None


def is_ordered(dtype: torch.dtype) -> bool:
    """Whether products of matrices of `dtype` are summed in the fixed order."""
    return dtype == torch.bfloat16 and isinstance(load(), Library)


@dataclass(frozen=True)
class Panels:
    """A weight [O, H] in bfloat16 as the products of the instruction set in use read it."""

    data: Tensor
    num_outputs: int
    depth: int


def panels(weight: Tensor, scale: Tensor | None = None, out: Panels | None = None) -> Panels:
    """weight: [O, H]; scale: [H], both bfloat16. With a scale: of weight * scale in 255 levels for each row and back.

    `out`: of a weight of this shape, whose memory is taken.
    """
    library = _needed(weight)
    weight, scale = weight.contiguous(), None if scale is None else scale.contiguous()
    size = c_int64()
    op = _Panels(weight.data_ptr(), _pointer(scale), None, ctypes.pointer(size), *weight.shape)
    if out is None:
        library.functions.saccade_ordered_panels(ctypes.byref(op))
        out = Panels(torch.empty(size.value, dtype=torch.uint8), *weight.shape)
    op.panels = out.data.data_ptr()
    library.functions.saccade_ordered_panels(ctypes.byref(op))
    return out


def product(x: Tensor, weight: Panels) -> Tensor:
    """x: [N, H] bfloat16. Returns [N, O]."""
    y = x.new_empty(len(x), weight.num_outputs)
    sizes = (len(x), weight.num_outputs, weight.depth)
    op = _Product(x.data_ptr(), None, weight.data.data_ptr(), None, y.data_ptr(), *sizes, x.stride(0), 0, 0)
    _needed(x).functions.saccade_ordered_product(ctypes.byref(op))
    return y


def levels(x: Tensor, scale: Tensor, step: float, zero: float) -> Tensor:
    """x / scale in 256 levels of width `step` and back. x: [N, H]; scale: [H], both bfloat16 and contiguous."""
    y = torch.empty_like(x)
    op = _Levels(x.data_ptr(), scale.data_ptr(), y.data_ptr(), *x.shape, step, zero)
    _needed(x).functions.saccade_ordered_levels(ctypes.byref(op))
    return y


@cache
def _silu_of_all() -> Tensor:
    """[65536]: of each number of bfloat16, by its bits."""
    return F.silu(torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).roll(1 << 15).view(torch.bfloat16))


def gate_up_distances(both: Tensor, bias: Tensor | None, exact: Tensor) -> Tensor:
    """Squared distances of the rows of silu(gate) * up to exact's. both: [N, 2 M]; bias: [2 M]; exact: [N, M]; bfloat16, contiguous.

    Returns [N] float32. M: at least 16.
    """
    distances = torch.empty(len(both))
    silu, sizes = _silu_of_all().data_ptr(), exact.shape
    op = _GateUp(both.data_ptr(), _pointer(bias), silu, exact.data_ptr(), distances.data_ptr(), *sizes)
    _needed(both).functions.saccade_ordered_gate_up(ctypes.byref(op))
    return distances


@dataclass(frozen=True)
class Segments:
    """Patches that attend to each other, one group after the other. cos, sin: [N, D] float32, contiguous.

    bounds: cumulative, from 0 to N, even. Segments are parts of 16 patches or more: sums are those over all of them with a mask,
    wherever a segment lies among them, as long as it begins at an even place.
    """

    cos: Tensor
    sin: Tensor
    bounds: tuple[int, ...]
    root: float  # of what logits are divided by


def segment_attention(qkv: Tensor, segments: Segments) -> Tensor:
    """One head. qkv: [N, 3 D] bfloat16, contiguous. Returns [N, D]."""
    y = qkv.new_empty(len(qkv), qkv.shape[1] // 3)
    _segments(qkv, segments, None, y, None)
    return y


def segment_distances(qkv: Tensor, segments: Segments, exact: Tensor) -> Tensor:
    """Squared distances of the same to `exact` [N, D]. Returns [N] bfloat16. D: at least 32."""
    distances = torch.empty(len(qkv))
    _segments(qkv, segments, exact, None, distances)
    return distances.to(qkv.dtype)


def _segments(qkv: Tensor, of: Segments, exact: Tensor | None, y: Tensor | None, distances: Tensor | None) -> None:
    bounds = (c_int64 * len(of.bounds))(*of.bounds)
    results = [_pointer(t) for t in (exact, y, distances)]
    op = _Segments(
        qkv.data_ptr(), of.cos.data_ptr(), of.sin.data_ptr(), ctypes.addressof(bounds),
        *results, len(of.bounds) - 1, qkv.shape[1] // 3, of.root,
    )  # fmt: skip
    _needed(qkv).functions.saccade_ordered_segments(ctypes.byref(op))


def causal_softmax(logits: Tensor, first: int) -> Tensor:
    """logits: [heads, rows, N] float32 of tokens from `first` on; N: at least 16. Returns what each sees, in bfloat16, then zeros."""
    logits = logits.contiguous()
    y = torch.empty_like(logits, dtype=torch.bfloat16)
    rows, columns = logits.shape[1:]
    op = _Causal(logits.data_ptr(), y.data_ptr(), len(logits) * rows, columns, rows, first)
    _needed(logits).functions.saccade_ordered_causal(ctypes.byref(op))
    return y


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _needed(*tensors: Tensor) -> Library:
    library = _library(*tensors)
    assert library is not None, "is_ordered() tells before"
    return library


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a: [..., N, K]; b: [..., K, M], of as many dimensions. Returns [..., N, M] in their type."""
    if a.dtype != torch.bfloat16 or (library := _library(a, b)) is None:
        return a @ b
    y = a.new_empty(*a.shape[:-1], b.shape[-1])
    if a.dim() == 2:
        _multiply(library, a, b, None, y)
    else:
        for i in range(len(a)):
            y[i] = matmul(a[i], b[i])
    return y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: [N, H]; weight: [O, H]; bias: [O]. Returns [N, O]: the sum and the bias are rounded together."""
    if x.dtype != torch.bfloat16 or (library := _library(x, weight)) is None:
        return F.linear(x, weight, bias)
    y = x.new_empty(len(x), len(weight))
    _multiply(library, x, weight.T, bias, y)
    return y


def _multiply(library: Library, a: Tensor, b: Tensor, bias: Tensor | None, y: Tensor) -> None:
    if a.stride(1) != 1:
        a = a.contiguous()
    bias = None if bias is None else bias.contiguous()
    pointers = (a.data_ptr(), b.data_ptr(), None, _pointer(bias), y.data_ptr())
    sizes = (a.shape[0], b.shape[1], a.shape[1])
    op = _Product(*pointers, *sizes, a.stride(0), b.stride(0), b.stride(1))
    library.functions.saccade_ordered_product(ctypes.byref(op))


def patch_convolution(patches: Tensor, weight: Tensor) -> Tensor:
    """A convolution over patches that do not overlap. patches: [P, C, T, H, W]; weight: [O, C, T, H, W]. Returns [P, O].

    Sums go place by place, over the channels of each, an even number of them.
    """
    if weight.dtype != torch.bfloat16 or _library(patches, weight) is None:
        return F.conv3d(patches, weight, stride=weight.shape[2:]).flatten(1)
    odd = weight.shape[1] % 2
    x, w = (F.pad(t.permute(0, 2, 3, 4, 1), (0, odd)).flatten(1) for t in (patches, weight))
    return linear(x, w)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, lanes: int = LANES) -> Tensor:
    """q, k, v: [1, heads, N, D]. Returns [1, heads, N, D]: torch's flash attention."""
    if q.dtype != torch.bfloat16 or (library := _library(q, k, v)) is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.0, is_causal=q.shape[2] > 1)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    y = torch.empty_like(q)
    op = _Attention(*(t.data_ptr() for t in (q, k, v, y)), *q.shape[1:], lanes)
    library.functions.saccade_ordered_attention(ctypes.byref(op))
    return y


def gelu(x: Tensor) -> Tensor:
    """The exact form (with erf), in x's type. In bfloat16 rounded once, as oneDNN nearly does there."""
    if x.dtype != torch.bfloat16:
        return F.gelu(x)
    wide = x.double()
    return (wide * torch.erfc(wide * -math.sqrt(0.5)) / 2).to(x.dtype)


def row_sums(x: Tensor, lanes: int = LANES) -> Tensor:
    """The sums over the last dimension, in x's type."""
    wide = lanes if x.dtype == torch.float32 else 2 * lanes
    is_ours = x.dtype in (torch.float32, torch.bfloat16) and x.shape[-1] >= wide
    if not is_ours or (library := _library(x)) is None:
        return x.sum(-1)
    x = x.contiguous()
    y = torch.empty(x.shape[:-1], dtype=torch.float32)
    _each_row(library.functions.saccade_ordered_sum, x, y, lanes)
    return y.to(x.dtype)


def row_means(x: Tensor) -> Tensor:
    """The means over the last dimension, in x's type."""
    return row_sums(x) / x.shape[-1]


def softmax(x: Tensor, lanes: int = LANES) -> Tensor:
    """Over the last dimension, in float32. x: any type."""
    x = x.float().contiguous()
    if (library := _library(x)) is None:
        return x.softmax(-1)
    y = torch.empty_like(x)
    _each_row(library.functions.saccade_ordered_softmax, x, y, lanes)
    return y


def _each_row(call: ctypes._NamedFuncPointer, x: Tensor, y: Tensor, lanes: int) -> None:
    columns = x.shape[-1]
    op = _Rows(x.data_ptr(), y.data_ptr(), x.numel() // max(1, columns), columns, lanes, x.dtype == torch.bfloat16)
    call(ctypes.byref(op))
