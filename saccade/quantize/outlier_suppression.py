"""anti_method m2: for each norm, a search for how far its outlier channels are scaled down (section 5).

The range migration of Outlier Suppression+ (arXiv:2304.09145, section 4.3) without the shift. A candidate is a threshold t; channels
beyond it are divided until they fit. Its loss is what quantizing both sides does to the output of an objective.
The winner is decided by losses in T, so every operation here has the reference's order; what is shared between candidates is only
what stays equal bit for bit. Knows tensors; knows no model. Letters: N tokens or patches, H inputs, O outputs, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.quantize.forward import rotate_half, rotate_patches
from saccade.quantize.rounding import EPS, row_scale

LOWEST_THRESHOLD = 0.1
MIN_STEPS = 100
STEP_SIZE = 0.5
ALIGNED = (
    64  # columns: zeros in front of a softmax's row are skipped in whole vectors only, which keeps its sum's order
)
ROWS_AT_ONCE = 1024  # queries whose weights over all keys are in memory


class Objective(Protocol):
    """What is compared: from x W^T [N, O] in T to the block's intermediate result."""

    def output(self, product: Tensor) -> Tensor:
        """The result; its last dimension is summed over in the loss."""


# --- the search ------------------------------------------------------------------------------------------------------


def search(x: Tensor, weight: Tensor, objective: Objective) -> Tensor:
    """x: [N, H], the norm's output; weight: [O, H], what it feeds, concatenated; both in T. Returns the scale c [H] in T, c >= 1."""
    high, low = x.amax(0), x.amin(0)
    exact = objective.output(x @ weight.T)
    scaled = ScaledWeight(weight)
    best, winner = math.inf, float(max(high.max().item(), -low.min().item(), 0.0))
    for threshold in thresholds(high, low):
        scale = scale_at(threshold, high, low)
        product = fake_range(x / scale, threshold) @ scaled.at(scale).T
        loss = mean_square(objective.output(product), exact).item()
        if loss < best:
            best, winner = loss, threshold
    return scale_at(winner, high, low)


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


def fake_range(x: Tensor, threshold: float) -> Tensor:
    """x rounded to 256 unsigned levels over [-t, t] and back, in T."""
    t = torch.tensor(threshold, dtype=x.dtype)
    low, high = -t.clamp(min=0), t.clamp(min=0)
    scale = torch.maximum((high - low) / 255.0, torch.tensor(EPS).to(x.dtype))
    zero = (0 - torch.round(low / scale)).clamp(0, 255).item()
    step = scale.item()
    return (x / step).round_().add_(zero).clamp_(0, 255).sub_(zero).mul_(step)


def mean_square(output: Tensor, exact: Tensor) -> Tensor:
    """The mean of the squared distances between last-dimension vectors; in T where the objective's output is."""
    return (output - exact).abs_().pow_(2.0).sum(-1).mean()


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


# --- objectives ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GateUp:
    """silu(gate) * up, in float32. The tower's bias [O] counts, the decoder has none."""

    bias: Tensor | None = None

    def output(self, product: Tensor) -> Tensor:
        if self.bias is not None:
            product = product + self.bias
        gate, up = product.chunk(2, dim=-1)
        return (F.silu(gate) * up).float()


@dataclass(frozen=True)
class DecoderAttention:
    """Causal attention without q's, k's and v's biases and with one-axis rotary positions: faults kept. Result [N, heads * D] float32.

    positions: [N], the time row. One key head's query heads at a time.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    positions: Tensor

    def output(self, product: Tensor) -> Tensor:
        num_tokens, dtype = len(product), product.dtype
        heads = product.view(num_tokens, -1, self.head_dim).transpose(0, 1)
        q, k, v = heads[: self.num_heads], heads[self.num_heads : -self.num_kv_heads], heads[-self.num_kv_heads :]
        cos, sin = self._tables(num_tokens)
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin  # float32 from here on
        q = q / math.sqrt(self.head_dim)
        columns = torch.arange(num_tokens)
        lowest = torch.tensor(torch.finfo(dtype).min)
        groups = self.num_heads // self.num_kv_heads
        out = torch.empty(num_tokens, self.num_heads, self.head_dim, dtype=dtype)
        for start in range(0, num_tokens, ROWS_AT_ONCE):
            rows = slice(start, min(start + ROWS_AT_ONCE, num_tokens))
            is_future = columns > columns[rows, None]
            for head in range(self.num_kv_heads):
                mine = slice(head * groups, (head + 1) * groups)
                keys, values = (part[head : head + 1].expand(groups, -1, -1) for part in (k, v))
                logits = (q[mine, rows] @ keys.transpose(-2, -1)).masked_fill_(is_future, float("-inf"))
                weights = torch.maximum(logits, lowest).softmax(-1, dtype=torch.float32).to(dtype)
                out[rows, mine] = (weights @ values).transpose(0, 1)
        return out.view(num_tokens, -1).float()

    def _tables(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.int64).float() / self.head_dim
        angles = torch.outer(torch.arange(num_tokens).float(), 1.0 / self.rope_theta**exponents)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos()[self.positions], angles.sin()[self.positions]


@dataclass(frozen=True)
class TowerAttention:
    """Attention within segments, without qkv's bias, logits divided by the root of the wrong head size: faults kept.

    cos, sin: [N, D] float32; bounds: cumulative segment bounds. Result [heads, N, D] in T: ties between candidates are frequent.
    """

    num_heads: int
    scaling_head_dim: int  # the decoder's width over the tower's heads
    cos: Tensor
    sin: Tensor
    bounds: Sequence[int]

    def output(self, product: Tensor) -> Tensor:
        num_patches, dtype = len(product), product.dtype
        q, k, v = product.view(num_patches, 3, self.num_heads, -1).unbind(1)
        q, k = rotate_patches(q, self.cos, self.sin), rotate_patches(k, self.cos, self.sin)
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)  # [heads, N, D]
        out = torch.empty(q.shape, dtype=dtype)
        root, lowest = math.sqrt(self.scaling_head_dim), torch.finfo(dtype).min
        for start, end in pairwise(self.bounds):
            for rows_start in range(start, end, ROWS_AT_ONCE):
                rows = slice(rows_start, min(rows_start + ROWS_AT_ONCE, end))
                columns = slice(start // ALIGNED * ALIGNED, min(-(-end // ALIGNED) * ALIGNED, num_patches))
                mask = torch.full((columns.stop - columns.start,), lowest, dtype=dtype)
                mask[start - columns.start : end - columns.start] = 0
                weights = torch.zeros(rows.stop - rows.start, num_patches, dtype=dtype)
                for head in range(self.num_heads):
                    logits = (q[head, rows] @ k[head, columns].T).div_(root).add_(mask)
                    weights[:, columns] = logits.softmax(-1, dtype=torch.float32).to(dtype)
                    out[head, rows] = weights @ v[head]  # all columns: the product's own blocking must not shift
        return out
