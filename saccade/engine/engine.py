"""The loop: schedule, run, take the tokens. One engine serves any number of requests, one step at a time."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Sequence

from torch import Tensor

from saccade.base.errors import OptionError, PromptError
from saccade.engine.batch import Batch, pack
from saccade.engine.lookup import Lookup
from saccade.engine.options import SamplingParams
from saccade.engine.request import Request
from saccade.engine.runner import Runner
from saccade.engine.sampling import Sampler, is_finite, top_logprobs
from saccade.engine.scheduler import Chunk, Scheduler
from saccade.inputs.chat import ChatTokenizer
from saccade.inputs.prompt import Prompt


class Engine:
    """Requests go in with `add`, advance with `step`, and always end: finished, cancelled, or with an error of their own."""

    def __init__(self, runner: Runner, scheduler: Scheduler, tokenizer: ChatTokenizer) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self.config = runner.model.config

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def max_context(self) -> int:
        """Most tokens a request may come to: the model's limit, or the cache's where that is smaller."""
        return min(self.config.text.max_position_embeddings, self.scheduler.pool.capacity_tokens)

    def add(self, prompt: Prompt, params: SamplingParams) -> list[Request]:
        """One request per answer asked for (params.n); answer i draws with seed + i. Raises before any work is done."""
        params = params.resolved(self.config.generation)
        if len(prompt) >= self.max_context:
            raise PromptError(
                f"prompt of {len(prompt)} tokens does not fit the context of {self.max_context}; "
                "make the pictures smaller (max_pixels), take fewer frames (fps), or give a larger kv_cache_tokens"
            )
        vocab_size = self.config.text.vocab_size
        if not prompt.token_ids:
            raise PromptError("the prompt is empty; give it at least one token")
        if max(prompt.token_ids) >= vocab_size:
            raise PromptError(f"token id {max(prompt.token_ids)} is beyond the vocabulary of {vocab_size}")
        if params.logprobs is not None and params.logprobs > vocab_size:
            raise OptionError(f"logprobs {params.logprobs} is more than the vocabulary of {vocab_size}")
        speculation = self.scheduler.speculation
        requests = []
        for index in range(params.n):
            seeded = params if params.seed is None else dataclasses.replace(params, seed=params.seed + index)
            request = Request(
                prompt,
                seeded,
                Sampler(seeded, prompt.token_ids, self.config.generation.eos_token_ids, vocab_size),
                self.tokenizer.stream(params.skip_special_tokens),
                max_tokens=min(params.max_tokens, self.max_context - len(prompt)),
                eos_token_ids=frozenset(self.config.generation.eos_token_ids),
                lookup=Lookup(prompt.token_ids, speculation) if speculation is not None else None,
            )
            requests.append(request)
        for request in requests:
            self.scheduler.add(request)
        return requests

    def cancel(self, request: Request) -> None:
        """Ends a request now and frees its blocks; one that has ended stays as it is."""
        if not request.is_finished:
            request.finish("cancelled")
            self.scheduler.remove(request)

    def step(self) -> list[Request]:
        """Computes one round of chunks. Returns the requests that got a token or ended."""
        chunks = self.scheduler.schedule()
        if not chunks:
            return []
        now = time.perf_counter()
        for chunk in chunks:
            if chunk.request.started is None:
                chunk.request.started = now
        batch = pack(chunks, self.scheduler.pool.block_size, self.runner.model.device)
        features = self._embed_media(batch, chunks)
        with self.runner.processors_to_itself():
            hidden = self.runner.run(batch, features)
            self._take_prompt_logprobs(chunks, hidden)
            advanced = self._take_tokens(chunks, batch, hidden)
        for request in advanced:
            if request.is_finished:
                self.scheduler.remove(request)
        return advanced

    def _embed_media(self, batch: Batch, chunks: Sequence[Chunk]) -> list[Tensor]:
        """Features of each placement's medium; the time goes to the requests that show one."""
        if not batch.placements:
            return []
        features, times = self.runner.embed_media([place.medium for place in batch.placements])
        for index in {place.chunk for place in batch.placements}:
            timings = chunks[index].request.timings
            timings.preprocessing_s += times.preprocessing_s
            timings.vision_s += times.vision_s
        return features

    def _take_prompt_logprobs(self, chunks: Sequence[Chunk], hidden: Tensor) -> None:
        row = 0
        for chunk in chunks:
            request = chunk.request
            if request.params.prompt_logprobs is not None:
                # Row i tells of token i + 1; the first token has no row. A resumed request has them already.
                first = max(chunk.start, len(request.prompt_logprobs))
                last = min(chunk.stop, len(request.prompt) - 1)
                rows = range(row + first - chunk.start, row + last - chunk.start)
                for at, logits in zip(range(first, last), self.runner.logits(hidden, rows), strict=True):
                    token_id = request.prompt.token_ids[at + 1]
                    request.prompt_logprobs.append(top_logprobs(logits, token_id, request.params.prompt_logprobs))
            row += chunk.length

    def _take_tokens(self, chunks: Sequence[Chunk], batch: Batch, hidden: Tensor) -> list[Request]:
        advanced = []
        ending = [(chunk, row) for chunk, row in zip(chunks, batch.last_rows, strict=True) if chunk.reaches_end]
        rows = [row for chunk, last in ending for row in range(last - len(chunk.drafts), last + 1)]
        logits_of = self.runner.logits(hidden, rows)
        for chunk, _ in ending:
            advance(chunk.request, chunk.drafts, list(itertools.islice(logits_of, len(chunk.drafts) + 1)))
            advanced.append(chunk.request)
        for chunk in chunks:
            self.scheduler.computed(chunk)
        return advanced


def advance(request: Request, drafts: Sequence[int], logits: Sequence[Tensor]) -> None:
    """Draws the request's next token, and as long as the draft beside it was right, the one after it.

    logits[i]: [V] behind drafts[:i]. Each token is drawn as it would be in a step of its own, with the next random number and after
    all that was said before; a draft changes nothing but how soon.
    """
    num_before = len(request.output_ids)
    for draft, row in zip([*drafts, None], logits, strict=True):
        if not is_finite(row):
            request.finish(
                "error",
                error=f"the model gave non-finite logits after {request.num_tokens} tokens; its weights or this "
                "precision are at fault: check the checkpoint (saccade inspect --check) or use --dtype float32",
            )
            break
        token_id = request.sampler.next_token(row)
        if request.params.logprobs is not None:
            request.logprobs.append(top_logprobs(row, token_id, request.params.logprobs))
        request.append(token_id)
        if request.is_finished or token_id != draft:
            break
    said = request.output_ids[num_before:]
    request.learn(len(drafts), sum(draft == token_id for draft, token_id in zip(drafts, said, strict=False)))
