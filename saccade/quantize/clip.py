"""Steps by search: a row or group may clip its largest values if all the others gain more by a finer step.

The squared error, weighted by how much each column's input weighs, is tried for a falling series of clipping points: the MSE
observer of Banner et al. (arXiv:1810.05723), here with the diagonal of the layer's Hessian as in AWQ's clip search
(arXiv:2306.00978, section 4). For whole-number group scales (QServe, arXiv:2405.04532, section 4.1) the row's step and the
groups' multiples of it are then searched again. Knows tensors; knows no model. Letters: O rows, H columns, G columns of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.quantize.steps import (
    MAX_GROUP_STEPS,
    TINY,
    Steps,
    largest_multiple,
    max_steps,
    nearest,
    upwards,
)
from saccade.schemes.scheme import Scheme

VALUES_AT_A_TIME = 1 << 18  # what fits a core's cache: the search passes over it many times
RATIOS_8 = tuple(1 - 0.025 * i for i in range(9))  # of the unclipped step
RATIOS_4 = tuple(1.1 - 0.03 * i for i in range(22))  # beyond 1: -8 reaches further than 7
TOP_STEPS = (16, 14, 12)  # the whole number that the largest group of a row gets


def search_steps(
    weight: Tensor,
    scheme: Scheme,
    dtype: torch.dtype = torch.float32,
    importance: Tensor | None = None,
    *,
    is_coarse: bool = False,
) -> Steps:
    """weight: [O, H] float32; importance: [H], the mean squared input of each column. `dtype`: the type scales are stored in.

    `is_coarse`: a quarter of the candidates, for trials. fp8's step only moves its exponent's window, so it is left unclipped.
    """
    if scheme.is_float:
        return max_steps(weight, scheme, dtype)
    if importance is None:
        importance = torch.ones(weight.shape[1], device=weight.device)
    size = scheme.group_size or weight.shape[1]
    rows_at_a_time = max(1, VALUES_AT_A_TIME // weight.shape[1])
    parts = []
    for rows in torch.split(weight, rows_at_a_time):
        groups = rows.view(len(rows), -1, size)
        found = _search(groups, scheme, dtype, importance.view(-1, size), is_coarse)
        if scheme.group_size is None:
            parts.append(Steps(scheme, found[:, 0]))
        elif scheme.has_float_groups:
            parts.append(Steps(scheme, torch.ones_like(found[:, 0]), found))
        else:
            parts.append(_in_whole_steps(groups, found, scheme, importance.view(-1, size)))
    group = None if parts[0].group is None else torch.cat([part.group for part in parts if part.group is not None])
    return Steps(scheme, torch.cat([part.row for part in parts]), group)


def _search(groups: Tensor, scheme: Scheme, dtype: torch.dtype, importance: Tensor, is_coarse: bool) -> Tensor:
    """groups: [O, n, G]; importance: [n, G]. Returns the steps [O, n]."""
    widest = groups.abs().amax(2) / largest_multiple(scheme)
    best = upwards(widest, dtype)
    least = _errors(groups, best, scheme, importance)
    ratios = RATIOS_4 if scheme.weight_bits == 4 else RATIOS_8
    for ratio in ratios[:: 4 if is_coarse else 1]:
        step = (widest * ratio).clamp_(min=TINY).to(dtype).float()
        error = _errors(groups, step, scheme, importance)
        better = error < least
        best = torch.where(better, step, best)
        least = torch.where(better, error, least)
    return best


def _in_whole_steps(groups: Tensor, wanted: Tensor, scheme: Scheme, importance: Tensor) -> Steps:
    """Row steps and whole multiples of them near `wanted` [O, n], by the least error of the whole row."""
    best_row = best_group = torch.empty(0)
    least = torch.empty(0)
    for top in TOP_STEPS:
        row = (wanted.amax(1) / top).clamp_(min=TINY)
        chosen, chosen_error = torch.empty(0), torch.empty(0)
        for towards in (torch.floor, torch.ceil):
            multiple = towards(wanted / row[:, None]).clamp_(1, MAX_GROUP_STEPS)
            error = _errors(groups, row[:, None] * multiple, scheme, importance)
            if not len(chosen):
                chosen, chosen_error = multiple, error
            else:
                chosen = torch.where(error < chosen_error, multiple, chosen)
                chosen_error = torch.minimum(error, chosen_error)
        total = chosen_error.sum(1)
        if not len(best_row):
            best_row, best_group, least = row, chosen, total
            continue
        better = total < least
        best_row = torch.where(better, row, best_row)
        best_group = torch.where(better[:, None], chosen, best_group)
        least = torch.where(better, total, least)
    return Steps(scheme, best_row, best_group)


def _errors(groups: Tensor, step: Tensor, scheme: Scheme, importance: Tensor) -> Tensor:
    """The weighted squared error of every group [O, n]."""
    rounded = nearest(groups, step[:, :, None], scheme).mul_(step[:, :, None])
    return rounded.sub_(groups).square_().mul_(importance).sum(2)
