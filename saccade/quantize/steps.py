"""The numbers a quantized weight may take: a step for every row or group, and whole multiples of it (or, for fp8, floats).

What rounds a weight (to nearest, by a clip search, by GPTQ) chooses steps and multiples; this is what they share, and how
their choice becomes a `Weight`. Knows tensors and schemes; knows no activations.
Letters: O rows, H columns of a weight, G columns of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.schemes.affine import E4M3_MAX
from saccade.schemes.packing import pack
from saccade.schemes.scheme import Scheme, Static, Weight

TINY = 2.0**-60  # the smallest step: bfloat16 holds it, and its square is a float32
MAX_GROUP_STEPS = 16  # the largest whole-number group scale: -8 * 16 is the least an int8 holds


@dataclass(frozen=True)
class Steps:
    """row: [O] float32; group: [O, H/G] float32 or None. The step of a column is its row's, times its group's if there are groups.

    `group` holds whole numbers where the scheme is of two stages; where it has floating-point groups the row's step is 1.
    """

    scheme: Scheme
    row: Tensor
    group: Tensor | None = None

    def of(self, first: int, last: int) -> Tensor:
        """The steps of columns first..last-1: [O, 1] or [O, last - first]."""
        row = self.row[:, None]
        if self.group is None:
            return row
        assert self.scheme.group_size is not None, "groups have a size"
        groups = torch.arange(first, last, device=row.device) // self.scheme.group_size
        return row * self.group[:, groups]

    def rows(self, which: slice) -> Steps:
        return Steps(self.scheme, self.row[which], None if self.group is None else self.group[which])


def limits(scheme: Scheme) -> tuple[int, int]:
    """The least and the largest multiple. -128 is left out: kernels negate."""
    return (-8, 7) if scheme.weight_bits == 4 else (-127, 127)


def largest_multiple(scheme: Scheme) -> float:
    """What a row's or group's largest magnitude is divided by when nothing is clipped."""
    return E4M3_MAX if scheme.is_float else float(limits(scheme)[1])


def nearest(weight: Tensor, step: Tensor, scheme: Scheme) -> Tensor:
    """weight / step, rounded to what the scheme stores, half to even; still float32."""
    multiples = weight / step
    if scheme.is_float:
        return multiples.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()
    return multiples.round_().clamp_(*limits(scheme))


def max_steps(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> Steps:
    """Round to nearest's steps: nothing is clipped. weight: [O, H] float32. `dtype`: the type scales are stored in.

    A step is rounded to that type upwards, so that the largest value still fits.
    """
    if scheme.group_size is None:
        return Steps(scheme, upwards(weight.abs().amax(1) / largest_multiple(scheme), dtype))
    size = scheme.group_size
    wanted = weight.view(len(weight), -1, size).abs().amax(2) / largest_multiple(scheme)
    if scheme.has_float_groups:
        return Steps(scheme, torch.ones_like(wanted[:, 0]), upwards(wanted, dtype))
    row = (wanted.amax(1) / MAX_GROUP_STEPS).clamp_(min=TINY)
    return Steps(scheme, row, (wanted / row[:, None]).ceil_().clamp_(1, MAX_GROUP_STEPS))


def upwards(step: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 values that `dtype` holds, none below `step` nor TINY."""
    step = step.clamp(min=TINY)
    narrow = step.to(dtype)
    if dtype == torch.float16:
        narrow = narrow.clamp(min=torch.finfo(dtype).tiny)
    return torch.where(
        narrow.float() < step, torch.nextafter(narrow, torch.full_like(narrow, torch.inf)), narrow
    ).float()


def round_to_nearest(weight: Tensor, steps: Steps, rows_at_a_time: int = 256) -> Tensor:
    """The multiples of a whole weight: [O, H] int8, or float8."""
    dtype = torch.float8_e4m3fn if steps.scheme.is_float else torch.int8
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for first in range(0, len(weight), rows_at_a_time):
        rows = slice(first, first + rows_at_a_time)
        out[rows] = nearest(weight[rows], steps.rows(rows).of(0, weight.shape[1]), steps.scheme).to(dtype)
    return out


def dequantized(multiples: Tensor, steps: Steps) -> Tensor:
    """What the multiples stand for: [O, H] float32."""
    return multiples.float() * steps.of(0, multiples.shape[1])


def whole_sums(multiples: Tensor) -> Tensor:
    """The sums of rows of int8 multiples, [O] float32, exact to 2^24."""
    return multiples.sum(1, dtype=torch.int32).float()


def static_part(multiples: Tensor, steps: Steps, scale: Tensor, zero: Tensor, bias: Tensor | None) -> Static:
    """The constants of a linear with static activations. scale, zero: [1] float32; everything in float32.

    quant_bias is round(bias / deq_scale - zero * sum of the row's integers): what remains of both after the integer product.
    """
    deq_scale = scale * steps.row
    wide = torch.zeros_like(deq_scale) if bias is None else bias.float()
    quant_bias = (wide.double() / deq_scale.double() - zero.double() * whole_sums(multiples).double()).round()
    return Static(scale, zero, quant_bias.to(torch.int32), deq_scale)


def as_weight(
    multiples: Tensor,
    steps: Steps,
    bias: Tensor | None,
    static: Static | None = None,
    visual_static: Static | None = None,
) -> Weight:
    """The canonical weight of multiples and steps."""
    scheme = steps.scheme
    if steps.group is None:
        return Weight(multiples, steps.row, bias, scheme, None, static, visual_static=visual_static)
    if scheme.is_two_stage:
        return Weight(pack(multiples), steps.row, bias, scheme, steps.group.to(torch.int8))
    return Weight(pack(multiples), steps.group, bias, scheme)
