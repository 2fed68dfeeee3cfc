"""The model that ships with Saccade, and the pictures and clips it is asked about: right answers, offline, in a minute.

`model/` is a small Qwen2.5-VL trained on drawn scenes (tools/train_demo); `media/` holds scenes it was not trained on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saccade.api import LLM, messages_for
from saccade.drawing import draw_answer
from saccade.engine.options import SamplingParams
from saccade.grounding import find_boxes, overlap
from saccade.inputs.options import MediaOptions
from saccade.outputs import CompletionOutput

FOLDER = Path(__file__).parent
MIN_OVERLAP = 0.5  # intersection over union from which a box counts as right
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".gif")


@dataclass(frozen=True)
class Question:
    """A question about shipped media, with the expected answer; `options` are those of MediaOptions."""

    media: tuple[Path, ...]
    question: str
    answer: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> list[Path]:
        return [path for path in self.media if path.suffix not in VIDEO_SUFFIXES]

    @property
    def videos(self) -> list[Path]:
        return [path for path in self.media if path.suffix in VIDEO_SUFFIXES]

    @property
    def messages(self) -> list[dict[str, Any]]:
        return messages_for(self.question, self.images, self.videos)


def questions() -> list[Question]:
    """What the demo asks, in order."""
    entries = json.loads((FOLDER / "media" / "questions.json").read_text(encoding="utf-8"))
    return [
        Question(
            tuple(FOLDER / "media" / name for name in entry["media"]),
            entry["question"],
            entry["answer"],
            entry.get("options", {}),
        )
        for entry in entries
    ]


def a_picture() -> Path:
    """One of the shipped pictures, for a command that was given none."""
    return next(image for question in questions() for image in question.images)


def is_right(question: Question, answer: CompletionOutput) -> bool:
    """Equal text, case and outer space aside; for boxes, the same labels at overlapping places."""
    expected = find_boxes(question.answer, answer.media)
    if not expected:
        return answer.text.strip().casefold() == question.answer.strip().casefold()
    found = answer.boxes
    return len(found) == len(expected) and all(
        a.label.casefold() == b.label.casefold() and overlap(a, b) >= MIN_OVERLAP
        for a, b in zip(found, expected, strict=True)
    )


def run(out: Path) -> int:
    """Asks every question, prints question, answer and verdict, saves boxes drawn into `out`. Returns how many were wrong."""
    asked = questions()
    llm = LLM("demo")
    wrong = 0
    for number, question in enumerate(asked, start=1):
        llm.media = MediaOptions(**question.options)
        output = llm.chat(question.messages, SamplingParams(max_tokens=200))[0]
        answer = output.outputs[0]
        right = is_right(question, answer)
        wrong += not right
        shown = ", ".join(
            str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path) for path in question.media
        )
        print(
            f"{shown or '(no picture)'}\n  {question.question}\n  -> {answer.text.strip()}   {'right' if right else 'WRONG'}"
        )
        if not right:
            print(f"  expected: {question.answer}")
        if answer.boxes and question.images:
            out.mkdir(parents=True, exist_ok=True)
            drawn = out / f"boxes-{number}.png"
            draw_answer(question.images[0], answer).save(drawn)
            print(f"  drawn: {drawn}")
    print(f"{len(asked) - wrong} of {len(asked)} answers right")
    return wrong
