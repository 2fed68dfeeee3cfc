"""Weights and ranges become integers: every operation rounds in the type the reference computes in (sections 4.1, 4.2, 4.5, 7).

Knows tensors; knows no names of layers. Letters: O rows, H columns of a weight, G columns of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 2.0**-23  # the smallest scale
LOW_BIT_LEVELS = 119  # 7 * 17: stage 2 stays inside int8
MAX_SECOND = 7


def _eps(like: Tensor) -> Tensor:
    return torch.tensor([EPS]).to(like.dtype)


# --- 8-bit weights ---------------------------------------------------------------------------------------------------


def row_scale(row_maxima: Tensor) -> Tensor:
    """row_maxima: [O], the largest |w| of each row, in T. Returns scale [O, 1] in T (section 4.1)."""
    return torch.maximum(row_maxima.view(-1, 1) / 127.0, _eps(row_maxima))


def round_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """weight: [O, H]; scale: [O, 1], both in T. Returns int8 [O, H] in -127..127: the quotient is rounded to T, then to an integer."""
    return (weight / scale).round_().clamp_(-127, 127).to(torch.int8)


def fake_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """What calibration multiplies by: [O, H] in T. Its integers reach down to -128, unlike the stored ones (section 4.1)."""
    return (weight / scale).round_().clamp_(-128, 127).mul_(scale)


# --- static activations ----------------------------------------------------------------------------------------------


def activation_parameters(low: Tensor, high: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """low, high: the range, in R. Returns (scale [1], zero point [1], not clamped) in R, or in T = bfloat16 if that is `dtype`.

    Asymmetric over -128..127, zero always representable. The zero point is computed with the scale not yet rounded to T.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = torch.maximum((high - low) / 255, _eps(low))
    zero = (-low / scale).round() - 128
    if dtype == torch.bfloat16:
        scale, zero = scale.to(dtype), zero.to(dtype)
    return scale.view(1), zero.view(1)


def fake_activation(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """x rounded to the 256 levels and back, in x's type (section 4.2)."""
    levels = (x / scale + zero).round_().clamp_(-128, 127)
    return ((levels - zero) * scale).to(x.dtype)


def dequantization(input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """deq_scale [O] float32: the product is rounded to the scales' common type before it is widened (section 7)."""
    return (input_scale * weight_scale).float().view(-1)


def integer_bias(bias: Tensor | None, deq_scale: Tensor, zero: Tensor, values: Tensor) -> Tensor:
    """quant_bias [O] int32: round(b / deq_scale - z * sum of the row's integers), in float32 (section 7)."""
    wide = torch.zeros_like(deq_scale) if bias is None else bias.float()
    return (wide / deq_scale - zero.float() * values.sum(1, dtype=torch.float32)).round().to(torch.int32)


# --- 4-bit weights in two stages -------------------------------------------------------------------------------------


def round_weight_4bit(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """weight: [O, H]. Returns (int8 [O, H] in -8..7, first scale [O, 1] float32, second scale [O, H/G] float32, whole numbers).

    Plain maxima, no search: rows to +-119, then groups of those integers to 4 bits by a whole-number scale, rounded to the
    nearest and hence often too small (section 4.5). A row of zeros has first scale 0 and integers 0.
    """
    wide = weight.float()
    first = wide.abs().amax(1, keepdim=True) / LOW_BIT_LEVELS
    levels = (wide / first).nan_to_num_(nan=0.0).round_().clamp_(-LOW_BIT_LEVELS, LOW_BIT_LEVELS)
    groups = levels.view(len(weight), -1, group_size)
    second = (groups.abs().amax(2) / MAX_SECOND).clamp_(min=1).round_()
    values = (groups / second[:, :, None]).round_().clamp_(-8, 7)
    return values.view(weight.shape).to(torch.int8), first, second
