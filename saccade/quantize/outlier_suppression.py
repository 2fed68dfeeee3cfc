"""anti_method m2: for each norm, a search for how far its outlier channels are scaled down (section 5).

The range migration of Outlier Suppression+ (arXiv:2304.09145, section 4.3) without the shift. A candidate is a threshold t; channels
beyond it are divided until they fit. Its loss is what quantizing both sides does to the output of an objective.
The winner is decided by losses in T, so every operation here has the reference's order; what is shared between candidates is only
what stays equal bit for bit. Knows tensors; knows no model. Letters: N tokens or patches, H inputs, O outputs, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.kernels import ordered
from saccade.quantize.forward import rotate_half, rotate_patches
from saccade.quantize.rounding import EPS, row_scale

LOWEST_THRESHOLD = 0.1
MIN_STEPS = 100
STEP_SIZE = 0.5
# Columns. Zeros in front of a softmax's row are skipped in whole vectors only, which keeps the order of its sum.
ALIGNED = 64
ROWS_AT_ONCE = 256  # what is computed, and given up, at a time
COARSE_STRIDE = 8  # candidates of the first round
SLACK = 1 + 2.0**-6  # a mean in bfloat16 is wrong by less
SLACK_WIDE = 1 + 2.0**-10  # likewise, in float32
# How far apart losses may be when products are sums of another order: on 128 to 320 tokens they were by up to 2e-4.
ORDER = 1 + 2.0**-7

Product = Callable[[Tensor, Tensor], Tensor]


class Objective(Protocol):
    """What is compared: a result of the block computed from x W^T."""

    def pieces(self, x: Tensor, weight: Tensor, product: Product = ordered.matmul) -> Iterator[Tensor]:
        """x: [N, H]; weight: [O, H]. The result piece by piece, always cut alike; the loss sums over the last dimension.

        `product`: what multiplies matrices in T.
        """


# --- the search ------------------------------------------------------------------------------------------------------


def search(x: Tensor, weight: Tensor, objective: Objective) -> Tensor:
    """x: [N, H], the norm's output; weight: [O, H], what it feeds, concatenated; both in T. Returns the scale c [H] in T, c >= 1.

    The smallest loss wins, of equal ones the largest threshold. A coarse round comes first: its best loss lets most of the
    others be given up before they are whole. Where products in T are slow, a candidate is first tried with fast ones of almost
    the same bits, and the others decide only among those that are near the best.
    """
    high, low = x.amax(0), x.amin(0)
    candidates = list(thresholds(high, low))
    if not candidates:
        return torch.ones_like(high)
    exact = list(objective.pieces(x, weight))
    is_tried_first = not has_fast_products(x.dtype) and exact[0].dtype != torch.float16
    best, winner = math.inf, 0
    coarse = range(0, len(candidates), COARSE_STRIDE)
    for indices in (coarse, [i for i in range(len(candidates)) if i not in coarse]):
        scaled = ScaledWeight(weight)
        for i in indices:
            scale = scale_at(candidates[i], high, low)
            rounded = fake_range(x / scale, candidates[i])
            value = scaled.at(scale)
            if is_tried_first and math.isfinite(best):
                fast = objective.pieces(rounded, value, product_in_float32)
                if math.isinf(loss_below(best * ORDER, fast, exact)):
                    continue
            loss = loss_below(best, objective.pieces(rounded, value), exact)
            if loss < best or (loss == best and i < winner):
                best, winner = loss, i
    return scale_at(candidates[winner], high, low)


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
    """silu(gate) * up, rows at a time, in float32. The tower's bias [O] counts, the decoder has none."""

    bias: Tensor | None = None

    def pieces(self, x: Tensor, weight: Tensor, product: Product = ordered.matmul) -> Iterator[Tensor]:
        for rows in torch.split(x, ROWS_AT_ONCE):
            both = product(rows, weight.T)
            if self.bias is not None:
                both = both + self.bias
            gate, up = both.chunk(2, dim=-1)
            yield (F.silu(gate) * up).float()


@dataclass(frozen=True)
class DecoderAttention:
    """Causal attention without q's, k's and v's biases and with one-axis rotary positions: faults kept. A piece is some
    rows of [N, heads * D] float32.

    positions: [N], the time row.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    positions: Tensor

    def pieces(self, x: Tensor, weight: Tensor, product: Product = ordered.matmul) -> Iterator[Tensor]:
        num_tokens, dtype = x.shape[0], x.dtype
        heads = product(x, weight.T).view(num_tokens, -1, self.head_dim).transpose(0, 1)
        q, k, v = heads[: self.num_heads], heads[self.num_heads : -self.num_kv_heads], heads[-self.num_kv_heads :]
        cos, sin = self._tables(num_tokens)
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin  # float32 from here on
        q = q / math.sqrt(self.head_dim)
        columns = torch.arange(num_tokens)
        lowest = torch.tensor(torch.finfo(dtype).min)
        groups = self.num_heads // self.num_kv_heads
        for start in range(0, num_tokens, ROWS_AT_ONCE):
            rows = slice(start, min(start + ROWS_AT_ONCE, num_tokens))
            out = torch.empty(rows.stop - start, self.num_heads, self.head_dim, dtype=dtype)
            is_future = columns > columns[rows, None]
            for head in range(self.num_kv_heads):
                mine = slice(head * groups, (head + 1) * groups)
                keys, values = (part[head : head + 1].expand(groups, -1, -1) for part in (k, v))
                logits = (q[mine, rows] @ keys.transpose(-2, -1)).masked_fill_(is_future, float("-inf"))
                weights = ordered.softmax(torch.maximum(logits, lowest)).to(dtype)
                out[:, mine] = product(weights, values).transpose(0, 1)
            yield out.flatten(1).float()

    def _tables(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.int64).float() / self.head_dim
        angles = torch.outer(torch.arange(num_tokens).float(), 1.0 / self.rope_theta**exponents)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos()[self.positions], angles.sin()[self.positions]


@dataclass(frozen=True)
class TowerAttention:
    """Attention within segments, without qkv's bias, logits divided by the root of the wrong head size: faults kept.

    cos, sin: [N, D] float32; bounds: cumulative segment bounds. A piece is a head's [N, D] in T:
    ties between candidates are frequent.
    """

    num_heads: int
    scaling_head_dim: int  # the decoder's width over the tower's heads
    cos: Tensor
    sin: Tensor
    bounds: Sequence[int]

    def pieces(self, x: Tensor, weight: Tensor, product: Product = ordered.matmul) -> Iterator[Tensor]:
        qkv = product(x, weight.T).view(len(x), 3, self.num_heads, -1)
        for head in range(self.num_heads):
            q, k = rotate_patches(qkv[:, :2, head], self.cos, self.sin).unbind(1)
            yield self._attend(q, k, qkv[:, 2, head], product)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, product: Product) -> Tensor:
        """One head: [N, D] each. Returns [N, D]."""
        num_patches, dtype = len(q), q.dtype
        out = torch.empty(v.shape, dtype=dtype)
        root, lowest = math.sqrt(self.scaling_head_dim), torch.finfo(dtype).min
        is_library = not ordered.is_ordered(dtype)  # in a fixed order zeros may be left out
        for start, end in pairwise(self.bounds):
            columns = slice(start // ALIGNED * ALIGNED, min(-(-end // ALIGNED) * ALIGNED, num_patches))
            mask = torch.full((columns.stop - columns.start,), lowest, dtype=dtype)
            mask[start - columns.start : end - columns.start] = 0
            for first in range(start, end, ROWS_AT_ONCE):
                rows = slice(first, min(first + ROWS_AT_ONCE, end))
                logits = product(q[rows], k[columns].T).div_(root)
                if end - start < len(mask):
                    logits.add_(mask)
                weights = ordered.softmax(logits).to(dtype)
                if is_library and len(mask) < num_patches:  # all columns all the same: its own blocking must not shift
                    weights = F.pad(weights, (columns.start, num_patches - columns.stop))
                out[rows] = product(weights, v if weights.shape[1] == num_patches else v[columns])
        return out
