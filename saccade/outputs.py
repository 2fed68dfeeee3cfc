"""What a caller gets back: answers with their boxes in original pixels, and the receipt of every medium."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from saccade.engine.request import FinishReason, Request, Timings
from saccade.engine.sampling import Logprob
from saccade.grounding import Box, Event, Point, find_boxes, find_events, find_points
from saccade.inputs.prompt import MediaReceipt


@dataclass(frozen=True)
class CompletionOutput:
    """One answer. finish_reason is None while it grows; `error` says what went wrong when it is "error"."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    logprobs: list[list[Logprob]] | None
    error: str | None
    media: tuple[MediaReceipt, ...]

    @cached_property
    def boxes(self) -> list[Box]:
        """Boxes the answer holds, in pixels of the original pictures."""
        return find_boxes(self.text, self.media)

    @cached_property
    def points(self) -> list[Point]:
        """Points the answer holds, in pixels of the original pictures."""
        return find_points(self.text, self.media)

    @cached_property
    def events(self) -> list[Event]:
        """Events the answer holds, in seconds of the original videos."""
        return find_events(self.text, self.media)


@dataclass(frozen=True)
class RequestOutput:
    """What became of one conversation: its answers, and the receipt of every medium in order of appearance."""

    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    media: list[MediaReceipt]
    timings: Timings
    num_cached_tokens: int
    prompt_logprobs: list[list[Logprob]] | None
    num_drafted_tokens: int = 0  # of all answers: guessed and computed beside the tokens that were due,
    num_accepted_tokens: int = 0  # and those of them that were right

    @property
    def is_finished(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)


def output_of(requests: Sequence[Request]) -> RequestOutput:
    """The state of the requests that answer one conversation."""
    first = requests[0]
    media = tuple(medium.receipt for medium in first.prompt.media)
    outputs = [
        CompletionOutput(
            index=index,
            text=request.text[: request.num_shown()],
            token_ids=list(request.output_ids),
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            logprobs=list(request.logprobs) if request.params.logprobs is not None else None,
            error=request.error,
            media=media,
        )
        for index, request in enumerate(requests)
    ]
    return RequestOutput(
        prompt_token_ids=list(first.prompt.token_ids),
        outputs=outputs,
        media=list(media),
        timings=first.timings,
        num_cached_tokens=first.num_cached,
        num_drafted_tokens=sum(request.num_drafted for request in requests),
        num_accepted_tokens=sum(request.num_accepted for request in requests),
        prompt_logprobs=list(first.prompt_logprobs) if first.params.prompt_logprobs is not None else None,
    )
