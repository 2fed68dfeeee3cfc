"""The demo model's drawings, questions and tokens say what they claim."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

pytest.importorskip("safetensors")
from saccade.checkpoints.config import PreprocessingConfig
from saccade.geometry import Grid
from saccade.inputs.pixels import patches
from tools.train_demo import scenes, tasks, tokenizer
from tools.train_demo.batches import BatchSource, Packer, patch_rows
from tools.train_demo.dense import CHARACTERS, COLUMNS, KINDS, UNIT, dense_targets
from tools.train_demo.evaluate import is_right
from tools.train_demo.network import Network
from tools.train_demo.train import answer_logits, demo_config, see

if not scenes.FONT_FOLDER.is_dir():
    pytest.skip("the drawings need fonts-dejavu-core", allow_module_level=True)


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def small_tokenizer() -> Tokenizer:
    return tokenizer.build(seed=1, num_scenes=20)


# --- scenes ----------------------------------------------------------------------------------------------------------


def test_a_seed_draws_the_same_picture_and_the_same_clip():
    for draw in (lambda r: scenes.picture(r, 140, 168), lambda r: scenes.page(r, 140, 168)):
        a, b = draw(rng(5)), draw(rng(5))
        assert np.array_equal(a.pixels, b.pixels)
        assert a.items == b.items
    a, b = (scenes.clip(rng(6), 112, 112, 6) for _ in range(2))
    assert np.array_equal(a.frames, b.frames)
    assert (a.items, a.entries, a.second_per_grid) == (b.items, b.entries, b.second_per_grid)


def test_training_scenes_never_hold_what_is_held_out():
    generator = rng(7)
    for _ in range(60):
        items = list(scenes.picture(generator, 112, 140).items)
        items += [item for shown in scenes.clip(generator, 84, 84, 6).items for item in shown]
        for item in items:
            assert (item.colour, item.kind) not in scenes.HELD_OUT_PAIRS
            assert not scenes.is_held_out_text(item.text)


def test_held_out_scenes_do_hold_them():
    generator = rng(8)
    items = [item for _ in range(40) for item in scenes.picture(generator, 112, 140, held_out=True).items]
    texts = [item.text for item in items if item.kind == "number"]
    assert texts
    assert all(scenes.is_held_out_text(text) for text in texts)
    pairs = [(item.colour, item.kind) in scenes.HELD_OUT_PAIRS for item in items if item.is_shape]
    assert 0.4 < sum(pairs) / len(pairs) < 0.9


@pytest.mark.parametrize("kind", scenes.SHAPES)
def test_a_box_encloses_exactly_the_pixels_drawn(kind: str):
    sprite = scenes.shape_sprite(kind, "red", (255.0, 0.0, 0.0), 40, 0.1)
    canvas = np.zeros((80, 90, 3), dtype=np.float32)
    scenes.paste(canvas, sprite, 20, 10)
    rows, columns = np.nonzero(canvas[:, :, 0] >= scenes.SOLID)
    assert sprite.at(20, 10).box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_objects_keep_apart_and_inside_the_picture():
    generator = rng(9)
    for _ in range(40):
        items = scenes.draw_picture(generator, 112, 112).items
        assert items
        for i, a in enumerate(items):
            assert 0 <= a.box[0] < a.box[2] <= 112
            assert 0 <= a.box[1] < a.box[3] <= 112
            for b in items[:i]:
                apart = (a.box[0] - b.box[2], b.box[0] - a.box[2], a.box[1] - b.box[3], b.box[1] - a.box[3])
                assert max(apart) >= scenes.GAP


def test_glyphs_tile_a_text_from_left_to_right():
    item = scenes.text_sprite("4096", "blue", (0.0, 0.0, 255.0), "DejaVuSans.ttf", 30).item
    assert "".join(glyph.character for glyph in item.glyphs) == "4096"
    assert all(a.right == b.left for a, b in zip(item.glyphs, item.glyphs[1:], strict=False))
    assert item.kind == "number"


def test_a_moving_shape_goes_where_the_clip_says():
    generator = rng(10)
    moving = [c for c in (scenes.draw_clip(generator, 112, 112, 6) for _ in range(40)) if c.story == "move"]
    assert moving
    for clip in moving:
        first, last = clip.items[0][0].centre, clip.items[-1][0].centre
        dx, dy = last[0] - first[0], last[1] - first[1]
        assert (
            clip.direction
            == {(1, 0): "right", (-1, 0): "left", (0, 1): "down", (0, -1): "up"}[np.sign(dx), np.sign(dy)]
        )


def test_shapes_enter_a_clip_in_the_order_of_its_cast():
    generator = rng(11)
    for _ in range(40):
        clip = scenes.draw_clip(generator, 112, 112, 8)
        if clip.story in ("appear", "replace"):
            for shape, entry in zip(clip.cast, clip.entries, strict=True):
                shown = [shape.name in {item.name for item in items} for items in clip.items]
                assert shown.index(True) == entry
            assert list(clip.entries) == sorted(set(clip.entries))


# --- questions -------------------------------------------------------------------------------------------------------


def scene_of(*items: scenes.Item) -> scenes.Scene:
    return scenes.Scene(np.zeros((112, 112, 3), dtype=np.uint8), items)


RED_CIRCLE = scenes.Item("circle", "red", (10, 10, 30, 30))
RED_SQUARE = scenes.Item("square", "red", (40, 10, 60, 30))
BLUE_CIRCLE = scenes.Item("circle", "blue", (70, 50, 90, 70))
WORD = scenes.Item("word", "green", (10, 80, 60, 95), "HELLO")


def answers(ask, scene) -> set[str]:
    return {turn.answer for seed in range(60) if (turn := ask(rng(seed), scene)) is not None}


def test_only_questions_with_one_answer_are_asked():
    scene = scene_of(RED_CIRCLE, RED_SQUARE, BLUE_CIRCLE, WORD)
    assert answers(tasks.ask_colour, scene) == {"The square is red.", "The word is green."}  # two circles: not asked
    assert answers(tasks.ask_shape, scene) == {"The blue shape is a circle."}
    assert answers(tasks.ask_text, scene) == {"The word is HELLO.", "It says HELLO."}


def test_counts_equal_the_shapes_drawn():
    generator = rng(12)
    for _ in range(30):
        scene = scenes.draw_picture(generator, 140, 140)
        for seed in range(6):
            turn = tasks.ask_count(rng(seed), scene)
            count, what = re.fullmatch(r"There (?:is|are) (no|\d) (.+)\.", turn.answer).groups()
            words = set(re.sub(r"(shape|circle|square|triangle|star|diamond|cross)e?s$", r"\1", what).split()) - {
                "shape"
            }
            matching = [item for item in scene.shapes if words <= {item.colour, item.kind}]
            assert len(matching) == (0 if count == "no" else int(count))


def test_a_box_answer_is_a_fenced_json_list_as_qwen_writes_it():
    turn = next(
        t for s in range(50) if (t := tasks.ask_box(rng(s), scene_of(RED_CIRCLE))) and "red circle" in t.question
    )
    assert turn.answer == '```json\n[\n\t{"bbox_2d": [10, 10, 30, 30], "label": "red circle"}\n]\n```'
    assert json.loads(turn.answer.removeprefix("```json").removesuffix("```"))[0]["bbox_2d"] == [10, 10, 30, 30]


def test_a_description_runs_from_left_to_right():
    turn = tasks.describe_picture(rng(0), scene_of(BLUE_CIRCLE, RED_SQUARE, WORD, RED_CIRCLE))
    assert turn.answer == "The picture shows a red circle, the word HELLO, a red square and a blue circle."


def test_two_pictures_are_compared_by_what_they_hold():
    pair = scene_of(RED_CIRCLE), scene_of(RED_SQUARE, BLUE_CIRCLE)
    assert answers(tasks.ask_which_has_more, pair) == {"The second picture."}
    for seed in range(20):
        turn = tasks.ask_which_has(rng(seed), pair)
        assert turn.answer == ("The first picture." if "red circle" in turn.question else "The second picture.")


def test_boxes_count_as_right_from_half_an_overlap_on():
    turn = tasks.Turn("box", "Where is it?", tasks.boxes_answer([RED_CIRCLE], "circle"))
    near, far = (scenes.Item("circle", "red", box) for box in ((12, 11, 31, 30), (25, 25, 45, 45)))
    assert is_right(turn, tasks.boxes_answer([near], "circle"))
    assert not is_right(turn, tasks.boxes_answer([far], "circle"))
    assert not is_right(turn, "There is none.")


# --- tokens and batches ----------------------------------------------------------------------------------------------


def test_the_tokenizer_returns_every_text(small_tokenizer: Tokenizer):
    texts = [
        "What colour is the circle?",
        "naïve café 漢字 🙂",
        "  two  spaces\n\nand\ttabs",
        '```json\n[{"bbox_2d": [1, 22]}]\n```',
    ]
    for text in texts:
        assert small_tokenizer.decode(small_tokenizer.encode(text).ids) == text


def test_digits_and_drawn_letters_are_single_tokens(small_tokenizer: Tokenizer):
    assert small_tokenizer.encode("2048").tokens == list("2048")
    assert small_tokenizer.encode("ZEBRA").tokens == list("ZEBRA")


def test_added_tokens_are_single_ids_in_qwens_order(small_tokenizer: Tokenizer):
    added = (*tokenizer.SPECIAL, *tokenizer.NOT_SPECIAL)
    ids = [small_tokenizer.encode(token).ids for token in added]
    first = ids[0][0]
    assert ids == [[first + i] for i in range(len(added))]
    shown = small_tokenizer.decode([i for one in ids for i in one], skip_special_tokens=True)
    assert shown.split() == list(tokenizer.NOT_SPECIAL) or shown == "".join(tokenizer.NOT_SPECIAL)


def test_a_branch_sees_the_trunk_and_itself_alone(small_tokenizer: Tokenizer):
    packer = Packer(small_tokenizer, 2.0)
    turns = [tasks.Turn("colour", f"Question {i}?", f"Answer {i}.") for i in range(3)]
    tree = packer.tree([(Grid(1, 8, 8), 0.0)], [[turns[0]], [turns[1], turns[2]]])
    batch = packer.batch("picture", (), [tree])
    visible = batch.attention_bias()[0, 0] == 0
    branch = batch.branch[0]
    for i in range(len(branch)):
        expected = [j <= i and branch[j] in (0, branch[i]) for j in range(len(branch))]
        assert visible[i].tolist() == expected
    # Each branch continues at the trunk's next position, as if it stood alone.
    starts = [int((branch == b).nonzero()[0]) for b in (1, 2)]
    assert batch.positions[:, 0, starts[0]].tolist() == batch.positions[:, 0, starts[1]].tolist()
    text = small_tokenizer.decode(batch.token_ids[0][branch == 2].tolist(), skip_special_tokens=False)
    assert text == (
        "Question 1?<|im_end|>\n<|im_start|>assistant\nAnswer 1.<|im_end|>\n<|im_start|>user\n"
        "Question 2?<|im_end|>\n<|im_start|>assistant\nAnswer 2.<|im_end|>"
    )


def test_dense_targets_name_the_character_of_every_strip():
    item = scenes.text_sprite("71", "blue", (0.0, 0.0, 255.0), "DejaVuSans.ttf", 40).item
    targets = dense_targets([[item]], 56, 56)
    assert targets.kind[0, 0] == KINDS.index("number") + 1
    strips = targets.characters.view(2, 2 * COLUMNS)[0].tolist()
    seen = [CHARACTERS[i - 1] for i in strips if i]
    assert sorted(set(seen), key=seen.index) == ["7", "1"]
    assert targets.place.tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]
    assert UNIT == 28


def test_training_cuts_patches_as_the_engine_does(small_tokenizer: Tokenizer):
    config = demo_config(small_tokenizer)
    frames = torch.randint(0, 256, (4, 3, 56, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours = patch_rows(frames.unflatten(0, (2, 2)), config.vision, PreprocessingConfig())
    torch.testing.assert_close(ours.flatten(0, 1), patches(frames, config), rtol=0, atol=1e-6)
    ours = patch_rows(frames[:1, None], config.vision, PreprocessingConfig())
    torch.testing.assert_close(ours[0], patches(frames[:1], config), rtol=0, atol=1e-6)


def test_a_held_out_batch_runs_and_an_index_gives_the_same_batch_again(small_tokenizer: Tokenizer):
    source = BatchSource(Packer(small_tokenizer, 2.0), 3, "held out")
    a, b = source("clip", 4), source("clip", 4)
    assert torch.equal(a.token_ids, b.token_ids)
    assert torch.equal(a.groups[0].frames, b.groups[0].frames)
    network = Network(demo_config(small_tokenizer))
    with torch.no_grad():
        logits = answer_logits(network, a, see(network, a))
    assert logits.shape == (int(a.is_answer.sum()), tokenizer.VOCAB_SIZE)
    assert logits.isfinite().all()
