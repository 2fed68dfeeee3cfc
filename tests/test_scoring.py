"""Teacher-forced logits: the same as the whole sequence in one pass, however they were computed; and KL as its definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from saccade import LLM, SamplingParams
from saccade.base.errors import PromptError
from saccade.inputs.pixels import patches
from saccade.model.language import WholeSequences
from saccade.scoring import answer_tokens, join, score_answers, token_divergence
from tests.engine.test_engine import conversation

Open = Callable[..., LLM]
Pairs = list[tuple[list[dict[str, Any]], str]]

PAIRS: Pairs = [(conversation(seed), " ".join(["yes", "no", "left", "42"][: seed % 5])) for seed in range(12)]


@torch.inference_mode()
def one_pass(llm: LLM, messages: list[dict[str, Any]], answer: str) -> Tensor:
    """The oracle: prompt and answer as one sequence without a cache. [A, V] float32."""
    prompt, ids = llm.prepare(messages), answer_tokens(llm, answer)
    model = llm.engine.runner.model
    positions = torch.cat([prompt.positions, (prompt.next_position + torch.arange(len(ids))).expand(3, -1)], dim=1)
    x = model.embed(torch.tensor([*prompt.token_ids, *ids]))
    for span, medium in zip(prompt.spans, prompt.media, strict=True):
        features = model.encode(patches(medium.frames, llm.config), [medium.receipt.grid])
        x[span.start : span.start + len(features)] = features
    hidden = model(x, positions, WholeSequences(model.kernels, (len(x),)))
    first = len(prompt) - 1
    return model.head(hidden[first : first + len(ids)]).float()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_cache_tokens": 256, "block_size": 4, "max_tokens_per_step": 33, "encoder_cache_bytes": 0},
    ],
    ids=["roomy", "everything small"],
)
def test_the_logits_are_those_of_the_whole_sequence(open_tiny: Open, options: dict[str, Any]) -> None:
    llm = open_tiny(**options)
    for (messages, answer), scored in zip(PAIRS, score_answers(llm, PAIRS), strict=True):
        torch.testing.assert_close(scored.logits, one_pass(llm, messages, answer), atol=2e-5, rtol=1e-5)
        assert scored.token_ids == answer_tokens(llm, answer)
    pool = llm.engine.scheduler.pool
    assert pool.num_free == pool.num_blocks


def test_a_greedy_answer_is_the_likeliest_at_every_token(open_tiny: Open) -> None:
    llm = open_tiny()
    messages = conversation(3)
    said = llm.chat(messages, SamplingParams(max_tokens=8, temperature=0, repetition_penalty=1.0))[0].outputs[0]
    (scored,) = score_answers(llm, [(messages, said.text)])
    retold = llm.tokenizer.encode(said.text)
    same = next((i for i, (a, b) in enumerate(zip(retold, said.token_ids, strict=False)) if a != b), len(retold))
    assert same > 0
    assert scored.logits.argmax(-1).tolist()[:same] == said.token_ids[:same]
    assert (scored.logprobs < 0).all()


def test_what_the_engine_did_before_changes_no_bit(open_tiny: Open) -> None:
    llm = open_tiny()
    first = [scored.logits for scored in score_answers(llm, PAIRS)]
    llm.chat([messages for messages, _ in PAIRS], SamplingParams(max_tokens=3))
    second = [scored.logits for scored in score_answers(llm, PAIRS)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_pairs_are_read_as_they_are_needed(open_tiny: Open) -> None:
    read = 0

    def endless() -> Iterator[tuple[list[dict[str, Any]], str]]:
        nonlocal read
        while True:
            read += 1
            yield [{"role": "user", "content": f"question {read}"}], "yes"

    scores = score_answers(open_tiny(max_tokens_per_step=64), endless())
    for _ in range(40):
        next(scores)
    assert read < 80
    scores.close()


def test_an_answer_spells_no_special_token(open_tiny: Open) -> None:
    llm = open_tiny()
    ids = answer_tokens(llm, "a<|im_end|>b")
    end = llm.tokenizer.added_tokens["<|im_end|>"]
    assert ids[-1] == end
    assert end not in ids[:-1]


def test_what_does_not_fit_is_refused_with_its_size(open_tiny: Open) -> None:
    llm = open_tiny(kv_cache_tokens=64)
    with pytest.raises(PromptError, match="do not fit the context of 64"):
        list(score_answers(llm, [([{"role": "user", "content": "Hi"}], "yes " * 100)]))


def test_divergence_is_its_definition() -> None:
    generator = torch.Generator().manual_seed(1)
    p, q = (torch.randn(150, 37, generator=generator) for _ in range(2))
    found = token_divergence(p, q)
    for row in (0, 63, 64, 149):
        a, b = p[row].double().softmax(0), q[row].double().softmax(0)
        assert found.kl[row].item() == pytest.approx(
            sum(float(x) * float((x / y).log()) for x, y in zip(a, b, strict=True))
        )
        assert bool(found.agrees[row]) == (int(a.argmax()) == int(b.argmax()))
    summary = found.summary()
    assert summary.mean_kl == pytest.approx(float(found.kl.mean()))
    assert summary.max_kl == float(found.kl.max())
    assert sum(float(kl) > summary.p99_kl for kl in found.kl) == 2  # of 150 tokens


def test_equal_models_do_not_diverge_at_all() -> None:
    logits = torch.randn(5, 11) * 30
    summary = token_divergence(logits, logits.clone()).summary()
    assert (summary.mean_kl, summary.p99_kl, summary.max_kl, summary.top1_agreement) == (0, 0, 0, 1)


def test_a_split_counts_its_own_tokens_alone() -> None:
    p = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    q = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    both = join([token_divergence(p[:1], q[:1]), token_divergence(p[1:], q[1:])])
    assert both.summary().num_tokens == 3
    assert both.summary(torch.tensor([True, False, True])).mean_kl == 0
    assert both.summary(torch.tensor([False, True, False])).top1_agreement == 0
    assert both.summary(torch.zeros(3, dtype=torch.bool)).num_tokens == 0
