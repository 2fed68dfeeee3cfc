"""What the Triton kernels share: where the interpreter differs from a card, rounding, and rows in memory."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Options of a launch. A product and the sum behind it are rounded each, as the reference does; or once, which is faster.
# Triton's own choice differs from version to version.
ROUNDED_EACH: dict[str, bool] = {"enable_fp_fusion": False}
FUSED: dict[str, bool] = {"enable_fp_fusion": True}
# Numbers that differ from prompt to prompt: Triton would compile anew, a second a kernel, where one is 1 or in sixteens for once.
VARYING = ("T", "q_programs", "table_stride")

_INTERPRETED = tl.constexpr(IS_INTERPRETED)
_ROUNDER = tl.constexpr(
    1.5 * 2**23
)  # added and subtracted, it leaves a float32 below 2^22 a whole number, half to even


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
    # Triton 3.6 takes every sum for float32 unless told otherwise.
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def _mark(x_ptr):
    tl.store(x_ptr, 1)


def mark(device: torch.device) -> Tensor:
    """[1] int32, a one, by a kernel: whether kernels run at all."""
    x = torch.zeros(1, dtype=torch.int32, device=device)
    _mark[(1,)](x, **ROUNDED_EACH)
    return x


def unbroken(x: Tensor) -> Tensor:
    """The same with its last dimension contiguous; the others may have any stride."""
    return x if x.stride(-1) == 1 else x.contiguous()
