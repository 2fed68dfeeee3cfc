"""Numbers to fewer bits and back: scales from ranges, round to nearest.

Letters: O outputs, H inputs, G columns in a group.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from saccade.base.errors import OptionError
from saccade.schemes.packing import pack, unpack
from saccade.schemes.scheme import W8A8, W8A16, Scheme, Static, Weight, fitting, scheme_of

Levels = tuple[Tensor, Tensor]  # of a static activation: scale and zero point, [1] each
MAX_GROUP_SCALE = 17  # of values from -7 to 7, and 16 from -8: int8 holds their products
E4M3_MAX = 448.0
TINY = torch.finfo(torch.float32).tiny
INT4_STEPS = (
    120  # of a row's scale: 7.5 steps of a 16-fold group scale, whose lowest value, -8 times 16, still fits int8
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
    """Symmetric in two stages: a group's scale is the whole number of row scales nearest to a 7.5th of its largest magnitude.

    values: [O, H]. Returns ([O, H] int8 from -8 to 7, scale [O] float32, group_scale [O, H/G] int8 from 1 to 16).
    A group's scale rounded down clips its largest numbers a little. Rounding it up clips none and loses 0.8 dB of
    signal-to-noise on normal numbers, to nearest costs nothing against float scales (groups of 64 to 256).
    """
    groups = values.float().view(len(values), -1, group_size)
    largest = groups.abs().amax(dim=2)
    scale = (largest.amax(dim=1) / INT4_STEPS).clamp_(min=TINY)
    whole = (largest / (7.5 * scale[:, None])).round_().clamp_(1, 16).to(torch.int8)
    scale, group_scale = settled_scales(scale, whole)
    step = join_group_scales(scale, group_scale)[:, :, None]
    return (groups / step).round_().clamp_(-8, 7).to(torch.int8).flatten(1), scale, group_scale


def quantize_groups_float(values: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Symmetric, a scale for each group. values: [O, H]. Returns ([O, H] int8 from -8 to 7, scale [O, H/G] float32).

    The largest magnitude becomes 7.5 steps, so one of a negative number is -8 and one of a positive number is clipped by half a
    step. Scales are whole bfloat16 numbers, which is how files and other engines keep them: nothing is rounded later.
    """
    groups = values.float().view(len(values), -1, group_size)
    scale = (groups.abs().amax(dim=2) / 7.5).clamp_(min=TINY).to(torch.bfloat16).float()
    return (groups / scale[:, :, None]).round_().clamp_(-8, 7).to(torch.int8).flatten(1), scale


def quantize_groups_asymmetric(values: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """16 levels from a group's least to its largest number, zero among them. values: [O, H].

    Returns ([O, H] int8 from -8 to 7, scale [O, H/G] float32, a whole bfloat16 number, zero [O, H/G] int8 from -8 to 7).
    """
    groups = values.float().view(len(values), -1, group_size)
    low, high = groups.amin(dim=2).clamp_(max=0), groups.amax(dim=2).clamp_(min=0)
    scale = ((high - low) / 15).clamp_(min=TINY).to(torch.bfloat16).float()
    zero = (-8 - low / scale).round_().clamp_(-8, 7)
    integers = (groups / scale[:, :, None] + zero[:, :, None]).round_().clamp_(-8, 7)
    return integers.to(torch.int8).flatten(1), scale, zero.to(torch.int8)


def quantize_rows_fp8(values: Tensor) -> tuple[Tensor, Tensor]:
    """The largest magnitude of a row becomes 448, the largest e4m3 number. values: [O, H]. Returns ([O, H] e4m3, [O] float32)."""
    wide = values.float()
    scale = (wide.abs().amax(dim=1) / E4M3_MAX).clamp_(min=TINY)
    return (wide / scale[:, None]).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def quantize_weight(weight: Weight, scheme: Scheme = W8A16, rows_at_a_time: int | None = None) -> Weight:
    """A dense weight in another scheme, in memory bounded by `rows_at_a_time` float32 rows beyond the result.

    Few rows stay in a processor's caches: 22016 x 2048 to w4a8-g256 takes 177 ms of one thread by 128 rows, 365 ms by 4096 (Xeon,
    torch 2.13). On a GPU launches are what takes time, so by default it gets more at once.
    The caller has seen to it that the scheme's activations need no calibration and its groups divide the columns (`fitting`).
    """
    assert weight.scheme.is_dense, f"a {weight.scheme.name} weight is quantized already"
    assert scheme.activation != "static", f"{scheme.name} needs calibration"
    assert fitting(scheme, weight.in_features) == scheme, f"{scheme.name} on {weight.in_features} columns"
    count = rows_at_a_time or (128 if weight.values.device.type == "cpu" else 2048)
    whole: list[Tensor] = []  # filled as pieces come: a head would be in memory twice
    for first in range(0, weight.out_features, count):
        piece = _rounded(weight.values[first : first + count], scheme)
        whole = whole or [part.new_empty(weight.out_features, *part.shape[1:]) for part in piece]
        for out, part in zip(whole, piece, strict=True):
            out[first : first + count] = part
    values, scale, *others = whole
    group_scale = others[0] if scheme.is_two_stage else None
    return Weight(values, scale, weight.bias, scheme, group_scale, zero=others[0] if scheme.is_asymmetric else None)


def _rounded(values: Tensor, scheme: Scheme) -> tuple[Tensor, ...]:
    """values: [O, H]. Returns a Weight's values and scale, and its group_scale or zero points if it has them."""
    if scheme.is_float:
        return quantize_rows_fp8(values)
    if scheme.group_size is None:
        return quantize_rows_int8(values)
    if scheme.is_two_stage:
        integers, *rest = quantize_groups_int4(values, scheme.group_size)
    elif scheme.is_asymmetric:
        integers, *rest = quantize_groups_asymmetric(values, scheme.group_size)
    else:
        integers, *rest = quantize_groups_float(values, scheme.group_size)
    return pack(integers), *rest


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


def scaled_rows(weight: Weight, factor: Tensor) -> Weight:
    """The weight of outputs `factor` [O] times as large, bias included; whole numbers stay as they are."""
    wide = factor.float()
    static, visual_static = (
        each and replace(each, deq_scale=each.deq_scale * wide) for each in (weight.static, weight.visual_static)
    )
    bias = None if weight.bias is None else (weight.bias.float() * wide).to(weight.bias.dtype)
    if weight.scale is None:
        return replace(weight, values=weight.values * wide[:, None].to(weight.values.dtype), bias=bias)
    scale = weight.scale * wide.view(-1, *[1] * (weight.scale.ndim - 1))
    return replace(weight, scale=scale, bias=bias, static=static, visual_static=visual_static)


# --- calibrated activations and scales of two stages ------------------------------------------------------------------


def static_weight(
    values: Tensor, scale: Tensor, bias: Tensor | None, levels: Levels, visual_levels: Levels | None = None
) -> Weight:
    """A w8a8 weight from what calibration found: scale and zero point [1] of the layer's input, and of its visual tokens' alone.

    values: [O, H] int8; scale: [O]; bias: [O] or None. The bias is rounded to steps of deq_scale, its zero point's share is whole.
    A row of zeros may have any scale: it gets one whose steps the bias can be counted in.
    """
    wide = torch.zeros_like(scale, dtype=torch.float64) if bias is None else bias.double()
    finest = min(float(each[0]) for each in (levels, visual_levels) if each)
    for_bias = (wide.abs() / (finest * 2**24)).clamp(min=TINY).float()
    scale = torch.where((values == 0).all(dim=1), for_bias, scale.float())
    sums = values.sum(dim=1, dtype=torch.int64)

    def static(levels: Levels) -> Static:
        input_scale, zero = (each.float().view(1) for each in levels)
        deq_scale = scale * input_scale
        quant_bias = ((wide / deq_scale.double()).round() - zero.double() * sums).clamp(-(2**31), 2**31 - 1)
        return Static(input_scale, zero, quant_bias.to(torch.int32), deq_scale)

    visual = None if visual_levels is None else static(visual_levels)
    return Weight(values, scale, bias, W8A8, static=static(levels), visual_static=visual)


def settled_scales(scale: Tensor, group_scale: Tensor) -> tuple[Tensor, Tensor]:
    """The same scales (to 2^-19) in the one form that files which multiply the two stages out give back bit for bit.

    scale: [O] float32; group_scale: [O, H/G] int8. A row's group scales lose their common factor to the row's scale, which then
    is rounded up to a multiple of 32 in its last place, so that its product with any whole number up to 32 is exact.
    """
    factor = group_scale[:, 0].clone()
    for group in group_scale.unbind(dim=1):
        factor = torch.gcd(factor, group)
    bits = (scale * factor).view(torch.int32)
    rounded = ((bits + 31) & ~31).view(torch.float32)
    return rounded, group_scale // factor[:, None]


def join_group_scales(scale: Tensor, group_scale: Tensor) -> Tensor:
    """The two stages multiplied: [O, H/G] float32, exact for settled scales."""
    return scale[:, None] * group_scale.float()


def split_group_scales(product: Tensor) -> tuple[Tensor, Tensor] | None:
    """The inverse of `join_group_scales`: (scale [O], group_scale [O, H/G] int8), or None where there is none.

    The smallest product of a row is 1 to 17 times its scale; the first number by which all others come out whole is taken.
    """
    product = product.float()
    least = product.amin(dim=1, keepdim=True)
    if not bool((least > 0).all()):
        return None
    ratio = product / least
    numbers = torch.arange(1, MAX_GROUP_SCALE + 1, dtype=product.dtype)
    few = ratio[:, :8, None] * numbers  # which numbers a row's first groups leave possible
    possible = ((few - few.round()).abs() < 1e-4).all(dim=1)
    while bool(possible.any(dim=1).all()):
        number = numbers[possible.to(torch.uint8).argmax(dim=1)][:, None]
        multiples = ratio * number
        whole = multiples.round()
        fits = (multiples.sub_(whole).abs_().amax(dim=1) < 1e-4) & (whole.amax(dim=1) <= MAX_GROUP_SCALE)
        if bool(fits.all()):
            return (least / number)[:, 0], whole.to(torch.int8)
        possible &= fits[:, None] | (numbers != number)
    return None
