"""Ranges: by hand where they are simple, against a bin-by-bin search and sampling where they are not."""

from __future__ import annotations

import pytest
import torch

from saccade.quantize.observers import Histogram, MeanMinMax, Spread
from tests.quantize.oracle import histogram_range


def test_min_max_is_the_mean_of_extremes_not_the_extreme() -> None:
    observer = MeanMinMax()
    for low, high in ((-1.0, 2.0), (-3.0, 6.0)):
        observer.update(torch.tensor([low, 0.0, high]))
    assert [value.item() for value in observer.range()] == [-2.0, 4.0]


def test_bounds_are_truncated_when_values_are_counted() -> None:
    """-0.9 .. 5.3 is counted between 0 and 5, so negatives are lost, yet read as if it covered -0.9 .. 5.3."""
    observer = Histogram()
    observer.update(torch.cat([torch.full((100,), -0.9), torch.linspace(0, 5, 1000), torch.tensor([5.3])]))
    assert observer.counts.sum().item() == 1000
    assert (observer.low.item(), observer.high.item()) == pytest.approx((-0.9, 5.3))


def test_a_range_within_one_is_counted_whole() -> None:
    """Both bounds truncate to 0, and an empty range means the data's own."""
    observer = Histogram()
    observer.update(torch.linspace(-0.9, 0.8, 500))
    assert observer.counts.sum().item() == 500


@pytest.mark.parametrize("seed", range(4))
def test_the_search_finds_what_a_bin_by_bin_search_finds(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    observer = Histogram()
    for width in (1.0, 3.0, 2.0):
        observer.update(torch.randn(4000, generator=generator) ** 3 * width)
        first, last = histogram_range(
            observer.counts.tolist(), float(observer.low), float(observer.high), observer.error
        )
        bin_width = (observer.high - observer.low) / observer.BINS
        low, high = observer.range()
        assert (low, high) == (observer.low + bin_width * first, observer.low + bin_width * (last + 1))
    assert first > 0 or last < observer.BINS - 1


def test_a_growing_range_keeps_the_mass_of_old_counts() -> None:
    observer = Histogram()
    observer.update(torch.linspace(-2, 2, 1000))
    observer.update(torch.linspace(-8, 8, 1000))
    assert observer.counts.sum().item() == pytest.approx(2000, abs=1)
    assert observer.low.item() == -8.0
    assert observer.high.item() >= 8.0
    centre = observer.counts[observer.BINS * 3 // 8 : observer.BINS * 5 // 8].sum().item()
    assert centre == pytest.approx(1250, rel=0.02)


def test_an_input_within_the_old_range_is_added() -> None:
    observer = Histogram()
    observer.update(torch.tensor([-4.0, 4.0]))
    observer.update(torch.linspace(-1, 1, 100))
    assert observer.counts.sum().item() == 102
    assert (observer.low.item(), observer.high.item()) == (-4.0, 4.0)


def test_a_constant_input_does_not_end_in_a_division_by_zero() -> None:
    observer = Histogram()
    observer.update(torch.full((10,), 2.0))
    observer.update(torch.linspace(-1, 1, 10))
    assert all(torch.isfinite(value) for value in observer.range())


def test_the_expected_error_is_that_of_rounding_samples() -> None:
    observer = Histogram()
    x = torch.rand(200_000, generator=torch.Generator().manual_seed(0)) * 8 - 4
    x[0], x[1] = -4, 4  # whole, so that nothing is truncated
    observer.update(x)
    low, high = float(observer.low), float(observer.high)
    cell = (high - low) / 256
    rounded = ((x - low) / cell).floor().clamp(0, 255) * cell + low + cell / 2
    assert observer.error(0, 2047) == pytest.approx((x - rounded).pow(2).sum().item(), rel=0.02)


def test_far_outliers_choose_min_max_and_others_the_histogram() -> None:
    """Around the sum of a channel's extremes: what lies symmetrically spreads little, and only then an outlier stands out."""
    calm, wild = Spread(), Spread()
    calm.update(torch.randn(100, 8, generator=torch.Generator().manual_seed(0)))
    spiky = torch.zeros(1000, 200)
    spiky[0, 0], spiky[1, 0] = 100.0, -100.0
    wild.update(spiky)
    assert isinstance(calm.observer(), Histogram)
    assert isinstance(wild.observer(), MeanMinMax)
