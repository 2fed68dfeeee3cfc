"""Mixed precision from a recipe to folders that Saccade, transformers and Ascend's engines read; caches of int8."""

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
from saccade.checkpoints import compressed_tensors
from saccade.checkpoints.formats import open_checkpoint
from saccade.kernels import reference
from saccade.planning import plan
from saccade.quantize.best_recipe import Rule
from saccade.schemes.scheme import W8A16
from saccade.scoring import score_prompts
from tests.checkpoints.test_compressed_tensors import library_rows, our_logits

MIXED = {
    "model.layers.0.self_attn.*": "w4a16",
    "model.layers.0.mlp.down_proj": "w8a8",
    "model.layers.1.self_attn.?_proj": "w8a8",
    "model.layers.1.mlp.down_proj": "float",
    "visual.blocks.0.*": "w8a16",
    "visual.*": "float",
}
RULES = tuple(Rule(match, scheme) for match, scheme in MIXED.items())
OPTIONS: dict[str, Any] = {"scheme": "w8a8-dynamic", "samples": 3, "threads": 1}
IDS, POSITIONS = torch.arange(5, 45), torch.arange(40).expand(3, 40)


@torch.no_grad()
def library_logits(folder: Path) -> torch.Tensor:
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return model(input_ids=IDS[None], position_ids=POSITIONS[:, None]).logits[0]


def served_logits(folder: Path) -> torch.Tensor:
    """Through the paged cache: [A, V] of the last tokens, which read it."""
    llm = LLM(folder, device="cpu", dtype="float32", kv_cache_tokens=1024, kernels={"linear": "reference"})
    prompt = llm.prepare([{"role": "user", "content": "Count to twenty."}])
    return next(iter(score_prompts(llm, [(prompt, llm.tokenizer.encode("one two three four five"))]))).logits


def test_a_mixed_recipe_is_read_back_by_saccade_and_by_transformers(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = quantize(tiny_checkpoint, tmp_path / "out", vision="all", rules=RULES, **OPTIONS)
    checkpoint = open_checkpoint(tmp_path / "out")
    found = {module: checkpoint.scheme(module) for module in report.plan.assignment}
    assert found == report.plan.assignment
    assert {scheme.name for scheme in found.values()} == {"w4a16-g64", "w8a8", "dense", "w8a16", "w8a8-dynamic"}
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert entry["format"] == "mixed-precision"
    assert len(entry["config_groups"]) == 4
    monkeypatch.setattr(reference, "quantize_rows", library_rows)
    ours, theirs = our_logits(tmp_path / "out", IDS, POSITIONS), library_logits(tmp_path / "out")
    exact = our_logits(tiny_checkpoint, IDS, POSITIONS)
    # Static ranges: their bias is rounded to whole steps here and to none there.
    assert (ours - theirs).norm() <= 0.01 * theirs.norm()
    assert (exact - theirs).norm() > 0.02 * theirs.norm()


@pytest.mark.parametrize("format_", ["vllm-ascend", "mindie"])
def test_what_ascend_can_say_of_a_mixture_is_read_back(tiny_checkpoint: Path, tmp_path: Path, format_: Any) -> None:
    rules = tuple(Rule(rule.match, {"w4a16": "w4a8"}.get(rule.scheme, rule.scheme)) for rule in RULES)
    report = quantize(tiny_checkpoint, tmp_path / "out", format=format_, rules=rules, **OPTIONS)
    checkpoint = open_checkpoint(tmp_path / "out")
    found = {module: checkpoint.scheme(module) for module in report.plan.assignment}
    assert found == report.plan.assignment
    assert len(set(found.values())) == 5
    float_logits, logits = served_logits(tiny_checkpoint), served_logits(tmp_path / "out")
    assert 0 < (logits - float_logits).norm() < 0.3 * float_logits.norm()
    with pytest.raises(OptionError, match=f"the {format_} format has no w4a16-g64; it has w8a8"):
        quantization_job(tiny_checkpoint, tmp_path / "no", format=format_, rules=RULES, **OPTIONS)


# --- the cache -------------------------------------------------------------------------------------------------------


def test_an_int8_cache_is_written_read_and_followed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"scheme": "w8a16", "threads": 1}
    quantize(tiny_checkpoint, tmp_path / "plain", **options)
    quantize(tiny_checkpoint, tmp_path / "int8", kv_cache="int8", **options)
    assert open_checkpoint(tmp_path / "int8").config.has_int8_cache
    assert not open_checkpoint(tmp_path / "plain").config.has_int8_cache
    messages = [{"role": "user", "content": "Count."}]
    sizes = {
        (name, dtype): plan(tmp_path / name, messages, kv_cache_dtype=dtype).kv_cache_bytes
        for name in ("plain", "int8")
        for dtype in ("auto", "model", "int8")
    }
    assert sizes["int8", "auto"] == sizes["int8", "int8"] < sizes["int8", "model"] == sizes["plain", "auto"]
    plain, int8 = served_logits(tmp_path / "plain"), served_logits(tmp_path / "int8")
    assert 0 < (plain - int8).norm() < 0.05 * plain.norm()
    plain, int8 = library_logits(tmp_path / "plain"), library_logits(tmp_path / "int8")
    assert 0 < (plain - int8).norm() < 0.05 * plain.norm()  # the library follows it, too


def test_ascends_files_say_nothing_of_the_cache(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="vllm-ascend files say nothing of the cache"):
        quantize(tiny_checkpoint, tmp_path / "out", format="vllm-ascend", kv_cache="int8")


@pytest.mark.parametrize(
    ("scheme", "note"),
    [
        (None, None),
        ({"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}, None),
        ({"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False}, "each token's own is taken"),
        ({"num_bits": 8, "type": "float", "strategy": "tensor"}, "is not followed"),
    ],
)
def test_what_a_config_says_of_the_cache_is_noted(scheme: dict[str, Any] | None, note: str | None) -> None:
    entry = compressed_tensors.config_entry({"model.layers.0.mlp.up_proj": W8A16})
    notes = compressed_tensors.parse(entry | {"kv_cache_scheme": scheme}).notes
    assert [note in text for text in notes] == ([] if note is None else [True])
