"""From logits to the next token: penalties, filters and the draw, in transformers' order and meaning.

Knows rows of logits and what a request has said so far; knows no scheduling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saccade.base.errors import OptionError
from saccade.engine.options import SamplingParams

COLUMNS = 64  # values whose largest stands for all of them while the k largest are looked for


@dataclass(frozen=True)
class Logprob:
    """A token, its log probability in the model's own distribution (before penalties and filters), and its rank from 1."""

    token_id: int
    logprob: float
    rank: int


class Sampler:
    """Draws the tokens of one answer: what it has seen, how often, and its own stream of random numbers."""

    def __init__(
        self, params: SamplingParams, prompt_ids: Sequence[int], eos_token_ids: Sequence[int], vocab_size: int
    ) -> None:
        """`params` must be resolved. Token ids beyond the vocabulary raise OptionError."""
        for token_id in params.stop_token_ids:
            if not 0 <= token_id < vocab_size:
                raise OptionError(f"stop_token_ids has {token_id}; the vocabulary ends at {vocab_size - 1}")
        self.params = params
        self.penalty = params.repetition_penalty if params.repetition_penalty is not None else 1.0
        self._seen = set(prompt_ids)
        self.seen_ids = torch.tensor(sorted(self._seen), dtype=torch.int64)
        self.counts: dict[int, int] = {}  # of the answer's ids, without the prompt's
        self._num_generated = 0
        enders = set(params.stop_token_ids) if params.ignore_eos else {*eos_token_ids, *params.stop_token_ids}
        self.enders = torch.tensor(sorted(enders), dtype=torch.int64)
        self._generator: torch.Generator | None = None
        if not params.is_greedy:
            self._generator = torch.Generator()
            if params.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(params.seed)

    def next_token(self, logits: Tensor) -> int:
        """logits: [V] float32 on the CPU, finite; left as they are. Returns the drawn token's id and remembers it."""
        scores = self._penalized(logits)
        if self._num_generated < self.params.min_tokens and len(self.enders):
            scores = scores.index_fill(0, self.enders, -torch.inf)
        # numpy's argmax is twenty times as fast as torch's; of equals both take the first.
        token_id = int(scores.numpy().argmax()) if self.params.is_greedy else self._draw(scores)
        self.remember(token_id)
        return token_id

    def next_number(self) -> float:
        """The random number, 0 <= u < 1, of the next draw, which depends on no logits and can be had before them; 0 if greedy."""
        if self._generator is None:
            return 0.0
        return float(torch.rand((), dtype=torch.float64, generator=self._generator))

    def remember(self, token_id: int) -> None:
        """The answer's next token is this one, drawn here or elsewhere."""
        if token_id not in self._seen:
            self._seen.add(token_id)
            self.seen_ids = torch.cat([self.seen_ids, torch.tensor([token_id])])
        self.counts[token_id] = self.counts.get(token_id, 0) + 1
        self._num_generated += 1

    def _penalized(self, logits: Tensor) -> Tensor:
        params = self.params
        if self.penalty != 1.0:
            seen = logits[self.seen_ids]
            penalized = torch.where(seen < 0, seen * self.penalty, seen / self.penalty)
            logits = logits.index_copy(0, self.seen_ids, penalized)
        if self.counts and (params.presence_penalty or params.frequency_penalty):
            ids = torch.tensor(list(self.counts))
            counts = torch.tensor(list(self.counts.values()), dtype=torch.float32)
            logits = logits.index_add(0, ids, -(params.presence_penalty + params.frequency_penalty * counts))
        return logits

    def _draw(self, scores: Tensor) -> int:
        """Temperature, top-k, top-p, min-p, then the first token, in the vocabulary's order, up to which the kept ones' weights come to
        more than the random number's share of their sum. Only tokens that may be kept are ever sorted.
        """
        params = self.params
        assert params.temperature is not None, "params are not resolved"
        scores = scores / params.temperature
        ids: Tensor | None = None  # None: all
        if params.top_k and params.top_k < len(scores):
            ids = _largest(scores, params.top_k)
            scores = scores[ids]
        if params.top_p is not None and params.top_p < 1.0:
            kept = _nucleus(scores, params.top_p).sort().values
            ids, scores = kept if ids is None else ids[kept], scores[kept]
        weights = (scores - scores.max()).exp().double()
        if params.min_p:
            weights = weights.where(weights >= params.min_p, 0.0)  # the likeliest one's is 1
        sums = weights.cumsum(0)
        drawn = int(torch.searchsorted(sums, sums[-1] * self.next_number(), right=True))
        return drawn if ids is None else int(ids[drawn])


def is_finite(logits: Tensor) -> bool:
    """Whether all are numbers. Their sum is one only if they are; where it is not, it may have been too large."""
    return math.isfinite(float(logits.sum())) or bool(torch.isfinite(logits).all())


def _largest(scores: Tensor, count: int) -> Tensor:
    """Places of the `count` largest, in order of place; ties with the last of them stay.

    The largest of every COLUMNS values are looked at first: the count-th of those is a bound that at least `count` values reach.
    """
    if count > len(scores) // COLUMNS:
        return _where(scores >= scores.topk(count).values[-1])
    rows = scores[: len(scores) // COLUMNS * COLUMNS].view(COLUMNS, -1)
    places = _where(scores >= rows.amax(0).topk(count).values[-1])
    return places[_where(scores[places] >= scores[places].topk(count).values[-1])]


def _nucleus(scores: Tensor, top_p: float) -> Tensor:
    """Places of the likeliest that together reach `top_p`, from the least likely of them on.

    What all have less than half of the rest's even share cannot reach the rest together: those are dropped without sorting.
    """
    weights = (scores - scores.max()).exp().double()
    total = weights.sum()
    places = _where(weights >= (1.0 - top_p) / 2 * total / len(weights))
    order = scores[places].sort(stable=True).indices  # of equals, those that come first go first
    places = places[order]
    kept = weights[places]
    keep = (total - kept.sum() + kept.cumsum(0)) > (1.0 - top_p) * total
    keep[-1] = True
    return places[keep]


def _where(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def top_logprobs(logits: Tensor, token_id: int, count: int) -> list[Logprob]:
    """logits: [V] float32. The chosen token first, then the `count` likeliest in order."""
    logprobs = logits.log_softmax(0)
    chosen = Logprob(token_id, float(logprobs[token_id]), int((logprobs > logprobs[token_id]).sum()) + 1)
    best = logprobs.topk(count)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [chosen, *(Logprob(i, value, rank) for rank, (i, value) in enumerate(pairs, start=1))]


def is_looping(
    token_ids: Sequence[int], longest_period: int = 128, min_repeats: int = 16, min_tokens: int = 256
) -> bool:
    """Whether the answer ends in one short passage repeated over and over: at least `min_repeats` times and `min_tokens` long.

    Generous, since tables and lists repeat themselves for good reason.
    """
    tail = torch.tensor(token_ids[-longest_period * min_repeats :])
    for period in range(1, longest_period + 1):
        length = max(period * min_repeats, min_tokens)
        if length > len(tail):
            return False
        last = tail[-length:]
        if torch.equal(last[period:], last[:-period]):
            return True
    return False
