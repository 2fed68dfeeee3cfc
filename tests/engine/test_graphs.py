"""Recorded decoding, on a card that computes anew at every replay, late, into the recording's own output.

Attention is Triton's, interpreted: it alone takes contexts from the buffer that a recording reads. So is the choice of the token.
"""

from __future__ import annotations

import pytest
import torch

from saccade import LLM, SamplingParams
from saccade.kernels.choose import choose, lack_of
from saccade.kernels.record import OPS
from tests.engine.late_card import LateCard, put_on

TEXTS = ("Say hello.", "Count to five, please.", "Describe the picture that I have not shown you.")
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
OPTIONS = {"device": "cpu", "dtype": "float32", "kv_cache_tokens": 1024, "block_size": 4}


pytestmark = pytest.mark.skipif(
    lack_of("triton", torch.device("cpu")) is not None, reason="Triton's interpreter is what attends here"
)


def open_recorded(card: LateCard, *, chooses: bool) -> LLM:
    likeliest = choose(torch.device("cpu"), dict.fromkeys(OPS, "triton")).likeliest
    llm = LLM("demo", kernels={"attention_paged": "triton"}, **OPTIONS)
    return put_on(llm, card, chooses=chooses, likeliest=likeliest)


def answers(llm: LLM, texts: tuple[str, ...]) -> list[list[int]]:
    outputs = llm.chat([[{"role": "user", "content": text}] for text in texts], GREEDY)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("chooses", [False, True], ids=["tokens chosen on the host", "on the card"])
@pytest.mark.parametrize("num_texts", [1, 3])
def test_replayed_steps_say_what_computed_ones_do(num_texts: int, chooses: bool) -> None:
    plain = LLM("demo", **OPTIONS)
    card = LateCard()
    recorded = open_recorded(card, chooses=chooses)
    assert answers(recorded, TEXTS[:num_texts]) == answers(plain, TEXTS[:num_texts])
    assert card.num_replayed == 5  # every step but the first, which is the prompts'
    assert card.num_recorded == 1  # three rows are filled up to four
    assert card.num_ahead == (4 if chooses else 0)


def test_a_wider_table_is_recorded_anew_and_an_old_size_is_replayed() -> None:
    card = LateCard()
    llm = open_recorded(card, chooses=False)
    answers(llm, TEXTS[:1])
    answers(llm, TEXTS[1:2])
    assert card.num_recorded == 1
    answers(llm, ("one two " * 25,))  # more than 16 blocks of 4
    assert card.num_recorded == 2
    assert llm.engine.runner.graphs is not None
    assert [shape for _, *shape in llm.engine.runner.graphs.recordings] == [[1, 16], [1, 32]]


def test_prompts_are_not_replayed() -> None:
    card = LateCard()
    llm = open_recorded(card, chooses=True)
    llm.chat([{"role": "user", "content": "Hi"}], SamplingParams(max_tokens=1, temperature=0.0))
    assert card.num_recorded == 0
