"""The demo model's training tokens, batches and growth say what they claim."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer

pytest.importorskip("safetensors")
from saccade.checkpoints.config import PreprocessingConfig
from saccade.evals.drawing import text_sprite
from saccade.evals.questions import Turn
from saccade.evals.tasks import MEDIA
from saccade.geometry import Grid
from saccade.inputs.pixels import patches
from tools.train_demo import batches, reopen, tokenizer
from tools.train_demo.batches import START_WEIGHTS, BatchSource, Packer, patch_rows
from tools.train_demo.dense import CHARACTERS, COLUMNS, KINDS, UNIT, dense_targets
from tools.train_demo.export import averaged
from tools.train_demo.network import Network
from tools.train_demo.train import SIZES, Training, answer_logits, answers_right, demo_config
from tools.train_demo.widen import widened


@pytest.fixture(scope="module")
def small_tokenizer() -> Tokenizer:
    return tokenizer.build(seed=1, num_items=4)


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
    turns = [Turn("colour", f"Question {i}?", f"Answer {i}.", "exact") for i in range(3)]
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
    drawn = text_sprite("71", "blue", (0.0, 0.0, 255.0), 40).drawn
    targets = dense_targets([[drawn]], 56, 56)
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


def source_of(small_tokenizer: Tokenizer, *, test: bool) -> BatchSource:
    return BatchSource(Packer(small_tokenizer, 2.0), 3, lambda: START_WEIGHTS, test=test)


def test_an_index_gives_the_same_batch_again(small_tokenizer: Tokenizer):
    a, b = (source_of(small_tokenizer, test=True)(4, "moving") for _ in range(2))
    assert torch.equal(a.token_ids, b.token_ids)
    assert torch.equal(a.groups[0].frames, b.groups[0].frames)
    other = source_of(small_tokenizer, test=False)(4, "moving")
    assert not torch.equal(a.groups[0].frames[:1], other.groups[0].frames[:1])


def test_every_medium_makes_a_batch_and_only_right_logits_are_right(
    small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(batches, "UNITS_PER_BATCH", 64)
    for medium in MEDIA:
        batch = source_of(small_tokenizer, test=False)(1, medium)
        assert batch.is_media.sum() == sum(len(g.frames) * g.grid[0] * g.grid[1] // 4 for g in batch.groups)
        answers = batch.token_ids[batch.is_answer]
        perfect = torch.nn.functional.one_hot(answers, tokenizer.VOCAB_SIZE).float()
        assert all(all(hits) for hits in answers_right(batch, perfect, small_tokenizer).values())
        wrong = answers_right(batch, torch.zeros_like(perfect), small_tokenizer)
        assert not any(any(hits) for hits in wrong.values())


def test_a_widened_network_says_the_same(small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batches, "UNITS_PER_BATCH", 32)
    torch.manual_seed(0)
    config = demo_config(small_tokenizer)
    narrow = replace(
        config,
        text=replace(config.text, hidden_size=256, num_heads=4, intermediate_size=704),
        vision=replace(config.vision, out_hidden_size=256),
    )
    old, new = Network(narrow), Network(config)
    with torch.no_grad():
        for parameter in old.parameters():  # norms and biases that are not plain
            parameter.add_(torch.randn_like(parameter) * 0.02)
        inner = config.text.intermediate_size
        new.load_state_dict({n: widened(n, w, config.text.head_dim, inner) for n, w in old.state_dict().items()})
        batch = source_of(small_tokenizer, test=True)(2, "number")
        logits = []
        for network in (old, new):
            rows = patch_rows(batch.groups[0].frames, config.vision, config.preprocessing)
            logits.append(answer_logits(network, batch, [network.visual(rows, *batch.groups[0].grid)]))
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-4)
    assert logits[0].std() > 0.05


@pytest.mark.parametrize(("size", "least", "most"), [("nano", 15e6, 20e6), ("small", 100e6, 200e6)])
def test_the_sizes_are_what_they_are_called(small_tokenizer: Tokenizer, size: str, least: float, most: float):
    assert set(SIZES) == {"nano", "small"}
    config = demo_config(small_tokenizer, size)
    with torch.device("meta"):
        network = Network(config)
    assert least < sum(p.numel() for p in network.parameters()) < most
    assert config.text.hidden_size % 256 == config.text.intermediate_size % 256 == 0
    assert sum(config.text.mrope_section) * 2 == config.text.head_dim


def test_an_average_lies_between_the_run_and_what_it_began_from():
    old, new = {"a": torch.zeros(2), "b": torch.full((3,), 4.0)}, {"a": torch.full((2,), 8.0), "b": torch.zeros(3)}
    found = averaged(new, old, 0.75)
    assert torch.equal(found["a"], torch.full((2,), 6.0))
    assert torch.equal(found["b"], torch.ones(3))


def test_heads_are_fitted_to_a_tower_that_stays_as_it_is(small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reopen, "NUM_BATCHES", 2)
    monkeypatch.setattr(batches, "UNITS_PER_BATCH", 40)
    training = Training(demo_config(small_tokenizer))
    before = {name: weight.clone() for name, weight in training.network.state_dict().items()}
    source = BatchSource(Packer(small_tokenizer, 2.0), 3, lambda: START_WEIGHTS, test=False)
    first, last = reopen.fit_heads(training, source)
    assert last < 0.7 * first
    assert all(torch.equal(weight, before[name]) for name, weight in training.network.state_dict().items())
