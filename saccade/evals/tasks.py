"""The tasks: what each asks, and item `index` of a split, which follows from (task, split, seed, index) alone.

Knows which scene belongs to which question; knows no model and no scores. Training and test items differ by their random stream
and by what is held out (`scenes.is_held_out`): numbers, words and what is copied, sorted or added are all of one split; of the
shapes of a test item two in three are of a pair of colour and shape that training never shows; a test chart, table or form holds
at least one combination of a place and its value that training never does, and any of its facts is asked. Pictures are drawn at
multiples of 28 pixels, so that no resizing moves what is asked about.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from saccade.base.errors import SaccadeError
from saccade.evals import questions, scenes
from saccade.evals.drawing import Rng
from saccade.evals.item import Item, Split
from saccade.evals.questions import Turn

Subject = tuple[scenes.Scene, ...] | scenes.Clip  # pictures in their order, or a clip
Size = tuple[int, ...]  # height and width in pixels, and frames of a clip


@dataclass(frozen=True)
class Medium:
    """What there is to see, drawn by `draw(rng, *size, test=...)` at one of the sizes; at a size of `large`, more of it or finer."""

    draw: Callable[..., Subject]
    sizes: tuple[Size, ...]
    large: tuple[Size, ...] = ()


def _one(scene: Callable[..., scenes.Scene], *fixed: object) -> Callable[..., Subject]:
    return lambda rng, *size, test: (scene(rng, *size, *fixed, test=test),)


def _two(scene: Callable[..., scenes.Scene]) -> Callable[..., Subject]:
    return lambda rng, *size, test: (scene(rng, *size, test=test), scene(rng, *size, test=test))


_SMALL = ((112, 112), (112, 140), (140, 112))


def _clips(num_frames: int) -> tuple[Size, ...]:
    return tuple((*size, num_frames) for size in _SMALL)


MEDIA: dict[str, Medium] = {
    "shapes": Medium(_one(scenes.shapes), (*_SMALL, (140, 140), (112, 168), (168, 112), (168, 168))),
    "couple": Medium(_one(scenes.couple), _SMALL),
    "quarters": Medium(_one(scenes.quarters), ((112, 112),)),
    "number": Medium(_one(scenes.writing, "number"), ((84, 112), (84, 140), (112, 112))),
    "word": Medium(_one(scenes.writing, "word"), ((84, 140), (112, 112), (112, 140)), ((84, 168), (112, 168))),
    "chart": Medium(_one(scenes.chart), ((140, 140), (140, 168)), ((196, 168), (196, 196))),
    "table": Medium(_one(scenes.table), ((84, 84),)),
    "form": Medium(_one(scenes.form), ((224, 168), (252, 168)), ((336, 252), (448, 336))),
    "pair": Medium(_two(scenes.shapes), _SMALL),
    "appearing": Medium(scenes.appearing, _clips(6), (*_clips(8), *_clips(10))),
    "entering": Medium(scenes.entering, _clips(6), _clips(8)),
    "moving": Medium(scenes.moving, _clips(4), _clips(6)),
}


@dataclass(frozen=True)
class Task:
    """A question and what it is asked about: a medium with `ask(rng, subject)`, or no medium with `ask(rng, test=..., hard=...)`.

    `ask` gets the one scene of a medium of one picture, else the subject as it is; None means that this one allows no question.
    hard: the share of items that are of the task's harder kind: of a medium's large sizes, or of what `ask` makes of hard=True.
    """

    description: str
    ask: Callable[..., Turn | None]
    medium: str | None = None
    hard: float = 0.0


_TASKS: dict[str, Task] = {
    "digits": Task("read a number of two digits", questions.ask_number, "number"),
    "words": Task("read a word of three or four letters", questions.ask_word, "word", hard=0.5),
    "count": Task("count the shapes of one kind among others", questions.ask_count, "shapes"),
    "colour": Task("name the colour of a shape", questions.ask_colour, "shapes"),
    "shape": Task("name the shape of a colour", questions.ask_shape, "shapes"),
    "relation": Task("say on which side of another a shape lies", questions.ask_relation, "couple"),
    "box": Task("give the box of a shape as JSON", questions.ask_box, "quarters"),
    "chart": Task("read the height of a bar", questions.ask_chart, "chart", hard=0.8),
    "table": Task("look up a cell of a table", questions.ask_table, "table"),
    "form": Task("look up a field of a receipt, answered as JSON", questions.ask_form, "form", hard=0.3),
    "compare": Task("say which of two pictures shows more", questions.ask_compare, "pair"),
    "order": Task("say what appears first or last in a clip", questions.ask_order, "appearing", hard=0.3),
    "direction": Task("say which way a shape moves in a clip", questions.ask_direction, "moving", hard=0.6),
    "when": Task("say at which second of a clip the shape appears", questions.ask_when, "entering", hard=0.5),
    "copy": Task("copy digits and letters (text alone)", questions.ask_copy, hard=0.8),
    "sort": Task("sort three or four digits (text alone)", questions.ask_sort, hard=0.5),
    "sum": Task("add two numbers (text alone)", questions.ask_sum, hard=0.6),
}
TASKS: dict[str, str] = {name: task.description for name, task in _TASKS.items()}


def ask(task: str, rng: Rng, subject: Subject | None, *, test: bool, hard: bool = False) -> Turn | None:
    """A turn of the task about a subject of its medium (None for text alone), or None if it allows no such question."""
    chosen = _TASKS[task]
    if subject is None:
        return chosen.ask(rng, test=test, hard=hard)
    alone = isinstance(subject, tuple) and len(subject) == 1
    return chosen.ask(rng, subject[0] if alone else subject)  # type: ignore[index]


def tasks_about(medium: str | None) -> tuple[str, ...]:
    return tuple(name for name, task in _TASKS.items() if task.medium == medium)


def medium_of(task: str) -> str | None:
    return _TASKS[task].medium


def hard_share(task: str) -> float:
    """The share of a task's items that are of its harder kind."""
    return _TASKS[task].hard


def draw_medium(medium: str, rng: Rng, size: Size, *, test: bool) -> Subject:
    """The medium at exactly this size."""
    return MEDIA[medium].draw(rng, *size, test=test)


def parts(subject: Subject | None) -> tuple[dict[str, Any], ...]:
    """The subject as parts of a user turn."""
    if subject is None:
        return ()
    if isinstance(subject, scenes.Clip):
        frames = [Image.fromarray(frame) for frame in subject.frames]
        return ({"type": "video", "video": frames, "fps": float(scenes.FRAMES_PER_SECOND)},)
    return tuple({"type": "image", "image": Image.fromarray(scene.pixels)} for scene in subject)


def draw(task: str, split: Split, seed: int, index: int) -> Item:
    """Item `index` of a task's split. Raises SaccadeError for a task that there is not."""
    if task not in _TASKS:
        raise SaccadeError(f"no task {task!r}; there are {', '.join(TASKS)}")
    test = split == "test"
    rng = np.random.default_rng((seed, int(test), zlib.crc32(task.encode()), index))
    medium = _TASKS[task].medium
    hard = rng.random() < _TASKS[task].hard
    while True:
        subject = None
        if medium is not None:
            sizes = MEDIA[medium].large if hard else MEDIA[medium].sizes
            subject = draw_medium(medium, rng, sizes[int(rng.integers(len(sizes)))], test=test)
        turn = ask(task, rng, subject, test=test, hard=hard)
        if turn is not None:
            content = (*parts(subject), {"type": "text", "text": turn.question})
            return Item(f"{task}-{split}-{seed}-{index}", task, content, turn.answer, turn.metric)
