"""How likely a model finds given answers, and how far two models lie apart on them.

Teacher forcing: the right answer's tokens are fed in whatever the model would have said, so that two models are compared
token by token over equal contexts. The tokens pass through the engine's own paged cache and kernels, as if the request had
been preempted after its last token: what is measured is what serves. Knows models and texts; knows no tasks and no scores.
Letters: A tokens of an answer, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saccade.api import LLM
from saccade.base.errors import PromptError
from saccade.engine.batch import pack
from saccade.engine.options import SamplingParams
from saccade.engine.request import Request
from saccade.engine.sampling import Sampler
from saccade.engine.scheduler import Chunk, Scheduler
from saccade.inputs.prompt import Prompt

END_OF_TURN = "<|im_end|>"
LOOKAHEAD = 16  # prompts prepared ahead of the one in hand; their pictures wait in memory
ROWS_AT_ONCE = 64  # rows over the whole vocabulary that a comparison holds in float64

Conversation = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ScoredAnswer:
    """`logits[i]` float32 [V] on the CPU, before any temperature or penalty, is what the model predicts for token_ids[i].

    token_ids: the answer's A tokens, the end of turn (<|im_end|>) last. logits: [A, V].
    """

    token_ids: tuple[int, ...]
    logits: Tensor

    @property
    def logprobs(self) -> Tensor:
        """[A] float32: log probability, in nats, of each token of the answer."""
        return self.logits.log_softmax(-1).gather(1, torch.tensor(self.token_ids)[:, None])[:, 0]


def answer_tokens(llm: LLM, answer: str) -> tuple[int, ...]:
    """The tokens a model writes to say `answer` and no more. Nothing in the text becomes a special token."""
    return (*llm.tokenizer.encode(answer), llm.tokenizer.added_tokens[END_OF_TURN])


def score_answers(llm: LLM, pairs: Iterable[tuple[Conversation, str]]) -> Iterator[ScoredAnswer]:
    """Logits of each answer after its conversation, in the order of `pairs`, computed many at a time.

    `pairs` is read as far ahead as the engine needs, and of logits no more is held than belongs to the requests in hand: a
    caller that looks at each answer and lets it go needs the same memory for ten pairs as for ten thousand. Equal
    pairs and options give equal bits, whatever the engine did before.
    Raises PromptError, MediaError or OptionError for a conversation that cannot be prepared, once its turn has come.
    """
    prepared = ((llm.prepare(messages), answer_tokens(llm, answer)) for messages, answer in pairs)
    return score_prompts(llm, prepared)


def score_prompts(llm: LLM, pairs: Iterable[tuple[Prompt, Sequence[int]]]) -> Iterator[ScoredAnswer]:
    """As `score_answers`, of prompts that are prepared already and answers that are tokens already, at least one each."""
    engine = llm.engine
    options = llm.options
    # A scheduler of its own over the same blocks: nothing computed before is reused, so no row is missing and order alone
    # decides what is computed together.
    scheduler = Scheduler(engine.scheduler.pool, options.max_tokens_per_step, options.max_running, prefix_cache=False)
    upcoming = iter(pairs)
    in_order: deque[_Forced] = deque()
    by_request: dict[int, _Forced] = {}
    try:
        while True:
            while len(scheduler.waiting) < LOOKAHEAD and (pair := next(upcoming, None)) is not None:
                forced = _Forced(llm, *pair)
                in_order.append(forced)
                by_request[forced.request.id] = forced
                scheduler.add(forced.request)
            while in_order and in_order[0].is_done:
                yield in_order.popleft().result()
            if not in_order:
                return
            for chunk in _step(llm, scheduler, by_request):
                if chunk.reaches_end:
                    scheduler.remove(chunk.request)
                    del by_request[chunk.request.id]
    finally:
        for forced in in_order:
            scheduler.remove(forced.request)


def _step(llm: LLM, scheduler: Scheduler, by_request: Mapping[int, _Forced]) -> list[Chunk]:
    """One round: runs the next chunks and hands the rows that predict answer tokens to their requests."""
    engine = llm.engine
    chunks = scheduler.schedule()
    batch = pack(chunks, scheduler.pool.block_size)
    features, _ = engine.runner.embed_media([place.medium for place in batch.placements])
    hidden = engine.runner.run(batch, features)
    first_row = 0
    for chunk in chunks:
        forced = by_request[chunk.request.id]
        first = max(
            chunk.start, forced.num_prompt - 1
        )  # blocks for all tokens are held at admission: no row comes twice
        rows = range(first_row + first - chunk.start, first_row + chunk.length)
        forced.rows.extend(engine.runner.logits(hidden, rows))
        first_row += chunk.length
        scheduler.computed(chunk)
    return chunks


class _Forced:
    """A request whose answer is given. Token i of the answer is predicted at position len(prompt) - 1 + i."""

    def __init__(self, llm: LLM, prompt: Prompt, token_ids: Sequence[int]) -> None:
        longest = llm.engine.max_context
        if len(prompt) + len(token_ids) > longest:
            raise PromptError(
                f"prompt of {len(prompt)} and answer of {len(token_ids)} tokens do not fit the context of {longest}; make "
                "the pictures smaller (max_pixels), take fewer frames (fps), or give a larger kv_cache_tokens"
            )
        assert token_ids, "an answer has its end of turn at least"
        self.token_ids = tuple(token_ids)
        self.num_prompt = len(prompt)
        self.rows: list[Tensor] = []
        params = SamplingParams().resolved(llm.config.generation)
        self.request = Request(
            prompt,
            params,
            Sampler(params, (), (), llm.config.text.vocab_size),  # never asked
            llm.tokenizer.stream(),
            max_tokens=len(token_ids),
            eos_token_ids=frozenset(),
        )
        self.request.output_ids = list(token_ids[:-1])  # the last one predicts nothing we look at

    @property
    def is_done(self) -> bool:
        return len(self.rows) == len(self.token_ids)

    def result(self) -> ScoredAnswer:
        return ScoredAnswer(self.token_ids, torch.stack(self.rows))


# --- two models ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenDivergence:
    """Two models at each of A tokens. kl: [A] float64, nats; agrees: [A] bool, whether both hold the same token likeliest."""

    kl: Tensor
    agrees: Tensor

    def summary(self, mask: Tensor | None = None) -> Divergence:
        """Over all tokens, or over those where `mask` [A] bool is true: a split of the caller's choice."""
        kl, agrees = (self.kl, self.agrees) if mask is None else (self.kl[mask], self.agrees[mask])
        if not len(kl):
            return Divergence(0, 0.0, 0.0, 0.0, 1.0)
        p99 = float(np.quantile(kl.numpy(), 0.99))
        return Divergence(len(kl), kl.mean().item(), p99, kl.max().item(), agrees.double().mean().item())


@dataclass(frozen=True)
class Divergence:
    """How far model q is from model p over teacher-forced tokens; KL is KL(p || q) per token in nats.

    p99_kl is the 99th percentile (linear between ranks); top1_agreement the share of tokens where both models hold the same
    token likeliest. Of no tokens: zeros, and agreement 1.
    """

    num_tokens: int
    mean_kl: float
    p99_kl: float
    max_kl: float
    top1_agreement: float


def token_divergence(p: Tensor, q: Tensor) -> TokenDivergence:
    """p, q: [A, V] logits of the reference and of the other model at equal contexts. Equal logits give exactly 0.

    In float64, clamped at 0 from below: rounding may leave a KL of -1e-17.
    """
    assert p.shape == q.shape, f"logits of {tuple(p.shape)} and {tuple(q.shape)} are not of the same tokens"
    kls = []
    for start in range(0, len(p), ROWS_AT_ONCE):
        log_p = p[start : start + ROWS_AT_ONCE].double().log_softmax(-1)
        log_q = q[start : start + ROWS_AT_ONCE].double().log_softmax(-1)
        kls.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0))
    kl = torch.cat(kls) if kls else torch.zeros(0, dtype=torch.float64)
    return TokenDivergence(kl, p.argmax(-1) == q.argmax(-1))


def join(parts: Sequence[TokenDivergence]) -> TokenDivergence:
    """The tokens of all parts, one after the other."""
    if not parts:
        return TokenDivergence(torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.bool))
    return TokenDivergence(torch.cat([part.kl for part in parts]), torch.cat([part.agrees for part in parts]))
