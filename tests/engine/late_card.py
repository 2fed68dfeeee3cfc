"""A device that puts off everything: nothing that is queued happens before somebody waits for it. What then comes out right needed no
number of the device when it was queued, and left alone what the device had still to read.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saccade import LLM
from saccade.engine.graphs import DecodeGraphs
from saccade.kernels.record import Likeliest, PagedLayout


class LateCard:
    """Recordings keep what a card keeps, the computation and one place for its output, and compute anew at every replay."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.queue: deque[Callable[[], object]] = deque()
        self.num_queued = self.num_done = 0
        self.num_recorded = self.num_replayed = 0
        self.num_ahead = 0  # replays queued while another had not happened
        self._num_pending = 0

    def record(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        self.finish()
        self.num_recorded += 1
        for _ in range(2):
            output = torch.zeros_like(compute())

        def happen() -> None:
            self._num_pending -= 1
            output.copy_(compute())

        def replay() -> None:
            self.num_replayed += 1
            self.num_ahead += self._num_pending > 0
            self._num_pending += 1
            self._queue(happen)

        return replay, output

    def host_words(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int64)

    def copy(self, target: Tensor, source: Tensor) -> None:
        self._queue(lambda: target.copy_(source))

    def mark(self) -> Callable[[], object]:
        place = self.num_queued
        return lambda: self.finish(place)

    def finish(self, place: int | None = None) -> None:
        """Does what was queued before `place`; all of it by default."""
        with torch.inference_mode():
            while self.queue and (place is None or self.num_done < place):
                self.num_done += 1
                self.queue.popleft()()

    def _queue(self, what: Callable[[], object]) -> None:
        self.num_queued += 1
        self.queue.append(what)


def put_on(llm: LLM, card: LateCard, *, chooses: bool = True, likeliest: Likeliest | None = None) -> LLM:
    """The model's decoding recorded on the card, its tokens chosen there or not."""
    runner = llm.engine.runner
    head = runner.model.head if chooses else None
    vocab_size, block_size = runner.model.config.text.vocab_size, llm.engine.scheduler.pool.block_size
    runner.graphs = graphs = DecodeGraphs(runner.compute, head, vocab_size, block_size, card, likeliest)
    run = graphs.run

    def run_now(batch: Any) -> Tensor:
        hidden = run(batch)
        card.finish()  # a card would queue what is computed of it, too
        return hidden

    graphs.run = run_now  # type: ignore[method-assign]
    if runner.model.kernels.sources["attention_paged"] != "triton":
        attend_by_buffers(llm)
    return llm


def attend_by_buffers(llm: LLM) -> None:
    """Attention takes contexts from where a recording has them, as Triton's does."""
    runner = llm.engine.runner
    runner.decoder_step = None  # takes them from the host
    attend = runner.model.kernels.attention_paged

    def by_buffers(q: Tensor, k: Tensor, v: Tensor, layout: PagedLayout, scale: float) -> Tensor:
        contexts = tuple(layout.contexts.tolist())
        layout = PagedLayout(layout.query_lengths, contexts, layout.block_tables, layout.slots)
        return attend(q, k, v, layout, scale)

    runner.cache.kernels = dataclasses.replace(runner.model.kernels, attention_paged=by_buffers)
