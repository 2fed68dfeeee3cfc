"""Steps queued before the tokens of the last one are read: answers, cached prefixes and blocks are those of one step after the other.

On a card that does nothing before it is waited for (late_card.py).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from saccade import LLM, SamplingParams
from saccade.engine.request import Request
from tests.engine.late_card import LateCard, put_on
from tests.engine.test_engine import conversation, told

Open = Callable[..., LLM]
GREEDY = SamplingParams(max_tokens=24, temperature=0, repetition_penalty=1.0, ignore_eos=True)
KINDS = [
    GREEDY,
    dataclasses.replace(GREEDY, temperature=0.9, top_k=12, seed=5),
    dataclasses.replace(GREEDY, temperature=0.8, top_p=0.7, min_p=0.05, seed=6, ignore_eos=False, min_tokens=9),
    dataclasses.replace(GREEDY, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2, max_tokens=17),
    dataclasses.replace(GREEDY, stop=("e", "th"), min_tokens=7),
    dataclasses.replace(GREEDY, temperature=0.7, seed=7, n=2, prompt_logprobs=0, stop_token_ids=(65, 67, 300)),
    dataclasses.replace(GREEDY, temperature=1.3, repetition_penalty=1.1, frequency_penalty=-0.1, seed=-8),
]


def late(llm: LLM) -> tuple[LLM, LateCard]:
    card = LateCard()
    return put_on(llm, card), card


def answers(llm: LLM, seeds: range, kinds: list[SamplingParams] = KINDS) -> list[Any]:
    params = [kinds[seed * 5 % len(kinds)] for seed in seeds]
    return told(llm.chat([conversation(seed) for seed in seeds], params))


def known_blocks(llm: LLM) -> set[bytes]:
    return set(llm.engine.scheduler.pool._by_key)


@pytest.fixture(scope="module")
def in_turn(open_tiny: Open) -> list[Any]:
    return answers(open_tiny(speculation="off"), range(40))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_cache_tokens": 640, "block_size": 4, "max_tokens_per_step": 90},
        {"kv_cache_tokens": 1024, "block_size": 1, "max_running": 5},
        {"kv_cache_tokens": 512, "block_size": 4, "max_running": 3, "prefix_cache": False},
    ],
    ids=["roomy", "small cache, chunks", "blocks of one", "few at once"],
)
def test_40_mixed_requests_answer_as_one_step_after_the_other(
    open_tiny: Open, in_turn: list[Any], options: dict[str, Any]
) -> None:
    """Greedy and drawn, penalties, stop texts, ends of text, all lengths; requests come, end and are preempted between."""
    llm, card = late(open_tiny(speculation="off", **options))
    assert answers(llm, range(40)) == in_turn
    scheduler = llm.engine.scheduler
    assert 10 < card.num_ahead < card.num_replayed
    assert scheduler.pool.num_free == scheduler.pool.num_blocks, "blocks leaked"
    if options.get("max_tokens_per_step") == 90:
        assert scheduler.num_preemptions > 0, "the cache was not too small"


class FullCard(LateCard):
    """One that has no room for more than `room` recordings."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def record(self, compute: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        if self.num_recorded == self.room:
            self.finish()
            compute()  # what it did stays done
            try:
                raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")
            finally:
                raise RuntimeError("a recording failed")  # as torch says when it has to end one
        return super().record(compute)


@pytest.mark.parametrize("room", [0, 1])
def test_where_a_recording_fails_steps_are_launched_one_by_one_and_it_is_said_once(
    open_tiny: Open, in_turn: list[Any], caplog: pytest.LogCaptureFixture, room: int
) -> None:
    card = FullCard(room)
    llm = put_on(open_tiny(speculation="off"), card)
    assert answers(llm, range(12)) == in_turn[:12]
    assert card.num_recorded == room
    assert (card.num_replayed > 0) == (room > 0)
    assert [record.message for record in caplog.records if "(CUDA out of memory.)" in record.message] == caplog.messages
    assert len(caplog.messages) == 1


def test_a_request_whose_log_probabilities_are_told_holds_no_other_up(open_tiny: Open) -> None:
    """Its steps are the host's; those before and after it are not."""
    kinds = [GREEDY, dataclasses.replace(GREEDY, max_tokens=4, logprobs=2), KINDS[1], KINDS[3]]
    llm, card = late(open_tiny(speculation="off"))
    plain = open_tiny(speculation="off")
    assert answers(llm, range(4), kinds) == answers(plain, range(4), kinds)
    assert card.num_ahead > 10
    told, expected = (each.chat(conversation(1), kinds[1])[0].outputs[0].logprobs for each in (llm, plain))
    assert told == expected


def test_length_ends_an_answer_without_a_step_too_many_and_other_ends_with_one(open_tiny: Open) -> None:
    llm, card = late(open_tiny(speculation="off"))
    whole = llm.chat(conversation(0), GREEDY)[0].outputs[0].token_ids
    assert card.num_replayed == GREEDY.max_tokens - 1  # the first token is the prompt's
    card.num_replayed = 0
    ended = llm.chat(conversation(0), dataclasses.replace(GREEDY, stop_token_ids=(whole[5],)))[0].outputs[0]
    num_said = whole.index(whole[5]) + 1
    assert ended.token_ids == whole[:num_said]
    assert card.num_replayed == num_said - 1 + 1


def test_the_first_token_that_may_end_an_answer_is_the_hosts(open_tiny: Open) -> None:
    llm, card = late(open_tiny(speculation="off"))
    plain = open_tiny(speculation="off")
    said = plain.chat(conversation(0), GREEDY)[0].outputs[0].token_ids
    at = next(i for i in range(3, len(said)) if said[i] not in said[:i])
    for min_tokens in (at, at + 1):
        params = dataclasses.replace(GREEDY, stop_token_ids=(said[at],), min_tokens=min_tokens)
        left, right = (each.chat(conversation(0), params)[0].outputs[0] for each in (llm, plain))
        assert (left.token_ids, left.finish_reason) == (right.token_ids, right.finish_reason)
        assert (len(left.token_ids) == at + 1) == (min_tokens <= at)
    assert card.num_ahead > 2


def test_a_prompt_that_is_computed_token_by_token_says_nothing_before_its_end(open_tiny: Open) -> None:
    """A step of two tokens, one of them another's: both chunks are single tokens."""
    llm, card = late(open_tiny(speculation="off", max_tokens_per_step=2))
    assert answers(llm, range(0, 10, 5), [GREEDY]) == answers(open_tiny(speculation="off"), range(0, 10, 5), [GREEDY])
    assert card.num_ahead > 5


@pytest.mark.parametrize("block_size", [1, 4])
def test_only_what_was_said_is_found_in_the_prefix_cache(open_tiny: Open, block_size: int) -> None:
    plain = open_tiny(speculation="off", block_size=block_size)
    llm, card = late(open_tiny(speculation="off", block_size=block_size))
    whole = open_tiny().chat(conversation(1), GREEDY)[0].outputs[0].token_ids
    params = dataclasses.replace(GREEDY, stop_token_ids=(whole[6],))
    for each in (plain, llm):
        each.chat(conversation(0), params)
    request = llm.engine.add(llm.prepare(conversation(2)), params)[0]
    while not request.is_finished:
        llm.engine.step()
        if not request.is_finished:
            assert request.num_computed == request.num_tokens - 1
    plain.chat(conversation(2), params)
    assert card.num_ahead > 5
    assert known_blocks(llm) == known_blocks(plain)
    first, again = (each.chat([conversation(s) for s in (0, 1, 2)], params) for each in (plain, llm))
    assert [o.num_cached_tokens for o in again] == [o.num_cached_tokens for o in first]
    assert [o.outputs[0].token_ids for o in again] == [o.outputs[0].token_ids for o in first]


def test_requests_that_come_and_go_lose_nothing(open_tiny: Open) -> None:
    """Added and cancelled at random, steps under way or not; the rest answer as alone, and every block comes back."""
    pick = random.Random(5)
    llm, card = late(open_tiny(kv_cache_tokens=700, block_size=8, max_tokens_per_step=100, speculation="off"))
    plain = open_tiny(speculation="off")

    def params_of(seed: int) -> SamplingParams:
        return dataclasses.replace(KINDS[seed % len(KINDS)], n=1)

    alone = {seed: plain.chat(conversation(seed), params_of(seed))[0].outputs[0].token_ids for seed in range(10)}
    alive: dict[int, Request] = {}
    num_finished = 0
    for seed in [seed % 10 for seed in range(60)]:
        if seed not in alive:
            alive[seed] = llm.engine.add(llm.prepare(conversation(seed)), params_of(seed))[0]
        for _ in range(pick.randrange(9)):
            llm.engine.step()
        if pick.random() < 0.3:
            llm.engine.cancel(alive.pop(pick.choice(list(alive))))
        for done in [seed for seed, request in alive.items() if request.is_finished]:
            assert alive.pop(done).output_ids == alone[done]
            num_finished += 1
    for request in alive.values():
        llm.engine.cancel(request)
    pool = llm.engine.scheduler.pool
    assert num_finished > 15
    assert card.num_ahead > 50
    assert pool.num_free == pool.num_blocks
    assert not llm.engine.has_work


def test_a_request_that_arrives_waits_for_the_steps_under_way_and_no_longer(open_tiny: Open) -> None:
    llm, card = late(open_tiny(speculation="off"))
    first = llm.engine.add(llm.prepare(conversation(0)), GREEDY)[0]
    for _ in range(4):
        llm.engine.step()
    assert card.queue, "nothing is under way; the test tests nothing"
    second = llm.engine.add(llm.prepare(conversation(5)), GREEDY)[0]
    for _ in range(2):  # one reads what is under way
        llm.engine.step()
    assert (len(first.output_ids), len(second.output_ids)) == (6, 1)


def test_a_step_left_under_way_harms_no_later_request(open_tiny: Open) -> None:
    """A closed stream leaves one; what it stores lies in blocks that the next request may be given."""
    options = {"speculation": "off", "kv_cache_tokens": 160, "block_size": 4}
    llm, card = late(open_tiny(**options))
    stream = llm.stream(conversation(0), GREEDY)
    for _ in range(3):
        next(stream)
    stream.close()
    pool = llm.engine.scheduler.pool
    assert pool.num_free == pool.num_blocks
    assert not llm.engine.has_work
    assert card.queue, "nothing is under way; the test tests nothing"
    for seed in (5, 0):
        text = llm.chat(conversation(seed), GREEDY)[0].outputs[0].text
        assert text == open_tiny(**options).chat(conversation(seed), GREEDY)[0].outputs[0].text


def test_logits_that_are_no_numbers_end_their_request_alone(open_tiny: Open) -> None:
    plain = open_tiny(speculation="off")
    llm, card = late(open_tiny(speculation="off"))
    said = [plain.chat(conversation(seed), GREEDY)[0].outputs[0].token_ids for seed in (0, 5)]
    fatal = next(token for token in said[0][3:] if token not in said[1] and said[0].index(token) >= 3)
    for each in (plain, llm):
        each.engine.runner.model.language.embed_tokens.weight.values[fatal] = torch.nan
    told = [each.chat([conversation(0), conversation(5)], GREEDY) for each in (plain, llm)]
    for outputs in told:
        first, second = (output.outputs[0] for output in outputs)
        assert first.finish_reason == "error"
        assert first.token_ids == said[0][: said[0].index(fatal) + 1]
        assert second.token_ids == said[1]
    assert told[0][0].outputs[0].error == told[1][0].outputs[0].error
    assert card.num_ahead > 0


def test_tables_that_outgrow_their_recording_are_recorded_between_steps(open_tiny: Open) -> None:
    params = [dataclasses.replace(GREEDY, max_tokens=90), dataclasses.replace(KINDS[1], max_tokens=90)]
    llm, card = late(open_tiny(speculation="off", block_size=4))
    plain = open_tiny(speculation="off", block_size=4)
    assert answers(llm, range(3), params) == answers(plain, range(3), params)
    assert llm.engine.runner.graphs is not None
    assert len({width for _, _, width in llm.engine.runner.graphs.recordings}) > 1
    assert card.num_ahead > 60


def test_rows_that_fill_a_batch_up_follow_the_first_whatever_they_say_themselves(open_tiny: Open) -> None:
    """They store where the first row does, and the same numbers need not round the same in every row."""
    llm, card = late(open_tiny(speculation="off"))
    graphs = llm.engine.runner.graphs
    assert graphs is not None
    assert graphs.head is not None
    head = graphs.head
    signs = torch.tensor([1.0, 1.0, 1.0, -1.0])[:, None]
    graphs.head = lambda hidden: head(hidden) * signs
    kinds = KINDS[:2]
    assert answers(llm, range(3), kinds) == answers(open_tiny(speculation="off"), range(3), kinds)
    assert card.num_ahead > 10
    card.finish()
    next_ids = graphs._seats[4].token_ids
    assert next_ids[3] == next_ids[0]


def test_words_are_sorted_only_for_those_who_draw(open_tiny: Open) -> None:
    llm, _ = late(open_tiny(speculation="off"))
    graphs = llm.engine.runner.graphs
    assert graphs is not None
    answers(llm, range(3), [GREEDY, KINDS[3]])
    assert {what for what, _, _ in graphs.recordings} == {"likeliest tokens"}
    answers(llm, range(3), [GREEDY, KINDS[1]])
    assert {what for what, _, _ in graphs.recordings} == {"likeliest tokens", "drawn tokens"}


def test_streamed_pieces_make_up_the_text(open_tiny: Open) -> None:
    llm, card = late(open_tiny(speculation="off"))
    expected = open_tiny(speculation="off").chat(conversation(3), GREEDY)[0].outputs[0].text
    updates = list(llm.stream(conversation(3), GREEDY))
    assert "".join(update.text for update in updates) == expected
    assert len(updates) > 10, "text is to leave token by token"
    assert card.num_ahead > 10


def test_guessing_leaves_tokens_to_the_host(open_tiny: Open) -> None:
    llm, card = late(open_tiny(speculation="lookup"))
    assert answers(llm, range(3), [GREEDY]) == answers(open_tiny(speculation="off"), range(3), [GREEDY])
    assert card.num_ahead == 0
