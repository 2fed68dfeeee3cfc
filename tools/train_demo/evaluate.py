"""Scores an exported model on test items of every task: python -m tools.train_demo.evaluate

What `saccade eval MODEL --limit 200 --json saccade/demo/scores.json` does, for the shipped model; knows nothing more.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from saccade.evals.report import render_markdown
from saccade.evals.run import Candidate, EvalOptions, evaluate
from saccade.evals.tasks import TASKS, draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="saccade/demo/model")
    parser.add_argument("--to", type=Path, default=Path("saccade/demo/scores.json"))
    parser.add_argument("--items", type=int, default=200, help="of each task")
    arguments = parser.parse_args()
    options = EvalOptions(limit=arguments.items)
    items = [draw(task, "test", options.seed, index) for task in TASKS for index in range(arguments.items)]
    figures = evaluate(Candidate(arguments.model), items, options).figures()
    print(render_markdown(figures))
    arguments.to.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
