"""Linear layers in C++: what of a Weight the library is told, and the call."""

from __future__ import annotations

import ctypes
import weakref
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from saccade.kernels import reference
from saccade.kernels.library import Library
from saccade.kernels.record import Linear
from saccade.schemes.scheme import Weight

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # SaccadeDtype
DENSE, W8A16, W4A16, W8A8, W8A8_DYNAMIC, W4A8, W4A8_FLOAT, FP8 = range(8)  # SaccadeScheme


class Layer(ctypes.Structure):
    """SaccadeLinear of csrc/linear.h."""

    _fields_ = (
        ("scheme", c_int32),
        ("dtype", c_int32),
        ("out_features", c_int64),
        ("in_features", c_int64),
        ("group_size", c_int64),
        ("values", c_void_p),
        ("scale", c_void_p),
        ("group_scale", c_void_p),
        ("zero", c_void_p),
        ("bias", c_void_p),
        ("quant_bias", c_void_p),
        ("deq_scale", c_void_p),
        ("static_scale", c_float),
        ("static_zero", c_float),
    )


def kind(weight: Weight, dtype: torch.dtype) -> int | None:
    """The library's word for the weight's scheme; None if it does not compute it with x of `dtype`."""
    scheme = weight.scheme
    if dtype not in DTYPES:
        return None
    if scheme.is_dense:
        return DENSE if dtype == weight.values.dtype == torch.bfloat16 else None  # torch is twice as fast in others
    if scheme.is_two_stage:
        return W4A8
    if scheme.weight_bits == 4:
        return W4A16 if scheme.activation == "none" else W4A8_FLOAT
    return {"w8a16": W8A16, "w8a8": W8A8, "w8a8-dynamic": W8A8_DYNAMIC, "fp8": FP8}[scheme.name]


def describe(weight: Weight, dtype: torch.dtype) -> Layer | None:
    """`weight` as the library knows it, for x of `dtype`; None if the library does not compute this kind."""
    scheme = kind(weight, dtype)
    if scheme is None:
        return None
    if not all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in weight.tensors()):
        return None
    if weight.bias is not None and weight.bias.dtype != dtype and weight.static is None:
        return None
    static = weight.static
    return Layer(
        scheme,
        DTYPES[dtype],
        weight.out_features,
        weight.in_features,
        weight.scheme.group_size or 0,
        weight.values.data_ptr(),
        _pointer(weight.scale),
        _pointer(weight.group_scale),
        _pointer(weight.zero),
        _pointer(weight.bias),
        _pointer(static.quant_bias if static else None),
        _pointer(static.deq_scale if static else None),
        float(static.scale) if static else 0.0,
        float(static.zero) if static else 0.0,
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def alike_rows(weight: Weight, dtype: torch.dtype) -> int:
    """See record.py. Sums of whole numbers are exact in any order; those of floats take another order where many rows begin.

    Attention, too, is alike for so many queries of a sequence (FEW_QUERIES of csrc/attention.cpp), and no more.
    """
    layer = describe(weight, dtype)
    return 1 if layer is None else {DENSE: 8, W8A16: 4, W4A16: 4}.get(layer.scheme, 16)


def linear(library: Library) -> Linear:
    """The op over `library`. Weights it does not compute, and inputs that want gradients, go to the reference."""
    call = library.functions.saccade_linear
    call.argtypes = [c_void_p, c_void_p, c_int64, c_void_p, c_int64]
    call.restype = None
    known: dict[tuple[int, torch.dtype], tuple[Layer | None, int]] = {}  # by the weight's id; its end removes it

    def layer_of(weight: Weight, dtype: torch.dtype) -> tuple[Layer | None, int]:
        layer = describe(weight, dtype)
        entry = (layer, ctypes.addressof(layer) if layer is not None else 0)
        known[id(weight), dtype] = entry
        weakref.finalize(weight, known.pop, (id(weight), dtype), None)
        return entry

    def run(x: Tensor, weight: Weight) -> Tensor:
        layer, address = known.get((id(weight), x.dtype)) or layer_of(weight, x.dtype)
        if layer is None or (x.requires_grad and torch.is_grad_enabled()):
            return reference.linear(x, weight)
        if x.stride(-1) != 1:
            x = x.contiguous()
        y = x.new_empty(x.shape[0], layer.out_features)
        call(address, x.data_ptr(), x.stride(0), y.data_ptr(), x.shape[0])
        return y

    return run
