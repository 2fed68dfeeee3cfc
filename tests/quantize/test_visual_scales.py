"""Static scales of visual tokens' own: found on them, used for them and for nobody else, refused by who would ignore them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from saccade import LLM, SamplingParams
from saccade.api import quantization_job, quantize
from saccade.base.errors import CheckpointError, OptionError
from saccade.checkpoints import ascend
from saccade.checkpoints import compressed_tensors as ours
from saccade.checkpoints.formats import open_checkpoint
from saccade.kernels import reference
from saccade.kernels.library import load
from saccade.model.layers import Linear
from saccade.quantize.best_recipe import BestRecipe
from saccade.quantize.drawn_samples import drawn
from saccade.quantize.round_linear import Rounder
from saccade.quantize.smoothing import loss, trial
from saccade.quantize.statistics import ANSWER, FIRST, PICTURE, TEXT, Seen, Watcher, tokens_of
from saccade.schemes.affine import scaled_rows, static_weight
from saccade.schemes.parts import take_columns, take_rows
from saccade.schemes.scheme import W8A8, Weight, stack
from saccade.verify.sensitivity import Trials
from saccade.verify.verification import answer
from tests.checkpoints.making import InMemory, assert_same
from tests.test_quantized_model import logits_of, picture_question
from tests.verify.conftest import edited
from tests.verify.test_layers import compare, served

NAME = "model.layers.1.mlp.up_proj"
OPTIONS = {"scheme": "w8a8", "smooth": "none", "rounding": "mse", "samples": 4, "threads": 1}
WITH_LOGPROBS = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=4)
QUESTION = [
    {"role": "user", "content": [{"type": "image", "image": drawn(5).picture}, {"type": "text", "text": "What is it?"}]}
]


def two_ranges(rows: int = 12, columns: int = 32, seed: int = 0) -> Weight:
    """Text within 1, visual tokens within 20."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)
    bias = torch.randn(rows, generator=generator)
    text, visual = (torch.tensor([1 / 127]), torch.tensor([3.0])), (torch.tensor([20 / 127]), torch.tensor([-5.0]))
    return static_weight(values, torch.full((rows,), 0.01), bias, text, visual)


def linear_of(weight: Weight, name: str = "up") -> Linear:
    linear = Linear(reference.kernels(), weight.in_features, {name: weight.out_features}, bias=True)
    linear.weight = weight
    return linear


def by_kind(weight: Weight, x: Tensor, is_visual: Tensor) -> Tensor:
    """A row at a time, by the weight that its kind meets."""
    visual = replace(weight, static=weight.visual_static, visual_static=None)
    text = replace(weight, visual_static=None)
    return torch.cat([reference.linear(row[None], visual if v else text) for row, v in zip(x, is_visual, strict=True)])


# --- a weight of two ranges ------------------------------------------------------------------------------------------


def test_each_token_meets_the_range_of_its_kind() -> None:
    weight, x = two_ranges(), torch.randn(7, 32)
    is_visual = torch.tensor([False, True, True, False, True, False, False])
    linear = linear_of(weight)
    assert torch.equal(linear(x, is_visual), by_kind(weight, x, is_visual))
    assert torch.equal(linear(x), by_kind(weight, x, torch.zeros(7, dtype=torch.bool)))
    assert not torch.equal(linear(x), linear(x, is_visual))
    for alike in (torch.zeros(7, dtype=torch.bool), torch.ones(7, dtype=torch.bool)):
        assert torch.equal(linear(x, alike), by_kind(weight, x, alike))


def test_both_ranges_go_where_the_weight_goes() -> None:
    """Stacked, cut into rows and columns, with larger outputs, on a device: the product is the whole's for both kinds."""
    q, k, x = two_ranges(8), two_ranges(4, seed=1), torch.randn(5, 32)
    is_visual = torch.tensor([True, False, True, False, True])
    whole = torch.cat([by_kind(q, x, is_visual), by_kind(k, x, is_visual)], dim=1)
    both = stack({"q": q, "k": k})
    assert torch.equal(by_kind(both, x, is_visual), whole)
    assert torch.equal(by_kind(both.to(torch.device("cpu"), torch.float32), x, is_visual), whole)
    rows = take_rows(both, [slice(9, 12), slice(2, 5)])
    assert torch.equal(by_kind(rows, x, is_visual), torch.cat([whole[:, 9:12], whole[:, 2:5]], dim=1))
    parts = [
        take_columns(both, columns, "q", keep_bias=not i) for i, columns in enumerate((slice(0, 16), slice(16, 32)))
    ]
    total = sum(by_kind(part, x[:, 16 * i : 16 * i + 16], is_visual) for i, part in enumerate(parts))
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-4)
    twice = scaled_rows(both, torch.full((12,), 2.0))
    assert torch.equal(by_kind(twice, x, is_visual), 2 * whole)
    assert sum(tensor.numel() for tensor in both.tensors()) == 12 * 32 + 12 + 12 + 2 * (1 + 1 + 12 + 12)


def test_parts_of_one_product_have_both_ranges_in_common() -> None:
    with pytest.raises(CheckpointError, match="q has another of visual tokens and k has one input scale"):
        stack({"q": two_ranges(), "k": replace(two_ranges(), visual_static=None)})
    other = two_ranges()
    assert other.visual_static is not None
    moved = replace(other, visual_static=replace(other.visual_static, zero=torch.tensor([4.0])))
    with pytest.raises(CheckpointError, match="q has the input zero -5 and k 4"):
        stack({"q": two_ranges(), "k": moved})


# --- finding them ----------------------------------------------------------------------------------------------------


def seen_of(kinds: Tensor, seed: int = 0) -> Seen:
    """Pictures are 20 times as large as everything else."""
    x = torch.randn(len(kinds), 32, generator=torch.Generator().manual_seed(seed))
    x[kinds == PICTURE] *= 20
    watcher = Watcher(32, torch.device("cpu"), None)
    watcher.see(x, tokens_of(kinds, 512, 0))
    return watcher.seen()


def kinds_of(*counts: tuple[int, int]) -> Tensor:
    return torch.cat([torch.full((count,), kind, dtype=torch.int8) for kind, count in counts])


MIXED = kinds_of((FIRST, 1), (TEXT, 60), (PICTURE, 400), (ANSWER, 40))


def test_ranges_are_found_on_the_tokens_they_are_for() -> None:
    seen = seen_of(MIXED)
    rounder = Rounder(BestRecipe("w8a8", visual_scales=True), torch.float32, reference.kernels())
    (text, _), (visual, _) = rounder.levels(seen, torch.ones(32), torch.float32)
    assert 10 < float(visual / text) < 40
    one = Rounder(BestRecipe("w8a8"), torch.float32, reference.kernels()).levels(seen, torch.ones(32), torch.float32)
    assert len(one) == 1
    assert float(one[0][0] / visual) == pytest.approx(1, rel=0.3)


@pytest.mark.parametrize("kinds", [kinds_of((PICTURE, 50)), kinds_of((FIRST, 1), (TEXT, 50))])
def test_one_kind_of_token_has_one_range(kinds: Tensor) -> None:
    """As in the tower, where all rows are pictures'."""
    rounder = Rounder(BestRecipe("w8a8", visual_scales=True), torch.float32, reference.kernels())
    assert len(rounder.levels(seen_of(kinds), torch.ones(32), torch.float32)) == 1


def test_smoothing_is_tried_with_the_ranges_that_will_be_there() -> None:
    """Text that shares the range of pictures 20 times as large loses most of its bits; a range of its own gives them back."""
    weights, seen = [torch.randn(24, 32)], seen_of(MIXED)
    losses = []
    for has_visual_scales in (False, True):
        attempt = trial(weights, seen, W8A8, None, torch.float32, has_visual_scales)
        losses.append(loss(attempt, torch.ones(32), attempt.seen.rows @ attempt.weight.t()))
    assert losses[1] < losses[0] / 20


# --- files -----------------------------------------------------------------------------------------------------------


def test_they_are_written_and_read_bit_for_bit() -> None:
    weight = two_ranges()
    tensors = InMemory(ours.write(NAME, weight, torch.float32))
    config = ours.parse(ours.config_entry({NAME: W8A8}, has_visual_scales=True))
    assert config.find_problems(tensors, NAME, (12, 32)) == []
    assert ours.parse(ours.config_entry({NAME: W8A8})).read(tensors, NAME).visual_static is None
    assert_same(config.read(tensors, NAME), weight)
    with pytest.raises(AssertionError, match="two input scales"):
        ascend.write(NAME, weight, "vllm", torch.bfloat16)


@pytest.fixture(scope="module")
def folder(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "two"
    quantize(small, out, **OPTIONS, visual_scales=True)
    return out


@pytest.fixture(scope="module")
def uneven(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with an eighth of the visual tokens' scales: most of their values are clipped."""

    def shrink(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("input_scale_visual"):
                tensor /= 8

    return edited(folder, tmp_path_factory.mktemp("uneven") / "two", shrink)


def test_a_damaged_one_is_named(folder: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.input_scale_visual"
    for change, words in (
        (lambda tensors: tensors.pop(name.replace("scale", "zero_point")), "input_zero_point_visual is missing"),
        (lambda tensors: tensors[name].neg_(), "input_scale_visual in .* is -.*a positive number is expected"),
        (lambda tensors: tensors.update({name: torch.ones(3)}), r"input_scale_visual in .* has shape \[3\]"),
    ):
        shutil.rmtree(tmp_path / "damaged", ignore_errors=True)
        with pytest.raises(CheckpointError, match=words):
            LLM(edited(folder, tmp_path / "damaged", change), device="cpu", kv_cache_tokens=1024)


def test_the_library_that_would_skip_them_refuses_the_folder(folder: Path) -> None:
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)


# --- from samples to answers -----------------------------------------------------------------------------------------


def test_the_decoder_has_two_ranges_and_the_tower_one(small: Path, tmp_path: Path) -> None:
    quantize(small, tmp_path / "out", **OPTIONS, visual_scales=True, vision="reference")
    checkpoint = open_checkpoint(tmp_path / "out")
    for module, has_two in (("model.layers.0.self_attn.q_proj", True), ("visual.blocks.0.attn.qkv", False)):
        weight = checkpoint.weight(module)
        assert weight is not None
        assert weight.static is not None
        assert (weight.visual_static is not None) == has_two
    assert (
        "one of visual tokens' own"
        in quantization_job(small, tmp_path / "x", **OPTIONS, visual_scales=True).plan.render()[1]
    )


def test_samples_without_pictures_are_refused(small: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Hello."}]}) + "\n")
    with pytest.raises(OptionError, match=r"visual_scales are found on pictures, and .*text\.jsonl has none"):
        quantization_job(
            small, tmp_path / "out", **OPTIONS, visual_scales=True, calibration=str(tmp_path / "text.jsonl")
        )


def test_the_model_tells_picture_tokens_from_all_others(folder: Path) -> None:
    """Logits are those of linears that round each row by the levels of its kind, found by token id."""
    llm = LLM(folder, device="cpu", dtype="float32", kv_cache_tokens=1024)
    linears = [layer for layer in llm.engine.runner.model.language.modules() if isinstance(layer, Linear)]
    with_two = [layer for layer in linears if layer.weight.visual_static is not None]
    assert len(with_two) == 3 * llm.config.text.num_layers
    seen: list[Tensor] = []
    for layer in with_two:

        def forward(x: Tensor, is_visual: Tensor | None = None, layer: Linear = layer) -> Tensor:
            assert is_visual is not None
            seen.append(is_visual)
            return by_kind(layer.weight, x, is_visual)

        layer.forward = forward  # type: ignore[method-assign]
    simulated = logits_of(llm)
    for layer in with_two:
        del layer.forward
    assert torch.equal(logits_of(llm), simulated)
    ids = torch.tensor(llm.prepare(picture_question()).token_ids)
    assert all(torch.equal(rows, ids == llm.config.image_token_id) for rows in seen)


@pytest.mark.skipif(isinstance(load(), str), reason=str(load()))
@pytest.mark.parametrize("at_once", [2048, 24])
def test_steps_with_pictures_and_planned_ones_go_together(uneven: Path, at_once: int) -> None:
    """Whether steps without pictures are one call or not: the same answers and probabilities."""
    answers = []
    for is_planned in (True, False):
        llm = LLM(uneven, device="cpu", dtype="float32", kv_cache_tokens=1024, max_tokens_per_step=at_once)
        assert llm.engine.runner.decoder_step is not None
        if not is_planned:
            llm.engine.runner.decoder_step = None
        text = [{"role": "user", "content": "Count to three."}]
        outputs = llm.chat([QUESTION, text, QUESTION], WITH_LOGPROBS)
        answers.append([(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs])
    assert answers[0] == answers[1]


def test_it_is_verified_as_it_is_served(small: Path, uneven: Path) -> None:
    """The comparison computes what serving does, and sees how much of the visual tokens is clipped."""
    samples = answer(LLM(small, device="cpu", dtype="float32", kv_cache_tokens=1024), [QUESTION], 6)
    found = compare(small, uneven, samples)
    assert (found.quantized - served(uneven, samples)).norm() < 0.02 * found.exact.norm()
    (measured,) = (layer for layer in found.layers if layer.module == "model.layers.0.self_attn.q_proj")
    assert measured.clipped is not None
    assert measured.clipped > 0.2
    assert measured.output_db["picture"] < measured.output_db["text"] - 10


def test_the_sensitivity_of_a_layer_is_of_both_ranges(small: Path, uneven: Path) -> None:
    samples = answer(LLM(small, device="cpu", dtype="float32", kv_cache_tokens=1024), [QUESTION], 6)
    trials = Trials(open_checkpoint(small), open_checkpoint(uneven), samples, torch.device("cpu"))
    even = Trials(open_checkpoint(small), open_checkpoint(uneven), samples, torch.device("cpu"))
    for layer in even.model.modules():
        if isinstance(layer, Linear):
            layer.weight = replace(layer.weight, visual_static=None)
    assert trials.kl() > 2 * even.kl()
