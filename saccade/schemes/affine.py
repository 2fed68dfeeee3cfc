"""Numbers to integers and back: scales from ranges, round to nearest.

Letters: O outputs, H inputs, G columns in a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.base.errors import OptionError
from saccade.schemes.packing import pack, unpack
from saccade.schemes.scheme import W8A16, Scheme, Weight, scheme_of

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


def quantize_weight(weight: Weight, scheme: Scheme = W8A16, rows_at_a_time: int = 4096) -> Weight:
    """A dense weight in another scheme, in memory bounded by `rows_at_a_time` float32 rows beyond the result.

    The caller has seen to it that the scheme's activations need no calibration and its groups divide the columns.
    """
    assert weight.scheme.is_dense, f"a {weight.scheme.name} weight is quantized already"
    assert scheme.activation != "static", f"{scheme.name} needs calibration"
    pieces = torch.split(weight.values, rows_at_a_time)
    if scheme.group_size is None:
        rows = [quantize_rows_int8(piece) for piece in pieces]
        return Weight(torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows]), weight.bias, scheme)
    assert weight.in_features % scheme.group_size == 0, f"{scheme.name} on {weight.in_features} columns"
    groups = [quantize_groups_int4(piece, scheme.group_size) for piece in pieces]
    return Weight(
        torch.cat([pack(group[0]) for group in groups]),
        torch.cat([group[1] for group in groups]),
        weight.bias,
        scheme,
        torch.cat([group[2] for group in groups]),
    )


def integer_values(weight: Weight, rows: slice = slice(None)) -> Tensor:
    """The whole numbers a quantized weight's rows stand for, before their scale: [O, H] int8, group scales multiplied in."""
    if weight.group_scale is None:
        return weight.values[rows]
    group_scale = weight.group_scale[rows]
    values = unpack(weight.values[rows]).view(*group_scale.shape, -1)
    return (values * group_scale[:, :, None]).flatten(1)  # fits int8: a Weight's promise


def dequantize(weight: Weight) -> Tensor:
    """What the weight stands for: [O, H] float32, the dense values themselves if it is dense."""
    if weight.scale is None:
        return weight.values.float()
    return integer_values(weight).float() * weight.scale[:, None]
