"""What answers are worth, metric by metric: right, nearly right, wrong."""

from __future__ import annotations

import pytest

from saccade.evals.item import Item
from saccade.evals.metrics import METRICS, mean_overlap, score
from saccade.geometry import Grid
from saccade.inputs.prompt import MediaReceipt

PICTURE = MediaReceipt("image", 0, "p", "", (112, 112), (112, 112), Grid(1, 8, 8), 16)
TEN_VOTES = ("yes",) * 2 + ("no",) * 7 + ("maybe",)


def item(metric: str, answer: str, *accepted: str) -> Item:
    return Item("1", "t", ({"type": "text", "text": "?"},), answer, metric, accepted)


def boxes(*found: tuple[int, int, int, int, str]) -> str:
    inner = ", ".join(f'{{"bbox_2d": {list(values)}, "label": "{label}"}}' for *values, label in found)
    return f"```json\n[{inner}]\n```"


@pytest.mark.parametrize(
    ("metric", "answer", "accepted", "text", "worth"),
    [
        ("exact", "Red", (), " red. ", 1),
        ("exact", "red", (), "dark red", 0),
        ("exact", "red", ("crimson",), "Crimson", 1),
        ("contains", "red", (), "It is Red, I think", 1),
        ("contains", "red", (), "bored", 0),
        ("contains", "3.5", (), "about 3x5", 0),
        ("anls", "Invoice 42", (), "invoice  42", 1),
        ("anls", "abcd", (), "abcx", 0.75),
        ("anls", "abcd", (), "abxy", 0.5),
        ("anls", "abcd", (), "axyz", 0),
        ("anls", "abcd", ("wxyz",), "wxyz", 1),
        ("anls", "abc", (), "", 0),
        ("choice", "B", ("a cat",), "B", 1),
        ("choice", "B", ("a cat",), "(b)", 1),
        ("choice", "B", ("a cat",), "B. a cat", 1),
        ("choice", "B", ("a cat",), "The answer is B.", 1),
        ("choice", "B", ("a cat",), "A cat.", 1),
        ("choice", "B", ("a cat",), "A", 0),
        ("choice", "B", ("a cat",), "C: a cat", 0),
        ("choice", "B", ("a cat",), "a dog", 0),
        ("number", "1000", (), "1,000", 1),
        ("number", "1000", (), "There are 1e3 of them.", 1),
        ("number", "4", (), "4 or 5", 0),
        ("number", "4", (), "B4", 0),
        ("number", "-2.5", (), "-2.50", 1),
        ("number", "4", (), "four", 0),
        ("relaxed", "100", (), "105", 1),
        ("relaxed", "100", (), "94.9", 0),
        ("relaxed", "12%", (), "0.12", 1),
        ("relaxed", "-20", (), "20", 0),
        ("relaxed", "0", (), "0.01", 0),
        ("relaxed", "0", (), "0", 1),
        ("relaxed", "2010", (), "Two", 0),
        ("relaxed", "Japan", (), "japan", 1),
        ("json", '{"a": 1, "b": [2]}', (), '```json\n{"b": [2.0], "a": 1}\n```', 1),
        ("json", '{"a": 1}', (), '{"a": true}', 0),
        ("json", '{"a": 1}', (), '{"a": "1"}', 0),
        ("json", '{"a": 1}', (), "a: 1", 0),
        ("json", '{"a": 1}', (), '{"a": 1', 0),
        ("vqa", "no", TEN_VOTES, "No.", 1),
        ("vqa", "no", TEN_VOTES, "yes", (2 * 1 / 3 + 8 * 2 / 3) / 10),
        ("vqa", "no", TEN_VOTES, "never", 0),
        ("vqa", "2", (), "two", 1),
        ("vqa", "the dog's bed", (), "a dogs bed", 1),
        ("vqa", "1,000.5", (), "1000.5", 1),
    ],
)
def test_an_answer_is_worth(metric: str, answer: str, accepted: tuple[str, ...], text: str, worth: float) -> None:
    assert score(item(metric, answer, *accepted), text, ()) == pytest.approx(worth)


@pytest.mark.parametrize(
    ("text", "worth", "overlap"),
    [
        (boxes((0, 0, 100, 100, "dog")), 1, 1),
        (boxes((0, 0, 100, 50, "Dog")), 1, 0.5),
        (boxes((0, 0, 100, 49, "dog")), 0, 0.49),
        (boxes((0, 0, 100, 100, "cat")), 0, 0),
        (boxes((0, 0, 100, 100, "dog"), (0, 0, 9, 9, "dog")), 0, 0.5),
        ("nothing", 0, 0),
    ],
)
def test_a_box_counts_by_overlap(text: str, worth: float, overlap: float) -> None:
    asked = item("box", boxes((0, 0, 100, 100, "dog")))
    assert score(asked, text, (PICTURE,)) == worth
    assert mean_overlap(asked, text, (PICTURE,)) == pytest.approx(overlap)


def test_boxes_are_matched_in_any_order_each_once() -> None:
    first, second = (0, 0, 50, 50, "dog"), (50, 50, 110, 110, "dog")
    asked = item("box", boxes(first, second))
    assert score(asked, boxes(second, first), (PICTURE,)) == 1
    assert score(asked, boxes(first, first), (PICTURE,)) == 0
    assert mean_overlap(asked, boxes(first), (PICTURE,)) == 0.5


@pytest.mark.parametrize("metric", METRICS)
def test_no_text_is_too_strange_to_judge(metric: str) -> None:
    right = boxes((0, 0, 9, 9, "x")) if metric == "box" else "1"
    for text in ("", "{" * 2000, "9" * 5000, "1e999", "\ud800", "```json\n```", "[[[[", "nan", "-", ".", "," * 50):
        assert 0 <= score(item(metric, right), text, (PICTURE,)) < 1
