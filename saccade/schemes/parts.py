"""A part of a weight: some of its rows, some of its columns. What is shared by rows stays, what belongs to groups goes along."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from saccade.base.errors import OptionError
from saccade.schemes.packing import RUN
from saccade.schemes.scheme import Static, Weight


def take_rows(weight: Weight, rows: Sequence[slice]) -> Weight:
    """The outputs of `rows`, one after the other."""

    def of(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.cat([tensor[each] for each in rows])

    def of_static(static: Static | None) -> Static | None:
        if static is None:
            return None
        quant_bias, deq_scale = (
            torch.cat([each[row] for row in rows]) for each in (static.quant_bias, static.deq_scale)
        )
        return replace(static, quant_bias=quant_bias, deq_scale=deq_scale)

    values = torch.cat([weight.values[each] for each in rows])
    return replace(
        weight,
        values=values,
        scale=of(weight.scale),
        bias=of(weight.bias),
        group_scale=of(weight.group_scale),
        static=of_static(weight.static),
        zero=of(weight.zero),
        visual_static=of_static(weight.visual_static),
    )


def take_columns(weight: Weight, columns: slice, name: str, keep_bias: bool) -> Weight:
    """What these inputs contribute to every output. The bias must be kept by one part only, for parts are added.

    Raises OptionError naming the layer `name` where a boundary lies within a group.
    """
    size = weight.scheme.group_size
    unit = size or (RUN if weight.scheme.weight_bits == 4 else 1)
    if columns.start % unit or columns.stop % unit:
        raise OptionError(
            f"columns {columns.start} to {columns.stop} of {name} cut groups of {unit}; use fewer ranks, or smaller groups"
        )
    per_byte = 2 if weight.scheme.weight_bits == 4 else 1

    def groups(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or size is None:
            return tensor
        return tensor[:, columns.start // size : columns.stop // size].contiguous()

    def bias_of(static: Static | None) -> Static | None:
        if static is None or keep_bias:
            return static
        # The zero point's share is in it, too, for all columns.
        return replace(static, quant_bias=torch.zeros_like(static.quant_bias))

    return replace(
        weight,
        values=weight.values[:, columns.start // per_byte : columns.stop // per_byte].contiguous(),
        scale=groups(weight.scale) if weight.scheme.has_float_groups else weight.scale,
        bias=weight.bias if keep_bias else None,
        group_scale=groups(weight.group_scale),
        static=bias_of(weight.static),
        zero=groups(weight.zero),
        visual_static=bias_of(weight.visual_static),
    )
