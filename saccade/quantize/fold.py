"""Scales moved from activations into weights: what is divided out before a linear is multiplied into it. In place, in T."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def fold_norm(gain: Tensor, weights: Sequence[Tensor], scale: Tensor) -> None:
    """gain: [H]; weights: [O, H] each; scale: [H]. The norm's output becomes h / scale, the products stay."""
    gain.div_(scale)
    for weight in weights:
        weight.mul_(scale)


def fold_linear(first: Tensor, bias: Tensor | None, second: Tensor, rows: Tensor, columns: Tensor) -> None:
    """first: [R, H] with `bias` [R]; second: [O, C]. `first` gives 1/rows of its output, `second` takes `columns` of it."""
    first.div_(rows[:, None])
    if bias is not None:
        bias.div_(rows)
    second.mul_(columns)
