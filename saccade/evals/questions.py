"""Questions about scenes, each with the one short answer that counts: one wording and one form of answer per task.

Knows what scenes hold and the phrases; knows no pixels, tokens or model. A turn's answer follows from the scene alone.
`ask_*` returns None where a scene allows no such question.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from saccade.evals.drawing import DIGITS, Drawn, Rng
from saccade.evals.scenes import CONSONANTS, FRAMES_PER_SECOND, Clip, Scene, is_held_out

T = TypeVar("T")
Pair = tuple[Scene, Scene]
ORDINALS = ("first", "second")


@dataclass(frozen=True)
class Turn:
    """A question about the media of a conversation, its answer, and how the answer is judged (a name of metrics.METRICS)."""

    task: str
    question: str
    answer: str
    metric: str


def pick(rng: Rng, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def unique(things: Sequence[Drawn], key: Callable[[Drawn], str]) -> list[Drawn]:
    counts = Counter(key(thing) for thing in things)
    return [thing for thing in things if counts[key(thing)] == 1]


def plural(kind: str) -> str:
    return f"{kind}es" if kind == "cross" else f"{kind}s"


# --- one picture -----------------------------------------------------------------------------------------------------


def ask_colour(rng: Rng, scene: Scene) -> Turn | None:
    options = unique(scene.shapes, lambda thing: thing.kind)
    if not options:
        return None
    shape = pick(rng, options)
    return Turn("colour", f"What colour is the {shape.kind}?", shape.colour, "exact")


def ask_shape(rng: Rng, scene: Scene) -> Turn | None:
    options = unique(scene.shapes, lambda thing: thing.colour)
    if not options:
        return None
    shape = pick(rng, options)
    return Turn("shape", f"What shape is {shape.colour}?", shape.kind, "exact")


def ask_count(rng: Rng, scene: Scene) -> Turn | None:
    """How many of one kind, the others being there to distract."""
    if not scene.shapes:
        return None
    kind = pick(rng, scene.shapes).kind
    count = sum(shape.kind == kind for shape in scene.shapes)
    answer = f"There is 1 {kind}." if count == 1 else f"There are {count} {plural(kind)}."
    return Turn("count", f"How many {plural(kind)} are there?", answer, "number")


def ask_relation(rng: Rng, scene: Scene) -> Turn | None:
    """Where the one of two shapes lies from the other."""
    first = int(rng.integers(2))
    a, b = scene.shapes[first], scene.shapes[1 - first]
    dx, dy = a.centre[0] - b.centre[0], a.centre[1] - b.centre[1]
    across, upright = "left" if dx < 0 else "right", "above" if dy < 0 else "below"
    question = f"Is the {a.kind} left of, right of, above or below the other shape?"
    return Turn("relation", question, across if abs(dx) > abs(dy) else upright, "exact")


def box_answer(thing: Drawn, label: str) -> str:
    """A box as Qwen2.5-VL writes it: a fenced JSON list, absolute pixels of the resized picture."""
    return f'```json\n[\n\t{{"bbox_2d": {list(thing.box)}, "label": "{label}"}}\n]\n```'


def ask_box(rng: Rng, scene: Scene) -> Turn | None:
    options = unique(scene.shapes, lambda thing: thing.kind)
    if not options:
        return None
    shape = pick(rng, options)
    return Turn("box", f"Locate the {shape.kind}.", box_answer(shape, shape.kind), "box")


def ask_number(rng: Rng, scene: Scene) -> Turn | None:
    return Turn("digits", "What number is written?", scene.texts[0].text, "exact")


def ask_word(rng: Rng, scene: Scene) -> Turn | None:
    return Turn("words", "What word is written?", scene.texts[0].text, "anls")


def ask_chart(rng: Rng, scene: Scene) -> Turn | None:
    colour, value = pick(rng, scene.facts)
    return Turn("chart", f"How high is the {colour} bar?", value, "number")


def ask_table(rng: Rng, scene: Scene) -> Turn | None:
    name, value = pick(rng, scene.facts)
    return Turn("table", f"What is in row {name[0]}, column {name[1]}?", value, "exact")


def ask_form(rng: Rng, scene: Scene) -> Turn | None:
    name, value = pick(rng, scene.facts)
    return Turn("form", f"What is the {name}? Answer in JSON.", json.dumps({name: value}), "json")


# --- two pictures ----------------------------------------------------------------------------------------------------


def ask_compare(rng: Rng, pair: Pair) -> Turn | None:
    """Which picture has more shapes."""
    counts = [len(scene.shapes) for scene in pair]
    if counts[0] == counts[1]:
        return None
    return Turn("compare", "Which picture has more shapes?", ORDINALS[counts[1] > counts[0]], "exact")


# --- a clip ----------------------------------------------------------------------------------------------------------


def ask_order(rng: Rng, clip: Clip) -> Turn | None:
    which = pick(rng, ("first", "last"))
    return Turn("order", f"What appears {which}?", clip.cast[0 if which == "first" else -1].name, "exact")


def ask_when(rng: Rng, clip: Clip) -> Turn | None:
    """The second from which on the one shape is there, counted from 0; with its half, if it comes at one."""
    return Turn("when", "At which second does the shape appear?", f"{clip.entries[0] / FRAMES_PER_SECOND:g}", "number")


def ask_direction(rng: Rng, clip: Clip) -> Turn | None:
    return Turn("direction", "Which way does the shape move?", str(clip.direction), "exact")


# --- text alone ------------------------------------------------------------------------------------------------------


def ask_copy(rng: Rng, *, test: bool, hard: bool) -> Turn:
    """Three to five digits and letters, or six to eight digits, of which more are alike."""
    low, high, alphabet = (6, 8, DIGITS) if hard else (3, 5, DIGITS + CONSONANTS)
    while True:
        symbols = " ".join(pick(rng, alphabet) for _ in range(int(rng.integers(low, high + 1))))
        if is_held_out(symbols) == test:
            return Turn("copy", f"Copy: {symbols}", symbols, "exact")


def ask_sort(rng: Rng, *, test: bool, hard: bool) -> Turn:
    """Three different digits, or four of which some may be alike; which they are is held out, in any order."""
    while True:
        drawn = rng.integers(len(DIGITS), size=4) if hard else rng.permutation(len(DIGITS))[:3]
        digits = [DIGITS[int(i)] for i in drawn]
        if is_held_out("sort", *sorted(digits)) == test:
            return Turn("sort", f"Sort: {' '.join(digits)}", " ".join(sorted(digits)), "exact")


def ask_sum(rng: Rng, *, test: bool, hard: bool) -> Turn:
    """A number of two digits and one of one digit, without a carry; or two numbers of two digits, with a sum below 100."""
    while True:
        ten, one = int(rng.integers(1, 10)), int(rng.integers(0, 10))
        other = (int(rng.integers(1, 10)), int(rng.integers(0, 10))) if hard else (int(rng.integers(0, 10 - one)),)
        left, right = f"{ten}{one}", "".join(map(str, other))
        total = int(left) + int(right)
        if total < 100 and is_held_out("sum", ten, one, *other) == test:
            return Turn("sum", f"{left} + {right} = ?", str(total), "number")
