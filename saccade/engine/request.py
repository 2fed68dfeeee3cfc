"""A request's life: one answer being generated, from its prompt to the reason it ended."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import Literal

from saccade.engine.blocks import block_key
from saccade.engine.lookup import Lookup
from saccade.engine.options import SamplingParams
from saccade.engine.sampling import Logprob, Sampler, is_looping
from saccade.inputs.chat import TextStream
from saccade.inputs.prompt import Prompt

FinishReason = Literal["stop", "length", "repetition", "cancelled", "error"]
LOOP_CHECK_INTERVAL = 32  # tokens between two looks for endless repetition

_ids = itertools.count()


@dataclass
class Timings:
    """Seconds of each stage of one request. Stages shared with other requests of a step count in full for each."""

    media_s: float = 0.0  # reading and decoding
    preprocessing_s: float = 0.0  # resizing, normalising, cutting into patches, tokenising
    vision_s: float = 0.0
    queue_s: float = 0.0  # from arrival until the first step
    prefill_s: float = 0.0  # from the first step to the first token, media's time left out
    decode_s: float = 0.0  # from the first token to the last
    first_token_s: float = 0.0  # from arrival
    total_s: float = 0.0


class Request:
    """One answer in the making. Tokens are the prompt's, then the answer's; the first `num_computed` are in the cache."""

    def __init__(
        self,
        prompt: Prompt,
        params: SamplingParams,
        sampler: Sampler,
        text: TextStream,
        max_tokens: int,
        eos_token_ids: frozenset[int],
        lookup: Lookup | None = None,
    ) -> None:
        """`max_tokens` is the limit after the context's; `params` are resolved; `lookup` guesses the next tokens."""
        self.id = next(_ids)
        self.prompt = prompt
        self.params = params
        self.sampler = sampler
        self.lookup = lookup
        self.stream = text
        self.max_tokens = max_tokens
        self.enders = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_token_ids)
        self.output_ids: list[int] = []
        self.text = ""
        self.logprobs: list[list[Logprob]] = []
        self.prompt_logprobs: list[list[Logprob]] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.error: str | None = None
        self.num_computed = 0
        self.num_cached = 0  # prompt tokens found in the prefix cache when last admitted
        self.num_drafted = self.num_accepted = 0  # tokens guessed and computed, and those of them that were right
        self.blocks: list[int] = []
        media_s = sum(medium.decode_s for medium in prompt.media)
        self.timings = Timings(media_s=media_s, preprocessing_s=prompt.prepare_s - media_s)
        self.arrived = time.perf_counter()
        self.started: float | None = None
        self.first_token: float | None = None
        self._block_keys: list[bytes] = []
        self._stop_from = 0  # a stop text counts from here on: after min_tokens

    @property
    def num_tokens(self) -> int:
        return len(self.prompt.token_ids) + len(self.output_ids)

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Tokens start..stop of prompt and answer together."""
        num_prompt = len(self.prompt.token_ids)
        head = self.prompt.token_ids[start : min(stop, num_prompt)]
        return [*head, *self.output_ids[max(start - num_prompt, 0) : max(stop - num_prompt, 0)]]

    def block_keys(self, num_blocks: int, block_size: int) -> list[bytes]:
        """Content keys of the first `num_blocks` full blocks."""
        while len(self._block_keys) < num_blocks:
            start = len(self._block_keys) * block_size
            stop = start + block_size
            media = [
                (span.start - start, medium.key)
                for span, medium in zip(self.prompt.spans, self.prompt.media, strict=True)
                if span.start < stop and span.start + medium.receipt.num_tokens > start
            ]
            previous = self._block_keys[-1] if self._block_keys else b""
            self._block_keys.append(block_key(previous, self.token_ids(start, stop), media))
        return self._block_keys[:num_blocks]

    def guess(self, most: int) -> list[int]:
        """Guesses of the tokens after the next, at most `most`, and none beyond the answer's longest."""
        most = min(most, self.max_tokens - len(self.output_ids) - 1)
        return self.lookup.guess(most) if self.lookup is not None and most > 0 else []

    def learn(self, num_drafted: int, num_accepted: int) -> None:
        """How many of the guesses in this step were what was drawn."""
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        if self.lookup is not None:
            self.lookup.learn(num_drafted, num_accepted)

    def append(self, token_id: int) -> None:
        """Takes the next token; the answer ends if this token, its text or the length says so."""
        self.output_ids.append(token_id)
        if self.lookup is not None:
            self.lookup.append(token_id)
        if self.first_token is None:
            self.first_token = time.perf_counter()
        num = len(self.output_ids)
        may_end = num >= self.params.min_tokens
        if token_id in self.enders and may_end:
            self.finish("stop", stop_reason=token_id if token_id in self.params.stop_token_ids else None)
            return
        self.text += self.stream.push(token_id)
        if not may_end:
            self._stop_from = len(self.text)
        elif self.params.stop:
            self._end_at_stop_text()
        if not self.is_finished and num >= self.max_tokens:
            self.finish("length")
        elif (
            not self.is_finished
            and self.params.detect_repetition
            and not self.params.ignore_eos
            and may_end
            and num % LOOP_CHECK_INTERVAL == 0
            and is_looping(self.output_ids)
        ):
            self.finish("repetition")

    def _end_at_stop_text(self) -> None:
        found = [(at, text) for text in self.params.stop if (at := self.text.find(text, self._stop_from)) >= 0]
        if found:
            at, stop = min(found)
            self.finish("stop", stop_reason=stop)
            self.text = self.text[:at]

    def num_shown(self) -> int:
        """How many characters of the text are sure to stay: the beginning of a stop text at the end is held back."""
        if self.is_finished:
            return len(self.text)
        held = 0
        for stop in self.params.stop:
            for length in range(min(len(stop) - 1, len(self.text)), held, -1):
                if self.text.endswith(stop[:length]):
                    held = length
                    break
        return len(self.text) - held

    def finish(self, reason: FinishReason, *, stop_reason: str | int | None = None, error: str | None = None) -> None:
        self.finish_reason, self.stop_reason, self.error = reason, stop_reason, error
        self.text += self.stream.flush()
        now = time.perf_counter()
        times = self.timings
        times.total_s = now - self.arrived
        if self.started is not None:
            times.queue_s = self.started - self.arrived
        if self.started is not None and self.first_token is not None:
            times.first_token_s = self.first_token - self.arrived
            cutting_s = times.media_s + times.preprocessing_s - self.prompt.prepare_s  # into patches, within the steps
            times.prefill_s = self.first_token - self.started - times.vision_s - cutting_s
            times.decode_s = now - self.first_token
