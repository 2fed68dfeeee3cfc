"""How sure a figure is: bootstrap intervals, and paired tests of two models over the same items. Knows numbers only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

RESAMPLES = 2000
VALUES_AT_ONCE = 4_000_000  # drawn indices held at a time


@dataclass(frozen=True)
class Interval:
    """A mean with the bounds between which it lies at the given level of confidence."""

    mean: float
    low: float
    high: float


def bootstrap(groups: Sequence[Sequence[float]], *, seed: int, level: float = 0.95) -> Interval:
    """The mean over groups of each group's mean, with its percentile bootstrap interval (Efron 1979), seeded.

    Items are drawn anew within each group: tasks are fixed, items are a sample. No group may be empty. Two models over the same
    items are compared by the differences of their scores.
    """
    rng = np.random.default_rng(seed)
    arrays = [np.asarray(group, dtype=np.float64) for group in groups]
    means = np.mean([_resampled_means(values, rng) for values in arrays], axis=0)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.mean([values.mean() for values in arrays])), float(low), float(high))


def _resampled_means(values: Floats, rng: np.random.Generator) -> Floats:
    """[RESAMPLES] means of as many values drawn with replacement."""
    assert len(values), "a group without items has no mean"
    step = max(1, VALUES_AT_ONCE // len(values))
    parts = []
    for start in range(0, RESAMPLES, step):
        count = min(step, RESAMPLES - start)
        parts.append(values[rng.integers(len(values), size=(count, len(values)))].mean(axis=1))
    return np.concatenate(parts)


@dataclass(frozen=True)
class McNemar:
    """Two models over the same items, each right or wrong. p_value: of a split this uneven, were both equally good."""

    only_a: int  # items that a alone has right
    only_b: int
    p_value: float


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> McNemar:
    """The exact two-sided test (McNemar 1947) on the items where the two differ; 1 where they differ nowhere."""
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    num = only_a + only_b
    tail = sum(math.comb(num, k) for k in range(min(only_a, only_b) + 1))
    return McNemar(only_a, only_b, min(1.0, 2 * tail / 2**num))
