"""The ops between products in C++, and the way into the cache: what the library is told, and the calls."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from saccade.kernels import reference
from saccade.kernels.cpu_linear import DTYPES
from saccade.kernels.library import Library
from saccade.kernels.record import PagedLayout, RmsNorm, Rope, SiluMul, StoreKv


class Norm(ctypes.Structure):
    """SaccadeNorm of csrc/small.h."""

    _fields_ = (
        ("x", c_void_p),
        ("residual", c_void_p),
        ("gain", c_void_p),
        ("y", c_void_p),
        ("sum", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("x_stride", c_int64),
        ("eps", c_float),
        ("dtype", c_int32),
    )


class Gate(ctypes.Structure):
    """SaccadeSiluMul of csrc/small.h."""

    _fields_ = (
        ("gate_up", c_void_p),
        ("y", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("stride", c_int64),
        ("dtype", c_int32),
    )


class Rotation(ctypes.Structure):
    """SaccadeRope of csrc/small.h."""

    _fields_ = (
        ("x", c_void_p),
        ("y", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("rows", c_int64),
        ("heads", c_int64),
        ("head_dim", c_int64),
        ("x_stride", c_int64),
        ("y_stride", c_int64),
        ("dtype", c_int32),
    )


class Storing(ctypes.Structure):
    """SaccadeStore of csrc/small.h."""

    _fields_ = (
        ("x", c_void_p),
        ("cache", c_void_p),
        ("slots", c_void_p),
        ("rows", c_int64),
        ("heads", c_int64),
        ("head_dim", c_int64),
        ("x_stride", c_int64),
        ("dtype", c_int32),
        ("is_int8", c_int32),
    )


def rms_norm(library: Library) -> RmsNorm:
    call = library.functions.saccade_rms_norm
    call.argtypes, call.restype = [c_void_p], None

    def run(x: Tensor, gain: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not are_ours(x, gain, residual):
            return reference.rms_norm(x, gain, eps, residual)
        if x.stride(-1) != 1:
            x = x.contiguous()
        y, total = x.new_empty(x.shape), x
        if residual is not None:
            residual, total = residual.contiguous(), x.new_empty(x.shape)
        op = Norm(
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            gain.data_ptr(),
            y.data_ptr(),
            total.data_ptr(),
            x.shape[0],
            x.shape[1],
            x.stride(0),
            eps,
            DTYPES[x.dtype],
        )
        call(ctypes.byref(op))
        return y, total

    return run


def silu_mul(library: Library) -> SiluMul:
    call = library.functions.saccade_silu_mul
    call.argtypes, call.restype = [c_void_p], None

    def run(gate_up: Tensor) -> Tensor:
        if not are_ours(gate_up):
            return reference.silu_mul(gate_up)
        if gate_up.stride(-1) != 1:
            gate_up = gate_up.contiguous()
        rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
        y = gate_up.new_empty(rows, columns)
        op = Gate(gate_up.data_ptr(), y.data_ptr(), rows, columns, gate_up.stride(0), DTYPES[gate_up.dtype])
        call(ctypes.byref(op))
        return y

    return run


def rope(library: Library) -> Rope:
    call = library.functions.saccade_rope
    call.argtypes, call.restype = [c_void_p], None

    def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = heads_together(x)
        y = x.new_empty(x.shape)
        rows, heads, head_dim = x.shape
        strides = (x.stride(0), heads * head_dim)
        pointers = (x.data_ptr(), y.data_ptr(), cos.data_ptr(), sin.data_ptr())
        call(ctypes.byref(Rotation(*pointers, rows, heads, head_dim, *strides, DTYPES[x.dtype])))
        return y

    def run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if not are_ours(q, k):
            return reference.rope(q, k, cos, sin)
        cos, sin = cos.contiguous(), sin.contiguous()
        return rotated(q, cos, sin), rotated(k, cos, sin)

    return run


def store_kv(library: Library) -> StoreKv:
    call = library.functions.saccade_store
    call.argtypes, call.restype = [c_void_p], None

    def store(x: Tensor, cache: Tensor, slots: Tensor) -> None:
        x = heads_together(x)
        pointers = (x.data_ptr(), cache.data_ptr(), slots.data_ptr())
        op = Storing(*pointers, *x.shape, x.stride(0), DTYPES[x.dtype], cache.dtype == torch.int8)
        call(ctypes.byref(op))

    def run(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, layout: PagedLayout) -> None:
        slots = layout.slots.contiguous()
        store(k, k_cache, slots)
        store(v, v_cache, slots)

    return run


def heads_together(x: Tensor) -> Tensor:
    """x [T, heads, D], copied if a token's values do not lie one after the other."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def are_ours(*tensors: Tensor | None) -> bool:
    """Whether the library computes with these: on the CPU, of one type it knows, and nobody wants gradients."""
    present = [tensor for tensor in tensors if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in present):
        return False
    return present[0].dtype in DTYPES and all(tensor.dtype == present[0].dtype for tensor in present)
