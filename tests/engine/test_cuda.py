"""On a card: recorded steps, tokens chosen there and steps queued ahead say what the same model says op by op. Skipped without one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from saccade import LLM, SamplingParams
from tests.engine.test_engine import conversation, told

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")

GREEDY = SamplingParams(max_tokens=24, min_tokens=24, temperature=0.0, ignore_eos=True)
DRAWN = dataclasses.replace(GREEDY, temperature=0.8, top_k=40, top_p=0.9, seed=5, presence_penalty=0.2)
# float32, so that another order of a sum changes no token; no cached prefixes, so that every answer is computed alike.
OPTIONS: dict[str, Any] = {"dtype": "float32", "kv_cache_tokens": 8192, "prefix_cache": False, "speculation": "off"}
# A recording splits a context otherwise than a step of its own; where what comes of it is rounded to 8 bits, a last digit may
# become a step.
WEIGHTS_ALONE = [None, "w8a16", "w4a16-g32"]
SCHEMES = [*WEIGHTS_ALONE, "w8a8-dynamic", "w4a8-g32", "fp8"]


def answers(llm: LLM, params: SamplingParams, count: int = 3) -> list[Any]:
    return told(llm.chat([conversation(seed) for seed in range(count)], params))


@pytest.mark.parametrize("cache", ["model", "int8"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_however_a_step_gets_to_the_card_it_says_the_same(scheme: str | None, cache: str) -> None:
    llm = LLM("demo", device="cuda", quantization=scheme, kv_cache_dtype=cache, **OPTIONS)
    graphs = llm.engine.runner.graphs
    assert graphs is not None
    for params in (GREEDY, DRAWN):
        chosen_there = answers(llm, params)
        head, graphs.head = graphs.head, None
        chosen_here = answers(llm, params)
        graphs.head = head
        assert chosen_there == chosen_here
        if cache == "model" and scheme in WEIGHTS_ALONE:
            llm.engine.runner.graphs = None
            assert answers(llm, params) == chosen_here
            llm.engine.runner.graphs = graphs
    assert graphs.failure is None
    assert {what for what, *_ in graphs.recordings} == {"likeliest tokens", "drawn tokens", "hidden rows"}


@pytest.mark.parametrize("scheme", [None, "w8a16"])
def test_the_card_says_what_the_processor_says(scheme: str | None) -> None:
    there, here = (LLM("demo", device=name, quantization=scheme, **OPTIONS) for name in ("cuda", "cpu"))
    assert answers(there, GREEDY) == answers(here, GREEDY)


def test_recordings_outlive_what_else_the_memory_is_used_for() -> None:
    llm = LLM("demo", device="cuda", **OPTIONS)
    first = [answers(llm, GREEDY, count) for count in (1, 3)]
    torch.cuda.empty_cache()
    filler = [torch.full((1 << size,), -1, dtype=torch.int64, device="cuda") for size in range(6, 24) for _ in range(8)]
    assert [answers(llm, GREEDY, count) for count in (1, 3)] == first
    del filler


def test_a_card_that_is_named_by_its_number_serves() -> None:
    """The last of several: Triton launches on the current device, which need not be it."""
    last = torch.cuda.device_count() - 1
    llm = LLM("demo", device=f"cuda:{last}", **OPTIONS)
    torch.cuda.set_device(0)
    assert answers(llm, GREEDY) == answers(LLM("demo", device="cpu", **OPTIONS), GREEDY)
