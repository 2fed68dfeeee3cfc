"""Draws the pictures and clips that ship beside the demo model, with questions it answers rightly.

    python -m tools.train_demo.media

Knows which scenes make a good demonstration; knows nothing of training. All scenes are test scenes. Those about which the exported
model is wrong are passed over, and how many were is printed: how often it is right stands in scores.json, not here.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from saccade.api import LLM
from saccade.demo import Question, is_right
from saccade.engine.options import SamplingParams
from saccade.evals import scenes, tasks
from saccade.evals.questions import Turn
from saccade.evals.scenes import Clip, Scene
from tools.train_demo import talk

SEED = 990_000
FRAME_RATE = 8
TRIES = 12  # questions of a task about one scene
MOST_SCENES = 200  # looked at for one file
FRAMES_AT_ONCE = FRAME_RATE // scenes.FRAMES_PER_SECOND


def all_different(scene: Scene) -> bool:
    """Three shapes of three colours and kinds."""
    shapes = scene.shapes
    return len({s.kind for s in shapes}) == len({s.colour for s in shapes}) == len(shapes) == 3


def is_couple(scene: Scene) -> bool:
    return len({shape.kind for shape in scene.shapes}) == len(scene.shapes) == 2


def anything(scene: Any) -> bool:
    return True


# File, medium, size, what suits, and the tasks to ask ("describe" is talk's).
PLAN: tuple[tuple[str, str, tuple[int, ...], Callable[[Any], bool], tuple[str, ...]], ...] = (
    ("shapes.png", "shapes", (168, 168), all_different, ("colour", "shape", "count")),
    ("corner.png", "quarters", (112, 112), anything, ("box",)),
    ("sides.png", "couple", (112, 140), anything, ("relation",)),
    ("couple.png", "shapes", (140, 112), is_couple, ("describe",)),
    ("number.png", "number", (112, 112), anything, ("digits",)),
    ("word.jpg", "word", (112, 140), anything, ("words",)),
    ("chart.png", "chart", (196, 196), anything, ("chart",)),
    ("table.png", "table", (84, 84), anything, ("table",)),
    ("receipt.png", "form", (336, 252), anything, ("form",)),
    ("appearing.mp4", "appearing", (112, 140, 6), anything, ("describe", "order")),
    ("moving.mp4", "moving", (112, 140, 4), anything, ("direction",)),
)
PAIR = ("shapes.png", "couple.png")


def write_clip(clip: Clip, path: Path) -> None:
    """H.264 with halved chroma at a constant rate, every frame shown for as long as it stands for."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FRAME_RATE), options={"crf": "18"})
        stream.height, stream.width = clip.frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for pixels in np.repeat(clip.frames, FRAMES_AT_ONCE, axis=0):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode())


def save(drawn: Scene | Clip, path: Path) -> None:
    if isinstance(drawn, Clip):
        write_clip(drawn, path)
    else:
        Image.fromarray(drawn.pixels).save(path, quality=90)


def ask(task: str, rng: np.random.Generator, subject: tasks.Subject) -> Turn | None:
    return talk.describe(rng, subject) if task == "describe" else tasks.ask(task, rng, subject, test=True)


def answered(llm: LLM, paths: tuple[Path, ...], task: str, subject: tasks.Subject) -> dict[str, Any] | None:
    """A question that the model answers rightly, as an entry of questions.json; None if it is wrong on all it was asked."""
    asked = set()
    for seed in range(TRIES):
        turn = ask(task, np.random.default_rng(seed), subject)
        if turn is None or turn.question in asked:
            continue
        asked.add(turn.question)
        question = Question(paths, turn.question, turn.answer)
        output = llm.chat(question.messages, SamplingParams(max_tokens=80))[0]
        if is_right(question, output.outputs[0]):
            return {"media": [path.name for path in paths], "question": turn.question, "answer": turn.answer}
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("saccade/demo/model"))
    parser.add_argument("--to", type=Path, default=Path("saccade/demo/media"))
    arguments = parser.parse_args()
    arguments.to.mkdir(parents=True, exist_ok=True)
    llm = LLM(arguments.model)
    questions: list[dict[str, Any]] = []
    shown: dict[str, Scene] = {}
    passed_over = 0
    for number, (name, medium, size, suits, asked) in enumerate(PLAN):
        for attempt in itertools.islice(itertools.count(SEED + 1000 * number), MOST_SCENES):
            subject = tasks.draw_medium(medium, np.random.default_rng(attempt), size, test=True)
            drawn = subject if isinstance(subject, Clip) else subject[0]
            if not suits(drawn):
                continue
            save(drawn, arguments.to / name)
            found = [answered(llm, (arguments.to / name,), task, subject) for task in asked]
            if all(found):
                break
            passed_over += 1
        else:
            raise SystemExit(f"{name}: the model is wrong about all of {MOST_SCENES} scenes")
        if isinstance(drawn, Scene):
            shown[name] = drawn
        questions += [entry for entry in found if entry is not None]
    pair = answered(llm, tuple(arguments.to / name for name in PAIR), "compare", tuple(shown[name] for name in PAIR))
    questions += [pair] if pair is not None else []
    (arguments.to / "questions.json").write_text(json.dumps(questions, indent=2, ensure_ascii=False) + "\n")
    for entry in questions:
        print(f"{', '.join(entry['media'])}: {entry['question']} -> {entry['answer']}")
    print(f"{len(questions)} questions; {passed_over} scenes passed over")


if __name__ == "__main__":
    main()
