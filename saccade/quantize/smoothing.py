"""Scales that move the burden of outlier channels from a linear's input into its weight, found by trying them.

A method is a family of candidates; each candidate is tried with the real roundings on kept tokens, and the one whose output is
wrong least wins, every kind of token weighing the same. Doing nothing is a candidate too. What is learned from tokens is tried
on others, of other samples.
- learned: every channel's own scale, by descent of the expected rounding error (`learned_scale.py`).
- m4, iterative smooth: A^alpha / B^(1 - alpha) of SmoothQuant (arXiv:2211.10438, equation 4), alpha searched. A is taken over
  all tokens, and once more as the largest of each kind's relative to its own median, as pictures and text have outliers of
  their own (MASQuant, arXiv:2603.04800).
- m2, Outlier Suppression+ (arXiv:2304.09145, section 4.3): channels beyond a threshold are scaled down to it; the threshold is
  searched. Its shift is left out: an RMS norm has no bias that could take it.
- awq (arXiv:2306.00978, section 3.2): the mean magnitude to a power that is searched.
Knows tensors; knows no model. Letters: n rows, H channels, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from saccade.quantize.clip import search_steps
from saccade.quantize.learned_scale import learned_scale
from saccade.quantize.ranges import fake_static, parameters
from saccade.quantize.statistics import FIRST, KINDS, Seen
from saccade.quantize.steps import dequantized, max_steps, round_to_nearest
from saccade.schemes.affine import quantize_rows_fp8, quantize_rows_int8
from saccade.schemes.scheme import Scheme

Smoothing = Literal["none", "m2", "m4", "awq", "learned", "search"]
SMOOTHINGS = ("none", "m2", "m4", "awq", "learned", "search")  # `search` tries all families
ALPHAS = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)
NUM_THRESHOLDS = 12
MAX_OUTPUTS = 512  # rows of the weight that a candidate is tried on
MAX_ROWS = 384  # tokens
RUNS, EVERY = (
    16,
    4,
)  # kept tokens lie in the order of the samples; of RUNS runs of them every fourth is held out for the trial
LEARNED = (1.0, 0.75, 0.5)  # shares of what was learned that are tried, the rest being what it started from
FIRST_WEIGHT = 0.1  # of the first token's errors, to those of each other kind
FLOOR = 1e-5  # of the largest: what counts as no activation, or no weight, at all
MOST = 1e4  # a scale reaches this far from 1
# What a scale has to bring the error down to before it is preferred to none: found on some samples, it makes worse what they
# did not show; most so under a fixed range, which evened channels fill to its ends. Where there are outliers it is brought down to a
# fraction; with 0.8 in place of 0.5 a mean KL was 18 to 70 % larger in all seven variants of the demo model (notes/quantization.md).
ENOUGH, ENOUGH_STATIC = 0.97, 0.5
SHARES = (1.0, 0.8, 0.6, 0.4, 0.25)  # of a static range's ends that a candidate may clip to


@dataclass(frozen=True)
class Trial:
    """A linear on which candidates are tried. weight: [O, H] float32, all outputs that read the input, or some of them.

    columns: [H] int64: which scale each column takes; several share one where grouped heads do.
    """

    weight: Tensor
    seen: Seen
    scheme: Scheme
    columns: Tensor
    largest_weight: Tensor  # [H], over all outputs
    dtype: torch.dtype  # that scales are stored in
    has_visual_scales: bool = False  # whether text and pictures have static ranges of their own

    @property
    def num_scales(self) -> int:
        return int(self.columns.max()) + 1


def trial(
    weights: Sequence[Tensor],
    seen: Seen,
    scheme: Scheme,
    columns: Tensor | None,
    dtype: torch.dtype,
    has_visual_scales: bool = False,
) -> Trial:
    """A trial on evenly chosen outputs and tokens. weights: [O, H] float32 each."""
    largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    stride = -(-sum(len(weight) for weight in weights) // MAX_OUTPUTS)
    some = torch.cat([weight[::stride] for weight in weights])
    step = -(-len(seen.rows) // MAX_ROWS)
    kept = Seen(
        seen.low, seen.high, seen.mean_abs, seen.mean_square, None, seen.rows[::step].contiguous(), seen.kinds[::step]
    )
    if columns is None:
        columns = torch.arange(some.shape[1], device=some.device)
    return Trial(some, kept, scheme, columns, largest, dtype, has_visual_scales)


def best_scale(trial: Trial, method: Smoothing) -> Tensor:
    """[num_scales] float32, by which the input is to be divided; ones where nothing is better by enough."""
    best = torch.ones(trial.num_scales, device=trial.weight.device)
    if not len(trial.seen.rows):
        return best
    fitted, held_out = _halves(trial)
    exact = held_out.seen.rows @ trial.weight.t()
    least = loss(held_out, best, exact) * (ENOUGH_STATIC if trial.scheme.activation == "static" else ENOUGH)
    for scale in candidates(fitted, method):
        this = loss(held_out, scale, exact)
        if this < least:
            best, least = scale, this
    return best


def _halves(trial: Trial) -> tuple[Trial, Trial]:
    """The trial with the tokens that scales are learned from, and with those they are tried on; the same, of very few."""
    count = len(trial.seen.rows)
    run = torch.arange(count, device=trial.weight.device) * RUNS // count
    is_held_out = run % EVERY == EVERY - 1
    if count < RUNS:
        return trial, trial

    def having(chosen: Tensor) -> Trial:
        seen = trial.seen
        return replace(trial, seen=replace(seen, rows=seen.rows[chosen], kinds=seen.kinds[chosen]))

    return having(~is_held_out), having(is_held_out)


def loss(trial: Trial, scale: Tensor, exact: Tensor) -> float:
    """The output's expected squared error as `token_shares` weigh it. exact: [n, O]."""
    wide = scale[trial.columns]
    weight = trial.weight * wide
    rows = _rounded_input(trial.seen.divided(wide), trial.scheme, trial.has_visual_scales, weight.square().sum(0))
    if trial.scheme.weight_bits == 4:
        steps = search_steps(weight, trial.scheme, trial.dtype, trial.seen.mean_square / wide**2, is_coarse=True)
    else:
        steps = max_steps(weight, trial.scheme, trial.dtype)
    wrong = (rows @ dequantized(round_to_nearest(weight, steps), steps).t()).sub_(exact).square_().sum(1)
    return float(token_shares(exact, trial.seen.kinds) @ wrong)


def token_shares(exact: Tensor, kinds: Tensor) -> Tensor:
    """What a squared error of each token weighs: [n]. exact: [n, O], the outputs.

    Errors are relative to the token's own output, since norms follow, but not below the average of its kind, as the stream that
    the output is added to has its size. Kinds weigh the same, but for the first token, which is one vector.
    """
    size = exact.square().sum(1)
    shares = torch.zeros_like(size)
    for kind in KINDS:
        its = kinds == kind
        if bool(its.any()):
            shares[its] = 1 / ((size[its] + size[its].mean()).clamp(min=1e-30) * int(its.sum()))
            shares[its] *= FIRST_WEIGHT if kind == FIRST else 1.0
    return shares


def _rounded_input(seen: Seen, scheme: Scheme, has_visual_scales: bool, importance: Tensor) -> Tensor:
    """The kept rows as the scheme rounds them; a static range is clipped to the best of SHARES. importance: [H], see `ranges.py`."""
    rows = seen.rows
    if scheme.activation == "none":
        return rows
    if scheme.activation == "dynamic":
        values, scale = (quantize_rows_fp8 if scheme.is_float else quantize_rows_int8)(rows)
        return values.float() * scale[:, None]
    rounded = torch.empty_like(rows)
    for which, low, high in seen.modalities() if has_visual_scales else seen.whole():
        its = rows[which]
        tried = [fake_static(its, *parameters(share * low, share * high, torch.float32)) for share in SHARES]
        rounded[which] = min(tried, key=lambda candidate: float((candidate - its).square().sum(0) @ importance))
    return rounded


# --- candidates ------------------------------------------------------------------------------------------------------


def candidates(trial: Trial, method: Smoothing) -> Iterator[Tensor]:
    """[num_scales] each, in a fixed order."""
    by_kind = torch.stack([_shared(largest, trial) for largest in trial.seen.largest])
    weight = _floored(_shared(trial.largest_weight, trial))
    if method in ("learned", "search"):
        balanced = _centred((_floored(by_kind.amax(0)) / weight).sqrt())
        shares = token_shares(trial.seen.rows @ trial.weight.t(), trial.seen.kinds)
        for start in (torch.ones_like(balanced), balanced):
            learned = learned_scale(trial.seen.rows, shares, trial.weight, trial.scheme, trial.columns, start)
            for power in LEARNED:
                yield _centred(learned**power * start ** (1 - power))
    if method in ("m4", "search"):
        ranges = [by_kind.amax(0)]
        present = by_kind[by_kind.amax(1) > 0]
        if len(present) > 1:
            ranges.append((present / present.median(dim=1, keepdim=True).values.clamp(min=1e-20)).amax(0))
        for largest in ranges:
            for alpha in ALPHAS:
                yield _centred(_floored(largest) ** alpha / weight ** (1 - alpha))
    if method in ("awq", "search"):
        mean = torch.stack([_shared(each, trial) for each in trial.seen.mean_abs])
        present = mean[mean.amax(1) > 0]
        for alpha in ALPHAS:
            yield _centred(_floored(present.mean(0) if len(present) else mean[0]) ** alpha)
    if method in ("m2", "search"):
        largest = by_kind.amax(0)
        top, usual = float(largest.max()), float(largest.median())
        if top > usual > 0:
            for i in range(1, NUM_THRESHOLDS + 1):
                threshold = top * (usual / top) ** (i / NUM_THRESHOLDS)
                yield (largest / threshold).clamp(min=1.0)


def _shared(values: Tensor, trial: Trial) -> Tensor:
    """The largest of the columns that share a scale: [H] -> [num_scales]."""
    out = torch.zeros(trial.num_scales, device=values.device)
    return out.scatter_reduce(0, trial.columns, values, "amax")


def _floored(values: Tensor) -> Tensor:
    return values.clamp(min=max(float(values.max()) * FLOOR, 1e-20))


def _centred(scale: Tensor) -> Tensor:
    """With a geometric mean of 1: a common factor changes no rounding."""
    return (scale / scale.log().mean().exp()).clamp(1 / MOST, MOST)


# --- folding ---------------------------------------------------------------------------------------------------------


def rounded_gain(gain: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A norm's gain [H] divided by `scale`, as `dtype` stores it, and the factor [H] that the weights then have to take.

    The factor makes up for the gain's rounding, so that the product is what it was.
    """
    new = (gain / scale).to(dtype).float()
    factor = torch.where(new == 0, scale, gain / torch.where(new == 0, torch.ones_like(new), new))
    return new, torch.where(gain == 0, scale, factor)
