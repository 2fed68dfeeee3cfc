"""compressed-tensors: what we write, what its own library makes of it, and what that library writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from saccade import LLM
from saccade.base.errors import CheckpointError, OptionError
from saccade.checkpoints import compressed_tensors as ours
from saccade.checkpoints.formats import open_checkpoint
from saccade.checkpoints.stored import Tensors
from saccade.kernels import reference
from saccade.model.language import WholeSequences
from saccade.schemes.affine import TINY, dequantize, integer_values, quantize_weight
from saccade.schemes.packing import pack, unpack
from saccade.schemes.scheme import (
    DENSE,
    FP8,
    SCHEMES,
    W4A8,
    W4A8_FLOAT,
    W4A16,
    W4A16_ASYM,
    W8A8,
    W8A8_DYNAMIC,
    W8A16,
    Scheme,
    Weight,
)
from tests.checkpoints.making import InMemory, assert_same
from tests.quantized_folder import rounded, write_quantized

NAME = "model.layers.1.mlp.up_proj"
QUANTIZED = [scheme for scheme in SCHEMES.values() if not scheme.is_dense]


def config_for(scheme: Scheme, module: str = NAME) -> ours.Config:
    return ours.parse(ours.config_entry({module: scheme}))


# --- bit for bit -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", QUANTIZED, ids=lambda scheme: scheme.name)
def test_what_is_written_is_read_bit_for_bit(scheme: Scheme, dtype: torch.dtype) -> None:
    for has_bias in (False, True):
        bias = torch.randn(33).to(dtype) if has_bias else None
        weight = rounded(Weight(torch.randn(33, 512).to(dtype), bias=bias), scheme)
        tensors = InMemory(ours.write(NAME, weight, dtype))
        config = config_for(scheme)
        assert config.is_quantized(NAME)
        assert config.find_problems(tensors, NAME, (33, 512)) == []
        assert config.scheme(tensors, NAME) == scheme
        assert_same(config.read(tensors, NAME), weight)


@pytest.mark.parametrize("scheme", [W8A16, W8A8_DYNAMIC, FP8], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("columns", [1, 37, 3420])
def test_eight_bits_may_have_any_number_of_columns(scheme: Scheme, columns: int) -> None:
    weight = rounded(Weight(torch.randn(5, columns)), scheme)
    assert_same(config_for(scheme).read(InMemory(ours.write(NAME, weight, torch.bfloat16)), NAME), weight)


def test_a_zero_point_that_is_no_int8_is_not_written() -> None:
    weight = rounded(Weight(torch.randn(4, 32)), W8A8)
    assert weight.static is not None
    weight.static.zero[0] = 130
    with pytest.raises(OptionError, match="has the input zero point 130, and compressed-tensors keeps it as int8"):
        ours.write(NAME, weight, torch.bfloat16)


# --- the library as oracle -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 64), (1, 32), (3, 96), (0, 32)])
@pytest.mark.parametrize("in_cpp", [True, False])
def test_words_are_repacked_as_we_pack(shape: tuple[int, int], in_cpp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not in_cpp:
        monkeypatch.setattr(ours, "load", lambda: "not built")
    values = torch.randint(-8, 8, shape, dtype=torch.int8)
    assert torch.equal(ours.repack_words(pack_to_int32(values, 4)), pack(values))


def test_words_are_packed_as_the_library_packs_them() -> None:
    weight = quantize_weight(Weight(torch.randn(24, 64)), W4A16_ASYM[32])
    assert weight.zero is not None
    tensors = ours.write(NAME, weight, torch.bfloat16)
    assert torch.equal(tensors[f"{NAME}.weight_packed"], pack_to_int32(unpack(weight.values), 4))
    assert torch.equal(tensors[f"{NAME}.weight_zero_point"], pack_to_int32(weight.zero, 4, packed_dim=0))
    tensors = ours.write(NAME, rounded(Weight(torch.randn(3, 37)), W8A16), torch.bfloat16)
    values = config_for(W8A16).read(InMemory(tensors), NAME).values
    assert torch.equal(tensors[f"{NAME}.weight_packed"], pack_to_int32(values, 8))


@pytest.mark.parametrize("scheme", [W8A16, W4A16[64], W4A16_ASYM[64], W4A8[64], W4A8_FLOAT[64]], ids=lambda s: s.name)
def test_the_library_unpacks_the_same_weight(scheme: Scheme) -> None:
    weight = rounded(Weight(torch.randn(24, 128)), scheme)
    tensors = {name.rpartition(".")[2]: tensor for name, tensor in ours.write(NAME, weight, torch.float32).items()}
    (group,) = QuantizationConfig(**ours.config_entry({NAME: scheme})).config_groups.values()
    assert isinstance(group, QuantizationScheme)
    found = PackedQuantizationCompressor.decompress(tensors, group)["weight"]
    assert torch.equal(found.float(), dequantize(weight))


def library_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Dynamic activations by the library's rule: 127.5 steps to the largest magnitude, not 127."""
    scale = (x.float().abs().amax(dim=1) / 127.5).clamp(min=TINY)
    return (x.float() / scale[:, None]).round().clamp(-128, 127).to(torch.int8), scale


@torch.no_grad()
def our_logits(folder: Path, ids: Tensor, positions: Tensor) -> Tensor:
    model = LLM(folder, device="cpu", kv_cache_tokens=256, kernels={"linear": "reference"}).engine.runner.model
    return model.head(model(model.embed(ids), positions, WholeSequences(model.kernels, (len(ids),))))


# Measured: 3e-7 where only weights are rounded, or e4m3; 4e-5 with rounded int8 activations, of which a few fall on the other
# side of a half; 2.5e-3 with a static range, whose bias is rounded to whole steps here and to none there.
@pytest.mark.parametrize(
    ("scheme", "bound"),
    [
        (W8A16, 1e-06),
        (W4A16[32], 1e-06),
        (FP8, 0.001),
        (W8A8_DYNAMIC, 0.002),
        (W4A8[32], 0.002),
        (W4A8_FLOAT[32], 0.002),
        (W8A8, 0.01),
    ],
    ids=lambda value: value.name if isinstance(value, Scheme) else "",
)
def test_transformers_loads_what_we_write_and_computes_the_same_logits(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: Scheme, bound: float
) -> None:
    write_quantized(tiny_checkpoint, tmp_path / "out", "compressed-tensors", scheme)
    ids, positions = torch.arange(5, 45), torch.arange(40).expand(3, 40)
    monkeypatch.setattr(reference, "quantize_rows", library_rows)
    found = our_logits(tmp_path / "out", ids, positions)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(input_ids=ids[None], position_ids=positions[:, None]).logits[0]
    dense = our_logits(tiny_checkpoint, ids, positions)
    assert (found - expected).norm() <= bound * expected.norm()
    assert (dense - expected).norm() > 3 * max(bound, 1e-3) * expected.norm()  # the oracle did quantize


def test_several_schemes_in_one_checkpoint_load_in_transformers(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """int4 but for down_proj, which is int8, and for the first layer's attention, which is dense; the tower's blocks int8."""

    def pick(module: str) -> Scheme:
        if "layers.0.self_attn" in module or "merger" in module or module == "lm_head":
            return DENSE
        return W8A16 if "down_proj" in module or module.startswith("visual.") else W4A16[32]

    out = tmp_path / "out"
    write_quantized(tiny_checkpoint, out, "compressed-tensors", DENSE, lambda module: True, pick)
    entry = json.loads((out / "config.json").read_text())["quantization_config"]
    assert entry["format"] == "pack-quantized"
    assert len(entry["config_groups"]) == 2
    ids, positions = torch.arange(5, 45), torch.arange(40).expand(3, 40)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(input_ids=ids[None], position_ids=positions[:, None]).logits[0]
    assert (our_logits(out, ids, positions) - expected).norm() <= 1e-6 * expected.norm()


LIBRARY_ARGS: dict[str, tuple[Scheme, str, dict[str, Any], dict[str, Any] | None]] = {
    "int8 by channel": (
        W8A8_DYNAMIC,
        "int-quantized",
        {"num_bits": 8, "strategy": "channel"},
        {"num_bits": 8, "strategy": "token", "dynamic": True},
    ),
    "int8 by tensor": (
        W8A8_DYNAMIC,
        "int-quantized",
        {"num_bits": 8, "strategy": "tensor"},
        {"num_bits": 8, "strategy": "token", "dynamic": True},
    ),
    "int8 packed": (W8A16, "pack-quantized", {"num_bits": 8, "strategy": "channel"}, None),
    "int4 by group": (W4A16[32], "pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}, None),
    "int4 by channel": (W4A16[64], "pack-quantized", {"num_bits": 4, "strategy": "channel"}, None),
    "int4 with zeros": (
        W4A16_ASYM[32],
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
        None,
    ),
    "int4 in bytes": (
        W4A8_FLOAT[32],
        "int-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 32},
        {"num_bits": 8, "strategy": "token", "dynamic": True},
    ),
    "fp8": (
        FP8,
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
    ),
}


@pytest.mark.parametrize("case", LIBRARY_ARGS)
def test_what_the_library_writes_is_read(tiny_checkpoint: Path, tmp_path: Path, case: str) -> None:
    """Every decoder linear compressed by the library itself, in bfloat16 scales, under the names newer versions save."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme, file_format, weights, inputs = LIBRARY_ARGS[case]
    group = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weights),
        input_activations=QuantizationArgs(**inputs) if inputs else None,
    )
    compressor = BaseCompressor.get_value_from_registry(file_format)
    size = weights.get("group_size")
    tensors, expected = {}, {}
    for name, tensor in load_file(tiny_checkpoint / "model.safetensors").items():
        module = name.removesuffix(".weight")
        nested = name.replace("model.", "model.language_model.") if name.startswith("model.") else f"model.{name}"
        nested = name if name.startswith("lm_head") else nested
        if not (name.startswith("model.layers.") and tensor.ndim == 2 and name.endswith("weight")):
            tensors[nested] = tensor
            continue
        groups = tensor.view(len(tensor), -1, size) if size else tensor[:, None]
        low, high = groups.amin(dim=2), groups.amax(dim=2)
        if weights["strategy"] == "tensor":
            low, high = low.min().view(1), high.max().view(1)
        scale, zero = calculate_qparams(low, high, group.weights)
        state = {"weight": tensor, "weight_scale": scale.bfloat16(), "weight_zero_point": zero}
        compressed = compressor.compress(state, group)
        prefix = nested.removesuffix("weight")
        tensors |= {prefix + suffix: part.contiguous() for suffix, part in compressed.items()}
        expected[module] = compressor.decompress(compressed, group)["weight"].float()
    config = QuantizationConfig(
        config_groups={"group_0": group},
        format=file_format,
        quantization_status="compressed",
        ignore=[
            "lm_head",
            *[f"model.visual.blocks.{i}.{name}" for i in range(3) for name in ("attn.qkv", "attn.proj")],
            r"re:.*visual\.blocks\.\d+\.mlp.*",
            r"re:model\.visual\.merger.*",
        ],
    )
    for file in tiny_checkpoint.iterdir():
        if file.name not in ("model.safetensors", "config.json"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tiny_checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "quantization_config": config.to_dict()}))
    save_file(tensors, tmp_path / "model.safetensors")

    checkpoint = open_checkpoint(tmp_path)
    for module, dense in expected.items():
        weight = checkpoint.weight(module)
        assert weight is not None
        width = dense.shape[1]
        assert weight.scheme == (SCHEMES[scheme.name] if width % (scheme.group_size or 1) == 0 else W4A16[32])
        # The library multiplies in its scale's bfloat16.
        assert torch.equal(dequantize(weight).bfloat16().float(), dense)
    assert checkpoint.weight("visual.blocks.0.attn.qkv") is None
    assert LLM(tmp_path, device="cpu", kv_cache_tokens=256).quantization == checkpoint.quantization


# --- which layers ----------------------------------------------------------------------------------------------------

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}


def section(**groups: Any) -> dict[str, Any]:
    ignore = groups.pop("ignore", [])
    whole = {
        name: {"targets": targets, "weights": weights, "input_activations": None}
        for name, (targets, weights) in groups.items()
    }
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": whole, "ignore": ignore}


@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", "language_model.model."])
def test_names_are_matched_under_every_spelling(prefix: str) -> None:
    config = ours.parse(section(a=(["Linear"], INT4), ignore=[f"{prefix}layers.0.mlp.up_proj", r"re:.*visual\..*"]))
    assert not config.is_quantized("model.layers.0.mlp.up_proj")
    assert config.is_quantized("model.layers.0.mlp.gate_proj")
    assert config.is_quantized("model.layers.10.mlp.up_proj")
    assert not config.is_quantized("visual.blocks.0.attn.qkv")
    pattern = rf"re:{prefix}layers\.\d+\.mlp\.down_proj$".replace(".", r"\.", prefix.count("."))
    config = ours.parse(section(a=([pattern], INT8)))
    assert config.is_quantized("model.layers.3.mlp.down_proj")
    assert not config.is_quantized("model.layers.3.mlp.up_proj")


def test_a_name_or_pattern_is_stronger_than_the_class() -> None:
    groups = {"a": (["Linear"], INT4), "b": ([r"re:.*down_proj$"], INT8)}
    config = ours.parse(section(**groups))
    for module, name in (("model.layers.0.mlp.down_proj", "b"), ("model.layers.0.mlp.up_proj", "a")):
        group = config.group(module)
        assert group is not None
        assert group.name == name


def test_the_class_names_only_what_is_a_linear_in_engines() -> None:
    config = ours.parse(section(a=(["Linear"], INT4)))
    for module in ("visual.merger.mlp.2", "visual.blocks.1.attn.proj", "lm_head", "visual.blocks.0.mlp.down_proj"):
        assert config.is_quantized(module), module
    for module in ("visual.patch_embed.proj", "model.embed_tokens", "model.norm", "model.layers.0.input_layernorm"):
        assert not config.is_quantized(module), module


def test_the_config_gives_the_assignment_back() -> None:
    linears = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    assignment = {f"model.layers.{i}.{name}": W4A16[128] for i in range(12) for name in linears}
    assignment |= {f"visual.blocks.{i}.mlp.down_proj": DENSE for i in range(12)} | {"lm_head": DENSE}
    uniform = ours.config_entry(assignment)
    assert [group["targets"] for group in uniform["config_groups"].values()] == [["Linear"]]
    assert uniform["ignore"] == [r"re:.*visual\..*", "lm_head"]
    assignment |= {f"model.layers.{i}.mlp.down_proj": W8A8_DYNAMIC for i in range(12)}
    assignment |= {f"model.layers.{i}.self_attn.o_proj": DENSE for i in (1, 11)}
    assignment |= {f"visual.blocks.{i}.mlp.down_proj": W8A8_DYNAMIC for i in range(0, 12, 2)}
    assignment |= {"visual.merger.mlp.0": DENSE, "visual.merger.mlp.2": W8A8_DYNAMIC}
    mixed = ours.config_entry(assignment)
    assert mixed["format"] == "mixed-precision"
    QuantizationConfig(**mixed)  # the library accepts it
    for scheme, entry in ((None, mixed),):
        config = ours.parse(entry)
        for module, scheme in assignment.items():
            group = config.group(module)
            assert (group is None) == scheme.is_dense, module
            assert group is None or group.bits == scheme.weight_bits


# --- what is refused -------------------------------------------------------------------------------------------------


def changed(scheme: Scheme = W4A16[128], **changes: Any) -> dict[str, Any]:
    """An entry with changes in its only group, by the path of their keys joined by two underscores."""
    entry = ours.config_entry({NAME: scheme})
    group = entry["config_groups"]["group_0"]
    for path, value in changes.items():
        *parents, key = path.split("__")
        place = group
        for parent in parents:
            place = place[parent]
        place[key] = value
    return entry


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"config_groups": {}}, "has no config_groups"),
        ({"config_groups": {"group_0": 3}}, "group_0 of quantization_config of config.json has no targets"),
        (changed(targets="Linear"), "has no targets"),
        (changed(targets=["re:("]), r"holds the pattern re:\(, which is none"),
        (changed(weights=None), "has no weights"),
        (changed(weights__num_bits=3), "has weights of 3 bits, type int; int4, int8, fp8 are read"),
        (changed(weights__type="float"), "has weights of 4 bits, type float"),
        (changed(weights__group_size=48), "has groups of 48 columns; multiples of 32 are read"),
        (changed(weights__strategy="block"), "by block; read are by channel, and int4 by group"),
        (changed(weights__dynamic=True), "has dynamic weights"),
        (changed(format="marlin-24"), "has the format marlin-24; read are"),
        (changed(output_activations={"num_bits": 8}), "quantizes outputs"),
        (changed(W8A8_DYNAMIC, input_activations__num_bits=4), "has other activations than 8 bits of type int"),
        (changed(W8A8_DYNAMIC, input_activations__strategy="tensor"), "other than symmetric by token"),
        (changed(W8A8, input_activations__strategy="channel"), "static activations other than by tensor"),
        (changed(W4A8[32], weights__symmetric=False), "zero points of int4 weights and quantized activations"),
        (changed(FP8, input_activations=None), "fp8 weights and plain activations"),
        ({**changed(), "ignore": "lm_head"}, "ignore in quantization_config of config.json is lm_head"),
        ({**changed(), "transform_config": {"config_groups": {"R1": {}}}}, "has a transform_config"),
    ],
)
def test_what_cannot_be_run_is_refused_by_its_place_and_value(entry: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        ours.parse(entry)


Change = Callable[[dict[str, Tensor]], Any]


@pytest.mark.parametrize(
    ("scheme", "change", "words"),
    [
        (W4A16[32], lambda t: t.pop(f"{NAME}.weight_scale"), rf"{NAME}\.weight_scale is missing from"),
        (W4A16[32], lambda t: t.pop(f"{NAME}.weight_packed"), rf"{NAME}\.weight_packed is missing from"),
        (W4A16_ASYM[32], lambda t: t.pop(f"{NAME}.weight_zero_point"), r"weight_zero_point is missing"),
        (W8A8, lambda t: t.pop(f"{NAME}.input_scale"), r"input_scale is missing"),
        (W4A16[32], lambda t: t.update({f"{NAME}.weight_packed": torch.zeros(8, 4, dtype=torch.int32)}), r"\[8, 16\]"),
        (
            W8A8,
            lambda t: t.update({f"{NAME}.weight": torch.zeros(8, 128)}),
            r"is float32; int8, static activations implies",
        ),
        (
            W8A8_DYNAMIC,
            lambda t: (t.clear(), t.update({f"{NAME}.weight": torch.zeros(8, 128)})),
            r"is a plain tensor without weight_scale.*add model\.layers\.1\.mlp\.up_proj to ignore",
        ),
    ],
)
def test_what_is_absent_or_misshaped_is_named(scheme: Scheme, change: Change, words: str) -> None:
    tensors = ours.write(NAME, rounded(Weight(torch.randn(8, 128)), scheme), torch.bfloat16)
    change(tensors)
    with pytest.raises(AssertionError, match=words):
        assert config_for(scheme).find_problems(InMemory(tensors), NAME, (8, 128)) == []


@pytest.mark.parametrize(
    ("scheme", "change", "words"),
    [
        (W4A16[32], lambda t: t[f"{NAME}.weight_scale"].fill_(torch.inf), "holds NaN or an infinity"),
        (
            W4A16[32],
            lambda t: t[f"{NAME}.weight_shape"].fill_(8),
            r"weight_shape in .* is \[8, 8\], and weight_packed has",
        ),
        (W8A8, lambda t: t[f"{NAME}.input_scale"].fill_(0), "input_scale in .* is 0; a positive number"),
        (W4A8[32], lambda t: t[f"{NAME}.weight_scale"].normal_(), "no whole multiples, against integer_group_scales"),
        (
            W4A16[32],
            lambda t: t.update({f"{NAME}.weight_g_idx": torch.arange(128).flip(0) // 32}),
            "sorts columns into groups by activation",
        ),
    ],
)
def test_values_that_cannot_be_right_are_named(scheme: Scheme, change: Change, words: str) -> None:
    tensors = ours.write(NAME, rounded(Weight(torch.randn(8, 128)), scheme), torch.bfloat16)
    change(tensors)
    with pytest.raises(CheckpointError, match=words):
        config_for(scheme).read(InMemory(tensors), NAME)


def test_columns_sorted_by_activation_are_told_before_anything_is_loaded() -> None:
    tensors = ours.write(NAME, rounded(Weight(torch.randn(8, 128)), W4A16[32]), torch.bfloat16)
    tensors[f"{NAME}.weight_g_idx"] = torch.arange(128) // 32
    assert config_for(W4A16[32]).find_problems(InMemory(tensors), NAME, (8, 128)) == []
    tensors[f"{NAME}.weight_g_idx"] = torch.arange(128).flip(0) // 32
    (problem,) = config_for(W4A16[32]).find_problems(InMemory(tensors), NAME, (8, 128))
    assert "sorts columns into groups by activation" in problem


def test_fp8_with_a_stored_range_takes_each_tokens_own() -> None:
    """What vLLM calls FP8 static: the stored range is one for all tokens, each token's own is finer."""
    entry = changed(FP8, input_activations__strategy="tensor", input_activations__dynamic=False)
    tensors: Tensors = InMemory(ours.write(NAME, rounded(Weight(torch.randn(8, 128)), FP8), torch.bfloat16))
    assert ours.parse(entry).scheme(tensors, NAME) == FP8


def test_whole_rows_of_int4_are_exact_in_two_stages() -> None:
    """Per-channel W4A8: every group's whole-number scale is 1."""
    entry = changed(W4A8[32], weights__strategy="channel")
    integers, scale = torch.randint(-8, 8, (8, 128), dtype=torch.int8), torch.rand(8, 1)
    tensors = InMemory({f"{NAME}.weight": integers, f"{NAME}.weight_scale": scale})
    entry["config_groups"]["group_0"] |= {"format": "int-quantized"}
    entry["config_groups"]["group_0"]["weights"] |= {"group_size": None}
    weight = ours.parse(entry).read(tensors, NAME)
    assert weight.scheme == W4A8[128]
    assert torch.equal(integer_values(weight), integers)
    assert torch.equal(dequantize(weight), integers * scale)
