"""Damage that tools have done, put into a sound folder: each is found, and called by its name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saccade.quantize.report import Check, QuantizationReport
from saccade.schemes.affine import quantize_weight, static_weight
from saccade.schemes.scheme import W8A8_DYNAMIC, Weight
from saccade.verify.options import VerifyOptions
from saccade.verify.schema import find_faults
from saccade.verify.verification import verify
from tests.test_quantized_model import write_quantized

from .conftest import CONVERSATIONS, Edit, changed, edit_description, edited

GATE = "model.layers.1.mlp.gate_proj"
UP = "model.layers.1.mlp.up_proj"
Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
QUICK = VerifyOptions(device="cpu", answer_tokens=6, hashes=False)


def check_of(report: QuantizationReport, name: str) -> Check:
    (check,) = [check for check in report.checks if check.name == name]
    return check


def assert_found(check: Check, verdict: str, *words: str) -> None:
    assert check.verdict == verdict, check
    assert any(all(word in line for word in words) for line in (check.facts, *check.details)), check


def test_sound_folders_pass(tiny_checkpoint: Path, dynamic: Path, static: Path) -> None:
    for folder in (dynamic, static):
        report = verify(folder, tiny_checkpoint, CONVERSATIONS, QUICK)
        others = {check.name: check for check in report.checks if check.verdict != "pass"}
        assert report.verdict != "fail", others
        # The reference does not copy merges.txt; of twelve tokens of a random model one may be a near tie.
        assert set(others) <= {"files", "logits"}, others
        names = [check.name for check in report.checks]
        assert names == ["files", "tensors", "numbers", "choice", "weights", "runs", "layers", "logits"]


def swap(name: str, first: int, second: int) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name] = changed(tensors[name], [first, second], tensors[name][[second, first]])

    return edit


@pytest.mark.parametrize("module", [GATE, UP, Q, "model.layers.1.self_attn.v_proj", "visual.blocks.1.attn.qkv"])
def test_a_doubled_scale_is_found_by_its_row(tiny_checkpoint: Path, dynamic: Path, tmp_path: Path, module: str) -> None:
    """Also where smoothing could have given the row a factor: nothing undoes this one."""
    name = f"{module}.weight_scale"
    folder = edited(dynamic, tmp_path / "x", lambda t: t.update({name: changed(t[name], 7, 2 * t[name][7])}))
    report = verify(folder, tiny_checkpoint, (), QUICK)
    assert_found(check_of(report, "weights"), "fail", module, "rows 7 are not")


def test_a_factor_that_the_next_linear_undoes_is_no_fault(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Smoothing that found a few channels worth it, and left the others alone."""

    def smooth(tensors: dict[str, Tensor]) -> None:
        few = torch.ones(96)
        few[[3, 50]] = torch.tensor([0.6, 1.7])
        tensors[f"{UP}.weight"] /= few[:, None]
        tensors[f"{UP.replace('up', 'down')}.weight"] *= few
        heads = torch.ones(2, 1, 16)
        heads[0, 0, 5] = 1.5
        tensors["model.layers.1.self_attn.v_proj.weight"] /= heads.flatten()[:, None]
        tensors["model.layers.1.self_attn.v_proj.bias"] /= heads.flatten()
        tensors["model.layers.1.self_attn.o_proj.weight"] *= heads.expand(2, 2, 16).flatten()

    folder = write_quantized(edited(tiny_checkpoint, tmp_path / "smoothed", smooth), tmp_path / "out")
    check = check_of(verify(folder, tiny_checkpoint, (), QUICK), "weights")
    assert check.verdict == "pass", check
    assert "rescaled between layers" in check.facts


def test_a_negative_scale_is_found_without_the_source(dynamic: Path, tmp_path: Path) -> None:
    name = f"{UP}.weight_scale"
    folder = edited(dynamic, tmp_path / "x", lambda t: t.update({name: changed(t[name], 3, -t[name][3])}))
    assert_found(check_of(verify(folder, options=QUICK), "numbers"), "fail", UP, "row 3 are not positive")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_found(dynamic: Path, tmp_path: Path, bad: float) -> None:
    name = f"{UP}.weight_scale"
    folder = edited(dynamic, tmp_path / "x", lambda t: t.update({name: changed(t[name], 3, bad)}))
    assert_found(check_of(verify(folder, options=QUICK), "numbers"), "fail", UP, "row 3 are not finite")


@pytest.mark.parametrize("module", [UP, Q, DOWN])
def test_swapped_rows_are_found_by_their_numbers(
    tiny_checkpoint: Path, dynamic: Path, tmp_path: Path, module: str
) -> None:
    """Also where smoothing could have given rows or columns a factor."""
    folder = edited(dynamic, tmp_path / "x", swap(f"{module}.weight", 4, 9))
    report = verify(folder, tiny_checkpoint, (), QUICK)
    assert_found(check_of(report, "weights"), "fail", module, "rows 4, 9 are not")


def test_swapped_rows_of_a_smoothed_folder_are_found(tiny_checkpoint: Path, static: Path, tmp_path: Path) -> None:
    folder = edited(static, tmp_path / "x", swap(f"{GATE}.weight", 4, 9))
    report = verify(folder, tiny_checkpoint, (), QUICK)
    assert_found(check_of(report, "numbers"), "fail", GATE, "quant_bias of rows 4, 9")


def test_a_wrong_zero_point_is_found(static: Path, tmp_path: Path) -> None:
    name = f"{Q}.input_offset"
    folder = edited(static, tmp_path / "x", lambda t: t.update({name: t[name] + 9}))
    assert_found(check_of(verify(folder, options=QUICK), "numbers"), "fail", Q, "another zero point")


def test_a_zero_point_beyond_int8_is_found(static: Path, tmp_path: Path) -> None:
    name = f"{Q}.input_offset"
    folder = edited(static, tmp_path / "x", lambda t: t.update({name: torch.full_like(t[name], -200)}))
    assert_found(check_of(verify(folder, options=QUICK), "numbers"), "fail", Q, "-200", "does not fit int8")


def test_a_wrong_static_scale_is_found(static: Path, tmp_path: Path) -> None:
    name = f"{Q}.input_scale"
    folder = edited(static, tmp_path / "x", lambda t: t.update({name: t[name] * 1.1}))
    assert_found(check_of(verify(folder, options=QUICK), "numbers"), "fail", Q, "deq_scale", "is not")


def test_a_wrong_shape_is_found(dynamic: Path, tmp_path: Path) -> None:
    name = f"{UP}.weight"
    folder = edited(dynamic, tmp_path / "x", lambda t: t.update({name: t[name][:-1]}))
    report = verify(folder, options=QUICK)
    assert_found(check_of(report, "tensors"), "fail", name, "shape")
    assert "numbers" not in [check.name for check in report.checks]


def test_a_missing_scale_is_found(dynamic: Path, tmp_path: Path) -> None:
    folder = edited(dynamic, tmp_path / "x", lambda t: t.pop(f"{UP}.weight_scale"))
    assert_found(check_of(verify(folder, options=QUICK), "tensors"), "fail", f"{UP}.weight_scale is missing")


def test_a_tensor_of_another_model_is_noticed(dynamic: Path, tmp_path: Path) -> None:
    folder = edited(dynamic, tmp_path / "x", lambda t: t.update({"model.layers.9.mlp.rubbish": torch.ones(1)}))
    assert_found(check_of(verify(folder, options=QUICK), "tensors"), "warn", "model.layers.9.mlp.rubbish")


def test_a_quantized_head_nobody_asked_for_is_noticed(dynamic: Path, tmp_path: Path) -> None:
    def quantize_head(tensors: dict[str, Tensor]) -> None:
        weight = quantize_weight(Weight(tensors["lm_head.weight"]), W8A8_DYNAMIC)
        assert weight.scale is not None
        tensors |= {"lm_head.weight": weight.values, "lm_head.weight_scale": weight.scale[:, None]}

    folder = edited(dynamic, tmp_path / "x", quantize_head)
    entries = dict.fromkeys(("lm_head.weight", "lm_head.weight_scale"), "W8A8_DYNAMIC")
    edit_description(folder, lambda description: description.update(entries))
    assert_found(check_of(verify(folder, options=QUICK), "choice"), "warn", "lm_head is w8a8-dynamic", "usually")


@pytest.mark.parametrize("name", ["preprocessor_config.json", "generation_config.json"])
def test_a_missing_file_is_found(dynamic: Path, tmp_path: Path, name: str) -> None:
    folder = edited(dynamic, tmp_path / "x", lambda t: None)
    (folder / name).unlink()
    assert_found(check_of(verify(folder, options=QUICK), "files"), "fail", f"{name} is missing")


def test_a_folder_without_tokenizer_is_found(dynamic: Path, tmp_path: Path) -> None:
    """Of its two forms, one is enough."""
    folder = edited(dynamic, tmp_path / "x", lambda t: None)
    (folder / "tokenizer.json").unlink()
    assert check_of(verify(folder, options=QUICK), "files").verdict == "pass"
    (folder / "merges.txt").unlink()
    assert_found(check_of(verify(folder, options=QUICK), "files"), "fail", "tokenizer.json (or", "is missing")


def test_a_folder_without_weights_is_a_failed_check_and_no_crash(dynamic: Path, tmp_path: Path) -> None:
    folder = edited(dynamic, tmp_path / "x", lambda t: None)
    next(folder.glob("*.safetensors")).unlink()
    assert_found(check_of(verify(folder, options=QUICK), "tensors"), "fail", "holds no *.safetensors")


def test_another_models_tokenizer_is_found(tiny_checkpoint: Path, dynamic: Path, tmp_path: Path) -> None:
    folder = edited(dynamic, tmp_path / "x", lambda t: None)
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"normalizer"', '"normaliser"'))
    assert_found(check_of(verify(folder, tiny_checkpoint, (), QUICK), "files"), "fail", "tokenizer.json", "another")


def test_a_norm_smoothed_without_its_linears_is_found(tiny_checkpoint: Path, dynamic: Path, tmp_path: Path) -> None:
    name = "model.layers.1.post_attention_layernorm.weight"
    folder = edited(dynamic, tmp_path / "x", lambda t: t.update({name: t[name] * 2}))
    assert_found(check_of(verify(folder, tiny_checkpoint, (), QUICK), "weights"), "fail", GATE, "(worst is 2.0")


def test_a_lost_bias_is_found(tiny_checkpoint: Path, dynamic: Path, tmp_path: Path) -> None:
    """By its numbers and, apart from them, by what the layer does."""
    name = f"{Q}.bias"

    def lose(tensors: dict[str, Tensor]) -> None:
        tensors[name] = torch.zeros_like(tensors[name])

    folder = edited(dynamic, tmp_path / "x", lose)
    report = verify(folder, tiny_checkpoint, CONVERSATIONS, QUICK)
    assert_found(check_of(report, "weights"), "fail", Q, "the source's bias is lost")
    assert_found(check_of(report, "layers"), "warn", Q)


def test_a_changed_bias_is_noticed(tiny_checkpoint: Path, dynamic: Path, tmp_path: Path) -> None:
    """Not a fault: some methods correct the mean of the error by it."""
    folder = edited(dynamic, tmp_path / "x", lambda t: t.update({f"{Q}.bias": t[f"{Q}.bias"] * 1.1}))
    assert_found(check_of(verify(folder, tiny_checkpoint, (), QUICK), "weights"), "warn", Q, "another bias")


def test_another_model_is_not_the_source(dynamic: Path, tmp_path: Path) -> None:
    from tests.parity.oracle import SHAPES, build

    build(tmp_path / "other", SHAPES[4], seed=1)
    report = verify(dynamic, tmp_path / "other", (), QUICK)
    assert_found(check_of(report, "source"), "fail", "another model")


def test_a_static_bias_may_have_had_more_digits_than_the_stored_one() -> None:
    """Smoothing divides biases; the constant is formed before the bias is rounded to the file's type."""
    wide = torch.tensor([700.123, -1.5])
    plain = quantize_weight(Weight(torch.randn(2, 64)), W8A8_DYNAMIC)
    assert plain.scale is not None
    one = torch.ones(1)
    whole = static_weight(plain.values, plain.scale, wide, (0.01 * one, 3 * one))
    assert not list(find_faults(replace(whole, bias=wide.bfloat16())))
    assert list(find_faults(replace(whole, bias=(1.05 * wide).bfloat16())))
