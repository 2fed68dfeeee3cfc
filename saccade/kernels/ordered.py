"""Arithmetic in one fixed order: the same bits on every processor. Matrix products, causal attention, sums, softmax, gelu.

The order is that of torch 2.13 with one thread on a processor with AVX-512 and bfloat16 instructions but no AMX (AMD's Zen 4), which
wrote the reference quantizer's published results: docs/quantization-exact.md. In bfloat16 all of it is C++ (csrc/ordered.cpp); sums and
softmax in float32 are, too. Everything else, and everything where the library is missing, is torch's, whose order is the processor's.
"""

from __future__ import annotations

import ctypes
import math
from ctypes import c_int32, c_int64, c_void_p

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
        ("bias", c_void_p),
        ("y", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("depth", c_int64),
        ("a_stride", c_int64),
        ("b_row_stride", c_int64),
        ("b_column_stride", c_int64),
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
    pointers = (a.data_ptr(), b.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr())
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
