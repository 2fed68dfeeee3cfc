"""Items out of a file of the user's: a JSON object on each line (docs/evaluating.md). Mistakes are found before a model is loaded.

Knows the file's keys and what they may hold; reads no picture.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from saccade.base.errors import OptionError
from saccade.base.options import suggestion
from saccade.evals.item import Item
from saccade.evals.metrics import METRICS, asks_for_boxes, score

KEYS = {
    "id": "text",
    "task": "text",
    "question": "text",
    "image": "a path",
    "images": "a list of paths",
    "video": "a path",
    "videos": "a list of paths",
    "answer": "text or a number",
    "answers": "a list of texts or numbers",
    "choices": "a list of texts",
    "metric": "one of " + ", ".join(METRICS),
}
CHOICES_TAIL = "Answer with the option's letter from the given choices directly."


def read_dataset(path: Path, limit: int | None = None) -> list[Item]:
    """The items of a JSONL file in their order, `limit` of each task at most; paths in it are relative to the file.

    Raises OptionError naming file, line, key and remedy for the first line that is not as documented, even beyond the limit.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # JSON's texts may hold other ends of lines
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(
            f"{path} cannot be read as UTF-8 text: {error}; give a file with a JSON object on each line"
        ) from error
    items: list[Item] = []
    ids: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = _item(_object(line), path, number)
        except _Fault as fault:
            raise OptionError(f"{path}:{number}: {fault}") from None
        if item.id in ids:
            raise OptionError(
                f"{path}:{number}: id {item.id!r} is that of line {ids[item.id]}; give each line its own, or none"
            )
        ids[item.id] = number
        items.append(item)
    if not items:
        raise OptionError(f"{path} holds no item; give a JSON object on each line")
    seen: Counter[str] = Counter()
    kept = []
    for item in items:
        seen[item.task] += 1
        if limit is None or seen[item.task] <= limit:
            kept.append(item)
    return kept


class _Fault(Exception):
    """What is wrong with a line, and what to do."""


def _object(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _Fault(f"no JSON ({error}); give one object on one line") from None
    if not isinstance(found, dict):
        raise _Fault(f'a {type(found).__name__} in place of an object; write {{"question": ..., "answer": ...}}')
    for key in found:
        if key not in KEYS:
            raise _Fault(f"key {key!r} is unknown{suggestion(key, KEYS)}")
    return {key: value for key, value in found.items() if value is not None}


def _item(entry: Mapping[str, Any], path: Path, number: int) -> Item:
    question = _text(entry, "question", None)
    answers = _answers(entry)
    choices = _texts(entry, "choices")
    metric = _text(entry, "metric", "choice" if choices else "exact")
    if metric not in METRICS:
        raise _Fault(f"metric {metric!r} is unknown{suggestion(metric, METRICS)}")
    if choices:
        question, answers = _with_choices(question, answers, choices)
    elif metric == "choice":
        raise _Fault("metric 'choice' needs \"choices\", a list of texts; add it or choose another metric")
    if metric == "vqa":  # every annotator's answer is a vote, repeats included
        answers = (Counter(answers).most_common(1)[0][0], *answers)
    parts = [{"type": "image", "image": str(file)} for file in _files(entry, "image", path.parent)]
    parts += [{"type": "video", "video": str(file)} for file in _files(entry, "video", path.parent)]
    item = Item(
        id=_text(entry, "id", f"{path.stem}-{number}"),
        task=_text(entry, "task", path.stem),
        content=(*parts, {"type": "text", "text": question}),
        answer=answers[0],
        metric=metric,
        accepted=answers[1:],
    )
    _require_reachable(item, has_media=bool(parts))
    return item


def _require_reachable(item: Item, has_media: bool) -> None:
    """Refuses a right answer that its metric would never find right."""
    if asks_for_boxes(item):
        if not has_media or "bbox_2d" not in item.answer:
            raise _Fault(f'metric {item.metric!r} needs an image and an answer such as [{{"bbox_2d": [8, 9, 40, 50]}}]')
    elif item.metric in ("number", "json") and not any(
        score(item, right, ()) for right in (item.answer, *item.accepted)
    ):
        wanted = "holds one number and no other" if item.metric == "number" else "is JSON"
        raise _Fault(f"'answer' is {item.answer!r:.60}; for the metric {item.metric!r} give one that {wanted}")


def _text(entry: Mapping[str, Any], key: str, default: str | None) -> str:
    value = entry.get(key, default)
    if value is None:
        raise _Fault(f"{key!r} is missing; give {KEYS[key]}")
    if not isinstance(value, str) or not value.strip():
        raise _Fault(f"{key!r} is {value!r:.60}; give {KEYS[key]}, not empty")
    return value


def _texts(entry: Mapping[str, Any], key: str) -> tuple[str, ...]:
    values = entry.get(key, [])
    if not isinstance(values, list) or (key in entry and not values):
        raise _Fault(f"{key!r} is {values!r:.60}; give {KEYS[key]}, one at least")
    return tuple(_spelled(value, key) for value in values)


def _spelled(value: Any, key: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float) or str(value) in ("", "nan", "inf", "-inf"):
        raise _Fault(f"{key!r} holds {value!r:.60}; give {KEYS[key]}")
    return str(value)


def _answers(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """The one a perfect model gives first."""
    if ("answer" in entry) == ("answers" in entry):
        raise _Fault('give "answer" (a text or a number) or "answers" (a list of those), and not both')
    return _texts(entry, "answers") if "answers" in entry else (_spelled(entry["answer"], "answer"),)


def _with_choices(question: str, answers: tuple[str, ...], choices: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """The question with its choices by letter, and (the right letter, the right text)."""
    letters = ascii_uppercase[: len(choices)]
    if len(choices) > len(ascii_uppercase):
        raise _Fault(f"'choices' holds {len(choices)}; there are {len(ascii_uppercase)} letters")
    answer = answers[0]
    if len(answers) != 1 or (answer not in choices and (len(answer) != 1 or answer not in letters)):
        raise _Fault(
            f"'answer' is {answer!r:.60}, no letter from A to {letters[-1]} and none of the 'choices'; give one"
        )
    index = choices.index(answer) if answer in choices else letters.index(answer)
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True)]
    return "\n".join([question, *lines, CHOICES_TAIL]), (letters[index], choices[index])


def _files(entry: Mapping[str, Any], key: str, folder: Path) -> list[Path]:
    """The files under `key` or its plural, which must be there."""
    plural = f"{key}s"
    if key in entry and plural in entry:
        raise _Fault(f"{key!r} and {plural!r} are both given; give one")
    names = entry.get(plural, [entry[key]] if key in entry else [])
    used = plural if plural in entry else key
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise _Fault(f"{used!r} is {names!r:.60}; give {KEYS[used]}")
    for name in names:
        if not (folder / name).is_file():
            raise _Fault(
                f"{used!r} names {name!r}, and {folder / name} is no file; paths are relative to the data set's own file"
            )
    return [folder / name for name in names]
