"""A quantized output head: from a recipe to files that Saccade and transformers read, and while loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from saccade import LLM
from saccade.api import quantization_job, quantize
from saccade.base.errors import OptionError
from saccade.checkpoints.formats import EMBEDDING, open_checkpoint
from saccade.kernels import reference
from saccade.model.layers import size_bytes
from saccade.planning import plan
from saccade.quantize import run as running
from saccade.quantize.best_recipe import HEADS, BestRecipe, Rule
from saccade.quantize.report import QuantizationReport
from saccade.schemes.affine import dequantize, quantize_weight
from saccade.schemes.scheme import DENSE, W8A8_DYNAMIC, W8A16, fitting
from saccade.verify.verification import verify
from tests.checkpoints.test_compressed_tensors import library_rows, our_logits

PLAIN: dict[str, Any] = {"scheme": "w8a16", "smooth": "none", "rounding": "mse", "threads": 1}
IDS = torch.arange(3, 40)
POSITIONS = torch.arange(len(IDS)).expand(3, -1)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.parity.oracle import Shape, build

    folder = tmp_path_factory.mktemp("tied")
    build(folder, Shape("tied", hidden=64, heads=4, kv_heads=2, tied=True), seed=3)
    return folder


@torch.no_grad()
def library_logits(folder: Path) -> torch.Tensor:
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return model(input_ids=IDS[None], position_ids=POSITIONS[:, None]).logits[0]


@pytest.mark.parametrize("head", HEADS[1:])
def test_it_is_untied_written_and_read_back_by_saccade_and_by_transformers(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: Any
) -> None:
    monkeypatch.setattr(running, "ROWS_AT_ONCE", 100)  # the vocabulary is no multiple of it
    report = quantize(tied, tmp_path / "out", head=head, group_size=None, **PLAIN)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert not checkpoint.config.text.tie_word_embeddings
    expected = fitting(BestRecipe(head=head).head_scheme, 64)
    assert checkpoint.scheme("lm_head") == expected
    weight, table = checkpoint.weight("lm_head"), open_checkpoint(tied).tensor(EMBEDDING)
    assert weight is not None
    assert torch.equal(checkpoint.tensor(EMBEDDING), table)
    assert (dequantize(weight) - table).norm() < (0.2 if expected.weight_bits == 4 else 0.04) * table.norm()
    assert abs(report.output_bytes - report.plan.output_bytes) < 0.02 * report.output_bytes
    assert report.layers[-1].module == "lm_head"
    monkeypatch.setattr(reference, "quantize_rows", library_rows)
    ours, theirs = our_logits(tmp_path / "out", IDS, POSITIONS), library_logits(tmp_path / "out")
    assert (ours - theirs).norm() <= 0.002 * theirs.norm()
    assert (ours - our_logits(tied, IDS, POSITIONS)).norm() > 0.002 * ours.norm()


def test_engines_are_told_of_it_by_name(tied: Path, tmp_path: Path) -> None:
    """In vLLM a head is no Linear, and its name has a prefix."""
    targets = {}
    for head in ("w8a16", "w8a8-dynamic"):
        quantize(tied, tmp_path / head, head=head, **PLAIN)
        entry = json.loads((tmp_path / head / "config.json").read_text())["quantization_config"]
        assert "lm_head" not in entry["ignore"]
        targets[head] = [group["targets"] for group in entry["config_groups"].values()]
    assert targets["w8a16"] == [["Linear", "re:.*lm_head$"]]
    assert targets["w8a8-dynamic"][1] == ["re:.*lm_head$"]


def test_a_rotated_one_is_quantized_as_it_is_turned(tied: Path, tmp_path: Path) -> None:
    quantize(tied, tmp_path / "out", head="w8a16", rotate=True, **PLAIN)
    ours, exact = our_logits(tmp_path / "out", IDS, POSITIONS), our_logits(tied, IDS, POSITIONS)
    assert (ours - exact).norm() < 0.05 * exact.norm()


def test_verify_compares_it_with_the_embedding_that_it_was(tied: Path, tmp_path: Path) -> None:
    quantize(tied, tmp_path / "out", head="w8a16", **PLAIN)
    report = verify(tmp_path / "out", tied)
    assert isinstance(report, QuantizationReport)
    assert "fail" not in {check.verdict for check in report.checks}
    (measure,) = [layer for layer in report.layers if layer.module == "lm_head"]
    assert measure.weight_db is not None
    assert measure.weight_db > 35


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "w8a8"}, "head is 'w8a8'; use one of float, w8a16"),
        ({"head": "w8a16", "format": "mindie"}, "head is w8a16; mindie has float heads alone"),
        ({"rules": (Rule("lm_head", "w8a16"),)}, "matches no linear; that of the head is --head"),
    ],
)
def test_what_cannot_be_is_refused(tied: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        quantization_job(tied, tmp_path / "out", **{**PLAIN, **options})


# --- while loading ---------------------------------------------------------------------------------------------------


def opened(folder: Path, **options: Any) -> LLM:
    return LLM(folder, device="cpu", kv_cache_tokens=256, **options)


@pytest.mark.parametrize("mmap", [True, False])
def test_a_tied_head_is_quantized_while_loading_and_the_embedding_is_not(tied: Path, mmap: bool) -> None:
    model = opened(tied, head_quantization="w8a16", mmap=mmap).engine.runner.model
    table = model.language.embed_tokens.weight
    expected = quantize_weight(table, W8A16)
    assert table.scheme == DENSE
    assert model.lm_head.weight.scheme == W8A16
    assert torch.equal(model.lm_head.weight.values, expected.values)
    assert {layer.weight.scheme for layer in model.language.layers[0].modules() if hasattr(layer, "weight")} == {DENSE}


def test_what_it_takes_is_known_before(tied: Path, tiny_checkpoint: Path) -> None:
    """A tied one comes on top, another takes less than before."""
    messages = [{"role": "user", "content": "hi"}]
    for folder, grows in ((tied, True), (tiny_checkpoint, False)):
        planned = [plan(folder, messages, head_quantization=how).weight_bytes for how in (None, "w8a8-dynamic")]
        taken = size_bytes(opened(folder, head_quantization="w8a8-dynamic").engine.runner.model)
        assert abs(planned[1] - taken) < 0.02 * taken
        assert (planned[1] > planned[0]) == grows


def test_a_float_head_of_a_quantized_checkpoint_may_be_quantized_and_no_other(tied: Path, tmp_path: Path) -> None:
    quantize(tied, tmp_path / "float", **PLAIN)
    llm = opened(tmp_path / "float", head_quantization="w8a16")
    assert llm.engine.runner.model.lm_head.weight.scheme == W8A16
    assert llm.quantization is not None
    assert llm.quantization.endswith(", head w8a16")
    quantize(tied, tmp_path / "int8", head="w8a8-dynamic", **PLAIN)
    assert opened(tmp_path / "int8").engine.runner.model.lm_head.weight.scheme == W8A8_DYNAMIC
    with pytest.raises(
        OptionError, match=r"head_quantization 'w8a16': lm_head .*is w8a8-dynamic already; leave the option out"
    ):
        opened(tmp_path / "int8", head_quantization="w8a16")
    with pytest.raises(OptionError, match="'w8a8' needs activations measured"):
        opened(tied, head_quantization="w8a8")
