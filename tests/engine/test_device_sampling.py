"""Sampling of many rows where the logits are: each row's tokens are the host's, whatever stands beside it, and nothing is read back.

What the tokens mean is in test_sampling.py, for both.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from saccade import SamplingParams
from saccade.checkpoints.config import GenerationConfig
from saccade.engine.device_sampling import DeviceSampler
from saccade.engine.sampling import Sampler
from saccade.kernels.choose import choose, lack_of
from saccade.kernels.record import NOT_FINITE, OPS, Likeliest

VOCAB = 700
CPU = torch.device("cpu")
HAS_TRITON = lack_of("triton", CPU) is None


@pytest.fixture(params=["operations on tensors", "launches of our own"])
def likeliest(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Likeliest | None:
    """How the tokens of greedy rows are chosen."""
    if request.param == "operations on tensors":
        return None
    if not HAS_TRITON:
        pytest.skip(str(lack_of("triton", CPU)))
    from saccade.kernels import triton_sampling

    monkeypatch.setattr(triton_sampling, "PART", 128)  # six parts, the last of them smaller
    return choose(CPU, dict.fromkeys(OPS, "triton")).likeliest


def samplers_of(seed: int, count: int, **options: object) -> list[Sampler]:
    """With options, prompts and seeds of their own; the same again for the same `seed`."""
    pick = random.Random(seed)
    samplers = []
    for _ in range(count):
        chosen = {
            "temperature": pick.choice([0.0, 0.3, 1.0, 2.0]),
            "top_k": pick.choice([0, 1, 5, 50, VOCAB - 1, VOCAB + 1]),
            "top_p": pick.choice([0.0, 0.3, 0.9, 1.0]),
            "min_p": pick.choice([0.0, 0.05, 0.5, 1.0]),
            "repetition_penalty": pick.choice([0.7, 1.0, 1.05, 1.5]),
            "presence_penalty": pick.choice([0.0, 0.5, -0.5]),
            "frequency_penalty": pick.choice([0.0, 0.4, -0.2]),
            "min_tokens": pick.choice([0, 3]),
            "stop_token_ids": tuple(pick.sample(range(VOCAB), 2)),
            "seed": pick.randrange(1000),
        }
        params = SamplingParams(**{**chosen, **options}).resolved(GenerationConfig(eos_token_ids=(1, 2)))
        samplers.append(Sampler(params, [pick.randrange(VOCAB) for _ in range(20)], (1, 2), VOCAB))
    return samplers


def logits_of(seed: int, count: int, spread: float) -> Tensor:
    """[count, VOCAB] bfloat16, so that many are equal."""
    return (torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread).bfloat16()


def step(rows: DeviceSampler, samplers: list[Sampler], logits: Tensor, num_said: int) -> tuple[list[int], list[int]]:
    """One token of each, chosen there; and how they are told."""
    numbers = torch.tensor([sampler.next_number() for sampler in samplers], dtype=torch.float64)
    may_end = torch.tensor([num_said >= sampler.params.min_tokens for sampler in samplers])
    draws = any(not sampler.params.is_greedy for sampler in samplers)
    token_ids, told = rows.next_tokens(logits, numbers, may_end, draws)
    return token_ids.tolist(), told.tolist()


@pytest.mark.parametrize("seed", range(40))
def test_every_row_says_what_it_says_on_the_host(seed: int) -> None:
    """Greedy and drawn rows together, any options; the first tokens chosen on the host, as a prompt's are, the others here."""
    count = [1, 2, 4, 5, 19][seed % 5]  # the last is sorted in two tiles
    host, moving = samplers_of(seed, count), samplers_of(seed, count)
    rows = DeviceSampler(count, VOCAB, CPU)
    for num_said in range(9):
        logits = logits_of(100 * seed + num_said, count, [0.1, 1.0, 4.0][num_said % 3])
        expected = [sampler.next_token(row) for sampler, row in zip(host, logits.float(), strict=True)]
        if num_said < 2:
            assert [s.next_token(row) for s, row in zip(moving, logits.float(), strict=True)] == expected
            continue
        if num_said == 2:
            rows.begin(moving)
        token_ids, told = step(rows, moving, logits, num_said)
        assert token_ids == told == expected


@pytest.mark.skipif(not HAS_TRITON, reason=str(lack_of("triton", CPU)))
@pytest.mark.parametrize("seed", range(12))
def test_two_launches_choose_and_note_what_operations_on_tensors_do(seed: int, likeliest: Likeliest | None) -> None:
    """To the bit: whole tiles of equal scores, zeros of both signs, penalties that make unequal logits equal."""
    count = [1, 2, 5][seed % 3]
    host, there = (samplers_of(seed, count, temperature=0.0) for _ in range(2))
    plain, rows = DeviceSampler(count, VOCAB, CPU), DeviceSampler(count, VOCAB, CPU, likeliest)
    plain.begin(host)
    rows.begin(there)
    for num_said in range(12):
        logits = logits_of(100 * seed + num_said, count, [0.02, 1.0, 4.0][num_said % 3])
        logits = [logits, logits.float(), logits.round() * 0.0, logits.round()][num_said % 4]
        assert step(rows, there, logits, num_said) == step(plain, host, logits, num_said)
        assert torch.equal(rows.said.is_seen, plain.said.is_seen)
        assert torch.equal(rows.said.counts, plain.said.counts)


def test_rows_that_begin_anew_know_nothing_of_those_before_them(likeliest: Likeliest | None) -> None:
    rows = DeviceSampler(3, VOCAB, CPU, likeliest)
    for seed in range(8):
        options = {"temperature": 0.0} if seed % 2 else {}
        host, there = samplers_of(seed, 3, **options), samplers_of(seed, 3, **options)
        rows.begin(there)
        for num_said in range(4):
            logits = logits_of(seed, 3, 2.0)
            expected = [sampler.next_token(row) for sampler, row in zip(host, logits.float(), strict=True)]
            assert step(rows, there, logits, num_said)[0] == expected


@pytest.mark.parametrize("fault", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_told_and_harm_no_other_row(
    fault: float, temperature: float, likeliest: Likeliest | None
) -> None:
    host, there = (samplers_of(3, 3, temperature=temperature) for _ in range(2))
    rows = DeviceSampler(3, VOCAB, CPU, likeliest)
    rows.begin(there)
    for num_said in range(3):
        logits = logits_of(num_said, 3, 1.0)
        expected = [sampler.next_token(row) for sampler, row in zip(host, logits.float(), strict=True)]
        logits[1, 5] = fault
        token_ids, told = step(rows, there, logits, num_said)
        assert told == [expected[0], NOT_FINITE, expected[2]]
        assert all(0 <= token_id < VOCAB for token_id in token_ids), "the next step looks it up"


def test_large_logits_are_numbers(likeliest: Likeliest | None) -> None:
    rows = DeviceSampler(1, VOCAB, CPU, likeliest)
    samplers = samplers_of(0, 1, temperature=0.0)
    rows.begin(samplers)
    assert step(rows, samplers, torch.full((1, VOCAB), 3e38), 0)[1] != [NOT_FINITE]


@pytest.mark.parametrize("draws", [False, True])
def test_no_number_is_read_back(draws: bool) -> None:
    """On the meta device there are none: whatever would have to look at one fails."""
    rows = DeviceSampler(4, VOCAB, torch.device("meta"))
    numbers = torch.empty(4, dtype=torch.float64, device="meta")
    may_end = torch.empty(4, dtype=torch.bool, device="meta")
    token_ids, told = rows.next_tokens(torch.empty(4, VOCAB, device="meta"), numbers, may_end, draws)
    assert token_ids.shape == told.shape == (4,)
    with pytest.raises(NotImplementedError):
        told.nonzero()


def test_of_rows_without_any_number_the_token_is_still_a_word(likeliest: Likeliest | None) -> None:
    rows = DeviceSampler(2, VOCAB, CPU, likeliest)
    there = samplers_of(0, 2, temperature=0.0)
    rows.begin(there)
    for fill in (torch.nan, -torch.inf, torch.inf):
        token_ids, told = step(rows, there, torch.full((2, VOCAB), fill), 0)
        assert all(0 <= token_id < VOCAB for token_id in token_ids)
        assert told == [NOT_FINITE] * 2
