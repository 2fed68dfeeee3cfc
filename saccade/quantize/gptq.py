"""GPTQ (arXiv:2210.17323): columns are rounded one after the other, and what rounding a column does wrong the columns still
to come make good, as the inputs' correlations allow.

Columns are taken in falling order of their Hessian's diagonal; steps are fixed beforehand in the weight's own order ("act-order
weight"), so nothing has to be stored about the order. Where the whole Hessian would be too large it is a row of blocks on the
diagonal, each corrected within itself. Knows tensors; knows no model. Letters: O rows, H columns, B blocks of C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.quantize.steps import Steps, nearest
from saccade.schemes.scheme import Scheme

DAMPING = 0.01  # of the mean diagonal, added to it; a tenth more each time the factorisation fails
COLUMNS_AT_ONCE = 128  # whose corrections of the rest are gathered into one product
COLUMNS_AT_HAND = 16  # of those, likewise: a column corrects at once only these, which stay in a processor's cache


def gptq(weight: Tensor, hessian: Tensor, steps: Steps) -> Tensor:
    """weight: [O, H] float32; hessian: [B, C, C] float32, B * C = H, the mean of x x^T. Returns multiples [O, H] float32."""
    out = torch.empty_like(weight)
    for index, block in enumerate(hessian):
        first = index * len(block)
        last = first + len(block)
        out[:, first:last] = _block(weight[:, first:last], block, steps.of(first, last).expand(-1, len(block)), steps)
    return out


def _block(weight: Tensor, hessian: Tensor, step: Tensor, steps: Steps) -> Tensor:
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True, stable=True)
    upper = _inverse_factor(hessian[order][:, order])
    work = weight[:, order].contiguous()
    step = step[:, order]
    multiples = torch.empty_like(work)
    num_columns = work.shape[1]
    for start in range(0, num_columns, COLUMNS_AT_ONCE):
        end = min(start + COLUMNS_AT_ONCE, num_columns)
        columns = work[:, start:end].t().contiguous()  # a column is a row here: contiguous
        errors = _round_columns(columns, step[:, start:end].t(), upper[start:end, start:end], steps.scheme)
        multiples[:, start:end] = columns.t()
        if end < num_columns:
            work[:, end:].addmm_(errors.t(), upper[start:end, end:], alpha=-1)
    out = torch.empty_like(multiples)
    out[:, order] = multiples
    return out


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
