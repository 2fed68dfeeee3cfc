"""Scores an exported model on held-out scenes: python -m tools.train_demo.evaluate

Runs the model through Saccade itself, question by question, the way users do: pictures as PNG bytes, clips as lists of frames.
Knows scenes, questions and how answers are judged; knows no weights.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from saccade.api import LLM
from saccade.engine.options import SamplingParams
from tools.train_demo.batches import CLIP_SIZES, PAIR_SIZES, PICTURE_SIZES
from tools.train_demo.scenes import clip, picture
from tools.train_demo.tasks import CLIP_TASKS, PAIR_TASKS, PICTURE_TASKS, Turn, ask_about, chat

SEED = 77_000  # the training run's scenes follow from another
IOU_NEEDED = 0.5
WINDOW = 64  # conversations handed over at once


@dataclass(frozen=True)
class Case:
    """A question with its media as message parts. `group` is the line of the table its score counts towards."""

    group: str
    media: tuple[Mapping[str, Any], ...]
    turn: Turn

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [*self.media, {"type": "text", "text": self.turn.question}]}]


def image_part(pixels: np.ndarray) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"type": "image", "image": buffer.getvalue()}


def clip_part(frames: np.ndarray, second_per_grid: float) -> dict[str, Any]:
    """Frames as they are: the limits are set to their own size."""
    area = frames.shape[1] * frames.shape[2]
    pictures = [Image.fromarray(frame) for frame in frames]
    return {
        "type": "video",
        "video": pictures,
        "fps": 2 / second_per_grid,
        "min_pixels": area,
        "max_pixels": area,
    }


def cases(rng: np.random.Generator) -> Iterator[Case]:
    """Held-out cases without end: of every five scenes three are pictures, one a pair and one a clip."""
    number = 0
    while True:
        for _ in range(3):
            scene = picture(rng, *PICTURE_SIZES[int(rng.integers(len(PICTURE_SIZES)))], held_out=True)
            for _ in range(3):
                turn = ask_about(rng, scene, PICTURE_TASKS)
                yield Case(turn.task, (image_part(scene.pixels),), turn)
        sizes = [PAIR_SIZES[int(rng.integers(len(PAIR_SIZES)))] for _ in range(2)]
        first, second = (picture(rng, *size, held_out=True) for size in sizes)
        for _ in range(3):
            turn = ask_about(rng, (first, second), PAIR_TASKS)
            yield Case(turn.task, (image_part(first.pixels), image_part(second.pixels)), turn)
        size = CLIP_SIZES[int(rng.integers(len(CLIP_SIZES)))]
        shown = clip(rng, *size, int(rng.choice([4, 6])), held_out=True)
        for _ in range(3):
            turn = ask_about(rng, shown, CLIP_TASKS)
            yield Case(turn.task, (clip_part(shown.frames, shown.second_per_grid),), turn)
        if number % 4 == 0:
            turn = chat(rng)
            yield Case(turn.task, (), turn)
        number += 1


# --- judging ---------------------------------------------------------------------------------------------------------


def boxes(text: str) -> list[tuple[float, ...]]:
    return [tuple(float(v) for v in found.split(",")) for found in re.findall(r'"bbox_2d": \[([\d., ]+)\]', text)]


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection over union of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return shared / (areas - shared) if areas > shared else 0.0


def is_right(turn: Turn, answer: str) -> bool:
    """Boxes must match one to one with IoU over 0.5; every other answer must be the expected one, letter by letter."""
    if turn.task != "box":
        return answer.strip() == turn.answer
    found, wanted = boxes(answer), boxes(turn.answer)
    return len(found) == len(wanted) and all(
        len(a) == 4 and overlap(a, b) > IOU_NEEDED for a, b in zip(sorted(found), sorted(wanted), strict=True)
    )


def evaluate(llm: LLM, num_cases: int) -> dict[str, dict[str, float]]:
    """Share of right answers and number of items by group."""
    source = cases(np.random.default_rng(SEED))
    results: dict[str, list[bool]] = defaultdict(list)
    params = SamplingParams(max_tokens=200)
    for _ in range(0, num_cases, WINDOW):
        window = [next(source) for _ in range(WINDOW)]
        outputs = llm.chat([case.messages for case in window], params)
        for case, output in zip(window, outputs, strict=True):
            results[case.group].append(is_right(case.turn, output.outputs[0].text))
    return {
        group: {"score": round(sum(hits) / len(hits), 4), "items": len(hits)} for group, hits in sorted(results.items())
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("saccade/demo/model"))
    parser.add_argument("--to", type=Path, default=Path("saccade/demo/scores.json"))
    parser.add_argument("--cases", type=int, default=3200)
    arguments = parser.parse_args()
    scores = evaluate(LLM(arguments.model), arguments.cases)
    print("| task | right | items |\n|---|---|---|")
    for group, result in scores.items():
        print(f"| {group} | {result['score'] * 100:.1f} % | {result['items']} |")
    arguments.to.write_text(json.dumps(scores, indent=2) + "\n")


if __name__ == "__main__":
    main()
