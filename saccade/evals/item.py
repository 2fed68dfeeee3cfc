"""One question with what counts as right: what every task of ours and every line of a user's data set becomes.

Knows questions and answers; knows no drawing, no model and no scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Item:
    """A single-turn conversation and its right answer.

    content: the user turn's parts as `LLM.chat` takes them (pictures as paths, PIL or NumPy; videos as paths or lists of
    frames; text). answer: what a perfect model writes, letter for letter; the teacher-forced measures run over its tokens.
    accepted: further answers that count as right. metric: a name of `metrics.METRICS`.
    """

    id: str
    task: str
    content: tuple[Mapping[str, Any], ...]
    answer: str
    metric: str
    accepted: tuple[str, ...] = ()

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [dict(part) for part in self.content]}]

    @property
    def question(self) -> str:
        """The text of the user turn."""
        return "".join(str(part["text"]) for part in self.content if part.get("type") == "text")
