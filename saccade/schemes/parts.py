"""A part of a weight: some of its rows, some of its columns. What is shared by rows stays, what belongs to groups goes along."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from saccade.base.errors import OptionError
from saccade.schemes.packing import RUN
from saccade.schemes.scheme import Static, Weight


def take_rows(weight: Weight, rows: Sequence[slice]) -> Weight:
    """The outputs of `rows`, one after the other."""
    return _with_rows(weight, lambda tensor: torch.cat([tensor[each] for each in rows]))


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


def pad_rows(weight: Weight, num_parts: int, missing: int) -> Weight:
    """Each of `num_parts` runs of rows that lie one after the other with as many more that are `missing`, whose outputs are 0."""

    def of(tensor: Tensor) -> Tensor:
        parts = _plain(tensor).reshape(num_parts, -1, *tensor.shape[1:])
        zeros = parts.new_zeros(num_parts, missing, *parts.shape[2:])
        return torch.cat([parts, zeros], dim=1).flatten(0, 1).view(tensor.dtype)

    return _with_rows(weight, of)


def pad_columns(weight: Weight, missing: int) -> Weight:
    """With as many more columns that are `missing`, of zeros; of weights without groups."""
    assert weight.scheme.group_size is None, "groups have scales"
    values = _plain(weight.values)
    wide = torch.cat([values, values.new_zeros(len(values), missing)], dim=1)
    return replace(weight, values=wide.view(weight.values.dtype))


def _with_rows(weight: Weight, of: Callable[[Tensor], Tensor]) -> Weight:
    """With `of` done to all that has a row for each output."""

    def maybe(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else of(tensor)

    def of_static(static: Static | None) -> Static | None:
        return static and replace(static, quant_bias=of(static.quant_bias), deq_scale=of(static.deq_scale))

    return replace(
        weight,
        values=of(weight.values),
        scale=maybe(weight.scale),
        bias=maybe(weight.bias),
        group_scale=maybe(weight.group_scale),
        static=of_static(weight.static),
        zero=maybe(weight.zero),
        visual_static=of_static(weight.visual_static),
    )


def _plain(tensor: Tensor) -> Tensor:
    """e4m3 as bytes: torch joins few things of that type."""
    return tensor.view(torch.int8) if tensor.dtype == torch.float8_e4m3fn else tensor
