"""The decoder as one call gives what its ops give one by one, to the bit; and is there when it should be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from saccade import LLM, SamplingParams
from saccade.kernels.library import load
from tests.engine.test_engine import conversation

pytestmark = pytest.mark.skipif(isinstance(load(), str), reason=str(load()))
WITH_LOGPROBS = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=4)
Open = Callable[..., LLM]


@pytest.mark.parametrize(
    ("dtype", "cache"), [("float32", "auto"), ("bfloat16", "auto"), ("float16", "int8"), ("bfloat16", "int8")]
)
def test_one_call_has_the_bits_of_the_ops_one_by_one(tiny_checkpoint: Path, dtype: str, cache: str) -> None:
    """Prompts in chunks, decoding together: tokens and log probabilities are equal."""
    answers = []
    for one_by_one in (False, True):
        options: dict[str, Any] = {"max_tokens_per_step": 40, "kv_cache_tokens": 4096, "quantization": "w8a8-dynamic"}
        options["kv_cache_dtype"] = cache
        llm = LLM(tiny_checkpoint, device="cpu", dtype=dtype, **options)
        assert llm.engine.runner.decoder_step is not None
        if one_by_one:
            llm.engine.runner.decoder_step = None
        outputs = llm.chat([conversation(seed) for seed in range(6)], WITH_LOGPROBS)
        answers.append([(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs])
    assert answers[0] == answers[1]


def test_an_op_of_another_back_end_is_called(open_tiny: Open) -> None:
    """There is no one call where one op is taken from elsewhere: bisecting a wrong number must reach the op."""
    llm = open_tiny(quantization="w8a8-dynamic", kernels={"rope": "reference"})
    assert llm.engine.runner.decoder_step is None


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", {1}), ("float32", {2})])
def test_torch_keeps_to_one_thread_in_steps_of_our_own(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, expected: set[int]
) -> None:
    """And has its own again afterwards, whether the answer was whole or given up."""
    llm = LLM(tiny_checkpoint, device="cpu", dtype=dtype, quantization="w8a8-dynamic", threads=2)
    runner, seen = llm.engine.runner, set()
    compute, head = runner.compute, runner.head
    monkeypatch.setattr(runner, "compute", lambda *a: (seen.add(torch.get_num_threads()), compute(*a))[1])
    monkeypatch.setattr(runner, "head", lambda *a: (seen.add(torch.get_num_threads()), head(*a))[1])
    llm.chat(conversation(0), WITH_LOGPROBS)
    assert seen == expected
    assert torch.get_num_threads() == 2
    monkeypatch.setattr(runner, "head", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        llm.chat(conversation(1), WITH_LOGPROBS)
    assert torch.get_num_threads() == 2
