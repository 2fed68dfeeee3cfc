"""anti_method m2: for each norm, a search for how far its outlier channels are scaled down (section 5).

The range migration of Outlier Suppression+ (arXiv:2304.09145, section 4.3) without the shift. A candidate is a threshold t; channels
beyond it are divided until they fit. Its loss is what quantizing both sides does to the output of an objective (objectives.py); what a
loss costs, and when it is given up, is trials.py's. Knows tensors; knows no model. Letters: N tokens or patches, H inputs, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from saccade.quantize.objectives import Objective
from saccade.quantize.trials import trial

LOWEST_THRESHOLD = 0.1
MIN_STEPS = 100
STEP_SIZE = 0.5
COARSE_STRIDE = 8  # candidates of the first round


def search(x: Tensor, weight: Tensor, objective: Objective) -> Tensor:
    """x: [N, H], the norm's output; weight: [O, H], what it feeds, concatenated; both in T. Returns the scale c [H] in T, c >= 1.

    The smallest loss wins, of equal ones the largest threshold. A coarse round comes first: its best loss lets most of the
    others be given up before they are whole.
    """
    high, low = x.amax(0), x.amin(0)
    # Only their values in T count, which several may share where there are hundreds.
    candidates = list(dict.fromkeys(torch.tensor(list(thresholds(high, low)), dtype=high.dtype).tolist()))
    if not candidates:
        return torch.ones_like(high)
    losses = trial(x, weight, objective)
    best, winner = math.inf, 0
    coarse = range(0, len(candidates), COARSE_STRIDE)
    for i in [*coarse, *(i for i in range(len(candidates)) if i not in coarse)]:
        loss = losses.loss_below(best, candidates[i], scale_at(candidates[i], high, low))
        if loss < best or (loss == best and i < winner):
            best, winner = loss, i
    return scale_at(candidates[winner], high, low)


def thresholds(high: Tensor, low: Tensor) -> Iterator[float]:
    """Candidates from the largest magnitude down to 0.1. high, low: channel extremes [H]. The step count knows only the maximum."""
    top = max(high.max().item(), 0.0)
    threshold = max(top, -low.min().item())
    step = (threshold - LOWEST_THRESHOLD) / max(MIN_STEPS, int(top / STEP_SIZE))
    while threshold >= LOWEST_THRESHOLD:
        yield threshold
        threshold -= step


def scale_at(threshold: float, high: Tensor, low: Tensor) -> Tensor:
    """c [H] in T: by what each channel exceeds the threshold on its worse side, 1 where it does not."""
    t = torch.tensor(threshold, dtype=high.dtype)
    one = torch.ones_like(high)
    return torch.maximum(torch.where(high > t, high / t, one), torch.where(low < -t, low / -t, one))
