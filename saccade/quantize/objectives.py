"""What m2 compares: a result of the block computed from x W^T, in the reference's order of operations (section 5).

Knows tensors; knows no model. Letters: N tokens or patches, H inputs, O outputs, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.kernels import ordered
from saccade.quantize.forward import rotate_half, rotate_patches

# Columns. Zeros in front of a softmax's row are skipped in whole vectors only, which keeps the order of its sum; fewer columns than
# a vector has would be summed in another.
ALIGNED = 64
ROWS_AT_ONCE = 256  # what is computed, and given up, at a time

Product = Callable[[Tensor, Tensor], Tensor]


class Objective(Protocol):
    """What is compared: a result of the block computed from x W^T."""

    def pieces(self, x: Tensor, weight: Tensor, product: Product = ordered.matmul) -> Iterator[Tensor]:
        """x: [N, H]; weight: [O, H]. The result piece by piece, always cut alike; the loss sums over the last dimension.

        `product`: what multiplies matrices in T.
        """


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
        num_tokens = len(x)
        heads = product(x, weight.T).view(num_tokens, -1, self.head_dim).transpose(0, 1)
        q, k, v = heads[: self.num_heads], heads[self.num_heads : -self.num_kv_heads], heads[-self.num_kv_heads :]
        q, k = self.rotated(q, k)
        for start in range(0, num_tokens, ROWS_AT_ONCE):
            rows = slice(start, min(start + ROWS_AT_ONCE, num_tokens))
            out = x.new_empty(rows.stop - start, self.num_heads, self.head_dim)
            for head in range(self.num_kv_heads):
                mine = slice(head * self.groups, (head + 1) * self.groups)
                out[:, mine] = attend_causally(q[mine, rows], k[head], v[head], start, product).transpose(0, 1)
            yield out.flatten(1).float()

    @property
    def groups(self) -> int:
        return self.num_heads // self.num_kv_heads

    def rotated(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q, k: [heads, N, D]. In float32, q by the root of D."""
        cos, sin = self._tables
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        return q / math.sqrt(self.head_dim), k

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor]:
        num_tokens = len(self.positions)
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.int64).float() / self.head_dim
        angles = torch.outer(torch.arange(num_tokens).float(), 1.0 / self.rope_theta**exponents)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos()[self.positions], angles.sin()[self.positions]


def attend_causally(q: Tensor, k: Tensor, v: Tensor, start: int, product: Product) -> Tensor:
    """q: [heads, rows, D], tokens from `start` on, and k: [N, D], both float32; v: [N, D] in T. Returns [heads, rows, D] in T."""
    keys, values = (part.expand(len(q), -1, -1) for part in (k, v))
    logits = q @ keys.transpose(-2, -1)
    if ordered.is_ordered(v.dtype) and len(k) >= ordered.LANES:
        seen = min(start + q.shape[1], len(k))  # the rest are zeros, which may be left out
        return product(ordered.causal_softmax(logits, start)[..., :seen], values[:, :seen])
    columns = torch.arange(len(k))
    is_future = columns > columns[start : start + q.shape[1], None]
    lowest = torch.tensor(torch.finfo(v.dtype).min)
    weights = torch.maximum(logits.masked_fill_(is_future, float("-inf")), lowest)
    return product(ordered.softmax(weights).to(v.dtype), values)


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
            stop = min(-(-end // ALIGNED) * ALIGNED, num_patches)
            columns = slice(max(0, min(start, stop - ordered.LANES)) // ALIGNED * ALIGNED, stop)
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
