"""Sampling where the logits are: `sampling.py`'s penalties, filters and draws for a batch of answers at once, as operations on tensors.

Shapes are fixed and nothing is read back, so a CUDA graph can hold a step of it: what was said so far lies on the device and grows
there, and what only the host knows, a random number and whether the answer may end, is given for every token. The same numbers draw
the same tokens as on the host, up to the rounding of a sum. Knows tensors of rows; knows no requests.

Letters: B rows, one for each answer; V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.engine.sampling import Sampler
from saccade.kernels.record import NOT_FINITE, Likeliest, Said

TILE = 16  # rows whose words are sorted at once, which takes some 100 bytes a word


class Draw(NamedTuple):
    """What the host adds to the choice of one token."""

    number: float  # Sampler.next_number()
    may_end: bool  # min_tokens are said


class DeviceSampler:
    """What sampling knows of B answers: their options, and which ids were said."""

    def __init__(
        self, num_rows: int, vocab_size: int, device: torch.device, likeliest: Likeliest | None = None
    ) -> None:
        """`likeliest`: what chooses where all rows are greedy; None: operations on tensors."""

        def words(dtype: torch.dtype) -> Tensor:
            return torch.zeros(num_rows, vocab_size, dtype=dtype, device=device)

        def options(value: float, dtype: torch.dtype) -> Tensor:  # a column, so that it meets [B, V]
            return torch.full((num_rows, 1), value, dtype=dtype, device=device)

        self.vocab_size = vocab_size
        self.likeliest = likeliest
        self.said = Said(
            is_seen=words(torch.bool),
            counts=words(torch.float32),
            is_ender=words(torch.bool),
            penalty=options(1.0, torch.float32),
            presence=options(0.0, torch.float32),
            frequency=options(0.0, torch.float32),
        )
        self.temperature = options(1.0, torch.float32)
        self.top_k = options(vocab_size, torch.int64)
        self.dropped = options(0.0, torch.float64)  # 1 - top_p
        self.min_p = options(0.0, torch.float64)
        self.is_greedy = torch.ones(num_rows, dtype=torch.bool, device=device)

    def begin(self, samplers: Sequence[Sampler]) -> None:
        """Takes over one answer for each row from the host. Waits for the device."""
        params = [sampler.params for sampler in samplers]
        columns: list[tuple[Tensor, list[float]]] = [
            (self.said.penalty, [sampler.penalty for sampler in samplers]),
            (self.said.presence, [each.presence_penalty for each in params]),
            (self.said.frequency, [each.frequency_penalty for each in params]),
            (self.temperature, [1.0 if each.is_greedy else each.temperature or 1.0 for each in params]),
            (self.dropped, [0.0 if each.top_p is None else 1.0 - each.top_p for each in params]),
            (self.min_p, [each.min_p or 0.0 for each in params]),
            (self.top_k, [min(each.top_k or self.vocab_size, self.vocab_size) for each in params]),
        ]
        for column, values in columns:
            column.copy_(torch.tensor(values, dtype=torch.float64)[:, None])
        self.is_greedy.copy_(torch.tensor([each.is_greedy for each in params]))
        counted = [torch.tensor(list(sampler.counts), dtype=torch.int64) for sampler in samplers]
        counts = torch.tensor([n for sampler in samplers for n in sampler.counts.values()], dtype=torch.float32)
        _mark(self.said.is_seen, [sampler.seen_ids for sampler in samplers], torch.tensor(True))
        _mark(self.said.is_ender, [sampler.enders for sampler in samplers], torch.tensor(True))
        _mark(self.said.counts, counted, counts)

    def next_tokens(self, logits: Tensor, numbers: Tensor, may_end: Tensor, draws: bool) -> tuple[Tensor, Tensor]:
        """logits: [B, V] in any float type; numbers: [B] float64, each Sampler.next_number(); may_end: [B] bool, whether min_tokens
        are said; draws: whether any row is not greedy. The tokens count as said.

        Returns them, [B] int64, within the vocabulary whatever the logits; and the same with NOT_FINITE where logits are no numbers.
        """
        if self.likeliest is not None and not draws:
            return self.likeliest(logits, self.said, may_end)
        logits = logits.float()
        low, high = logits.aminmax(dim=-1)  # both NaN where one is
        is_finite = (low > -torch.inf) & (high < torch.inf)
        scores = self._penalized(logits).masked_fill(self.said.is_ender & ~may_end[:, None], -torch.inf)
        token_ids = scores.argmax(-1)
        if draws:
            tiles = [slice(first, first + TILE) for first in range(0, len(scores), TILE)]
            drawn = torch.cat([self._draw(scores[rows], numbers[rows], rows) for rows in tiles])
            token_ids = torch.where(self.is_greedy, token_ids, drawn)
        self.said.is_seen.scatter_(1, token_ids[:, None], True)
        self.said.counts.scatter_add_(1, token_ids[:, None], torch.ones_like(token_ids[:, None], dtype=torch.float32))
        return token_ids, token_ids.masked_fill(~is_finite, NOT_FINITE)

    def _penalized(self, logits: Tensor) -> Tensor:
        said = self.said
        repeated = torch.where(logits < 0, logits * said.penalty, logits / said.penalty)
        logits = torch.where(said.is_seen, repeated, logits)
        lowered = logits - (said.presence + said.frequency * said.counts)
        return torch.where(said.counts > 0, lowered, logits)

    def _draw(self, scores: Tensor, numbers: Tensor, rows: slice) -> Tensor:
        """Of `rows`: temperature, top-k, top-p, min-p, then the first token whose sum of weights passes its number's share of them."""
        ascending, order = (scores / self.temperature[rows]).sort(dim=-1, stable=True)
        best = ascending[:, -1:]
        kth = ascending.gather(1, self.vocab_size - self.top_k[rows])
        weights = (ascending - best).exp().double().masked_fill(ascending < kth, 0.0)
        sums = weights.cumsum(-1)
        is_dropped = (sums <= self.dropped[rows] * sums[:, -1:]) | (weights < self.min_p[rows])
        is_dropped[:, -1].fill_(False)  # the likeliest always stays
        weights = torch.zeros_like(weights).scatter_(1, order, weights.masked_fill_(is_dropped, 0.0))
        sums = weights.cumsum(-1)
        # Summed in parallel, a sum may grow where no weight is.
        passes = (sums > numbers[:, None] * sums[:, -1:]) & (weights > 0)
        return passes.to(torch.uint8).argmax(-1)  # the first of equals


def _mark(rows: Tensor, ids: Sequence[Tensor], values: Tensor) -> None:
    """rows: [B, V] becomes `values`, one or one for each id, at row i's `ids[i]`, and 0 elsewhere."""
    rows.zero_()
    lengths = torch.tensor([len(each) for each in ids])
    places = (torch.repeat_interleave(torch.arange(len(ids)), lengths), torch.cat(list(ids)))
    rows[places[0].to(rows.device), places[1].to(rows.device)] = values.to(rows.device)
