"""The tasks draw what they say, the same every time, and keep from training what they test."""

from __future__ import annotations

import io
import json
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from saccade.base.errors import SaccadeError
from saccade.checkpoints.config import read_config
from saccade.demo import FOLDER
from saccade.evals import scenes, tasks
from saccade.evals.drawing import GAP, SHAPES, SOLID, Drawn, TextStyle, paste, shape_sprite, text_sprite
from saccade.evals.item import Item, Split
from saccade.evals.scenes import HELD_OUT_PAIRS, Clip, Scene, is_held_out
from saccade.evals.tasks import MEDIA, TASKS, ask, draw, draw_medium, tasks_about

METRICS = {"exact", "anls", "box", "json", "number"}


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def media_bytes(item: Item) -> bytes:
    """Every pixel of an item's pictures and clips, in order."""
    out = io.BytesIO()
    for part in item.content:
        for picture in (part["image"],) if "image" in part else part.get("video", ()):
            out.write(np.asarray(picture).tobytes())
    return out.getvalue()


# --- items -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_two_hundred_items_are_drawn_and_differ(task: str) -> None:
    items = [draw(task, "test", 3, index) for index in range(200)]
    assert {item.task for item in items} == {task}
    assert {item.metric for item in items} <= METRICS
    assert len({item.id for item in items}) == 200
    assert len({(item.question, media_bytes(item)) for item in items}) > 40
    assert len({item.answer for item in items}) > 1


@pytest.mark.parametrize("task", TASKS)
def test_an_index_gives_the_same_item_again_and_a_split_or_seed_another(task: str) -> None:
    one, again = (draw(task, "test", 3, 7) for _ in range(2))
    assert (one.question, one.answer, one.id) == (again.question, again.answer, again.id)
    assert media_bytes(one) == media_bytes(again)
    for other in (draw(task, "train", 3, 7), draw(task, "test", 4, 7), draw(task, "test", 3, 8)):
        assert (other.question, media_bytes(other)) != (one.question, media_bytes(one))


def test_an_unknown_task_is_named_with_those_there_are() -> None:
    with pytest.raises(SaccadeError, match=r"no task 'spelling'; there are digits, words, .*sum"):
        draw("spelling", "test", 0, 0)


def test_pictures_need_no_resizing_and_forms_are_the_largest() -> None:
    sizes = {name: (*medium.sizes, *medium.large) for name, medium in MEDIA.items()}
    areas = {name: max(height * width for height, width, *_ in found) for name, found in sizes.items()}
    assert all(side % 28 == 0 for found in sizes.values() for size in found for side in size[:2])
    assert areas["form"] >= 1.5 * max(area for name, area in areas.items() if name != "form")
    preprocessing = read_config(FOLDER / "model").preprocessing
    assert max(areas.values()) <= preprocessing.max_pixels


@pytest.mark.parametrize("task", TASKS)
def test_harder_items_are_mixed_in_as_often_as_the_task_says(task: str) -> None:
    share, medium = tasks.hard_share(task), tasks.medium_of(task)
    items = [draw(task, "test", 11, index) for index in range(200)]
    found = sum(is_hard(item, medium) for item in items) / len(items)
    assert abs(found - share) < 0.12
    assert share < 1


def is_hard(item: Item, medium: str | None) -> bool:
    """By what there is to see: the picture's size, the clip's length, how much is to be copied, sorted or added."""
    if medium is None:
        return len(item.question) > {"copy": 15, "sort": 11, "sum": 10}[item.task]
    pictures = [part["image"] if "image" in part else part["video"] for part in item.content[:-1]]
    if isinstance(pictures[0], list):
        return len(pictures[0]) in {frames for *_, frames in MEDIA[medium].large}
    return (pictures[0].height, pictures[0].width) in MEDIA[medium].large


# --- the splits are disjoint -----------------------------------------------------------------------------------------


def shapes_in(subject: Any) -> list[Drawn]:
    if isinstance(subject, Clip):
        return list(subject.cast)
    return [shape for scene in subject for shape in scene.shapes]


@pytest.mark.parametrize("medium", ["shapes", "quarters", "couple", "pair", "appearing", "entering", "moving"])
def test_held_out_pairs_of_colour_and_shape_are_for_tests_alone(medium: str) -> None:
    generator, size = rng(1), MEDIA[medium].sizes[0]
    for _ in range(60):
        trained = shapes_in(draw_medium(medium, generator, size, test=False))
        assert not {(shape.colour, shape.kind) for shape in trained} & HELD_OUT_PAIRS
    tested = [s for _ in range(60) for s in shapes_in(draw_medium(medium, generator, size, test=True))]
    share = sum((shape.colour, shape.kind) in HELD_OUT_PAIRS for shape in tested) / len(tested)
    assert 0.4 < share < 0.9


@pytest.mark.parametrize("task", ["digits", "words", "copy"])
def test_strings_are_of_one_split(task: str) -> None:
    splits: tuple[Split, ...] = ("train", "test")
    for split in splits:
        for index in range(100):
            assert is_held_out(draw(task, split, 5, index).answer) == (split == "test")


@pytest.mark.parametrize("medium", ["chart", "table", "form"])
def test_a_test_scene_holds_a_combination_no_training_scene_does(medium: str) -> None:
    generator, size, (task,) = rng(2), MEDIA[medium].sizes[-1], tasks_about(medium)
    trained = set()
    for _ in range(60):
        (scene,) = draw_medium(medium, generator, size, test=False)
        assert not any(scene.is_new)
        trained |= combinations(medium, scene)
    for _ in range(40):
        (scene,) = draw_medium(medium, generator, size, test=True)
        new = {value for value, is_new in zip(sorted_by_place(medium, scene), scene.is_new, strict=True) if is_new}
        assert new
        assert not new & trained
        turn = ask(task, generator, (scene,), test=True)
        assert turn is not None
        assert any(name[-1] in turn.question and value in turn.answer for name, value in scene.facts)


def sorted_by_place(medium: str, scene: Scene) -> list[tuple[object, ...]]:
    """What identifies each fact: a bar's place counts too, a form's line does not."""
    return [(place, *fact) if medium == "chart" else fact for place, fact in enumerate(scene.facts)]


def combinations(medium: str, scene: Scene) -> set[tuple[object, ...]]:
    return set(sorted_by_place(medium, scene))


def test_what_is_sorted_or_added_is_of_one_split() -> None:
    def operands(task: str, split: str) -> set[tuple[str, ...]]:
        found = (re.findall(r"\d+", draw(task, split, 6, index).question) for index in range(150))  # type: ignore[arg-type]
        return {tuple(sorted(one)) if task == "sort" else tuple(one) for one in found}

    for task in ("sort", "sum"):
        assert not operands(task, "train") & operands(task, "test")


# --- answers follow from what is drawn -------------------------------------------------------------------------------


def scene_of(*things: Drawn) -> Scene:
    return Scene(np.zeros((112, 112, 3), dtype=np.uint8), things)


RED_CIRCLE = Drawn("circle", "red", (10, 10, 30, 30))
RED_SQUARE = Drawn("square", "red", (40, 10, 60, 30))
BLUE_CIRCLE = Drawn("circle", "blue", (70, 50, 90, 70))
GREEN_STAR = Drawn("star", "green", (42, 80, 62, 100))


def turns(task: str, subject: Any) -> set[tuple[str, str]]:
    found = (ask(task, rng(seed), subject, test=False) for seed in range(60))
    return {(turn.question, turn.answer) for turn in found if turn is not None}


def test_only_questions_with_one_answer_are_asked() -> None:
    scene = (scene_of(RED_CIRCLE, RED_SQUARE, BLUE_CIRCLE),)
    assert turns("colour", scene) == {("What colour is the square?", "red")}  # two circles: not asked
    assert turns("shape", scene) == {("What shape is blue?", "circle")}
    assert {question for question, _ in turns("box", scene)} == {"Locate the square."}


def test_a_relation_says_where_the_shape_lies_from_the_other() -> None:
    text = "Is the {} left of, right of, above or below the other shape?"
    assert turns("relation", (scene_of(RED_SQUARE, GREEN_STAR),)) == {
        (text.format("star"), "below"),
        (text.format("square"), "above"),
    }
    assert turns("relation", (scene_of(RED_CIRCLE, RED_SQUARE),)) == {
        (text.format("circle"), "left"),
        (text.format("square"), "right"),
    }


@pytest.mark.parametrize("seed", range(20))
def test_a_couple_stands_along_one_axis(seed: int) -> None:
    a, b = scenes.couple(rng(seed), 112, 140, test=False).shapes
    dx, dy = abs(a.centre[0] - b.centre[0]), abs(a.centre[1] - b.centre[1])
    assert max(dx, dy) > 2 * min(dx, dy)
    assert a.kind != b.kind


def test_counts_leave_other_shapes_out() -> None:
    assert turns("count", (scene_of(RED_CIRCLE, RED_SQUARE, BLUE_CIRCLE),)) == {
        ("How many circles are there?", "There are 2 circles."),
        ("How many squares are there?", "There is 1 square."),
    }


def test_a_box_is_written_as_qwen_writes_it() -> None:
    ((_, answer),) = turns("box", (scene_of(RED_CIRCLE),))
    assert answer == '```json\n[\n\t{"bbox_2d": [10, 10, 30, 30], "label": "circle"}\n]\n```'
    assert json.loads(answer.removeprefix("```json").removesuffix("```"))[0]["bbox_2d"] == [10, 10, 30, 30]


def test_two_pictures_are_compared_by_how_many_shapes_they_show() -> None:
    pair = scene_of(RED_CIRCLE), scene_of(RED_SQUARE, BLUE_CIRCLE)
    assert turns("compare", pair) == {("Which picture has more shapes?", "second")}
    assert turns("compare", pair[::-1]) == {("Which picture has more shapes?", "first")}
    assert not turns("compare", (scene_of(RED_CIRCLE), scene_of(BLUE_CIRCLE)))


@pytest.mark.parametrize(("height", "levels"), [(140, scenes.LEVELS), (196, scenes.FINE_LEVELS)])
def test_a_bar_reaches_the_line_of_its_value(height: int, levels: int) -> None:
    for seed in range(30):
        scene = scenes.chart(rng(seed), height, 168, test=False)
        tops = {bar.colour: bar.box[1] for bar in scene.things}
        values = {colour: int(value) for colour, value in scene.facts}
        level = (height - 8 - 10) / levels
        assert all(abs((height - 8 - tops[colour]) / level - value) < 0.1 for colour, value in values.items())
        assert max(values.values()) <= levels


def test_a_cell_lies_below_its_column_and_right_of_its_row() -> None:
    for seed in range(20):
        scene = scenes.table(rng(seed), 112, 84, test=False)
        centres = {thing.text: thing.centre for thing in scene.things if thing.text.isalpha()}
        cells = [thing for thing in scene.things if thing.text.isdigit()]
        assert [cell.meaning for cell in cells] == [name for name, _ in scene.facts]
        for cell, (name, value) in zip(cells, scene.facts, strict=True):
            assert cell.text == value
            assert abs(cell.centre[1] - centres[name[0]][1]) < 6
            assert abs(cell.centre[0] - centres[name[1]][0]) < 6


@pytest.mark.parametrize(("height", "width", "most"), [(224, 168, 2), (448, 336, 4)])
def test_a_field_stands_beside_its_number(height: int, width: int, most: int) -> None:
    counts = set()
    for seed in range(20):
        scene = scenes.form(rng(seed), height, width, test=False)
        counts.add(len(scene.facts))
        written = {thing.text: thing for thing in scene.things[1:]}
        for name, value in scene.facts:
            label, numbers = written[name.upper()], [t for t in scene.things if t.text == value]
            assert any(abs(label.centre[1] - number.centre[1]) < 4 for number in numbers)
            assert all(label.box[2] < number.box[0] for number in numbers)
            assert label.box[2] < width
            assert label.box[3] < height
    assert counts == set(range(1, most + 1))


@pytest.mark.parametrize(("num_frames", "ways"), [(4, 4), (6, 8)])
def test_a_moving_shape_goes_where_the_clip_says(num_frames: int, ways: int) -> None:
    seen = set()
    for seed in range(60):
        clip = scenes.moving(rng(seed), 112, 140, num_frames, test=False)
        (x1, y1), (x2, y2) = clip.things[0][0].centre, clip.things[-1][0].centre
        assert (np.sign(x2 - x1), np.sign(y2 - y1)) == scenes.DIRECTIONS[str(clip.direction)]
        assert max(abs(x2 - x1), abs(y2 - y1)) > 20
        seen.add(clip.direction)
    assert len(seen) == ways


def test_shapes_appear_in_the_order_of_the_cast() -> None:
    for seed in range(30):
        clip = scenes.appearing(rng(seed), 112, 112, 6, test=False)
        for shape, entry in zip(clip.cast, clip.entries, strict=True):
            assert [shape.name in {thing.name for thing in shown} for shown in clip.things].index(True) == entry
        assert dict(turns("order", clip)) == {
            "What appears first?": clip.cast[0].name,
            "What appears last?": clip.cast[-1].name,
        }


@pytest.mark.parametrize(("num_frames", "times"), [(6, {0, 1, 2}), (8, {n / 2 for n in range(8)})])
def test_a_shape_is_there_from_the_second_asked_for_on(num_frames: int, times: set[float]) -> None:
    seen = set()
    for seed in range(80):
        clip = scenes.entering(rng(seed), 112, 112, num_frames, test=False)
        ((_, second),) = turns("when", clip)
        assert [len(shown) for shown in clip.things] == [int(i >= 2 * float(second)) for i in range(num_frames)]
        seen.add(float(second))
    assert seen == times


def test_text_tasks_answer_what_they_ask() -> None:
    for index in range(60):
        copied, ordered, added = (draw(task, "test", 1, index) for task in ("copy", "sort", "sum"))
        assert copied.question == f"Copy: {copied.answer}"
        assert sorted(ordered.question.split()[1:]) == ordered.answer.split()
        left, right = (int(n) for n in re.findall(r"\d+", added.question))
        assert left + right == int(added.answer)


def test_a_perfect_answer_of_a_box_task_is_a_box_of_the_drawn_shape() -> None:
    item = draw("box", "test", 1, 0)
    picture: Image.Image = item.content[0]["image"]
    x1, y1, x2, y2 = json.loads(item.answer.strip("`").removeprefix("json"))[0]["bbox_2d"]
    pixels = np.asarray(picture).astype(float)
    inside, corner = pixels[(y1 + y2) // 2, (x1 + x2) // 2], pixels[0, 0]
    assert np.abs(inside - corner).sum() > 60


# --- drawing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHAPES)
def test_a_box_encloses_exactly_the_pixels_drawn(kind: str) -> None:
    sprite = shape_sprite(kind, "red", (255.0, 0.0, 0.0), 40, 0.1)
    canvas = np.zeros((80, 90, 3), dtype=np.float32)
    drawn = paste(canvas, sprite, 20, 10)
    rows, columns = np.nonzero(canvas[:, :, 0] >= SOLID)
    assert drawn.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_shapes_keep_apart_and_inside_the_picture() -> None:
    generator = rng(9)
    for _ in range(40):
        things = scenes.shapes(generator, 112, 112, test=False).things
        for i, a in enumerate(things):
            assert 0 <= a.box[0] < a.box[2] <= 112
            assert 0 <= a.box[1] < a.box[3] <= 112
            for b in things[:i]:
                apart = (a.box[0] - b.box[2], b.box[0] - a.box[2], a.box[1] - b.box[3], b.box[1] - a.box[3])
                assert max(apart) >= GAP


@pytest.mark.parametrize("style", [TextStyle(), TextStyle(stroke=1, slant=0.2, stretch=1.2, angle=0.1)])
def test_glyphs_tile_a_text_from_left_to_right(style: TextStyle) -> None:
    drawn = text_sprite("4096", "blue", (0.0, 0.0, 255.0), 30, style).drawn
    assert "".join(glyph.character for glyph in drawn.glyphs) == "4096"
    assert all(a.right == b.left for a, b in zip(drawn.glyphs, drawn.glyphs[1:], strict=False))
    assert abs(drawn.glyphs[0].left - drawn.box[0]) < 6
    assert abs(drawn.glyphs[-1].right - drawn.box[2]) < 6
    assert drawn.kind == "number"


def test_a_style_changes_what_is_drawn() -> None:
    plain = text_sprite("KAT", "blue", (0.0, 0.0, 255.0), 30)
    for style in (TextStyle(stroke=1), TextStyle(slant=0.2), TextStyle(stretch=1.2), TextStyle(angle=0.1)):
        styled = text_sprite("KAT", "blue", (0.0, 0.0, 255.0), 30, style)
        assert styled.mask.shape != plain.mask.shape or (styled.mask != plain.mask).any()
