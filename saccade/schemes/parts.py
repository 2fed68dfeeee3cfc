"""A part of a weight: some of its rows, some of its columns. What is shared by rows stays, what belongs to groups goes along."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from saccade.base.errors import OptionError
from saccade.schemes.packing import RUN
from saccade.schemes.scheme import Weight


def take_rows(weight: Weight, rows: Sequence[slice]) -> Weight:
    """The outputs of `rows`, one after the other."""

    def of(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.cat([tensor[each] for each in rows])

    values = torch.cat([weight.values[each] for each in rows])
    static = weight.static
    if static is not None:
        quant_bias, deq_scale = (
            torch.cat([each[row] for row in rows]) for each in (static.quant_bias, static.deq_scale)
        )
        static = replace(static, quant_bias=quant_bias, deq_scale=deq_scale)
    return replace(
        weight,
        values=values,
        scale=of(weight.scale),
        bias=of(weight.bias),
        group_scale=of(weight.group_scale),
        static=static,
        zero=of(weight.zero),
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

    static = weight.static
    if static is not None and not keep_bias:  # the zero point's share is in it too, for all columns
        static = replace(static, quant_bias=torch.zeros_like(static.quant_bias))
    return replace(
        weight,
        values=weight.values[:, columns.start // per_byte : columns.stop // per_byte].contiguous(),
        scale=groups(weight.scale) if weight.scheme.has_float_groups else weight.scale,
        bias=weight.bias if keep_bias else None,
        group_scale=groups(weight.group_scale),
        static=static,
        zero=groups(weight.zero),
    )
