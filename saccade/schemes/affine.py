"""Numbers to fewer bits and back: scales from ranges, round to nearest.

Letters: O outputs, H inputs, G columns in a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.base.errors import OptionError
from saccade.schemes.packing import pack, unpack
from saccade.schemes.scheme import W8A16, Scheme, Weight, fitting, scheme_of

E4M3_MAX = 448.0
TINY = torch.finfo(torch.float32).tiny
INT4_STEPS = (
    119  # of the first stage; 119 = 7 * 17, so the second stage's 4-bit values times their group scale fit int8
)


def loading_scheme(name: str | None) -> Scheme:
    """The scheme called `name` if weights alone determine it. Raises OptionError for others and for unknown names."""
    scheme = scheme_of(name)
    if scheme.activation == "static":
        raise OptionError(
            f"quantization {name!r} needs activations measured on pictures, so it cannot be made while loading; "
            "use w8a8-dynamic, or a checkpoint that was quantized to w8a8"
        )
    return scheme


def quantize_rows_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per row, round to nearest even. values: [O, H]. Returns ([O, H] int8, scale [O] float32)."""
    wide = values.float()
    scale = (wide.abs().amax(dim=1) / 127).clamp_(min=TINY)
    return (wide / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


def quantize_groups_int4(values: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Symmetric in two stages: rows to whole numbers up to 119, groups of those to 4 bits by an integer scale.

    values: [O, H]. Returns ([O, H] int8 from -7 to 7, scale [O] float32, group_scale [O, H/G] int8 from 1 to 17).
    The group scale is rounded up: no value is clipped.
    """
    wide = values.float()
    scale = (wide.abs().amax(dim=1) / INT4_STEPS).clamp_(min=TINY)
    groups = (wide / scale[:, None]).round_().clamp_(-INT4_STEPS, INT4_STEPS).view(len(wide), -1, group_size)
    group_scale = (groups.abs().amax(dim=2) / 7).ceil_().clamp_(min=1)
    return (groups / group_scale[:, :, None]).round_().to(torch.int8).flatten(1), scale, group_scale.to(torch.int8)


def quantize_groups_float(values: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Symmetric, a scale for each group. values: [O, H]. Returns ([O, H] int8 from -8 to 7, scale [O, H/G] float32).

    The largest magnitude becomes 7.5 steps, so one of a negative number is -8 and one of a positive number is clipped by half a
    step. Scales are whole bfloat16 numbers, which is how files and other engines keep them: nothing is rounded later.
    """
    groups = values.float().view(len(values), -1, group_size)
    scale = (groups.abs().amax(dim=2) / 7.5).clamp_(min=TINY).to(torch.bfloat16).float()
    return (groups / scale[:, :, None]).round_().clamp_(-8, 7).to(torch.int8).flatten(1), scale


def quantize_rows_fp8(values: Tensor) -> tuple[Tensor, Tensor]:
    """The largest magnitude of a row becomes 448, the largest e4m3 number. values: [O, H]. Returns ([O, H] e4m3, [O] float32)."""
    wide = values.float()
    scale = (wide.abs().amax(dim=1) / E4M3_MAX).clamp_(min=TINY)
    return (wide / scale[:, None]).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def quantize_weight(weight: Weight, scheme: Scheme = W8A16, rows_at_a_time: int = 4096) -> Weight:
    """A dense weight in another scheme, in memory bounded by `rows_at_a_time` float32 rows beyond the result.

    The caller has seen to it that the scheme's activations need no calibration and its groups divide the columns (`fitting`).
    """
    assert weight.scheme.is_dense, f"a {weight.scheme.name} weight is quantized already"
    assert scheme.activation != "static", f"{scheme.name} needs calibration"
    assert fitting(scheme, weight.in_features) == scheme, f"{scheme.name} on {weight.in_features} columns"
    pieces = [_rounded(piece, scheme) for piece in torch.split(weight.values, rows_at_a_time)]
    values, scale, *group_scale = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return Weight(values, scale, weight.bias, scheme, group_scale[0] if group_scale else None)


def _rounded(values: Tensor, scheme: Scheme) -> tuple[Tensor, ...]:
    """values: [O, H]. Returns a Weight's values and scale, and its group_scale if there are two stages."""
    if scheme.is_float:
        return quantize_rows_fp8(values)
    if scheme.group_size is None:
        return quantize_rows_int8(values)
    quantize = quantize_groups_int4 if scheme.is_two_stage else quantize_groups_float
    integers, *scales = quantize(values, scheme.group_size)
    return pack(integers), *scales


def integer_values(weight: Weight, rows: slice = slice(None)) -> Tensor:
    """The whole numbers that a weight's rows stand for before their floating-point scale: [O, H] int8.

    Group scales of two stages are multiplied in, zero points subtracted.
    """
    values = weight.values[rows]
    if weight.scheme.weight_bits == 8:
        return values
    integers = unpack(values)
    if weight.group_scale is not None:
        group_scale = weight.group_scale[rows]
        integers = (integers.view(*group_scale.shape, -1) * group_scale[:, :, None]).flatten(
            1
        )  # fits: a Weight's promise
    if weight.zero is not None:
        zero = weight.zero[rows]
        integers = (integers.view(*zero.shape, -1) - zero[:, :, None]).flatten(1)
    return integers


def dequantize(weight: Weight, rows: slice = slice(None)) -> Tensor:
    """What the weight's rows stand for: [O, H] float32, the dense values themselves if it is dense."""
    if weight.scale is None:
        return weight.values[rows].float()
    wide = (weight.values[rows] if weight.scheme.is_float else integer_values(weight, rows)).float()
    scale = weight.scale[rows].view(len(wide), -1, 1)  # one of them per row, or per group
    return wide.view(len(wide), scale.shape[1], -1).mul_(scale).flatten(1)
