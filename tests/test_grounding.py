"""Boxes, points and events are found in whatever the model writes, and land in the original's pixels and seconds."""

from __future__ import annotations

import random

import pytest

from saccade.geometry import Grid
from saccade.grounding import Box, find_boxes, find_events, find_points
from saccade.inputs.prompt import MediaReceipt


def a_picture(
    index: int = 0, original: tuple[int, int] = (1000, 747), model: tuple[int, int] = (1008, 756), orientation: int = 1
) -> MediaReceipt:
    return MediaReceipt("image", index, "a.jpg", "0", original, model, Grid(1, 54, 72), 972, orientation)


def a_video(times: tuple[float, ...] = (10.0, 11.0)) -> MediaReceipt:
    return MediaReceipt("video", 0, "c.mp4", "0", (360, 640), (280, 504), Grid(1, 36, 20), 180, frame_times_s=times)


def corners(boxes: list[Box]) -> list[tuple[int, ...]]:
    return [tuple(round(value) for value in box.xyxy) for box in boxes]


@pytest.mark.parametrize(
    "text",
    [
        '```json\n[{"bbox_2d": [252, 189, 504, 378], "label": "cat"}]\n```',
        '[{"bbox_2d": [252, 189, 504, 378], "label": "cat"}]',
        'The cat is here: {"bbox_2d": [252, 189, 504, 378], "label": "cat"} and it sleeps.',
        '{"objects": [{"bbox_2d": [252, 189, 504, 378], "label": "cat"}]}',
        '```json\n[{"bbox_2d": [252, 189, 504, 378], "label": "cat"}, {"bbox_2d": [1, 2',  # cut off
        '[{"bbox_2d": [504, 378, 252, 189], "text_content": "cat"}]',  # corners the wrong way round
        '{"broken": [1, 2} [{"bbox_2d": [252, 189, 504, 378], "label": "cat"}]',
    ],
)
def test_a_box_is_found_and_mapped_to_the_original(text: str) -> None:
    boxes = find_boxes(text, [a_picture()])
    assert corners(boxes) == [(250, 187, 500, 374)]
    assert boxes[0].label == "cat"
    assert boxes[0].picture == 0


def test_boxes_are_clipped_to_the_picture() -> None:
    assert corners(find_boxes('{"bbox_2d": [-20, 700, 2000, 900]}', [a_picture()])) == [(0, 692, 1000, 747)]


def test_a_turned_photograph_gives_upright_and_stored_boxes() -> None:
    """Orientation 6: the file lies on its side, 747 wide and 1000 high shown upright."""
    turned = a_picture(original=(747, 1000), model=(756, 1008), orientation=6)
    box = find_boxes('{"bbox_2d": [0, 0, 378, 252]}', [turned])[0]
    assert box.xyxy == pytest.approx((0, 0, 373.5, 250))
    assert box.stored == pytest.approx((0, 373.5, 250, 747))  # in the raster of 1000 x 747


def test_a_box_belongs_to_the_picture_it_names() -> None:
    pictures = [a_picture(0), a_picture(1, original=(504, 378))]
    text = '[{"bbox_2d": [0, 0, 1008, 756], "image": 2}, {"bbox_2d": [0, 0, 1008, 756]}, '
    text += '{"bbox_2d": [0, 0, 1, 1], "image": "Picture 2"}]'
    boxes = find_boxes(text, pictures)
    assert [box.picture for box in boxes] == [1, 0, 1]
    assert corners(boxes)[:2] == [(0, 0, 504, 378), (0, 0, 1000, 747)]


def test_points_are_found() -> None:
    point = find_points('[{"point_2d": [504, 378], "label": "nose"}]', [a_picture()])[0]
    assert point.xy == (500, 373.5)
    assert point.label == "nose"


def test_events_count_from_the_clips_own_start() -> None:
    text = '[{"start_time": "01:02.50", "end_time": "75:00.0", "description": "a jump"}, '
    text += '{"start_time": 3, "end_time": 4.5, "label": "x"}]'
    events = find_events(text, [a_video()])
    assert [(event.start_s, event.end_s, event.description) for event in events] == [
        (72.5, 4510.0, "a jump"),
        (13.0, 14.5, "x"),
    ]


def test_without_media_nothing_is_found() -> None:
    text = '{"bbox_2d": [1, 2, 3, 4], "start_time": 1, "end_time": 2}'
    assert find_boxes(text, []) == []
    assert find_events(text, [a_picture()]) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no json",
        '{"bbox_2d": "none"}',
        '{"bbox_2d": [1, 2, 3]}',
        '{"bbox_2d": [1, 2, 3, NaN]}',
        '{"bbox_2d": [true, 2, 3, 4]}',
        '{"bbox_2d": [1, 2, 3, 1e999]}',
        '{"start_time": "soon", "end_time": "later"}',
        "{" * 5000,
        '{"a":' * 3000,
        "[" * 100_000,
    ],
)
def test_what_is_no_box_is_passed_over(text: str) -> None:
    media = [a_picture(), a_video()]
    assert (find_boxes(text, media), find_points(text, media), find_events(text, media)) == ([], [], [])


def test_mangled_answers_never_raise() -> None:
    pick = random.Random(0)
    pieces = [
        '{"bbox_2d": [1, 2, 30, 40], "label": "a"}',
        '{"point_2d": [1, 2]}',
        '"start_time": "0:1"',
        "```json",
        "[",
        "]",
        "{",
        "}",
        ",",
        '"',
    ]
    for _ in range(3000):
        text = "".join(pick.choice(pieces) for _ in range(pick.randrange(30)))
        text = "".join(c for c in text if pick.random() > 0.02)
        for box in find_boxes(text, [a_picture()]):
            assert 0 <= box.xyxy[0] <= box.xyxy[2] <= 1000
        find_points(text, [a_picture()])
        find_events(text, [a_video()])
