"""What a candidate of m2's search costs: its loss, or that it must exceed a bound (section 5.2).

Losses are computed in T, every operation in the reference's order; what is shared between candidates is only what stays equal bit for
bit. A candidate is given up as soon as what has been summed exceeds the bound. Letters: N tokens or patches, H inputs, O outputs,
D head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.kernels import ordered
from saccade.quantize.objectives import (
    ROWS_AT_ONCE,
    DecoderAttention,
    GateUp,
    Objective,
    TowerAttention,
    attend_causally,
)
from saccade.quantize.rounding import EPS, row_scale

SLACK = 1 + 2.0**-6  # a mean in bfloat16 is wrong by less
SLACK_WIDE = 1 + 2.0**-10  # likewise, in float32
# How far apart losses may be when products are sums of another order: on 128 to 320 tokens they were by up to 2e-4.
ORDER = 1 + 2.0**-7
ROWS = 96  # at least, that are computed, and given up, at a time


class Trial(Protocol):
    """Losses of one search's candidates. x: [N, H]; weight: [O, H], both in T."""

    def loss_below(self, bound: float, threshold: float, scale: Tensor) -> float:
        """The mean of squared distances to what is exact; inf if it exceeds `bound`. scale: [H] in T."""


def trial(x: Tensor, weight: Tensor, objective: Objective) -> Trial:
    if ordered.is_ordered(x.dtype):
        if isinstance(objective, GateUp) and len(weight) >= 2 * ordered.LANES:
            return GateUpTrial(x, weight, objective)
        if isinstance(objective, DecoderAttention):
            return DecoderTrial(x, weight, objective)
        if isinstance(objective, TowerAttention) and TowerTrial.fits(weight, objective):
            return TowerTrial(x, weight, objective)
    return WholeTrial(x, weight, objective)


# --- with torch's operations, for every type -------------------------------------------------------------------------


class WholeTrial:
    """All objectives. Where products in T are slow, a candidate is first tried with fast ones of almost the same bits, and the
    others decide only among those that are near the bound.
    """

    def __init__(self, x: Tensor, weight: Tensor, objective: Objective) -> None:
        self._x, self._weight, self._objective = x, weight, objective
        self._exact = list(objective.pieces(x, weight))
        self._is_tried_first = not has_fast_products(x.dtype) and self._exact[0].dtype != torch.float16
        self._scaled, self._last = ScaledWeight(weight), math.inf

    def loss_below(self, bound: float, threshold: float, scale: Tensor) -> float:
        if threshold > self._last:
            self._scaled = ScaledWeight(self._weight)
        self._last = threshold
        rounded, value = fake_range(self._x / scale, threshold), self._scaled.at(scale)
        if self._is_tried_first and math.isfinite(bound):
            fast = self._objective.pieces(rounded, value, product_in_float32)
            if math.isinf(loss_below(bound * ORDER, fast, self._exact)):
                return math.inf
        return loss_below(bound, self._objective.pieces(rounded, value), self._exact)


def loss_below(bound: float, pieces: Iterator[Tensor], exact: Sequence[Tensor]) -> float:
    """The mean of the squared distances between last-dimension vectors, in the pieces' type; inf as soon as it must exceed `bound`."""
    count = sum(piece.numel() // piece.shape[-1] for piece in exact)
    slack = SLACK_WIDE if exact[0].dtype == torch.float32 else SLACK
    limit = math.inf if exact[0].dtype == torch.float16 else bound * count * slack  # float16 may overflow
    sums: list[Tensor] = []
    spent = 0.0
    for piece, reference in zip(pieces, exact, strict=True):
        distances = ordered.row_sums((piece - reference).abs_().pow_(2.0))
        sums.append(distances)
        spent += float(distances.sum(dtype=torch.float64))
        if spent > limit:
            return math.inf
    return float(ordered.row_means(torch.cat(sums)))


def has_fast_products(dtype: torch.dtype) -> bool:
    """Whether matrices of `dtype` are multiplied by a library here. Torch's own loops are many times slower than float32's."""
    return dtype != torch.float16 or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def product_in_float32(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() @ b.float()).to(a.dtype)


def fake_range(x: Tensor, threshold: float) -> Tensor:
    """x rounded to 256 unsigned levels over [-t, t] and back, in T."""
    step, zero = range_levels(threshold, x.dtype)
    return (x / step).round_().add_(zero).clamp_(0, 255).sub_(zero).mul_(step)


def range_levels(threshold: float, dtype: torch.dtype) -> tuple[float, float]:
    """The step and the zero of the levels over [-t, t], computed in `dtype`."""
    t = torch.tensor(threshold, dtype=dtype)
    low, high = -t.clamp(min=0), t.clamp(min=0)
    scale = torch.maximum((high - low) / 255.0, torch.tensor(EPS).to(dtype))
    return scale.item(), (0 - torch.round(low / scale)).clamp(0, 255).item()


class ScaledWeight:
    """Fake-quantized W * c for a falling sequence of thresholds: only what a step changes is computed again.

    A channel's c grows as t falls, and rounding is monotone, so a row's maximum is that of its start and its scaled columns.
    A row whose scale moved is rounded anew; of the others only the scaled columns.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self._maxima = weight.abs().amax(1)
        self._scale = row_scale(self._maxima)
        self._value = _fake(weight, self._scale)

    def at(self, scale: Tensor) -> Tensor:
        """scale: [H] in T, nowhere below the one before. Returns [O, H] in T, valid until the next call."""
        columns = (scale != 1).nonzero()[:, 0]
        if not len(columns):
            return self._value
        changed = self._weight[:, columns] * scale[columns]
        rows_scale = row_scale(torch.maximum(self._maxima, changed.abs().amax(1)))
        rows = (rows_scale != self._scale).any(1).nonzero()[:, 0]
        self._scale = rows_scale
        self._value[:, columns] = _fake(changed, rows_scale)
        if len(rows):
            self._value[rows] = _fake(self._weight[rows] * scale, rows_scale[rows])
        return self._value


def _fake(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale).round_().clamp_(-127, 127).mul_(scale)


# --- in bfloat16 and the fixed order, with the C++ kernels -----------------------------------------------------------


class _Candidates:
    """x and the weight as candidates round them."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._weights = weights
        self._panels: list[ordered.Panels | None] = [None] * len(weights)
        self._is_current = [False] * len(weights)
        self.threshold, self.scale = 0.0, torch.ones(())

    def begin(self, threshold: float, scale: Tensor) -> None:
        self.threshold, self.scale = threshold, scale
        self._step, self._zero = range_levels(threshold, scale.dtype)
        self._is_current = [False] * len(self._weights)

    def rounded(self, x: Tensor) -> Tensor:
        return ordered.levels(x, self.scale, self._step, self._zero)

    def panels(self, part: int) -> ordered.Panels:
        """Of a part of the weight, rounded when it is first asked for."""
        if not self._is_current[part]:
            self._panels[part] = ordered.panels(self._weights[part], self.scale, self._panels[part])
            self._is_current[part] = True
        found = self._panels[part]
        assert found is not None
        return found


class GateUpTrial:
    """The heaviest rows first, as the first candidate that was computed whole had them."""

    def __init__(self, x: Tensor, weight: Tensor, objective: GateUp) -> None:
        self._x, self._bias = x, objective.bias
        both = ordered.matmul(x, weight.T)
        gate, up = (both if self._bias is None else both + self._bias).chunk(2, dim=-1)
        self._exact = F.silu(gate) * up
        self._order: Tensor | None = None  # of the rows, once it is known
        self._candidate = _Candidates([weight])

    def loss_below(self, bound: float, threshold: float, scale: Tensor) -> float:
        self._candidate.begin(threshold, scale)
        panels = self._candidate.panels(0)
        limit, spent = bound * len(self._x) * SLACK_WIDE, 0.0
        found: list[Tensor] = []
        for x, exact in zip(torch.split(self._x, ROWS), torch.split(self._exact, ROWS), strict=True):
            both = ordered.product(self._candidate.rounded(x), panels)
            found.append(ordered.gate_up_distances(both, self._bias, exact))
            spent += float(found[-1].sum(dtype=torch.float64))
            if spent > limit:
                return math.inf
        distances = torch.cat(found)
        if self._order is None:
            self._order = distances.argsort(descending=True)
            self._x, self._exact = self._x[self._order], self._exact[self._order]
        else:
            distances = torch.empty_like(distances).index_put_((self._order,), distances)
        return float(ordered.row_means(distances))


class DecoderTrial:
    """A head of keys and values, with its queries, at a time."""

    def __init__(self, x: Tensor, weight: Tensor, objective: DecoderAttention) -> None:
        self._x, self._objective = x, objective
        dim, groups, count = objective.head_dim, objective.groups, objective.num_kv_heads
        q, k, v = (
            part.view(count, -1, len(weight[0]))
            for part in torch.split(weight, [groups * count * dim, count * dim, count * dim])
        )
        self._candidate = _Candidates(list(torch.cat((q, k, v), 1)))
        self._exact = torch.cat(list(objective.pieces(x, weight)))
        self._parts = list(range(count))
        self._is_sorted = False

    def loss_below(self, bound: float, threshold: float, scale: Tensor) -> float:
        self._candidate.begin(threshold, scale)
        x = self._candidate.rounded(self._x)
        limit, spent = bound * len(x) * SLACK_WIDE, 0.0
        squares = torch.empty_like(self._exact)
        masses = [0.0] * len(self._parts)
        width = self._objective.groups * self._objective.head_dim
        for part in self._parts:
            mine = slice(part * width, (part + 1) * width)
            out = self._attend(ordered.product(x, self._candidate.panels(part)))
            squares[:, mine] = (out.float() - self._exact[:, mine]).abs_().pow_(2.0)
            masses[part] = float(squares[:, mine].sum(dtype=torch.float64))
            spent += masses[part]
            if spent > limit:
                return math.inf
        if not self._is_sorted:
            self._parts.sort(key=lambda part: -masses[part])
            self._is_sorted = True
        return float(ordered.row_means(ordered.row_sums(squares)))

    def _attend(self, qkv: Tensor) -> Tensor:
        """qkv: [N, (groups + 2) * D]. Returns [N, groups * D]."""
        heads = qkv.view(len(qkv), -1, self._objective.head_dim).transpose(0, 1)
        q, k = self._objective.rotated(heads[:-2], heads[-2:-1])
        rows = [
            attend_causally(part, k[0], heads[-1], i * ROWS_AT_ONCE, ordered.matmul).transpose(0, 1)
            for i, part in enumerate(torch.split(q, ROWS_AT_ONCE, 1))
        ]
        return torch.cat(rows).flatten(1)


class TowerTrial:
    """A head of some segments at a time, those with the most distance for their size first."""

    def __init__(self, x: Tensor, weight: Tensor, objective: TowerAttention) -> None:
        self._whole, self._objective = x, objective
        heads = objective.num_heads
        weights = list(weight.view(3, heads, -1, weight.shape[1]).transpose(0, 1).flatten(1, 2))
        self._candidate = _Candidates(weights)
        self._lengths = [end - start for start, end in pairwise(objective.bounds)]
        self._order = torch.arange(len(x))  # of the patches: those of a group follow each other
        self._rows: list[slice] = []  # of each group, in that order
        self._segments: list[ordered.Segments] = []
        self._group(range(len(self._lengths)))
        self._parts = [(group, head) for group in range(len(self._rows)) for head in range(heads)]
        self._is_sorted = False
        self._exact = x.new_empty(heads, len(x), len(weights[0]) // 3)
        for group, head in self._parts:
            rows = self._rows[group]
            qkv = ordered.linear(self._x[rows], weights[head])
            self._exact[head, rows] = ordered.segment_attention(qkv, self._segments[group])

    @staticmethod
    def fits(weight: Tensor, objective: TowerAttention) -> bool:
        """Whether the C++ kernel knows such segments and heads."""
        is_even = all(bound % 2 == 0 for bound in objective.bounds)
        return is_even and objective.bounds[-1] >= ordered.LANES and len(weight) >= 96 * objective.num_heads

    def _group(self, segments: Sequence[int]) -> None:
        """Segments in that order become groups of ROWS rows or more."""
        objective, bounds = self._objective, self._objective.bounds
        self._order = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in segments])
        self._x = self._whole[self._order]
        cos, sin, root = objective.cos[self._order], objective.sin[self._order], math.sqrt(objective.scaling_head_dim)
        self._rows, self._segments = [], []
        start, ends = 0, [0]  # of the group under way; the latter within it
        for place, segment in enumerate(segments):
            ends.append(ends[-1] + self._lengths[segment])
            if ends[-1] >= ROWS or place == len(segments) - 1:
                rows = slice(start, start + ends[-1])
                self._rows.append(rows)
                self._segments.append(ordered.Segments(cos[rows], sin[rows], tuple(ends), root))
                start, ends = rows.stop, [0]

    def loss_below(self, bound: float, threshold: float, scale: Tensor) -> float:
        self._candidate.begin(threshold, scale)
        distances = self._x.new_empty(self._exact.shape[:2])
        limit, spent = bound * distances.numel() * SLACK, 0.0
        x = self._candidate.rounded(self._x)
        for group, head in self._parts:
            rows = self._rows[group]
            qkv = ordered.product(x[rows], self._candidate.panels(head))
            found = ordered.segment_distances(qkv, self._segments[group], self._exact[head, rows])
            distances[head, rows] = found
            spent += float(found.sum(dtype=torch.float64))
            if spent > limit:
                return math.inf
        distances[:, self._order] = distances.clone()
        if not self._is_sorted:
            self._sort(distances.double())
        return float(ordered.row_means(distances.flatten()))

    def _sort(self, distances: Tensor) -> None:
        """distances: [heads, P]."""
        before = self._order.argsort()
        means = [float(part.mean()) for part in torch.split(distances, self._lengths, 1)]
        self._group(sorted(range(len(means)), key=lambda i: -means[i]))
        self._exact = self._exact[:, before[self._order]]
        heavy = {
            (group, head): float(distances[head, self._order[rows]].mean())
            for group, rows in enumerate(self._rows)
            for head in range(len(distances))
        }
        self._parts = sorted(heavy, key=lambda part: -heavy[part])
        self._is_sorted = True
