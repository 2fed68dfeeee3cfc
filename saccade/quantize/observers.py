"""Ranges of activations as the reference finds them, with its faults (section 4.3): each is documented in docs/quantization-exact.md.

Knows tensors; knows no layers and no policy.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import Protocol

import torch
from torch import Tensor

from saccade.kernels import ordered


class Observer(Protocol):
    """Sees inputs one after the other; `range` is (low, high) of all seen so far."""

    def update(self, x: Tensor) -> None: ...

    def range(self) -> tuple[Tensor, Tensor]: ...


class MeanMinMax:
    """act_method 1: the mean of the inputs' minima and of their maxima, in T. Not a running extreme."""

    def __init__(self) -> None:
        self._lows: list[Tensor] = []
        self._highs: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        self._lows.append(x.min())
        self._highs.append(x.max())

    def range(self) -> tuple[Tensor, Tensor]:
        return torch.stack(self._lows).mean(), torch.stack(self._highs).mean()


class Histogram:
    """act_method 2: a histogram of 2048 bins and a greedy search for the range with the least expected rounding error.

    It counts between bounds truncated to integers, yet reads the counts as if they covered the untruncated range.
    """

    BINS = 2048
    SUB_BINS = 128  # into which an old bin is spread when the range grows
    LEVELS = 256
    STEP = 1e-5  # of the mass given up per round of the search

    def __init__(self) -> None:
        self.counts = torch.zeros(self.BINS)
        self.low = self.high = torch.zeros(())
        self._is_empty = True

    def update(self, x: Tensor) -> None:
        if x.numel() == 0:
            return
        wide = x.float()
        low, high = wide.min(), wide.max()
        if self._is_empty or bool(self.low == self.high):  # a range of no width cannot be spread: it starts anew
            self._is_empty = False
            self.low, self.high, self.counts = low, high, self._count(wide, low, high)
            return
        low, high = torch.minimum(low, self.low), torch.maximum(high, self.high)
        sub_width = (self.high - self.low) / (self.BINS * self.SUB_BINS)
        stretch = int(torch.ceil((high - low) / (self.BINS * sub_width)))
        high = high + (stretch * (self.BINS * sub_width) - (high - low))
        start = int(torch.round((self.low - low) / sub_width))
        counts = self._count(wide, low, high)
        is_unmoved = bool(low == self.low) and bool(high == self.high)
        self.counts = counts + (self.counts if is_unmoved else self._spread(stretch, start))
        self.low, self.high = low, high

    def _count(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return torch.histc(x, self.BINS, min=int(low), max=int(high))

    def _spread(self, stretch: int, start: int) -> Tensor:
        """The old counts in the bins of the new range, `stretch` times as wide, beginning `start` sub-bins before the old one."""
        fine = torch.zeros(self.BINS * stretch)
        room = fine[start : start + self.BINS * self.SUB_BINS]
        room.copy_(self.counts.repeat_interleave(self.SUB_BINS)[: len(room)])
        cumulated = torch.cumsum(fine, 0, dtype=torch.float64)[stretch - 1 :: stretch]
        before = torch.zeros(self.BINS)
        before[1:] = cumulated[:-1]
        return ((cumulated - before) / self.SUB_BINS).float()

    def range(self) -> tuple[Tensor, Tensor]:
        width = (self.high - self.low) / self.BINS
        first, last = self._search()
        return self.low + width * first, self.low + width * (last + 1)

    def _search(self) -> tuple[int, int]:
        """The chosen first and last bin. Each round gives up STEP of the mass on either side and moves the cheaper edge."""
        total = float(self.counts.sum())
        cumulated: list[float] = torch.cumsum(self.counts, 0).tolist()
        alpha, beta, first, last, best = 0.0, 1.0, 0, self.BINS - 1, float("inf")
        while alpha < beta:
            next_alpha, next_beta = alpha + self.STEP, beta - self.STEP
            left = min(max(bisect_left(cumulated, next_alpha * total), first), last)
            right = max(min(bisect_right(cumulated, next_beta * total) - 1, last), first)
            if left - first > last - right:
                proposal, alpha = (left, last), next_alpha
            else:
                proposal, beta = (first, right), next_beta
            if proposal == (first, last):
                continue
            error = self.error(*proposal)
            if error > best:
                break
            best, (first, last) = error, proposal
        return first, last

    def error(self, first: int, last: int) -> float:
        """Expected squared rounding error, times the count, when LEVELS equal cells cover the bins first..last."""
        width = (float(self.high) - float(self.low)) / self.BINS
        cell = width * (last - first + 1) / self.LEVELS
        if cell == 0.0:
            return 0.0
        begin = (torch.arange(self.BINS) - first) * width
        end = begin + width
        begin_cell = torch.div(begin, cell, rounding_mode="floor").clamp(0, self.LEVELS - 1)
        end_cell = torch.div(end, cell, rounding_mode="floor").clamp(0, self.LEVELS - 1)
        density = self.counts / width

        def squares(low: Tensor, high: Tensor) -> Tensor:
            return density * ((high * high * high - low * low * low) / 3)

        half = torch.full((self.BINS,), cell / 2)
        total = squares(begin - (begin_cell + 0.5) * cell, half)
        total = total + (end_cell - begin_cell - 1) * squares(-half, half)
        total = total + squares(-half, end - (end_cell * cell + cell / 2))
        return float(ordered.row_sums(total))


class Spread:
    """act_method 3's choice between the two: how far the extremes lie outside the bulk, from a float pass (section 4.3)."""

    LIMIT = 50.0

    def __init__(self) -> None:
        self._low = self._high = self._sigma = 0.0
        self._is_empty = True

    def update(self, x: Tensor) -> None:
        """x: [N, H]. The deviation is taken around the sum, not the half-sum, of each channel's extremes."""
        rows = x.view(-1, x.shape[-1])
        sigma = float((rows - (rows.amax(0) + rows.amin(0))).std())
        low, high = float(rows.min()), float(rows.max())
        if not self._is_empty:
            low, high, sigma = min(low, self._low), max(high, self._high), max(sigma, self._sigma)
        self._low, self._high, self._sigma, self._is_empty = low, high, sigma, False

    def observer(self) -> Observer:
        extreme = max(abs(self._low), abs(self._high))
        return Histogram() if extreme <= self.LIMIT * self._sigma else MeanMinMax()
