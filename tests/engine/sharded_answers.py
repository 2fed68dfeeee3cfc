"""Run by torchrun: opens models one after the other and writes what rank 0 answers. Arguments: cases as JSON, the file to write."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from saccade import LLM, SamplingParams
from saccade.demo import questions

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, repetition_penalty=1.0)


def answer(options: dict[str, Any]) -> list[list[int]]:
    """Token ids for a picture's description, one that the model has right, and for two questions without one, batched."""
    described = next(question for question in questions() if question.answer.startswith("The picture shows"))
    llm = LLM(**{"device": "cpu", "kv_cache_tokens": 4096, **options})
    seen = llm.chat(described.messages, GREEDY)[0]
    said = llm.chat([[{"role": "user", "content": text}] for text in ("Say hello.", "Count to five, please.")], GREEDY)
    llm.close()
    return [list(output.outputs[0].token_ids) for output in (seen, *said)]


def main(cases: str, out: str) -> None:
    answers = []
    for options in json.loads(cases):
        try:
            answers.append(answer(options))
        except SystemExit:  # what a follower does when the leader closes; here the next model follows
            continue
    if answers:
        Path(out).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
