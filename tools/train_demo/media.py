"""Draws the pictures and clips that ship beside the demo model, with questions it answers rightly.

    python -m tools.train_demo.media

Knows which scenes make a good demonstration; knows nothing of training. All scenes are held out: by seed, and most of them by
combination. Scenes about which the exported model is wrong are passed over, and how many were is printed: how often it is right
stands in scores.json, not here.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np
from PIL import Image

from saccade.api import LLM, messages_for
from saccade.engine.options import SamplingParams
from tools.train_demo import tasks
from tools.train_demo.evaluate import boxes, is_right, overlap
from tools.train_demo.scenes import HELD_OUT_PAIRS, Clip, Scene, draw_clip, draw_picture
from tools.train_demo.tasks import Turn

SEED = 990_000
FRAME_RATE = 8
TRIES = 6  # wordings of a question
NUM_FRAMES = 24  # three seconds: six frames are looked at by default
T = TypeVar("T")
Ask = Callable[[np.random.Generator, Any], Turn | None]


def first(draw: Callable[[np.random.Generator], T], suits: Callable[[T], bool], seed: int) -> T:
    """The first drawing that suits, over consecutive seeds."""
    while True:
        drawn = draw(np.random.default_rng(seed))
        if suits(drawn):
            return drawn
        seed += 1


def has_held_out(scene: Scene) -> bool:
    return any((item.colour, item.kind) in HELD_OUT_PAIRS for item in scene.shapes)


def is_shapes(scene: Scene) -> bool:
    """Three shapes of three colours and kinds, one pair of them held out."""
    kinds, colours = {item.kind for item in scene.items}, {item.colour for item in scene.items}
    return has_held_out(scene) and len(kinds) == len(colours) == len(scene.items) == len(scene.shapes) == 3


def is_couple(scene: Scene) -> bool:
    kinds = [item.kind for item in scene.items]
    return has_held_out(scene) and len(kinds) == len(scene.shapes) == 2 == len(set(kinds))


def is_text(kind: str) -> Callable[[Scene], bool]:
    return lambda scene: [item.kind for item in scene.items] == [kind]


def is_procession(clip: Clip) -> bool:
    """Two shapes, the second well after the first."""
    return clip.story == "appear" and clip.entries[0] == 0 and clip.entries[1] >= 10


def write_clip(clip: Clip, path: Path) -> None:
    """H.264 with halved chroma at a constant rate."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FRAME_RATE), options={"crf": "18"})
        stream.height, stream.width = clip.frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for pixels in clip.frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode())


PLAN: tuple[tuple[str, Callable[[np.random.Generator], Any], Callable[[Any], bool], tuple[Ask, ...]], ...] = (
    (
        "shapes.png",
        lambda rng: draw_picture(rng, 240, 240, text_share=0.0, held_out=True),
        is_shapes,
        (tasks.ask_colour, tasks.ask_shape, tasks.ask_count, tasks.ask_box),
    ),
    (
        "couple.png",
        lambda rng: draw_picture(rng, 140, 168, text_share=0.0, held_out=True),
        is_couple,
        (tasks.describe_picture,),
    ),
    ("number.png", lambda rng: draw_picture(rng, 168, 168, held_out=True), is_text("number"), (tasks.ask_text,)),
    ("word.jpg", lambda rng: draw_picture(rng, 180, 200, held_out=True), is_text("word"), (tasks.ask_text,)),
    (
        "appearing.mp4",
        lambda rng: draw_clip(rng, 140, 168, NUM_FRAMES, held_out=True),
        is_procession,
        (tasks.describe_clip, tasks.ask_first_or_last),
    ),
    (
        "moving.mp4",
        lambda rng: draw_clip(rng, 140, 168, NUM_FRAMES, held_out=True),
        lambda clip: clip.story == "move",
        (tasks.ask_direction,),
    ),
)
PAIR = ("shapes.png", "couple.png")


def candidates(ask: Ask, subject: Any) -> Iterator[Turn]:
    """Different turns about the subject, in a fixed order."""
    seen: set[str] = set()
    for seed in range(40):
        turn = ask(np.random.default_rng(seed), subject)
        if turn is not None and turn.question not in seen and turn.question[0].isupper() and turn.question[-1] in "?.":
            seen.add(turn.question)
            yield turn


def answered(llm: LLM, names: tuple[Path, ...], ask: Ask, subject: Any) -> dict[str, Any] | None:
    """A question that the model answers rightly, as an entry of questions.json; None if it is wrong on the first few."""
    videos = [path for path in names if path.suffix == ".mp4"]
    images = [path for path in names if path.suffix != ".mp4"]
    for turn in itertools.islice(candidates(ask, subject), TRIES):
        output = llm.chat(messages_for(turn.question, images, videos), SamplingParams(max_tokens=200))[0]
        # Boxes are asked in the resized picture's pixels: judge by what the scene says.
        expected = rescaled(turn, subject, output.media[0].model_size) if turn.task == "box" else turn
        text = output.outputs[0].text.strip()
        if is_right(expected, text) and (
            turn.task != "box" or overlap(boxes(text)[0], boxes(expected.answer)[0]) > 0.75
        ):
            return {"media": [path.name for path in names], "question": turn.question, "answer": expected.answer}
    return None


def save(drawn: Scene | Clip, path: Path) -> None:
    if isinstance(drawn, Clip):
        write_clip(drawn, path)
    else:
        Image.fromarray(drawn.pixels).save(path, quality=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("saccade/demo/model"))
    parser.add_argument("--to", type=Path, default=Path("saccade/demo/media"))
    arguments = parser.parse_args()
    arguments.to.mkdir(parents=True, exist_ok=True)
    llm = LLM(arguments.model)
    questions: list[dict[str, Any]] = []
    shown: dict[str, Any] = {}
    passed_over = 0
    for number, (name, draw, suits, asks) in enumerate(PLAN):
        for attempt in itertools.count():
            drawn = first(draw, suits, SEED + 100_000 * number + 1000 * attempt)
            path = arguments.to / name
            save(drawn, path)
            found = [answered(llm, (path,), ask, drawn) for ask in asks]
            if all(found):
                break
            passed_over += 1
        shown[name] = drawn
        questions += [entry for entry in found if entry is not None]
    pair = tuple(arguments.to / name for name in PAIR)
    for ask in (tasks.ask_which_has, tasks.ask_which_has_more):
        entry = answered(llm, pair, ask, tuple(shown[name] for name in PAIR))
        questions += [entry] if entry is not None else []
    (arguments.to / "questions.json").write_text(json.dumps(questions, indent=2, ensure_ascii=False) + "\n")
    for entry in questions:
        print(f"{', '.join(entry['media'])}: {entry['question']} -> {entry['answer']}")
    print(f"{len(questions)} questions; {passed_over} scenes passed over")


def rescaled(turn: Turn, scene: Scene, model_size: tuple[int, int]) -> Turn:
    """A box answer in the pixels of the picture as the model sees it. model_size: (width, height)."""
    height, width = scene.pixels.shape[:2]
    answer = turn.answer
    for item in scene.items:
        x1, y1, x2, y2 = item.box
        sx, sy = model_size[0] / width, model_size[1] / height
        new = [round(x1 * sx), round(y1 * sy), round(x2 * sx), round(y2 * sy)]
        answer = answer.replace(str(list(item.box)), str(new))
    return Turn(turn.task, turn.question, answer)


if __name__ == "__main__":
    main()
