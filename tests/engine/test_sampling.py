"""Penalties, filters and draws mean what they mean in transformers, on the host and where the logits are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from saccade import SamplingParams
from saccade.base.errors import OptionError
from saccade.checkpoints.config import GenerationConfig
from saccade.engine.device_sampling import DeviceSampler
from saccade.engine.sampling import Sampler, _largest, _nucleus, is_finite, is_looping, top_logprobs

VOCAB = 50
PROMPT = [3, 3, 8, 41]
EOS = (49, 48)


def logits_of(seed: int) -> Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def on_host(**options: Any) -> Sampler:
    params = SamplingParams(**{"temperature": 1.0, **options}).resolved(GenerationConfig(eos_token_ids=EOS, top_k=0))
    return Sampler(params, PROMPT, EOS, VOCAB)


class OnDevice:
    """One row of a DeviceSampler, asked like the host's."""

    def __init__(self, **options: Any) -> None:
        self.host = on_host(**options)
        self.rows = DeviceSampler(1, VOCAB, torch.device("cpu"))
        self.rows.begin([self.host])
        self.num_said = 0

    def next_token(self, logits: Tensor) -> int:
        number = torch.tensor([self.host.next_number()], dtype=torch.float64)
        may_end = torch.tensor([self.num_said >= self.host.params.min_tokens])
        self.num_said += 1
        token_ids, told = self.rows.next_tokens(logits[None], number, may_end, draws=not self.host.params.is_greedy)
        assert token_ids.tolist() == told.tolist()
        return int(told)


Open = Callable[..., Sampler | OnDevice]


@pytest.fixture(params=[on_host, OnDevice], ids=["host", "device"])
def sampler(request: pytest.FixtureRequest) -> Open:
    return request.param  # type: ignore[no-any-return]


def drawn_distribution(sampler: Open, logits: Tensor, draws: int = 4000, **options: Any) -> Tensor:
    if sampler is on_host:
        counts = Counter(on_host(seed=seed, **options).next_token(logits) for seed in range(draws))
    else:
        hosts = [on_host(seed=seed, **options) for seed in range(draws)]
        rows = DeviceSampler(draws, VOCAB, torch.device("cpu"))
        rows.begin(hosts)
        numbers = torch.tensor([host.next_number() for host in hosts], dtype=torch.float64)
        may_end = torch.ones(draws, dtype=torch.bool)
        counts = Counter(rows.next_tokens(logits.expand(draws, -1), numbers, may_end, draws=True)[1].tolist())
    return torch.tensor([counts[i] / draws for i in range(VOCAB)])


@pytest.mark.parametrize(
    ("options", "processors"),
    [
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"top_k": 5}, [TopKLogitsWarper(5)]),
        ({"top_p": 0.6}, [TopPLogitsWarper(0.6)]),
        ({"min_p": 0.2}, [MinPLogitsWarper(0.2)]),
        (
            {"repetition_penalty": 1.8, "temperature": 1.5, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
            [
                RepetitionPenaltyLogitsProcessor(1.8),
                TemperatureLogitsWarper(1.5),
                TopKLogitsWarper(20),
                TopPLogitsWarper(0.8),
                MinPLogitsWarper(0.05),
            ],
        ),
    ],
)
def test_draws_follow_transformers_distribution(sampler: Open, options: dict[str, Any], processors: list[Any]) -> None:
    logits = logits_of(1)
    scores = logits[None]
    for processor in processors:
        scores = processor(torch.tensor([PROMPT]), scores)
    expected = scores[0].softmax(-1)
    drawn = drawn_distribution(sampler, logits, **options)
    assert set(drawn.nonzero()[:, 0].tolist()) <= set(expected.nonzero()[:, 0].tolist())
    assert (drawn - expected).abs().max() < 0.03  # four standard deviations of 4000 draws


def test_ties_with_the_kth_token_stay(sampler: Open) -> None:
    logits = torch.full((VOCAB,), -9.0)
    logits[[4, 5, 6]] = torch.tensor([2.0, 1.0, 1.0])
    assert set(drawn_distribution(sampler, logits, 300, top_k=2).nonzero()[:, 0].tolist()) == {4, 5, 6}


def test_the_likeliest_token_always_stays(sampler: Open) -> None:
    assert sampler(top_p=0.0).next_token(logits_of(2)) == int(logits_of(2).argmax())


def test_the_penalty_counts_each_id_once_and_the_prompt_too(sampler: Open) -> None:
    greedy = sampler(temperature=0.0, repetition_penalty=2.0)
    logits = torch.zeros(VOCAB)
    logits[3], logits[10], logits[11] = 4.0, 2.5, 1.5
    assert [greedy.next_token(logits) for _ in range(3)] == [10, 3, 3]  # 3 is halved from the start, 10 once it is said


def test_presence_and_frequency_penalties_count_the_answer_alone(sampler: Open) -> None:
    logits = torch.zeros(VOCAB)
    logits[3], logits[10] = 3.0, 2.6
    presence = sampler(temperature=0.0, presence_penalty=0.5)
    assert [presence.next_token(logits) for _ in range(4)] == [3, 10, 3, 3]
    frequency = sampler(temperature=0.0, frequency_penalty=0.5)
    assert [frequency.next_token(logits) for _ in range(4)] == [3, 10, 3, 10]


def test_no_end_before_min_tokens(sampler: Open) -> None:
    logits = torch.zeros(VOCAB)
    logits[[48, 49]] = 9.0
    oracle = MinNewTokensLengthLogitsProcessor(len(PROMPT), 2, list(EOS), "cpu")
    assert oracle(torch.tensor([PROMPT]), logits[None].clone())[0].argmax() == 0
    greedy = sampler(temperature=0.0, min_tokens=2)
    assert [greedy.next_token(logits) for _ in range(3)] == [0, 0, 48]


def test_a_seed_repeats_and_the_logits_are_left_alone(sampler: Open) -> None:
    logits = logits_of(3)
    before = logits.clone()
    first, second = (sampler(seed=5, repetition_penalty=1.3, presence_penalty=1.0) for _ in range(2))
    assert [first.next_token(logits) for _ in range(20)] == [second.next_token(logits) for _ in range(20)]
    assert torch.equal(logits, before)


def test_a_tiny_temperature_is_greedy_and_does_not_overflow(sampler: Open) -> None:
    logits = logits_of(4) * 50
    assert sampler(temperature=1e-6).next_token(logits) == int(logits.argmax())


def test_logprobs_are_the_models_own() -> None:
    logits = logits_of(5)
    chosen, *best = top_logprobs(logits, 7, 3)
    expected = logits.log_softmax(0)
    assert chosen.logprob == pytest.approx(float(expected[7]))
    assert chosen.rank == int((expected > expected[7]).sum()) + 1
    assert [entry.token_id for entry in best] == expected.topk(3).indices.tolist()
    assert [entry.rank for entry in best] == [1, 2, 3]


def test_the_checkpoints_defaults_fill_what_is_not_said() -> None:
    defaults = GenerationConfig((1,), do_sample=True, temperature=0.1, top_k=1, top_p=0.001, repetition_penalty=1.05)
    resolved = SamplingParams(top_k=7).resolved(defaults)
    assert (resolved.temperature, resolved.top_k, resolved.top_p, resolved.repetition_penalty) == (0.1, 7, 0.001, 1.05)
    assert SamplingParams().resolved(GenerationConfig((1,))).is_greedy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 1.5}, "top_p is 1.5; it must be 0 to 1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens 9 is larger"),
        ({"stop": ("",)}, "non-empty"),
        ({"n": 0}, "n is 0"),
        ({"top_k": "3"}, "top_k is '3'"),
    ],
)
def test_an_option_out_of_bounds_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message.replace("(", r"\(")):
        SamplingParams(**options)


def test_an_unknown_stop_token_is_refused() -> None:
    with pytest.raises(OptionError, match="stop_token_ids has 50"):
        on_host(stop_token_ids=(50,))


def test_endless_repetition_is_seen_and_tables_are_not() -> None:
    assert is_looping([5] * 256)
    assert is_looping([1, 2, 3] + [7, 8, 9, 10] * 64)
    assert is_looping(list(range(128)) * 16)
    assert not is_looping([5] * 255)
    assert not is_looping([7, 8, 9, 10] * 63)
    rows = [token for i in range(300) for token in (1, 2, 10 + i % 10, 100 + i // 10, 3)]
    assert not is_looping(rows)


@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("size", [7, 640, 15_193])
def test_filters_that_do_not_sort_keep_what_sorting_keeps(spread: float, size: int) -> None:
    """Rounded as bfloat16 is, so that many are equal."""
    scores = (torch.randn(size, generator=torch.Generator().manual_seed(size)) * spread).bfloat16().float()
    for count in {1, 2, 5, min(50, size), size}:
        kth = scores.sort(descending=True).values[count - 1]
        assert torch.equal(_largest(scores, count), (scores >= kth).nonzero()[:, 0])
    for top_p in (0.0, 0.1, 0.9, 0.999):
        ascending = scores.double().sort().values
        mass = ascending.softmax(0).cumsum(0)
        num_kept = max(1, int((mass > 1.0 - top_p).sum()))
        kept = _nucleus(scores, top_p)
        assert abs(len(kept) - num_kept) <= (mass - (1.0 - top_p)).abs().lt(1e-6).sum(), "more than rounding apart"
        assert torch.equal(scores[kept], ascending[size - len(kept) :].float())


def test_only_numbers_are_finite() -> None:
    assert is_finite(torch.tensor([3e38, 3e38, -1.0]))  # though their sum is not
    for value in (torch.nan, torch.inf, -torch.inf):
        assert not is_finite(torch.tensor([0.0, value, 1.0]))
    assert not is_finite(torch.tensor([torch.inf, -torch.inf]))
