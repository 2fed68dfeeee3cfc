"""Intervals and tests against what they are by definition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from saccade.evals.statistics import bootstrap, mcnemar


def test_an_interval_holds_the_mean_and_narrows_with_more_items() -> None:
    few, many = (bootstrap([[1, 0, 1, 1] * count], seed=1) for count in (5, 500))
    assert few.mean == many.mean == 0.75
    assert few.low < 0.75 < few.high
    assert many.high - many.low == pytest.approx((few.high - few.low) / 10, rel=0.15)


def test_the_interval_is_that_of_the_binomial() -> None:
    """Resampled means of 0s and 1s are binomial: their quantiles are known."""
    values = [1.0] * 60 + [0.0] * 40
    found = bootstrap([values], seed=3)
    draws = np.random.default_rng(9).binomial(100, 0.6, size=200_000) / 100
    assert found.low == pytest.approx(np.quantile(draws, 0.025), abs=0.011)
    assert found.high == pytest.approx(np.quantile(draws, 0.975), abs=0.011)


def test_ninety_five_of_a_hundred_intervals_hold_the_truth() -> None:
    rng = np.random.default_rng(5)
    held = 0
    for seed in range(200):
        found = bootstrap([rng.binomial(1, 0.7, size=80).tolist()], seed=seed)
        held += found.low <= 0.7 <= found.high
    assert 176 <= held <= 199


def test_the_mean_over_tasks_weighs_tasks_alike() -> None:
    assert bootstrap([[1.0] * 1000, [0.0] * 10], seed=1).mean == 0.5


def test_the_seed_makes_it_repeatable() -> None:
    values = [np.random.default_rng(0).random(40).tolist()]
    assert bootstrap(values, seed=4) == bootstrap(values, seed=4)
    assert bootstrap(values, seed=4) != bootstrap(values, seed=5)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (5, 5), (0, 5), (1, 8), (9, 3), (2, 10)])
def test_mcnemar_counts_the_splits_at_least_as_uneven(only_a: int, only_b: int) -> None:
    a = [True] * only_a + [False] * only_b + [True, False]
    b = [False] * only_a + [True] * only_b + [True, False]
    splits = [sum(coins) for coins in itertools.product([0, 1], repeat=only_a + only_b)]
    smaller, total = min(only_a, only_b), only_a + only_b
    p_value = sum(min(heads, total - heads) <= smaller for heads in splits) / len(splits)
    found = mcnemar(a, b)
    assert (found.only_a, found.only_b) == (only_a, only_b)
    assert found.p_value == pytest.approx(p_value)


def test_thousands_of_differences_are_no_overflow() -> None:
    assert mcnemar([True] * 3000, [False] * 3000).p_value == 0.0


def test_differences_are_taken_item_by_item() -> None:
    """Unpaired, a difference of 0.1 would drown in the spread of 0 to 1."""
    a = np.linspace(0, 1, 50)
    found = bootstrap([(a - (a - 0.1)).tolist()], seed=1)
    assert found.low == pytest.approx(0.1)
    assert found.high == pytest.approx(0.1)
