"""Quantized linears to and from Ascend's files: every scheme both ways, every quirk, and every damage by name."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saccade.base.errors import CheckpointError
from saccade.checkpoints import ascend
from saccade.checkpoints.describe import describe
from saccade.checkpoints.formats import Checkpoint, find_strangers, open_checkpoint
from saccade.checkpoints.presets import config_json
from saccade.schemes.affine import dequantize, integer_values, quantize_weight
from saccade.schemes.packing import unpack
from saccade.schemes.scheme import W4A8, W8A8, W8A8_DYNAMIC, Scheme, Static, Weight
from tests.goldens import CASES, GOLDENS, needs_goldens

from .making import SMALL, InMemory, assert_same, random_tensors, write_configs, write_json, write_sharded

QUANTIZED = list(ascend.TAGS)
FLOAT_LAYERS = ("down_proj", "merger", "lm_head", "embed_tokens", "patch_embed")
Q = "model.layers.1.self_attn.q_proj"
UP = "model.layers.1.mlp.up_proj"
VISION_QKV = "visual.blocks.0.attn.qkv"


def quantized(weight: Weight, scheme: Scheme) -> Weight:
    """By rounding to nearest; static numbers as a calibration might give them."""
    if scheme != W8A8:
        return quantize_weight(weight, scheme)
    rounded = quantize_weight(weight)
    assert rounded.scale is not None
    scale, zero = torch.tensor([0.03125]), torch.tensor([-17.0])
    deq_scale = scale * rounded.scale
    bias = torch.zeros(len(deq_scale)) if weight.bias is None else weight.bias.float()
    quant_bias = (bias / deq_scale - zero * rounded.values.float().sum(1)).round().to(torch.int32)
    return Weight(rounded.values, rounded.scale, weight.bias, W8A8, static=Static(scale, zero, quant_bias, deq_scale))


Tensors = dict[str, Tensor]
Entries = dict[str, str | int]


def quantized_files(
    scheme: Scheme, dialect: ascend.Dialect = "vllm", dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensors, Entries, dict[str, Weight]]:
    """A small model with the usual layers quantized, as files hold it: tensors, description, and the weights meant."""
    tensors, entries, weights = {}, ascend.description_head(ascend.tag_of(scheme), scheme.group_size, dialect), {}
    plain = random_tensors(dtype=dtype)
    for name, tensor in plain.items():
        module, _, kind = name.rpartition(".")
        if kind == "bias" and module in weights:
            continue
        is_linear = kind == "weight" and tensor.dim() == 2 and not any(part in name for part in FLOAT_LAYERS)
        fits = scheme.group_size is None or tensor.shape[-1] % scheme.group_size == 0
        if not is_linear or not fits:
            tensors[name], entries[name] = tensor, ascend.FLOAT
            continue
        weights[module] = quantized(Weight(tensor, bias=plain.get(f"{module}.bias")), scheme)
        its_tensors = ascend.write(module, weights[module], dialect, dtype)
        tensors |= its_tensors
        entries |= ascend.description_entries(its_tensors, ascend.tag_of(scheme))
    return tensors, entries, weights


def write_folder(folder: Path, tensors: Tensors, entries: Entries, scheme: Scheme, dialect: ascend.Dialect) -> Path:
    write_configs(folder)
    save_file(tensors, folder / f"{ascend.weights_stem(ascend.tag_of(scheme))}.safetensors")
    write_json(folder / ascend.description_name(ascend.tag_of(scheme), dialect), entries)
    return folder


def write_quantized(folder: Path, scheme: Scheme, dialect: ascend.Dialect = "vllm") -> Path:
    tensors, entries, _ = quantized_files(scheme, dialect)
    return write_folder(folder, tensors, entries, scheme, dialect)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dialect", ["vllm", "mindie"])
@pytest.mark.parametrize("scheme", [s for s in QUANTIZED if s not in (W4A8[128], W4A8[256])], ids=lambda s: s.name)
def test_what_is_written_is_read_bit_for_bit(
    tmp_path: Path, scheme: Scheme, dialect: ascend.Dialect, dtype: torch.dtype
) -> None:
    tensors, entries, weights = quantized_files(scheme, dialect, dtype)
    assert len(weights) >= 6
    checkpoint = open_checkpoint(write_folder(tmp_path, tensors, entries, scheme, dialect))
    for module, weight in weights.items():
        assert_same(checkpoint.weight(module), weight)
    assert checkpoint.weight("model.layers.1.mlp.down_proj") is None
    assert find_strangers(checkpoint) == []


@pytest.mark.parametrize("size", [128, 256])
def test_wide_groups_are_told_by_the_shape_of_their_scales(size: int) -> None:
    weight = quantize_weight(Weight(torch.randn(6, 512)), W4A8[size])
    for dialect in ("vllm", "mindie"):
        tensors = ascend.write(UP, weight, dialect, torch.bfloat16)  # type: ignore[arg-type]
        assert_same(ascend.read(InMemory(tensors), description({UP: "W4A8_DYNAMIC"}), UP), weight)


def description(tags: dict[str, str]) -> ascend.Description:
    return ascend.Description(
        Path("description.json"), "?", "vllm", {f"{name}.weight": tag for name, tag in tags.items()}
    )


def test_types_and_shapes_on_disk_are_those_of_the_format() -> None:
    bias = torch.randn(6).bfloat16()
    weight = Weight(torch.randn(6, 64).bfloat16(), bias=bias)
    rounded = quantized(weight, W8A8)
    halves = Weight(rounded.values, rounded.scale.bfloat16().float(), bias, W8A8, static=rounded.static)  # type: ignore[union-attr]

    def kinds(
        weight: Weight, dialect: ascend.Dialect, dtype: torch.dtype, module: str = UP
    ) -> dict[str, tuple[str, list[int]]]:
        tensors = ascend.write(module, weight, dialect, dtype)
        return {n.rpartition(".")[2]: (str(t.dtype).removeprefix("torch."), list(t.shape)) for n, t in tensors.items()}

    static = {"input_scale", "input_offset", "quant_bias", "deq_scale"}
    assert kinds(halves, "vllm", torch.bfloat16) == {
        "weight": ("int8", [6, 64]),
        "bias": ("bfloat16", [6]),
        "weight_scale": ("bfloat16", [6, 1]),
        "weight_offset": ("bfloat16", [6, 1]),
        "input_scale": ("bfloat16", [1]),
        "input_offset": ("bfloat16", [1]),
        "quant_bias": ("int32", [6]),
        "deq_scale": ("float32", [6]),
    }
    assert kinds(rounded, "mindie", torch.float16)["deq_scale"] == ("int64", [6])
    assert kinds(rounded, "mindie", torch.float16)["input_scale"] == ("float32", [1])
    assert kinds(rounded, "vllm", torch.bfloat16)["weight_scale"] == ("float32", [6, 1])  # bfloat16 would round it
    assert not static & set(kinds(quantized(weight, W8A8_DYNAMIC), "vllm", torch.bfloat16))
    four = kinds(quantized(weight, W4A8[32]), "vllm", torch.bfloat16)
    assert four["weight"] == ("int8", [3, 64])
    assert four["weight_scale_second"] == ("float32", [6, 2])
    assert four["weight_offset_second"] == ("int64", [6, 2])
    assert four["scale_bias"] == ("float32", [6, 1])
    assert kinds(quantized(weight, W4A8[32]), "vllm", torch.bfloat16, VISION_QKV)["scale_bias"][1] == [6, 1]
    assert kinds(quantized(weight, W4A8[32]), "vllm", torch.bfloat16, "x.o_proj")["scale_bias"][1] == [6, 16]
    four = kinds(quantized(weight, W4A8[32]), "mindie", torch.bfloat16)
    assert four["weight"] == ("int8", [6, 64])
    assert "scale_bias" not in four


def test_names_of_files_and_the_head_of_the_description() -> None:
    assert ascend.description_name("W8A8", "vllm") == "quant_model_description.json"
    assert ascend.description_name("W4A8_DYNAMIC", "mindie") == "quant_model_description_w4a8_dynamic.json"
    assert ascend.weights_stem("W8A8_DYNAMIC") == "quant_model_weight_w8a8_dynamic"
    head = {"version": "1.0.0", "model_quant_type": "W4A8_DYNAMIC", "group_size": 256}
    assert list(ascend.description_head("W4A8_DYNAMIC", 256, "vllm").items()) == list(head.items())
    assert ascend.description_head("W8A8", None, "mindie") == {"model_quant_type": "W8A8"}
    assert ascend.description_entries(["x.weight", "x.bias"], "W8A8") == {"x.weight": "W8A8", "x.bias": "FLOAT"}


def test_scale_bias_is_eight_times_the_sums_of_the_rows() -> None:
    weight = quantize_weight(Weight(torch.randn(4, 64)), W4A8[32])
    assert weight.scale is not None
    assert weight.group_scale is not None
    parts = unpack(weight.values), weight.scale[:, None], weight.group_scale.float()
    near = dequantize(weight)
    torch.testing.assert_close(ascend.scale_bias(UP, *parts)[:, 0], 8 * near.sum(1), rtol=0.02, atol=0.3)
    torch.testing.assert_close(
        ascend.scale_bias("x.o_proj", *parts), 8 * near.view(4, 16, 4).sum(2), rtol=0.02, atol=0.1
    )


@pytest.mark.parametrize("scheme", [W8A8, W4A8[64]], ids=lambda s: s.name)
def test_shards_with_an_index_of_any_name_are_read(tmp_path: Path, scheme: Scheme) -> None:
    tensors, entries, weights = quantized_files(scheme)
    write_configs(tmp_path)
    write_sharded(tmp_path, tensors)
    stem = ascend.weights_stem(ascend.tag_of(scheme))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    (tmp_path / "model.safetensors.index.json").unlink()
    for file in tmp_path.glob("model-*.safetensors"):
        file.rename(tmp_path / file.name.replace("model", stem, 1))
    renamed = {name: file.replace("model", stem, 1) for name, file in index["weight_map"].items()}
    write_json(tmp_path / f"{stem}.safetensors.index.json", {"metadata": {}, "weight_map": renamed})
    write_json(tmp_path / ascend.description_name(ascend.tag_of(scheme), "vllm"), entries)
    checkpoint = open_checkpoint(tmp_path)
    for module, weight in weights.items():
        assert_same(checkpoint.weight(module), weight)


def test_names_of_newer_layouts_are_read_in_both_files(tmp_path: Path) -> None:
    def nested(name: str) -> str:
        return f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1)

    tensors, entries, weights = quantized_files(W8A8_DYNAMIC)
    tensors = {nested(name): tensor for name, tensor in tensors.items()}
    entries = {nested(name) if "." in name else name: tag for name, tag in entries.items()}
    checkpoint = open_checkpoint(write_folder(tmp_path, tensors, entries, W8A8_DYNAMIC, "vllm"))
    assert checkpoint.layout == "nested"
    for module, weight in weights.items():
        assert_same(checkpoint.weight(module), weight)


def test_a_weight_scale_left_out_follows_from_the_deq_scale(tmp_path: Path) -> None:
    tensors, entries, weights = quantized_files(W8A8)
    del tensors[f"{UP}.weight_scale"], tensors[f"{UP}.weight_offset"]
    weight = open_checkpoint(write_folder(tmp_path, tensors, entries, W8A8, "vllm")).weight(UP)
    assert weight is not None
    torch.testing.assert_close(weight.scale, weights[UP].scale)


def test_norms_may_carry_zero_biases_and_copies(tmp_path: Path) -> None:
    tensors, entries, _ = quantized_files(W8A8, "mindie")
    norm = "model.layers.0.input_layernorm"
    extra, tags = ascend.quantized_norm(norm, tensors[f"{norm}.weight"], "W8A8", "mindie")
    assert list(tags.items()) == [
        (f"{norm}.weight", "FLOAT"),
        (f"{norm}.bias", "FLOAT"),
        (f"{norm}.module.weight", "W8A8"),
        (f"{norm}.module.bias", "W8A8"),
    ]
    extra = {name: tensor.clone() for name, tensor in extra.items()}
    checkpoint = open_checkpoint(write_folder(tmp_path, {**tensors, **extra}, {**entries, **tags}, W8A8, "mindie"))
    assert find_strangers(checkpoint) == []
    assert torch.equal(checkpoint.tensor(f"{norm}.weight"), tensors[f"{norm}.weight"])
    for name, words in ((f"{norm}.bias", "is not zero"), (f"{norm}.module.bias", "is not zero")):
        changed = {**tensors, **extra, name: torch.full((64,), 0.5)}
        write_folder(tmp_path, changed, {**entries, **tags}, W8A8, "mindie")
        with pytest.raises(CheckpointError, match=rf"{name} in .*w8a8\.safetensors {words}; the RMS norms .* no bias"):
            open_checkpoint(tmp_path)
    write_folder(tmp_path, {**tensors, **extra, f"{norm}.module.weight": torch.ones(64)}, entries, W8A8, "mindie")
    with pytest.raises(CheckpointError, match=rf"{norm}\.module\.weight in .* differs from {norm}\.weight"):
        open_checkpoint(tmp_path)


def test_opening_reads_no_linear(tmp_path: Path) -> None:
    write_quantized(tmp_path, W8A8)
    checkpoint = open_checkpoint(tmp_path)
    (file,) = checkpoint.shards.files
    assert checkpoint.shards.bytes_read == file.stat().st_size - sum(
        checkpoint.info(name).nbytes for name in checkpoint.names()
    )


Change = Callable[[Tensors, Entries], None]


def drop(name: str) -> Change:
    return lambda tensors, entries: tensors.__delitem__(name)


def put(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors, entries: tensors.update({name: change(tensors[name]).contiguous()})


def tag(name: str, value: str) -> Change:
    return lambda tensors, entries: entries.update({name: value})


@pytest.mark.parametrize(
    ("scheme", "change", "words"),
    [
        (W8A8, drop(f"{UP}.weight"), rf"{UP}\.weight is missing; quant_model_description\.json lists it as W8A8"),
        (W8A8, drop(f"{UP}.deq_scale"), rf"{UP}\.deq_scale is missing from .*w8a8\.safetensors; {UP} is W8A8 by"),
        (W8A8, drop(f"{Q}.bias"), rf"{Q}\.bias is missing from .*w8a8\.safetensors"),
        (W8A8_DYNAMIC, drop(f"{UP}.weight_scale"), rf"{UP}\.weight_scale is missing from .*dynamic\.safetensors"),
        (W4A8[64], drop(f"{UP}.weight_scale_second"), rf"{UP}\.weight_scale_second is missing from"),
        (W8A8, put(f"{UP}.weight", lambda t: t[:-2]), r"has shape \[126, 64\]; W8A8 implies \[128, 64\]"),
        (W8A8, put(f"{UP}.weight", Tensor.float), rf"{UP}\.weight in .* is float32; W8A8 implies int8"),
        (W8A8, put(f"{UP}.quant_bias", Tensor.float), "quant_bias in .* is float32; W8A8 implies int32"),
        (W8A8, put(f"{UP}.input_scale", lambda t: t.repeat(2)), r"input_scale in .* has shape \[2\]; W8A8 implies \[1\]"),
        (W4A8[64], put(f"{UP}.weight", lambda t: t[1:]), r"has shape \[63, 64\]; .* \[128, 64\] or \[64, 64\]"),
        (W4A8[64], put(f"{UP}.weight_scale_second", lambda t: t[1:]), r"has shape \[127, 1\]; .*\[128, 2\] or \[128, 1\]"),
        (W8A8, tag(f"{UP}.weight", "W8A8S"), rf"{UP} is W8A8S by quant_model_description\.json; Saccade reads FLOAT, W8A8"),
        (W8A8, tag(f"{UP}.weight", "FLOAT"), rf"{UP}\.weight in .* is int8; .* does not list as quantized"),
        (W8A8, tag("model.norm.weight", "W8A8"), "model.norm is W8A8 by .*; only linear layers are read quantized"),
        (W8A8, tag("visual.patch_embed.proj.weight", "W8A8"), "patch_embed.proj is W8A8 by .*; only linear layers"),
        (W8A8, tag("model.embed_tokens.weight", "W8A8"), "embed_tokens is W8A8 by .*; only linear layers"),
    ],
)  # fmt: skip
def test_what_is_absent_or_misshaped_is_named_when_opening(
    tmp_path: Path, scheme: Scheme, change: Change, words: str
) -> None:
    tensors, entries, _ = quantized_files(scheme)
    change(tensors, entries)
    write_folder(tmp_path, tensors, entries, scheme, "vllm")
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path)
    assert any("problem" in line for line in describe(tmp_path).render())


@pytest.mark.parametrize(
    ("scheme", "dialect", "change", "words"),
    [
        (W8A8, "vllm", put(f"{UP}.weight_offset", torch.ones_like), r"weight_offset in .*safetensors is not zero; .*symm"),
        (W4A8[64], "vllm", put(f"{UP}.weight_offset_second", torch.ones_like), "weight_offset_second in .* is not zero"),
        (W4A8[64], "vllm", put(f"{UP}.weight_scale_second", lambda t: t + 0.5), "other than whole numbers from 1 to 17"),
        (W4A8[64], "vllm", put(f"{UP}.weight_scale_second", lambda t: t * 0 + 18), "other than whole numbers from 1 to 17"),
        (W4A8[64], "vllm", put(f"{UP}.weight_scale_second", lambda t: t * torch.nan), "other than whole numbers"),
        (W4A8[64], "mindie", put(f"{UP}.weight", lambda t: t * 2), r"holds values beyond -8\.\.7"),
        (W4A8[64], "mindie", put(f"{UP}.weight", lambda t: t * 0 - 8), "times its group scales leaves int8"),
        (W8A8, "vllm", put(f"{UP}.input_scale", lambda t: t * 0), "input_scale in .* is 0; a positive number"),
        (W8A8, "vllm", put(f"{UP}.input_scale", lambda t: t * torch.nan), "input_scale in .* is nan; a positive number"),
        (W8A8, "vllm", put(f"{UP}.input_offset", lambda t: t + 0.5), r"input_offset in .* is -16\.5; a whole number"),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_right_are_named_when_reading(
    tmp_path: Path, scheme: Scheme, dialect: ascend.Dialect, change: Change, words: str
) -> None:
    tensors, entries, _ = quantized_files(scheme, dialect)
    if "leaves int8" in words:
        tensors[f"{UP}.weight_scale_second"].fill_(17)
    change(tensors, entries)
    checkpoint = open_checkpoint(write_folder(tmp_path, tensors, entries, scheme, dialect))
    with pytest.raises(CheckpointError, match=words):
        checkpoint.weight(UP)


def test_a_description_that_is_none_is_refused(tmp_path: Path) -> None:
    write_quantized(tmp_path, W8A8)
    write_json(tmp_path / "quant_model_description.json", {"model_quant_type": 8})
    with pytest.raises(CheckpointError, match=r"description\.json: model_quant_type is 8; one of W8A8, W8A8_DYNAMIC"):
        open_checkpoint(tmp_path)
    write_json(tmp_path / "quant_model_description_w8a8.json", {})
    with pytest.raises(CheckpointError, match="holds several descriptions"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_weights_left_over_beside_the_quantized_ones_are_named(tmp_path: Path, name: str) -> None:
    write_quantized(tmp_path, W8A8)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=rf"holds {name} beside quant_model_weight_w8a8\.safetensors; .* remove the"
    ):
        open_checkpoint(tmp_path)


def test_a_quantization_config_beside_the_description_is_no_other_format(tmp_path: Path) -> None:
    write_quantized(tmp_path, W8A8, "mindie")
    section = {"group_size": 64, "act_method": 2, "w_bit": 8}
    write_json(tmp_path / "config.json", {**config_json(SMALL), "quantize": "w8a8", "quantization_config": section})
    assert "MindIE" in (open_checkpoint(tmp_path).quantization or "")


def test_inspection_says_what_is_quantized(tmp_path: Path) -> None:
    write_quantized(tmp_path, W8A8_DYNAMIC)
    quantization = describe(tmp_path).quantization
    assert quantization is not None
    assert quantization.startswith("W8A8_DYNAMIC, ")
    assert quantization.endswith(" linear layers (vLLM Ascend format, quant_model_description.json)")
    assert not [problem for problem in describe(tmp_path).problems if "tokenizer" not in problem]


# --- what the reference quantizer wrote ------------------------------------------------------------------------------


def golden(case: str) -> tuple[Checkpoint, Tensors]:
    folder = GOLDENS / case / "output"
    (file,) = folder.glob("*.safetensors")
    return open_checkpoint(folder), load_file(file)


@needs_goldens
@pytest.mark.parametrize("case", CASES)
def test_reference_files_come_back_byte_for_byte(case: str) -> None:
    checkpoint, tensors = golden(case)
    assert checkpoint.stored is not None
    dialect = checkpoint.stored.dialect
    entries = json.loads(checkpoint.stored.file.read_text())
    count = 0
    for module in [name.removesuffix(".weight") for name, t in tensors.items() if t.dtype == torch.int8]:
        weight = checkpoint.weight(module)
        assert weight is not None
        written = ascend.write(module, weight, dialect, torch.bfloat16, as_the_original=True)
        assert set(written) == {name for name in tensors if name.rpartition(".")[0] == module}
        for name, tensor in written.items():
            assert (tensor.dtype, tensor.shape) == (tensors[name].dtype, tensors[name].shape), name
            assert torch.equal(tensor, tensors[name]), name
        tags = ascend.description_entries(written, ascend.tag_of(weight.scheme))
        assert list(tags.items()) == [item for item in entries.items() if item[0].rpartition(".")[0] == module]
        assert list(
            ascend.description_head(ascend.tag_of(weight.scheme), weight.scheme.group_size, dialect).items()
        ) == list(itertools.takewhile(lambda item: "." not in item[0], entries.items()))
        assert checkpoint.stored.file.name == ascend.description_name(ascend.tag_of(weight.scheme), dialect)
        count += 1
    assert count >= 16
    assert find_strangers(checkpoint) == []


@needs_goldens
@pytest.mark.parametrize("case", CASES)
def test_reference_weights_are_near_the_floats_they_were_made_from(case: str) -> None:
    """Of layers that outlier suppression leaves alone: the tower's projections."""
    checkpoint, _ = golden(case)
    source = open_checkpoint(GOLDENS / case / "input")
    weight = checkpoint.weight("visual.blocks.0.attn.proj")
    assert weight is not None
    exact = source.tensor("visual.blocks.0.attn.proj.weight").float()
    error = (dequantize(weight) - exact).norm() / exact.norm()
    assert error < (0.2 if "w4a8" in case else 0.01)
    assert integer_values(weight).abs().max() <= 127
