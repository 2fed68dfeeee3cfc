"""What guessed tokens bring and cost.

    python benchmarks/speculation.py tasks [--items 24] [--quantization w8a8-dynamic]
    python benchmarks/speculation.py replay [--longest 3] [--shortest 1] [--most 7]
    python benchmarks/speculation.py cost [--random 3b] [--layers 12] [--quantization w4a8-g128] [--tokens 32] [--rounds 3]

tasks: the shipped model's answers to held-out items, with and without guesses: tokens a step, seconds, and whether all are equal.
replay: long answers of a known text, as if a model wrote exactly them: tokens a step. No model runs.
cost: a model of real shape; milliseconds of processor time a token without guesses, with guesses that are never right, and with 1,
3 and 7 that always are. The ways take turns; the median of the rounds is printed. More threads than one count their waiting, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

from saccade import LLM, SamplingParams
from saccade.api import messages_for
from saccade.bench.model import random_llm
from saccade.checkpoints.config import read_config
from saccade.demo import FOLDER
from saccade.engine import engine
from saccade.engine.lookup import Lookup, Speculation
from saccade.evals.tasks import draw
from saccade.inputs.chat import ChatTokenizer
from saccade.inputs.prompt import Prompt

TASKS = ("copy", "box", "form", "table", "count")
GREEDY = SamplingParams(temperature=0, repetition_penalty=1.0)


def tasks(num_items: int, quantization: str | None) -> None:
    ways = {
        way: LLM("demo", quantization=quantization, kv_cache_tokens=8192, speculation=way) for way in ("off", "auto")
    }
    print(f"{'task':8}{'tokens':>8}{'guessed':>9}{'right':>7}{'a step':>8}{'off ms':>8}{'auto ms':>9}  equal")
    for task in TASKS:
        items = [draw(task, "test", 1, index) for index in range(num_items)]
        tokens, guessed, right, equal = 0, 0, 0, True
        decode_s = dict.fromkeys(ways, 0.0)
        for item in items:
            said = {}
            for way, llm in ways.items():
                output = llm.chat(item.messages, GREEDY)[0]
                decode_s[way] += output.timings.decode_s
                said[way] = output.outputs[0].token_ids
            tokens += len(said["auto"])
            guessed += output.num_drafted_tokens
            right += output.num_accepted_tokens
            equal = equal and said["off"] == said["auto"]
        milliseconds = [1e3 * seconds / num_items for seconds in decode_s.values()]
        a_step = tokens / (tokens - right)
        print(
            f"{task:8}{tokens:8}{guessed:9}{right:7}{a_step:8.2f}{milliseconds[0]:8.1f}{milliseconds[1]:9.1f}  {equal}"
        )


# --- known answers -----------------------------------------------------------------------------------------------------


def answers() -> Iterator[tuple[str, str, str]]:
    """Name, question and answer: the forms in which Qwen2.5-VL is asked for boxes, fields and tables. The numbers are made up."""
    things = ["car", "person", "bicycle", "person", "car", "traffic light", "person", "car", "dog", "car"]
    boxes = [
        {"bbox_2d": [17 + 61 * i, 40 + 23 * i % 97, 70 + 61 * i, 119 + 37 * i % 83], "label": thing}
        for i, thing in enumerate(things)
    ]
    lines = ",\n".join("\t" + json.dumps(box) for box in boxes)
    yield "10 boxes", "Locate every object, output its bbox coordinates in JSON format.", f"```json\n[\n{lines}\n]\n```"
    goods = [("Green tea", 2, "3.40"), ("Bread", 1, "2.85"), ("Butter", 1, "1.99"), ("Apples", 6, "4.20")]
    receipt = {
        "store": "Corner Shop",
        "date": "2024-03-18",
        "items": [{"name": name, "quantity": count, "price": price} for name, count, price in goods],
        "total": "12.44",
    }
    yield (
        "receipt",
        "Read the receipt. Answer in JSON with store, date, items (name, quantity, price), total.",
        json.dumps(receipt, indent=2),
    )
    rows = [f"| {name} | {count} | {price} |" for name, count, price in goods]
    yield "table", "Write the table as Markdown.", "\n".join(["| Article | Count | Price |", "|---|---|---|", *rows])
    letter = "Dear Ms Brown, thank you for your letter of 3 May. We are glad that the parcel has come at last. "
    letter += "Should you need a copy of the bill, please write to us again, and we will send it within a week."
    yield "correction", f"Correct the spelling: {letter.replace('parcel', 'parsel').replace('week', 'weak')}", letter
    yield "prose", "Describe the picture.", letter


def replay(speculation: Speculation) -> None:
    """As the engine would: the token that is due is always right, guesses as far as they agree with the text."""
    tokenizer = ChatTokenizer(FOLDER / "model", read_config(FOLDER / "model"))
    print(f"{'answer':12}{'tokens':>8}{'guessed':>9}{'right':>7}{'a step':>8}")
    for name, question, text in answers():
        lookup = Lookup(tokenizer.build(messages_for(question)).token_ids, speculation)
        ids = tokenizer.encode(text)
        lookup.append(ids[0])  # with the prompt's step
        at, steps, guessed = 1, 1, 0
        while at < len(ids):
            guess = lookup.guess(min(speculation.max_tokens, len(ids) - at - 1)) if at + 1 < len(ids) else []
            num_right = next((i for i, token_id in enumerate(guess) if token_id != ids[at + i]), len(guess))
            lookup.learn(len(guess), num_right)
            for token_id in ids[at : at + num_right + 1]:
                lookup.append(token_id)
            at, steps, guessed = at + num_right + 1, steps + 1, guessed + len(guess)
        print(f"{name:12}{len(ids):8}{guessed:9}{len(ids) - steps:7}{len(ids) / steps:8.2f}")


# --- what a step costs ---------------------------------------------------------------------------------------------------


class Told(Lookup):
    """Guesses that were told beforehand: right ones, or ones that are never right, asked for as often as those that failed are."""

    answer: Sequence[int] = ()  # with the prompt; empty: nothing is ever right
    width = 7

    def guess(self, most: int) -> list[int]:
        if self.answer:
            at = len(self.token_ids)
            return list(self.answer[at : at + min(self.width, most)])
        self._matched = self.speculation.longest_match
        return [0] * self._trust[self._matched].ask(most)

    def learn(self, num_guessed: int, num_right: int) -> None:
        assert num_right == (num_guessed if self.answer else 0), "guesses were not as told"
        if not self.answer:
            super().learn(num_guessed, num_right)


def cost(preset: str, layers: int | None, quantization: str | None, num_tokens: int, rounds: int, threads: int) -> None:
    llm = random_llm(
        preset, layers, 1, quantization=quantization, threads=threads, kv_cache_tokens=2048, prefix_cache=False
    )
    messages = messages_for("Tell me about " + "one thing and another, " * 40)
    params = SamplingParams(
        temperature=0, repetition_penalty=1.0, max_tokens=num_tokens, min_tokens=num_tokens, detect_repetition=False
    )
    speculation = llm.engine.scheduler.speculation
    assert speculation is not None, "the kernels of this machine are not known to treat rows alike"
    engine.Lookup = Told  # type: ignore[misc]
    llm.engine.scheduler.speculation = None
    prompt = llm.prepare(messages)
    _, answer = decoding(llm, prompt, params)
    ways: dict[str, tuple[int, Sequence[int]] | None] = {"off": None, "never right": (7, ())}
    ways |= {
        f"{width} right": (width, [*prompt.token_ids, *answer]) for width in (1, 3, 7) if width < speculation.max_rows
    }
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, told in ways.items():
            llm.engine.scheduler.speculation = None if told is None else speculation
            Told.width, Told.answer = told or (0, ())
            seconds, said = decoding(llm, prompt, params)
            assert said == answer, "the answer changed"
            taken[way].append(seconds)
    plain = statistics.median(taken["off"])
    for way, seconds in taken.items():
        middle = statistics.median(seconds)
        print(f"{way:14}{1e3 * middle:8.1f} ms a token{plain / middle:7.2f} times as fast as without")


def decoding(llm: LLM, prompt: Prompt, params: SamplingParams) -> tuple[float, list[int]]:
    """Seconds of processor time for each token after the first, and the answer."""
    request = llm.engine.add(prompt, params)[0]
    while not request.output_ids:
        llm.engine.step()
    start = time.process_time()
    while not request.is_finished:
        llm.engine.step()
    return (time.process_time() - start) / (len(request.output_ids) - 1), request.output_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tasks", "replay", "cost"))
    parser.add_argument("--items", type=int, default=24)
    parser.add_argument("--quantization")
    parser.add_argument("--random", default="3b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--longest", type=int, default=3)
    parser.add_argument("--shortest", type=int, default=1)
    parser.add_argument("--most", type=int, default=7)
    chosen: Any = parser.parse_args()
    if chosen.what == "tasks":
        tasks(chosen.items, chosen.quantization)
    elif chosen.what == "replay":
        replay(Speculation(chosen.most, chosen.longest, chosen.shortest))
    else:
        cost(chosen.random, chosen.layers, chosen.quantization, chosen.tokens, chosen.rounds, chosen.threads)


if __name__ == "__main__":
    main()
