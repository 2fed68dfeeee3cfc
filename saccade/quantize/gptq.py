"""GPTQ (arXiv:2210.17323): columns are rounded one after the other, and what rounding a column does wrong the columns still
to come make good, as the inputs' correlations allow.

Columns are taken in falling order of their Hessian's diagonal; steps are fixed beforehand in the weight's own order ("act-order
weight"), so nothing has to be stored about the order. Where the whole Hessian would be too large it is a row of blocks on the
diagonal, each corrected within itself. Knows tensors; knows no model. Letters: O rows, H columns, B blocks of C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.quantize.steps import Steps, nearest
from saccade.schemes.scheme import Scheme

DAMPING = 0.01  # of the mean diagonal, added to it; a tenth more each time the factorisation fails
COLUMNS_AT_ONCE = 128  # whose corrections of the rest are gathered into one product
ROWS_AT_ONCE = 4096  # each is rounded by itself
COLUMNS_AT_HAND = 16  # of those, likewise: a column corrects at once only these, which stay in a processor's cache


@dataclass(frozen=True)
class Correction:
    """What a block of columns needs to be corrected: their order, [C] int64, and the upper Cholesky factor of the damped Hessian's
    inverse in that order, [C, C] float32.
    """

    order: Tensor
    upper: Tensor


def corrections(hessian: Tensor) -> list[Correction]:
    """hessian: [B, C, C] float32, the mean of x x^T. All weights that read the same x share them."""
    found = []
    for block in hessian:
        order = block.diagonal().argsort(descending=True, stable=True)
        found.append(Correction(order, _inverse_factor(block[order][:, order])))
    return found


def gptq(weight: Tensor, blocks: Sequence[Correction], steps: Steps) -> Tensor:
    """weight: [O, H] float32, B * C = H. Returns the multiples [O, H], int8 or float8. Some rows at a time, which bounds memory."""
    out = torch.empty(
        weight.shape, dtype=torch.float8_e4m3fn if steps.scheme.is_float else torch.int8, device=weight.device
    )
    first = 0
    for block in blocks:
        last = first + len(block.order)
        for top in range(0, len(weight), ROWS_AT_ONCE):
            rows = slice(top, top + ROWS_AT_ONCE)
            step = steps.rows(rows).of(first, last).expand(-1, last - first)
            out[rows, first:last] = _block(weight[rows, first:last], block, step, steps.scheme).to(out.dtype)
        first = last
    return out


def _block(weight: Tensor, block: Correction, step: Tensor, scheme: Scheme) -> Tensor:
    upper = block.upper
    work = weight[:, block.order]
    step = step[:, block.order]
    multiples = torch.empty_like(work)
    num_columns = work.shape[1]
    for start in range(0, num_columns, COLUMNS_AT_ONCE):
        end = min(start + COLUMNS_AT_ONCE, num_columns)
        columns = work[:, start:end].t().contiguous()  # a column is a row here: contiguous
        errors = _round_columns(columns, step[:, start:end].t(), upper[start:end, start:end], scheme)
        multiples[:, block.order[start:end]] = columns.t()
        if end < num_columns:
            work[:, end:].addmm_(errors.t(), upper[start:end, end:], alpha=-1)
    return multiples


def _round_columns(columns: Tensor, step: Tensor, upper: Tensor, scheme: Scheme) -> Tensor:
    """columns, step: [n, O], turned; upper: [n, n]. Columns become multiples. Returns what each lacks, [n, O], to be made good."""
    errors = torch.empty_like(columns)
    diagonal = upper.diagonal().tolist()
    for first in range(0, len(columns), COLUMNS_AT_HAND):
        last = min(first + COLUMNS_AT_HAND, len(columns))
        for at in range(first, last):
            column = columns[at]
            chosen = nearest(column, step[at], scheme)
            error = torch.addcmul(column, chosen, step[at], value=-1, out=errors[at]).div_(diagonal[at])
            columns[at] = chosen
            if at + 1 < last:
                columns[at + 1 : last].addr_(upper[at, at + 1 : last], error, alpha=-1)
        if last < len(columns):
            columns[last:].addmm_(upper[first:last, last:].t(), errors[first:last], alpha=-1)
    return errors


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse. A column whose input is always zero corrects nothing."""
    mean = float(hessian.diagonal().mean())
    damping = DAMPING * mean if mean > 0 else 1.0
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(failed):
                return torch.as_tensor(upper)
        damping *= 10
