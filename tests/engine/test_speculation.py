"""Guessed tokens change how many steps an answer takes, and nothing else: not a token, not a log probability, not a block."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from saccade import LLM, SamplingParams
from saccade.api import messages_for
from saccade.demo import questions
from saccade.engine.lookup import Lookup, Speculation
from saccade.kernels.choose import choose
from saccade.kernels.library import load
from saccade.schemes.affine import loading_scheme, quantize_weight
from saccade.schemes.scheme import Weight
from tests.engine.test_engine import conversation, told

Open = Callable[..., LLM]
GREEDY = SamplingParams(max_tokens=40, temperature=0, repetition_penalty=1.0, ignore_eos=True)
KINDS = [  # of requests; the tiny model soon repeats itself, so that much is guessed right, and much wrong
    GREEDY,
    dataclasses.replace(GREEDY, temperature=0.4, top_k=4, seed=5),
    dataclasses.replace(GREEDY, temperature=0.8, top_p=0.7, min_p=0.05, seed=6, ignore_eos=False, min_tokens=9),
    dataclasses.replace(GREEDY, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2, logprobs=2),
    dataclasses.replace(GREEDY, stop=("e", "th"), min_tokens=7),
    dataclasses.replace(GREEDY, temperature=0.3, seed=7, n=2, prompt_logprobs=0, stop_token_ids=(65, 67, 300)),
]
UNLIMITED = Speculation(max_rows=10_000)


def params_of(seed: int) -> SamplingParams:
    return KINDS[seed * 5 % len(KINDS)]


def answers(llm: LLM, seeds: range) -> list[Any]:
    return told(llm.chat([conversation(seed) for seed in seeds], [params_of(seed) for seed in seeds]))


@pytest.fixture(scope="module")
def unguessed(open_tiny: Open) -> list[Any]:
    return answers(open_tiny(speculation="off"), range(64))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_cache_tokens": 704, "block_size": 8, "max_tokens_per_step": 90},
    ],
    ids=["roomy", "small cache, chunks"],
)
def test_64_mixed_requests_answer_as_without_guesses(
    open_tiny: Open, unguessed: list[Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy and drawn, with penalties, stop texts and all; every step may hold guesses, prompts beside them."""
    llm = open_tiny(speculation="lookup", **options)
    scheduler = llm.engine.scheduler
    scheduler.speculation = UNLIMITED
    counts = {"drafted": 0, "accepted": 0}
    learn = Lookup.learn

    def counted(self: Lookup, num_guessed: int, num_right: int) -> None:
        counts["drafted"] += num_guessed
        counts["accepted"] += num_right
        learn(self, num_guessed, num_right)

    monkeypatch.setattr(Lookup, "learn", counted)
    assert answers(llm, range(64)) == unguessed
    assert 0 < counts["accepted"] < counts["drafted"], "nothing was guessed right, or nothing wrong"
    assert scheduler.pool.num_free == scheduler.pool.num_blocks, "blocks leaked"
    if "kv_cache_tokens" in options:
        assert scheduler.num_preemptions > 0, "the cache was not too small"


class Wrong(Lookup):
    """Guesses as many tokens as it may, none of which is ever drawn."""

    def guess(self, most: int) -> list[int]:
        return [1] * most

    def learn(self, num_guessed: int, num_right: int) -> None:
        assert num_right == 0, "token 1 was drawn; the test tests nothing"


def test_only_what_was_said_is_found_in_the_prefix_cache(open_tiny: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saccade.engine.engine.Lookup", Wrong)
    plain, guessing = open_tiny(speculation="off", block_size=1), open_tiny(speculation="lookup", block_size=1)
    expected = [plain.chat(conversation(1), GREEDY)[0] for _ in range(2)]
    engine = guessing.engine
    request = engine.add(guessing.prepare(conversation(1)), GREEDY)[0]
    while not request.is_finished:
        engine.step()
        if not request.is_finished:
            assert len(engine.scheduler.pool._by_key) == request.num_computed == request.num_tokens - 1
    assert request.output_ids == expected[0].outputs[0].token_ids
    assert request.num_drafted > 200
    again = guessing.chat(conversation(1), GREEDY)[0]
    assert again.outputs[0].token_ids == expected[1].outputs[0].token_ids
    assert again.num_cached_tokens == expected[1].num_cached_tokens


def test_guesses_take_no_other_requests_blocks(open_tiny: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same requests fit with guesses that fit without, and a block that held only wrong guesses is free after the step."""
    monkeypatch.setattr("saccade.engine.engine.Lookup", Wrong)
    llm = open_tiny(speculation="lookup", block_size=1, kv_cache_tokens=128)
    llm.engine.scheduler.speculation = UNLIMITED
    prompts = [llm.prepare([{"role": "user", "content": text}]) for text in ("Hi", "Ho")]
    params = dataclasses.replace(GREEDY, max_tokens=12)
    requests = [request for prompt in prompts for request in llm.engine.add(prompt, params)]
    pool = llm.engine.scheduler.pool
    while llm.engine.has_work:
        llm.engine.step()
        held = sum(len(request.blocks) for request in requests)
        shared = held - (pool.num_blocks - pool.num_free)
        assert held <= sum(request.num_tokens for request in requests if not request.is_finished)
        assert shared >= 0
    assert llm.engine.scheduler.num_preemptions == 0
    assert all(len(request.output_ids) == 12 for request in requests)


def test_an_answer_is_never_guessed_beyond_its_longest(open_tiny: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saccade.engine.engine.Lookup", Wrong)
    llm = open_tiny(speculation="lookup")
    output = llm.chat(conversation(0), dataclasses.replace(GREEDY, max_tokens=3))[0]
    assert len(output.outputs[0].token_ids) == 3
    assert output.num_drafted_tokens == 1  # after the first token one more may be guessed, after the second none


# --- to the bit --------------------------------------------------------------------------------------------------------

needs_library = pytest.mark.skipif(isinstance(load(), str), reason=str(load()))


@needs_library
@pytest.mark.parametrize("scheme", [None, "w8a16", "w4a16-g64", "w8a8-dynamic", "w4a8-g64", "fp8"])
def test_a_row_has_the_bits_it_has_alone(scheme: str | None, isa: str) -> None:
    """On each instruction set, up to as many rows as the back end says."""
    kernels = choose(torch.device("cpu"))
    assert kernels.alike_rows is not None
    weight = Weight((torch.randn(2049, 2048, generator=torch.Generator().manual_seed(1)) * 0.1).bfloat16())
    weight = quantize_weight(weight, loading_scheme(scheme)) if scheme else weight
    most = kernels.alike_rows(weight, torch.bfloat16)
    assert most >= 4
    x = torch.randn(most, 2048, generator=torch.Generator().manual_seed(2)).bfloat16()
    alone = torch.cat([kernels.linear(row[None], weight) for row in x])
    for count in {2, 3, 4, 5, 8, most} & set(range(most + 1)):
        assert torch.equal(kernels.linear(x[:count], weight), alone[:count]), count


@needs_library
@pytest.mark.parametrize("scheme", [None, "w8a16", "w4a16-g32", "w8a8-dynamic", "w4a8-g32"])
@pytest.mark.parametrize("cache", ["auto", "int8"])
def test_guessed_tokens_have_the_log_probabilities_of_single_steps(
    tiny_checkpoint: Path, scheme: str | None, cache: str
) -> None:
    """One call for all layers, bfloat16 or quantized, both kinds of cache: every logit equal."""
    told = []
    for speculation in ("off", "auto"):
        llm = LLM(
            tiny_checkpoint,
            device="cpu",
            dtype="bfloat16",
            quantization=scheme,
            kv_cache_dtype=cache,
            kv_cache_tokens=2048,
            speculation=speculation,
        )
        params = dataclasses.replace(GREEDY, max_tokens=64, logprobs=1)
        outputs = [llm.chat(conversation(seed), params)[0] for seed in (0, 1, 3)]
        told.append([(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs])
        num_right = sum(output.num_accepted_tokens for output in outputs)
        assert (num_right > 20) == (speculation == "auto")
    assert told[0] == told[1]


# --- where it serves ---------------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("scheme", [None, "w8a8-dynamic", "w4a8-g32"])
def test_the_demo_copies_in_fewer_steps(scheme: str | None) -> None:
    """What stands in the question, and a box's digits and commas."""
    boxed = next(question for question in questions() if question.question.startswith("Locate"))
    conversations = [messages_for("Copy: 4 K 7 P 2 H 5"), boxed.messages]
    told = []
    for speculation in ("off", "auto"):
        llm = LLM("demo", device="cpu", kv_cache_tokens=4096, quantization=scheme, speculation=speculation)
        outputs = [llm.chat(each, SamplingParams(temperature=0))[0] for each in conversations]
        told.append([output.outputs[0].text for output in outputs])
        for output in outputs:
            assert (output.num_accepted_tokens > 0) == (speculation == "auto")
    assert told[0] == told[1]
    assert told[0][0] == "4 K 7 P 2 H 5"
