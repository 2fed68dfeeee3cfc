"""Scores an exported model on test items of every task: python -m tools.train_demo.evaluate

Runs the model through Saccade itself, the way users do. Knows tasks and metrics; knows no weights.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from saccade.api import LLM
from saccade.engine.options import SamplingParams
from saccade.evals.metrics import METRICS
from saccade.evals.tasks import TASKS, draw

SEED = 77_000  # the training run's scenes follow from another
WINDOW = 50  # items handed over at once


def evaluate(llm: LLM, task: str, num_items: int) -> dict[str, float]:
    """Mean score and number of items."""
    scores: list[float] = []
    for start in range(0, num_items, WINDOW):
        items = [draw(task, "test", SEED, index) for index in range(start, min(start + WINDOW, num_items))]
        outputs = llm.chat([item.messages for item in items], SamplingParams(max_tokens=64))
        for item, output in zip(items, outputs, strict=True):
            scores.append(METRICS[item.metric](item, output.outputs[0].text, output.media))
    return {"score": round(sum(scores) / len(scores), 4), "items": len(scores)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("saccade/demo/model"))
    parser.add_argument("--to", type=Path, default=Path("saccade/demo/scores.json"))
    parser.add_argument("--items", type=int, default=200, help="of each task")
    arguments = parser.parse_args()
    llm = LLM(arguments.model)
    scores = {}
    print("| task | right | items |\n|---|---|---|")
    for task in TASKS:
        scores[task] = evaluate(llm, task, arguments.items)
        print(f"| {task} | {scores[task]['score'] * 100:.1f} % | {scores[task]['items']} |", flush=True)
    arguments.to.write_text(json.dumps(scores, indent=2) + "\n")


if __name__ == "__main__":
    main()
