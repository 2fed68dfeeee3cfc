"""What is remembered of a linear's inputs: extremes, means and squares of every channel, correlations if wanted, and some rows.

Pictures fill a prompt with hundreds of tokens for each word, so each kind of token gets the same weight in all (modality
balance, MBQ, arXiv:2412.19509, with equal shares). A sequence's first token, where attention sinks and activations are massive
(PrefixQuant, arXiv:2410.05265), is a kind of its own: it would drown the correlations, so it is left out of them; ranges and
scales have to serve it, since every later token attends to it. What the assistant says is one, too: those few tokens are what
a served model computes for itself, and a prompt's text, most of it the template's, is the same again and again.
Knows tensors; knows no model. Letters: T tokens or patches, H channels, B blocks of C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

TEXT, PICTURE, FIRST, ANSWER = 0, 1, 2, 3  # kinds of tokens
KINDS = (TEXT, PICTURE, FIRST, ANSWER)
MODALITIES: tuple[tuple[int, ...], ...] = ((TEXT, FIRST, ANSWER), (PICTURE,))
FIRST_SHARE = 4  # a quarter as many first tokens are kept as of the other kinds


@dataclass(frozen=True)
class Tokens:
    """The tokens of all samples, one after the other. kinds: [T] int8; weights: [T] float32, sum 1; sampled: [T] bool."""

    kinds: Tensor
    weights: Tensor
    sampled: Tensor

    def __getitem__(self, rows: slice) -> Tokens:
        return Tokens(self.kinds[rows], self.weights[rows], self.sampled[rows])


def tokens_of(kinds: Tensor, rows_per_kind: int, seed: int, is_balanced: bool = True) -> Tokens:
    """Weights by kind, first tokens none, and up to `rows_per_kind` tokens of each drawn to be kept whole. kinds: [T] int8."""
    generator = torch.Generator().manual_seed(seed)
    weights, sampled = torch.zeros(len(kinds)), torch.zeros(len(kinds), dtype=torch.bool)
    present = [kind for kind in (TEXT, PICTURE, ANSWER) if bool((kinds == kind).any())]
    counted = sum(int((kinds == kind).sum()) for kind in present)
    for kind in KINDS:
        places = (kinds == kind).nonzero()[:, 0]
        kept = rows_per_kind // FIRST_SHARE if kind == FIRST else rows_per_kind
        sampled[places[torch.randperm(len(places), generator=generator)[:kept]]] = True
        if kind in present:
            weights[places] = 1 / (len(present) * len(places)) if is_balanced else 1 / counted
    return Tokens(kinds, weights, sampled)


@dataclass(frozen=True)
class Seen:
    """Of one linear's inputs; float32. low, high, mean_abs: [kinds, H]; mean_square: [H], balanced; hessian: [B, C, C] or None.

    rows: [n, H], kinds: [n]: the tokens kept whole.
    """

    low: Tensor
    high: Tensor
    mean_abs: Tensor
    mean_square: Tensor
    hessian: Tensor | None
    rows: Tensor
    kinds: Tensor

    @property
    def largest(self) -> Tensor:
        """The largest magnitudes by kind: [kinds, H]."""
        return torch.maximum(self.high, -self.low)

    def modalities(self) -> list[tuple[Tensor, float, float]]:
        """Of text and of pictures, as far as they were seen: which kept rows are of it, [n] bool, and the extremes of all its rows."""
        seen = [kinds for kinds in MODALITIES if bool(self.largest[list(kinds)].any())]
        return [self._part(kinds) for kinds in seen or [KINDS]]

    def whole(self) -> list[tuple[Tensor, float, float]]:
        """The same of all tokens together."""
        return [self._part(KINDS)]

    def _part(self, kinds: tuple[int, ...]) -> tuple[Tensor, float, float]:
        its = torch.isin(self.kinds, torch.tensor(kinds, device=self.kinds.device, dtype=self.kinds.dtype))
        return its, float(self.low[list(kinds)].min()), float(self.high[list(kinds)].max())

    def divided(self, scale: Tensor) -> Seen:
        """As it would be had the inputs been divided by `scale` [H]."""
        hessian = self.hessian
        if hessian is not None:
            parts = scale.view(len(hessian), -1)
            hessian = hessian / (parts[:, :, None] * parts[:, None, :])
        return Seen(
            self.low / scale,
            self.high / scale,
            self.mean_abs / scale,
            self.mean_square / scale**2,
            hessian,
            self.rows / scale,
            self.kinds,
        )

    def tensors(self) -> Mapping[str, Tensor]:
        """What later quantizations of the same checkpoint can start from."""
        return {"low": self.low, "high": self.high, "mean_abs": self.mean_abs, "mean_square": self.mean_square}


class Watcher:
    """Gathers `Seen` piece by piece. `block`: columns of a Hessian's block, None where no Hessian is wanted."""

    def __init__(self, num_channels: int, device: torch.device, block: int | None) -> None:
        shape = (len(KINDS), num_channels)
        self._low = torch.full(shape, torch.inf, device=device)
        self._high = torch.full(shape, -torch.inf, device=device)
        self._sum_abs = torch.zeros(shape, device=device)
        self._count = torch.zeros(len(KINDS), 1, device=device)
        self._square = torch.zeros(num_channels, device=device)
        self._hessian = None
        if block is not None:
            self._hessian = torch.zeros(num_channels // block, block, block, device=device)
        self._rows: list[Tensor] = []
        self._kinds: list[Tensor] = []

    def see(self, x: Tensor, tokens: Tokens) -> None:
        """x: [T, H]; `tokens`: what those rows are."""
        for kind in KINDS:
            rows = x[tokens.kinds == kind]
            if len(rows):
                low, high = rows.aminmax(dim=0)
                self._low[kind] = torch.minimum(self._low[kind], low.float())
                self._high[kind] = torch.maximum(self._high[kind], high.float())
                self._sum_abs[kind] += rows.abs().sum(0, dtype=torch.float32)
                self._count[kind] += len(rows)
        counted = tokens.weights > 0
        weighted = x[counted].float().mul_(tokens.weights[counted].sqrt()[:, None])
        self._square += weighted.square().sum(0)
        if self._hessian is not None:
            size = self._hessian.shape[1]
            for index, block in enumerate(self._hessian):
                part = weighted[:, index * size : (index + 1) * size]
                block.addmm_(part.t(), part)
        self._rows.append(x[tokens.sampled])
        self._kinds.append(tokens.kinds[tokens.sampled])

    def seen(self) -> Seen:
        is_absent = self._count == 0
        return Seen(
            self._low.masked_fill(is_absent, 0),
            self._high.masked_fill(is_absent, 0),
            self._sum_abs / self._count.clamp(min=1),
            self._square,
            self._hessian,
            torch.cat(self._rows).float(),
            torch.cat(self._kinds),
        )


def hessian_block(num_channels: int, largest: int) -> int:
    """Columns of the blocks a Hessian is cut into: all if they are at most `largest`, else the largest fraction of them that is."""
    return max(size for size in range(1, min(num_channels, largest) + 1) if num_channels % size == 0)
