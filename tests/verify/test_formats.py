"""Every scheme in every format it can be written in: a sound folder passes, and one damaged row is found by its number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from saccade.checkpoints.formats import open_checkpoint
from saccade.checkpoints.writing import format_named
from saccade.quantize.report import Check, sqnr_db
from saccade.schemes.affine import dequantize, quantize_weight
from saccade.schemes.scheme import FP8, W4A8, W4A16, W4A16_ASYM, W8A8, W8A8_DYNAMIC, W8A16, Scheme, Weight
from saccade.verify.options import VerifyOptions
from saccade.verify.schema import check_choice, check_numbers, check_tensors
from saccade.verify.verification import check_weights, verify
from saccade.verify.weights import compare_weights
from tests.quantized_folder import write_quantized

SCHEMES = (W8A16, W8A8, W8A8_DYNAMIC, FP8, W4A16[32], W4A16_ASYM[32], W4A8[32])
MODULE = "model.layers.1.mlp.gate_proj"


def writable() -> list[tuple[str, Scheme]]:
    pairs = [(name, scheme) for name in ("compressed-tensors", "vllm-ascend", "mindie") for scheme in SCHEMES]
    return [
        (name, scheme)
        for name, scheme in pairs
        if not format_named(name, torch.float32).find_problems({MODULE: scheme})
    ]


PAIRS = writable()


def checks_of(source: Path, folder: Path) -> dict[str, Check]:
    """All that needs no run."""
    quantized = open_checkpoint(folder)
    checks = [check_tensors(quantized), check_numbers(quantized), check_choice(quantized)]
    checks.append(check_weights(list(compare_weights(open_checkpoint(source), quantized, None))))
    return {check.name: check for check in checks}


@pytest.mark.parametrize(("name", "scheme"), PAIRS, ids=[f"{name}-{scheme.name}" for name, scheme in PAIRS])
def test_a_sound_folder_passes_and_a_damaged_row_is_named(
    tiny_checkpoint: Path, tmp_path: Path, name: str, scheme: Scheme
) -> None:
    write_quantized(tiny_checkpoint, tmp_path / "out", name, scheme)
    checks = checks_of(tiny_checkpoint, tmp_path / "out")
    assert {check.verdict for check in checks.values()} == {"pass"}, checks
    if not scheme.is_float:
        assert "100.00% of integers nearest" in checks["weights"].facts or scheme.weight_bits == 4
    (file,) = (tmp_path / "out").glob("*.safetensors")
    tensors = load_file(file)
    scale = tensors[f"{MODULE}.weight_scale"]
    scale[5] *= 1.5
    save_file(tensors, file)
    checks = checks_of(tiny_checkpoint, tmp_path / "out")
    assert any(f"{MODULE}: rows 5 are not" in line for line in checks["weights"].details)


@pytest.mark.parametrize(("scheme", "db"), [(W8A16, 41.6), (FP8, 31.6), (W4A16[128], 19.1)])
def test_gaussian_rows_have_the_decibels_that_thresholds_are_set_by(scheme: Scheme, db: float) -> None:
    """docs/verifying.md gives these."""
    values = torch.randn(256, 2048, generator=torch.Generator().manual_seed(0))
    error = dequantize(quantize_weight(Weight(values), scheme)) - values
    assert sqnr_db(float(values.square().sum()), float(error.square().sum())) == pytest.approx(db, abs=0.1)


def test_the_formats_of_both_engines_are_among_them() -> None:
    assert len(PAIRS) >= 13
    assert {name for name, _ in PAIRS} == {"compressed-tensors", "vllm-ascend", "mindie"}


def test_a_weight_only_folder_is_run_and_compared(tiny_checkpoint: Path, tmp_path: Path) -> None:
    write_quantized(tiny_checkpoint, tmp_path / "out", "compressed-tensors", W8A16)
    question = [{"role": "user", "content": "Say hello."}]
    options = VerifyOptions(device="cpu", answer_tokens=4, hashes=False)
    report = verify(tmp_path / "out", tiny_checkpoint, [question], options)
    assert report.verdict == "pass", report.checks
    assert report.logits is not None
    assert 0 < report.logits.kl_mean < 0.01
