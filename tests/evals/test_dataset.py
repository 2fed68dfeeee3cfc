"""The user's own items: what a line may hold, and that every mistake is named before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from saccade.base.errors import OptionError
from saccade.demo import FOLDER
from saccade.evals.dataset import read_dataset
from saccade.evals.metrics import model_answer, score
from saccade.geometry import Grid
from saccade.inputs.prompt import MediaReceipt

GOOD = {"question": "How many?", "answer": "3"}


def write(path: Path, *lines: dict[str, Any] | str) -> Path:
    file = path / "mine.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return file


def test_a_line_becomes_an_item(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    entry = {
        "image": "a.png",
        "question": "How many?",
        "answers": ["3", "three"],
        "metric": "anls",
        "task": "docs",
        "id": "q",
    }
    (item,) = read_dataset(write(tmp_path, entry))
    assert (item.id, item.task, item.metric, item.answer, item.accepted) == ("q", "docs", "anls", "3", ("three",))
    assert item.content[0] == {"type": "image", "image": str(tmp_path / "a.png")}
    assert item.question == "How many?"


def test_what_is_left_out_has_a_default(tmp_path: Path) -> None:
    first, second = read_dataset(write(tmp_path, GOOD, "", {"question": "?", "answer": 4, "id": None}))
    assert (first.id, first.task, first.metric) == ("mine-1", "mine", "exact")
    assert (second.id, second.answer) == ("mine-3", "4")


def test_choices_are_lettered_and_letter_or_text_is_right(tmp_path: Path) -> None:
    entry = {"question": "Which?", "choices": ["a cat", "a dog"]}
    for answer in ("B", "a dog"):
        (item,) = read_dataset(write(tmp_path, entry | {"answer": answer}))
        assert (
            item.question
            == "Which?\nA. a cat\nB. a dog\nAnswer with the option's letter from the given choices directly."
        )
        assert score(item, "B", ()) == score(item, "A dog", ()) == 1
        assert score(item, "A", ()) == 0


def test_the_most_frequent_vote_is_the_one_to_say(tmp_path: Path) -> None:
    (item,) = read_dataset(write(tmp_path, {"question": "?", "answers": ["no", "yes", "yes"], "metric": "vqa"}))
    assert item.answer == "yes"
    assert item.accepted == ("no", "yes", "yes")


def test_the_limit_counts_each_task_by_itself(tmp_path: Path) -> None:
    lines = [GOOD | {"task": task} for task in "aabba"]
    assert [item.id for item in read_dataset(write(tmp_path, *lines), limit=1)] == ["mine-1", "mine-3"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "no JSON"),
        ("[1]", "a list in place of an object"),
        ({"question": "?", "anwser": "3"}, "key 'anwser' is unknown; did you mean 'answer'?"),
        ({"answer": "3"}, "'question' is missing"),
        ({"question": " ", "answer": "3"}, "'question' is ' '"),
        ({"question": "?"}, 'give "answer"'),
        ({"question": "?", "answer": "3", "answers": ["3"]}, "and not both"),
        ({"question": "?", "answers": []}, "one at least"),
        ({"question": "?", "answers": ["3", None]}, "'answers' holds None"),
        ({"question": "?", "answer": True}, "'answer' holds True"),
        ({"question": "?", "answer": "3", "metric": "exakt"}, "metric 'exakt' is unknown; did you mean 'exact'?"),
        ({"question": "?", "answer": "3", "metric": "choice"}, 'needs "choices"'),
        ({"question": "?", "answer": "C", "choices": ["x", "y"]}, "no letter from A to B and none of the 'choices'"),
        ({"question": "?", "answer": "3", "image": "no.png"}, "'image' names 'no.png'"),
        ({"question": "?", "answer": "3", "image": 3}, "'image' is [3]"),
        ({"question": "?", "answer": "3", "images": "a.png"}, "'images' is 'a.png'; give a list of paths"),
        ({"question": "?", "answer": "3", "video": "a", "videos": ["a"]}, "are both given"),
        (GOOD | {"id": "x"}, "id 'x' is that of line 1"),
        ({"question": "?", "answer": "five", "metric": "number"}, "give one that holds one number"),
        ({"question": "?", "answers": ["{x", "no"], "metric": "json"}, "give one that is JSON"),
        ({"question": "?", "answer": '[{"bbox_2d": [1, 2, 3, 4]}]', "metric": "box"}, "'box' needs an image"),
    ],
)
def test_a_mistake_names_file_line_and_remedy(tmp_path: Path, line: dict[str, Any] | str, message: str) -> None:
    file = write(tmp_path, GOOD | {"id": "x"}, GOOD, line)
    with pytest.raises(OptionError) as caught:
        read_dataset(file, limit=1)
    assert str(caught.value).startswith(f"{file}:3: ")
    assert message in str(caught.value)


def test_lines_end_where_json_says(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    line = json.dumps({"question": "one\u2028two\x85three", "answer": "3"}, ensure_ascii=False)
    file.write_text(f"\ufeff{line}\r\n{line}\r\n", encoding="utf-8", newline="")
    assert len(read_dataset(file)) == 2


def test_a_file_that_is_none_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be read"):
        read_dataset(tmp_path / "no.jsonl")
    with pytest.raises(OptionError, match="holds no item"):
        read_dataset(write(tmp_path, ""))


def test_boxes_of_a_picture_become_the_models_pixels() -> None:
    text = json.dumps([{"bbox_2d": [10, 20, 50, 100], "label": "dog"}])
    resized = MediaReceipt("image", 0, "p", "", (100, 200), (280, 560), Grid(1, 40, 20), 200)
    from saccade.evals.item import Item

    item = Item("1", "t", ({"type": "text", "text": "?"},), text, "picture_box")
    said = model_answer(item, [resized])
    assert '"bbox_2d": [28, 56, 140, 280], "label": "dog"' in said
    assert score(item, said, [resized]) == 1
    assert score(item, text, [resized]) == 0


def test_the_documented_example_is_read() -> None:
    items = read_dataset(FOLDER.parent.parent / "docs" / "example.jsonl")
    assert len(items) == 10
