"""The answers that are scored are those transformers gives: greedy, float32, token by token."""

from __future__ import annotations

from saccade.demo import FOLDER, questions
from saccade.engine.options import EngineOptions
from saccade.evals.item import Item
from saccade.evals.run import Candidate, EvalOptions, answer
from tests.parity.oracle import Oracle, load


def test_transformers_answers_alike() -> None:
    items = [
        Item(str(number), "demo", tuple(asked.messages[0]["content"]), asked.answer, "exact")
        for number, asked in enumerate(questions())
        if not asked.options
    ]
    llm = Candidate(engine=EngineOptions(dtype="float32", kv_cache_tokens=4096)).open()
    oracle = Oracle(load(FOLDER / "model"))
    for item, outcome in zip(items, answer(llm, items, EvalOptions(max_tokens=40)), strict=True):
        prompt = llm.prepare(item.messages)
        theirs = oracle.greedy(prompt, llm.config, 40, stop=llm.config.generation.eos_token_ids)
        assert tuple(theirs) == outcome.token_ids, item.question
