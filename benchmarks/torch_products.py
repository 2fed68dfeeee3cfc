"""Torch's own matrix products, which the kernels are held against, in the data type that this processor multiplies."""

from __future__ import annotations

from collections.abc import Callable

import torch


def has_bf16() -> bool:
    """Whether torch has a fast bfloat16 product here.

    With AVX2 alone, `linear` in bfloat16 is several times slower than in float32, and oneDNN's int8 product with results in
    bfloat16 falls back on its reference.
    """
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fast_dtype() -> torch.dtype:
    return torch.bfloat16 if has_bf16() else torch.float32


def int8_product(rows: int, outputs: int, columns: int) -> Callable[[], object] | None:
    """oneDNN's, weights packed and rows quantized beforehand; None where torch was built without it."""
    if not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return None
    weight = torch.randint(-127, 128, (outputs, columns), dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, [rows, columns])
    x = torch.randint(0, 255, (rows, columns), dtype=torch.uint8)
    scale, zero = torch.full((outputs,), 1e-3), torch.zeros(outputs, dtype=torch.int32)
    rest = (packed, scale, zero, None, 1.0, 0, fast_dtype(), "none", [], "")
    return lambda: torch.ops.onednn.qlinear_pointwise(x, 1.0, 0, *rest)


def float_product(rows: int, outputs: int, columns: int) -> Callable[[], object]:
    """`linear` in `fast_dtype()`."""
    weight, x = (torch.randn(count, columns).to(fast_dtype()) for count in (outputs, rows))
    return lambda: torch.nn.functional.linear(x, weight)
