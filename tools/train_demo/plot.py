"""Draws a run's losses: python -m tools.train_demo.plot --run runs/nano --to docs/demo-model-loss.png

Knows log.jsonl; knows nothing else.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LINES = {
    "answer shapes": "answers, shapes",
    "answer number": "answers, a number",
    "answer word": "answers, a word",
    "answer chart": "answers, a chart",
    "answer form": "answers, a receipt",
    "answer table": "answers, a table",
    "answer appearing": "answers, a clip",
    "answer entering": "answers, when",
    "answer moving": "answers, which way",
    "characters page": "characters (throw-away head)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/nano"))
    parser.add_argument("--to", type=Path, default=Path("docs/demo-model-loss.png"))
    arguments = parser.parse_args()
    entries = [json.loads(line) for line in (arguments.run / "log.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for key, label in LINES.items():
        points = [(entry["minutes"], entry[key]) for entry in entries if key in entry]
        axes.plot(*zip(*points, strict=True), label=label)
    axes.set_yscale("log")
    axes.set_xlabel("minutes of training")
    axes.set_ylabel("mean loss between two reports")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8)
    arguments.to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.to, dpi=120)


if __name__ == "__main__":
    main()
