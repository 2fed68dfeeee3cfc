"""The loop: schedule, run, take the tokens. One engine serves any number of requests, one step at a time."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from saccade.base.errors import OptionError, PromptError
from saccade.engine.batch import Batch, pack
from saccade.engine.device_sampling import Draw
from saccade.engine.lookup import Lookup
from saccade.engine.options import SamplingParams
from saccade.engine.request import Request
from saccade.engine.runner import Runner
from saccade.engine.sampling import Sampler, is_finite, top_logprobs
from saccade.engine.scheduler import Chunk, Scheduler
from saccade.inputs.chat import ChatTokenizer
from saccade.inputs.prompt import Prompt
from saccade.kernels.record import NOT_FINITE


@dataclass(frozen=True)
class InFlight:
    """A step that is queued on the device, which chooses its tokens; nobody has seen them yet."""

    chunks: list[Chunk]
    token_ids: Callable[[], list[int]]  # waits for them, one of each chunk


class Engine:
    """Requests go in with `add`, advance with `step`, and always end: finished, cancelled, or with an error of their own.

    Where the device chooses tokens, a step is queued before those of the last one are read, as long as the same requests go on. All
    that such a step needs is known without them. A request that turns out to have ended is in one step too many, whose token for it
    nobody reads; what the step stores lies in blocks that are free by then, behind whatever may be found in them.
    """

    def __init__(self, runner: Runner, scheduler: Scheduler, tokenizer: ChatTokenizer) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self.config = runner.model.config
        self._in_flight: InFlight | None = None

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
        if self._in_flight is None:
            chunks = self.scheduler.schedule()
            if not chunks:
                return []
            now = time.perf_counter()
            for chunk in chunks:
                if chunk.request.started is None:
                    chunk.request.started = now
            batch = pack(chunks, self.scheduler.pool.block_size)
            if not (self._can_launch(chunks, batch) and self._begin(chunks, batch)):
                return self._compute(chunks, batch)
            self._in_flight = self._launch(chunks, batch, is_first=True)
        flight = self._in_flight
        self._in_flight = self._launch_ahead(flight)
        return self._land(flight)

    def _compute(self, chunks: Sequence[Chunk], batch: Batch) -> list[Request]:
        """The step whose tokens the host chooses."""
        features = self._embed_media(batch, chunks)
        with self.runner.processors_to_itself():
            hidden = self.runner.run(batch, features)
            self._take_prompt_logprobs(chunks, hidden)
            advanced = self._take_tokens(chunks, batch, hidden)
        return self._freed(advanced)

    def _freed(self, advanced: list[Request]) -> list[Request]:
        """The same requests; those that have ended no longer hold anything."""
        for request in advanced:
            if request.is_finished:
                self.scheduler.remove(request)
        return advanced

    # --- tokens chosen on the device ---

    def _can_launch(self, chunks: Sequence[Chunk], batch: Batch) -> bool:
        """Whether the device can choose the tokens of the step: one of each request, and of no probability is to be told."""
        if self.scheduler.speculation is not None or not self.runner.chooses(batch):
            return False
        return all(chunk.reaches_end and chunk.request.params.logprobs is None for chunk in chunks)

    def _begin(self, chunks: Sequence[Chunk], batch: Batch) -> bool:
        return self.runner.begin(batch, [chunk.request.sampler for chunk in chunks])

    def _launch(self, chunks: list[Chunk], batch: Batch, *, is_first: bool) -> InFlight:
        draws = []
        for chunk in chunks:
            request = chunk.request
            num_said = chunk.stop - len(request.prompt)
            draws.append(Draw(request.sampler.next_number(), num_said >= request.params.min_tokens))
        return InFlight(chunks, self.runner.launch(batch, draws, is_first=is_first))

    def _launch_ahead(self, flight: InFlight) -> InFlight | None:
        """The step behind `flight`; None where `flight` has to be read before it is known what is next."""
        chunks = self.scheduler.ahead(flight.chunks)
        if not chunks:
            return None
        batch = pack(chunks, self.scheduler.pool.block_size)
        return self._launch(chunks, batch, is_first=False) if self.runner.can_follow(batch) else None

    def _land(self, flight: InFlight) -> list[Request]:
        """Takes the tokens of a step; of requests that have ended since it was queued there are none."""
        advanced = []
        for chunk, token_id in zip(flight.chunks, flight.token_ids(), strict=True):
            request = chunk.request
            if request.is_finished:
                continue
            if token_id == NOT_FINITE:
                fail_of_logits(request)
            else:
                request.sampler.remember(token_id)
                request.append(token_id)
            self.scheduler.computed(chunk)
            advanced.append(request)
        return self._freed(advanced)

    # --- tokens chosen on the host ---

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
            fail_of_logits(request)
            break
        token_id = request.sampler.next_token(row)
        if request.params.logprobs is not None:
            request.logprobs.append(top_logprobs(row, token_id, request.params.logprobs))
        request.append(token_id)
        if request.is_finished or token_id != draft:
            break
    said = request.output_ids[num_before:]
    request.learn(len(drafts), sum(draft == token_id for draft, token_id in zip(drafts, said, strict=False)))


def fail_of_logits(request: Request) -> None:
    request.finish(
        "error",
        error=f"the model gave non-finite logits after {request.num_tokens} tokens; its weights or this "
        "precision are at fault: check the checkpoint (saccade inspect --check) or use --dtype float32",
    )
