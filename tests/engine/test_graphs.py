"""Recorded decoding, with a recorder that computes anew at every replay, into the recording's own output, as a card would.

Attention is Triton's, interpreted: it alone takes contexts from the buffer that a recording reads.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from saccade import LLM, SamplingParams
from saccade.engine.graphs import DecodeGraphs
from saccade.kernels.choose import lack_of

TEXTS = ("Say hello.", "Count to five, please.", "Describe the picture that I have not shown you.")
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
OPTIONS = {"device": "cpu", "dtype": "float32", "kv_cache_tokens": 1024, "block_size": 4}


pytestmark = pytest.mark.skipif(
    lack_of("triton", torch.device("cpu")) is not None, reason="Triton's interpreter is what attends here"
)


class Replays:
    """A recorder that keeps what a card keeps: the computation, and one place for its output."""

    def __init__(self) -> None:
        self.num_recorded = self.num_replayed = 0

    def __call__(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        self.num_recorded += 1
        hidden = torch.full_like(compute(), torch.nan)

        def replay() -> None:
            self.num_replayed += 1
            hidden.copy_(compute())

        return replay, hidden


def open_recorded(recorder: Replays) -> LLM:
    llm = LLM("demo", kernels={"attention_paged": "triton"}, **OPTIONS)
    runner = llm.engine.runner
    runner.graphs = DecodeGraphs(runner.compute, 4, recorder)
    return llm


def answers(llm: LLM, texts: tuple[str, ...]) -> list[list[int]]:
    outputs = llm.chat([[{"role": "user", "content": text}] for text in texts], GREEDY)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("num_texts", [1, 3])
def test_replayed_steps_say_what_computed_ones_do(num_texts: int) -> None:
    plain = LLM("demo", **OPTIONS)
    recorder = Replays()
    recorded = open_recorded(recorder)
    assert answers(recorded, TEXTS[:num_texts]) == answers(plain, TEXTS[:num_texts])
    assert recorder.num_replayed == 5  # every step but the first, which is the prompts'
    assert recorder.num_recorded == 1  # three rows are filled up to four


def test_a_wider_table_is_recorded_anew_and_an_old_size_is_replayed() -> None:
    recorder = Replays()
    llm = open_recorded(recorder)
    answers(llm, TEXTS[:1])
    answers(llm, TEXTS[1:2])
    assert recorder.num_recorded == 1
    answers(llm, ("one two " * 25,))  # more than 16 blocks of 4
    assert recorder.num_recorded == 2
    assert set(llm.engine.runner.graphs.recordings) == {(1, 16), (1, 32)}  # type: ignore[union-attr]


def test_prompts_are_not_replayed() -> None:
    recorder = Replays()
    llm = open_recorded(recorder)
    llm.chat([{"role": "user", "content": "Hi"}], SamplingParams(max_tokens=1, temperature=0.0))
    assert recorder.num_recorded == 0
