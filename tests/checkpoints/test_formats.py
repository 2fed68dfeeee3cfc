"""A folder as one checkpoint: layouts, tied and untied heads, types, and every disagreement of config and tensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from saccade.base.errors import CheckpointError
from saccade.checkpoints.config import ModelConfig
from saccade.checkpoints.formats import (
    canonical_names,
    expected_tensors,
    find_strangers,
    open_checkpoint,
    open_unverified,
    require_tokenizer,
)
from saccade.checkpoints.presets import PRESETS, config_json
from saccade.checkpoints.shards import Shards

from .making import SMALL, TIED, random_tensors, write_checkpoint, write_configs, write_json, write_sharded

QKV = "visual.blocks.0.attn.qkv.weight"
UP = "model.layers.1.mlp.up_proj.weight"


def nested_name(name: str) -> str:
    return f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1)


def wrapped_name(name: str) -> str:
    return name if name.startswith("visual.") else f"language_model.{name}"


@pytest.mark.parametrize(
    ("layout", "rename"),
    [("hub", str), ("nested", nested_name), ("wrapped", wrapped_name)],
    ids=["hub", "nested", "wrapped"],
)
@pytest.mark.parametrize("is_sharded", [False, True], ids=["single", "sharded"])
def test_every_layout_is_read_under_the_published_names(
    tmp_path: Path, layout: str, rename: object, is_sharded: bool
) -> None:
    assert callable(rename)
    tensors = random_tensors()
    renamed = {rename(name): tensor for name, tensor in tensors.items()}
    write_configs(tmp_path)
    if is_sharded:
        write_sharded(tmp_path, renamed)
    else:
        save_file(renamed, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.layout == layout
    assert set(checkpoint.names()) == set(tensors)
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("config", [SMALL, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("version", ["hub", "in memory"])
def test_our_names_and_shapes_are_those_of_transformers(tmp_path: Path, config: ModelConfig, version: str) -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    write_configs(tmp_path, config)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_pretrained(tmp_path)).bfloat16()
    if version == "hub":
        model.save_pretrained(tmp_path)
    else:  # names as transformers >= 4.52 has them in memory, and as some tools save them
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save_file(
            {name: t for name, t in state.items() if config is SMALL or name != "lm_head.weight"},
            tmp_path / "model.safetensors",
        )
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.layout == ("hub" if version == "hub" else "nested")
    assert {name: checkpoint.info(name).shape for name in checkpoint.names()} == expected_tensors(checkpoint.config)
    theirs = model.model.language_model.layers[1].mlp.up_proj.weight
    assert torch.equal(checkpoint.tensor(UP), theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_plain_types_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = random_tensors(dtype=dtype)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors))
    assert checkpoint.info(UP).dtype == dtype
    out = torch.empty(checkpoint.info(UP).shape, dtype=torch.float32)
    checkpoint.read_into(UP, out)
    assert torch.equal(out, tensors[UP].float())


def test_a_tied_checkpoint_may_carry_its_head(tmp_path: Path) -> None:
    tensors = random_tensors(TIED)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors, TIED))
    assert find_strangers(checkpoint) == []


def test_opening_reads_no_weight(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path))
    file = tmp_path / "model.safetensors"
    bodies = sum(checkpoint.info(name).nbytes for name in checkpoint.names())
    assert checkpoint.shards.bytes_read == file.stat().st_size - bodies


@pytest.mark.parametrize(
    ("preset", "count", "parameters"),
    [
        ("3b", 824, 3_754_622_976),
        ("7b", 729, 8_292_166_656),
        ("32b", 1161, 33_452_718_336),
        ("72b", 1353, 73_410_777_344),
    ],
)
def test_the_published_sizes_have_their_published_totals(preset: str, count: int, parameters: int) -> None:
    """Numbers measured by instantiating the four models."""
    shapes = expected_tensors(PRESETS[preset])
    assert len(shapes) == count
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == parameters


def test_a_missing_tensor_is_named_with_its_file_and_the_nearest_name(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors["model.layers.1.mlp.up.weight"] = tensors.pop(UP)
    write_checkpoint(tmp_path, tensors)
    with pytest.raises(
        CheckpointError,
        match=rf"^{UP} is missing from .*model\.safetensors; the nearest name in the files is model\.layers\.1\.mlp\.up\.weight$",
    ):
        open_checkpoint(tmp_path)


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"model.norm.weight": torch.ones(64)})
    with pytest.raises(
        CheckpointError, match=rf"visual\.patch_embed.*and {len(expected_tensors(SMALL)) - 1 - 5} more$"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", [QKV, UP, "lm_head.weight", "model.norm.weight"])
def test_a_misshaped_tensor_is_named_with_its_file_and_both_shapes(tmp_path: Path, name: str) -> None:
    tensors = random_tensors()
    shape = list(tensors[name].shape)
    tensors[name] = torch.zeros(3, *shape[1:])
    write_checkpoint(tmp_path, tensors)
    wrong, right = str([3, *shape[1:]]).replace("[", r"\["), str(shape).replace("[", r"\[")
    with pytest.raises(
        CheckpointError, match=rf"^{name} in .*model\.safetensors has shape {wrong}, config\.json implies {right}"
    ):
        open_checkpoint(tmp_path)


def test_a_tensor_of_another_kind_is_named(tmp_path: Path) -> None:
    tensors = random_tensors()
    write_checkpoint(tmp_path, {**tensors, UP: tensors[UP].to(torch.int8)})
    with pytest.raises(CheckpointError, match=rf"^{UP} in .*model\.safetensors is int8; bfloat16, float16 or float32"):
        open_checkpoint(tmp_path)


def test_an_absent_head_hints_at_tying(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, random_tensors(TIED))
    with pytest.raises(CheckpointError, match=r"^lm_head\.weight is missing from .*set tie_word_embeddings to true"):
        open_checkpoint(tmp_path)


def test_a_weight_in_two_layouts_is_refused_with_both_names(tmp_path: Path) -> None:
    tensors = random_tensors()
    write_checkpoint(tmp_path, {**tensors, nested_name(UP): tensors[UP].clone()})
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.1.*model\.safetensors are the same weight in two layouts"
    ):
        open_checkpoint(tmp_path)


def test_tensors_the_model_does_not_have_are_ignored_and_listed(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(
        write_checkpoint(tmp_path, {**random_tensors(), "model.rotary.inv_freq": torch.ones(2)})
    )
    assert find_strangers(checkpoint) == ["model.rotary.inv_freq"]


def test_a_nan_is_found_when_asked_for(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors[UP][2, 1] = float("nan")
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors))
    checkpoint.check_finite([QKV])
    with pytest.raises(CheckpointError, match=rf"{UP} in .*model\.safetensors holds NaN at \[2, 1\]"):
        checkpoint.check_finite()


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path))
    with pytest.raises(
        CheckpointError, match=r"holds no model\.layer\.1\.mlp.*; the nearest name in the files is model\.layers\.1"
    ):
        checkpoint.tensor("model.layer.1.mlp.up_proj.weight")


def test_a_quantized_checkpoint_is_named_and_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    write_json(
        tmp_path / "config.json",
        {**config_json(SMALL), "quantization_config": {"quant_method": "bitsandbytes", "bits": 4}},
    )
    with pytest.raises(
        CheckpointError,
        match=r"is quantized \(bitsandbytes, quantization_config of config\.json\), which Saccade does not read",
    ):
        open_checkpoint(tmp_path)


def test_an_absent_tokenizer_is_told_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing, and so is vocab\.json and merges\.txt"):
        require_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing, and so is merges\.txt"):
        require_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("")
    require_tokenizer(tmp_path)


def test_a_config_of_another_size_is_caught_by_the_shapes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    write_configs(tmp_path, replace(SMALL, text=replace(SMALL.text, intermediate_size=64)))
    with pytest.raises(
        CheckpointError, match=r"mlp\.gate_proj\.weight in .* has shape \[128, 64\], config\.json implies \[64, 64\]"
    ):
        open_checkpoint(tmp_path)


def test_unverified_opening_leaves_the_comparison_to_the_caller(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {"model.language_model.norm.weight": torch.ones(64)}
    checkpoint = open_unverified(write_checkpoint(tmp_path, tensors))
    assert canonical_names(Shards(tmp_path)) == (checkpoint.layout, checkpoint.file_names)
    assert checkpoint.names() == ["model.norm.weight"]
