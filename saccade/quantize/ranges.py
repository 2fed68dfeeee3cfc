"""One scale and zero point for all inputs of a linear: static activations.

Outliers may be clipped where everything else gains more by a finer step: `mse` measures that on real rows, each channel
weighted by how much the weight's column makes of its error; `histogram` is the reference's search over a histogram, with the
range's true ends; `percentile` clips a fixed share; `minmax` nothing; `auto` takes the better of `minmax` and `histogram`.
Knows tensors; knows no model. Letters: n rows, H channels.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from saccade.quantize.observers import Histogram

Method = Literal["mse", "minmax", "histogram", "percentile", "auto"]
METHODS = ("mse", "minmax", "histogram", "percentile", "auto")
MAX_VALUES = 1 << 18  # that a search looks at
SHARES = tuple(1 - 0.05 * i for i in range(19))  # of the extremes, for the first round of `mse`
NEIGHBOURS = 4  # bfloat16 numbers on either side among which a scale with a good reciprocal is looked for


class TrueHistogram(Histogram):
    """The reference's search over counts between the range's true ends."""

    def _count(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        if bool(low == high):
            return super()._count(x, low, high)
        return torch.histc(x, self.BINS, min=float(low), max=float(high))


def static_parameters(
    rows: Tensor,
    low: float,
    high: float,
    method: Method,
    importance: Tensor,
    dtype: torch.dtype,
    percentile: float = 99.99,
) -> tuple[Tensor, Tensor]:
    """Returns (scale [1], zero point [1] in -128..127), float32; the scale is one that `dtype` holds.

    rows: [n, H] float32, some inputs; low, high: the extremes of all; importance: [H], what an error of each channel costs.
    """
    rows = rows[:: -(-rows.numel() // MAX_VALUES)]
    low, high = min(low, 0.0), max(high, 0.0)
    if method == "minmax":
        ends = low, high
    elif method == "percentile":
        ends = _percentile(rows, percentile)
    elif method == "mse":
        ends = _least_error(rows, low, high, importance)
    else:
        ends = _histogram(rows, low, high)
        if method == "auto" and _error(rows, low, high, importance) < _error(rows, *ends, importance):
            ends = low, high
    return parameters(*ends, dtype)


def parameters(low: float, high: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero point that cover low..high, zero included.

    Engines multiply by the reciprocal formed in `dtype`; of a bfloat16 scale's neighbours the one is taken whose reciprocal
    loses least.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    scale = torch.tensor([max((high - low) / 255, 2.0**-23)]).to(dtype)
    if dtype == torch.bfloat16:
        bits = scale.view(torch.int16) + torch.arange(-1, NEIGHBOURS, dtype=torch.int16)
        near = bits.view(torch.bfloat16)
        mismatch = (near.float() * (1 / near.float()).to(dtype).float() - 1).abs()
        scale = near[mismatch.argmin()].view(1)
    wide = scale.float()
    return wide, (torch.tensor([-low]) / wide).round().sub(128).clamp(-128, 127)


def fake_static(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """x rounded to the 256 levels and back, float32."""
    scale, zero = scale.to(x.device), zero.to(x.device)
    return (x / scale).add_(zero).round_().clamp_(-128, 127).sub_(zero).mul_(scale)


def _error(rows: Tensor, low: float, high: float, importance: Tensor) -> float:
    scale, zero = parameters(low, high, torch.float32)
    return float(fake_static(rows, scale, zero).sub_(rows).square_().sum(0) @ importance)


def _least_error(rows: Tensor, low: float, high: float, importance: Tensor) -> tuple[float, float]:
    """Both ends are drawn in together, then each alone."""
    best, ends = _error(rows, low, high, importance), (low, high)
    for round_number in range(3):
        tried = [(share * low, share * high) for share in SHARES] if round_number == 0 else _one_end(ends)
        for candidate in tried:
            error = _error(rows, *candidate, importance)
            if error < best:
                best, ends = error, candidate
    return ends


def _one_end(ends: tuple[float, float]) -> list[tuple[float, float]]:
    """Either end alone moved in or out by up to a third."""
    low, high = ends
    shares = (0.7, 0.8, 0.9, 1.1, 1.2, 1.3)
    return [(share * low, high) for share in shares] + [(low, share * high) for share in shares]


def _histogram(rows: Tensor, low: float, high: float) -> tuple[float, float]:
    observer = TrueHistogram()
    observer.update(torch.cat([rows.flatten().cpu(), torch.tensor([low, high])]))
    first, last = observer.range()
    return float(first), float(last)


def _percentile(rows: Tensor, percentile: float) -> tuple[float, float]:
    values = rows.flatten().sort().values
    last = len(values) - 1
    at = round(last * percentile / 100)
    return float(values[last - at]), float(values[at])
