"""Quantized checkpoints from folder to logits, and quantization while loading."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from saccade import LLM, SamplingParams
from saccade.api import quantize, quantize_exactly
from saccade.base.errors import CheckpointError, OptionError
from saccade.bench.model import random_llm
from saccade.checkpoints import ascend, formats
from saccade.checkpoints.formats import open_checkpoint
from saccade.checkpoints.shards import Shards
from saccade.model.language import WholeSequences
from saccade.model.layers import Linear, size_bytes
from saccade.planning import plan
from saccade.schemes.affine import dequantize, quantize_weight
from saccade.schemes.scheme import W4A8, W8A8_DYNAMIC, Weight
from tests import quantized_folder
from tests.goldens import CASES, GOLDENS, needs_goldens
from tests.parity.oracle import Shape, build

PICTURE = Image.linear_gradient("L").convert("RGB").resize((84, 56))
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)


def open_llm(folder: Path, **options: Any) -> LLM:
    return LLM(folder, device="cpu", **{"kv_cache_tokens": 4096, **options})


def linears(llm: LLM) -> list[Linear]:
    return [layer for layer in llm.engine.runner.model.modules() if isinstance(layer, Linear)]


def picture_question() -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "What is it?"}]}]


@torch.no_grad()
def logits_of(llm: LLM) -> Tensor:
    """[T, V] float32 of every token of a question about a picture."""
    prompt = llm.prepare(picture_question())
    model = llm.engine.runner.model
    features, _ = llm.engine.runner.embed_media(prompt.media)
    ids = torch.tensor(prompt.token_ids)
    rows = (ids == llm.config.image_token_id).nonzero().flatten()
    x = model.embed(ids, rows, torch.cat(features))
    return model.head(model(x, prompt.positions, WholeSequences(model.kernels, (len(prompt),)), rows)).float()


def distance(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


# --- the reference quantizer's checkpoints ---------------------------------------------------------------------------


def simulate(folder: Path, llm: LLM) -> None:
    """Makes every quantized linear compute section 10 of the specification from the file's own tensors, with int64 sums."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    for layer in linears(llm):
        modules = list(layer.parts)
        if tensors[f"{modules[0]}.weight"].dtype == torch.int8:
            layer.forward = simulated(tensors, modules)  # type: ignore[method-assign]


def simulated(tensors: dict[str, Tensor], modules: list[str]) -> Callable[..., Tensor]:
    def part(x: Tensor, module: str) -> Tensor:
        get = {name.rpartition(".")[2]: t for name, t in tensors.items() if name.rpartition(".")[0] == module}
        q = get["weight"].long()
        if "deq_scale" in get:
            x_q = (x.float() / get["input_scale"].float() + get["input_offset"].float()).round().clamp(-128, 127).long()
            return ((x_q @ q.T + get["quant_bias"]).float() * get["deq_scale"]).to(x.dtype)
        if "weight_scale_second" in get:
            low, high = q & 15, q >> 4
            rows = torch.stack([torch.where(low > 7, low - 16, low), high], dim=1).reshape(-1, q.shape[1])
            second = get["weight_scale_second"].long()
            q = rows * second.repeat_interleave(q.shape[1] // second.shape[1], dim=1)
        scale = x.float().abs().amax(1, keepdim=True) / 127
        x_q = (x.float() / scale).round().clamp(-128, 127).long()
        y = (x_q @ q.T).float() * scale * get["weight_scale"].float().T
        return (y + get["bias"].float() if "bias" in get else y).to(x.dtype)

    def whole(x: Tensor, is_visual: Tensor | None = None) -> Tensor:
        return torch.cat([part(x, module) for module in modules], dim=1)

    return whole


@needs_goldens
@pytest.mark.parametrize("case", CASES)
def test_a_reference_checkpoint_computes_what_its_specification_says(case: str) -> None:
    """Bit for bit the logits of a simulation that shares no code with the kernels or the reader."""
    folder = GOLDENS / case / "output"
    llm, simulation = open_llm(folder), open_llm(folder)
    simulate(folder, simulation)
    assert torch.equal(logits_of(llm), logits_of(simulation))


@needs_goldens
@pytest.mark.parametrize("case", CASES)
def test_every_layer_of_a_reference_checkpoint_is_its_dequantized_self_on_rounded_inputs(case: str) -> None:
    """In floating point, and so with the layer's bias where the integers have quant_bias: no more apart than rounding makes it."""
    llm = open_llm(GOLDENS / case / "output", dtype="float32")
    distances = []
    for layer in linears(llm):
        if not layer.weight.scheme.is_dense:

            def forward(x: Tensor, is_visual: Tensor | None = None, layer: Linear = layer) -> Tensor:
                y, static = layer.kernels.linear(x, layer.weight), layer.weight.static
                scale = x.abs().amax(1, keepdim=True) / 127 if static is None else static.scale
                zero = torch.zeros(1) if static is None else static.zero
                rounded = ((x / scale + zero).round().clamp(-128, 127) - zero) * scale
                expected = torch.nn.functional.linear(rounded, dequantize(layer.weight), layer.weight.bias)
                distances.append(distance(y, expected))
                return y

            layer.forward = forward  # type: ignore[method-assign]
    logits_of(llm)
    assert len(distances) >= 9
    # deq_scale was rounded to bfloat16, by 0.4 % at most; dynamic scales were not.
    assert max(distances) < (0.004 if "w8a8_" in case else 1e-6)


# Distance of the logits (norm of the difference over norm, in float32) from those of the dequantized and of the float model.
# Measured 0.088, 0.148, 0.034, 0.049; 0.101, 0.168, 0.054, 0.911: random weights with outliers amplify every rounding, and
# four bits in groups of 256 leave nothing of them.
@needs_goldens
@pytest.mark.parametrize(
    ("case", "near", "far"), zip(CASES, [0.13, 0.2, 0.05, 0.075], [0.15, 0.25, 0.08, 1.2], strict=True)
)
def test_a_reference_checkpoint_is_near_its_float_selves(case: str, near: float, far: float) -> None:
    folder = GOLDENS / case / "output"
    ours, dequantized = (open_llm(folder, dtype="float32") for _ in range(2))
    for layer in linears(dequantized):
        layer.weight = Weight(dequantize(layer.weight), bias=layer.weight.bias)
    source = open_llm(GOLDENS / case / "input", dtype="float32")
    assert 0 < distance(logits_of(ours), logits_of(dequantized)) < near
    assert 0 < distance(logits_of(ours), logits_of(source)) < far


@needs_goldens
@pytest.mark.parametrize("case", CASES)
def test_a_reference_checkpoint_answers(case: str) -> None:
    llm = open_llm(GOLDENS / case / "output")
    output = llm.ask("Describe", images=PICTURE, sampling_params=GREEDY)
    assert len(output.outputs[0].token_ids) == 4
    kinds = {layer.weight.scheme.name for layer in linears(llm)}
    assert kinds == {"dense", {"w8a8_": "w8a8", "w8a8d": "w8a8-dynamic", "w4a8_": "w4a8-g256"}[case[:5]]}


# --- without them ----------------------------------------------------------------------------------------------------


def write_quantized(source: Path, folder: Path, module_parts: tuple[str, ...] = ("_proj", "attn.")) -> Path:
    """The checkpoint `source` with some linears rounded to W8A8 dynamic, in the files of vLLM Ascend."""
    checkpoint = open_checkpoint(source)
    tensors, entries = {}, ascend.description_head("W8A8_DYNAMIC", None, "vllm")
    for name in checkpoint.names():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and any(part in name for part in module_parts) and "patch" not in name:
            bias = checkpoint.tensor(f"{module}.bias") if f"{module}.bias" in checkpoint else None
            weight = quantize_weight(Weight(checkpoint.tensor(name), bias=bias), W8A8_DYNAMIC)
            its_tensors = ascend.write(module, weight, "vllm", torch.float32)
            entries |= ascend.description_entries(its_tensors, ascend.tag_of(weight.scheme))
            tensors |= its_tensors
        else:
            tensors[name] = checkpoint.tensor(name)
    folder.mkdir()
    save_file(tensors, folder / "quant_model_weight_w8a8_dynamic.safetensors")
    (folder / "quant_model_description.json").write_text(json.dumps(entries))
    for file in source.iterdir():
        if "safetensors" not in file.name:
            shutil.copy(file, folder / file.name)
    return folder


@pytest.fixture(scope="module")
def quantized(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quantized(tiny_checkpoint, tmp_path_factory.mktemp("quantized") / "w8a8")


def test_a_quantized_folder_computes_what_the_float_one_does_quantized_while_loading(
    tiny_checkpoint: Path, quantized: Path
) -> None:
    """The file's layers are the same numbers; the merger, which stays dense in it, is given to both."""
    from_file, while_loading = open_llm(quantized), open_llm(tiny_checkpoint, quantization="w8a8-dynamic")
    schemes = [layer.weight.scheme.name for layer in linears(from_file)]
    assert {"dense", "w8a8-dynamic"} == set(schemes)
    merger = while_loading.engine.runner.model.visual.merger
    theirs = from_file.engine.runner.model.visual.merger
    merger.up.weight, merger.down.weight = theirs.up.weight, theirs.down.weight
    assert torch.equal(logits_of(from_file), logits_of(while_loading))


def test_a_quantized_folder_runs_in_another_type(quantized: Path) -> None:
    llm = open_llm(quantized, dtype="bfloat16")
    assert {layer.weight.bias.dtype for layer in linears(llm) if layer.weight.bias is not None} == {torch.bfloat16}
    assert distance(logits_of(llm), logits_of(open_llm(quantized))) < 0.1


def test_the_memory_of_a_quantized_checkpoint_is_known_before_loading(tiny_checkpoint: Path, quantized: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    taken = size_bytes(open_llm(quantized).engine.runner.model)
    assert abs(plan(quantized, messages).weight_bytes - taken) < 0.02 * taken
    assert plan(tiny_checkpoint, messages).weight_bytes > plan(quantized, messages).weight_bytes


def test_parts_of_one_product_must_be_quantized_alike(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = write_quantized(tiny_checkpoint, tmp_path / "mixed", ("q_proj", "k_proj"))
    with pytest.raises(CheckpointError, match=r"v_proj is dense and .*q_proj is w8a8-dynamic; .* quantized alike"):
        open_llm(folder)


def test_a_quantized_checkpoint_is_not_quantized_again(quantized: Path) -> None:
    with pytest.raises(OptionError, match=r"'w8a16' is for checkpoints that are not quantized, .*leave the option out"):
        open_llm(quantized, quantization="w8a16")


@pytest.mark.parametrize(
    ("name", "bound"), [("w8a16", 0.02), ("w8a8-dynamic", 0.03), ("fp8", 0.1), ("w4a16-g32", 0.2), ("w4a8-g32", 0.2)]
)
def test_quantization_while_loading_stays_near(name: str, bound: float) -> None:
    """Random weights whose columns every group of 32 divides. Measured: 0.012, 0.014, 0.118."""
    exact, rounded = (random_llm("tiny", device="cpu", kv_cache_tokens=4096, quantization=how) for how in (None, name))
    error = distance(logits_of(rounded), logits_of(exact))
    assert 0 < error < bound


def test_layers_whose_columns_groups_do_not_divide_take_what_fits(tiny_checkpoint: Path) -> None:
    llm = open_llm(tiny_checkpoint, quantization="w4a8-g256", vision_quantization="w4a8-g256")
    schemes = {layer.in_features: layer.weight.scheme.name for layer in linears(llm) if layer.is_quantizable}
    assert schemes == {
        32: "w4a8-g32",
        52: "w8a8-dynamic",
        64: "w4a8-g64",
        96: "w4a8-g32",
        128: "w4a8-g128",
    }
    assert logits_of(llm).isfinite().all()


def tower_and_decoder(llm: LLM) -> tuple[set[str], set[str]]:
    model = llm.engine.runner.model
    found = (
        {layer.weight.scheme.name for layer in part.modules() if isinstance(layer, Linear) and layer.is_quantizable}
        for part in (model.visual, model.language)
    )
    return next(found), next(found)


@pytest.mark.parametrize(
    ("options", "tower", "decoder"),
    [
        ({"quantization": "w4a8-g32"}, "w8a8-dynamic", "w4a8-g32"),
        ({"quantization": "w4a16-g32"}, "w8a16", "w4a16-g32"),
        ({"quantization": "fp8"}, "fp8", "fp8"),
        ({"quantization": "w4a16-g32", "vision_quantization": "float"}, "dense", "w4a16-g32"),
        ({"vision_quantization": "w8a16"}, "w8a16", "dense"),
    ],
)
def test_the_tower_takes_8_bits_where_the_decoder_takes_4_or_what_is_said(
    options: dict[str, str], tower: str, decoder: str
) -> None:
    """Random weights whose columns every group of 32 divides."""
    assert tower_and_decoder(random_llm("tiny", device="cpu", kv_cache_tokens=256, **options)) == ({tower}, {decoder})


def test_a_float_tower_of_a_quantized_checkpoint_may_be_quantized_and_no_other(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """What is quantized is read, not mapped; the decoder is used where it lies."""
    plain: dict[str, Any] = {"scheme": "w8a8-dynamic", "smooth": "none", "rounding": "rtn"}
    quantize(tiny_checkpoint, tmp_path / "float", **plain)
    llm = open_llm(tmp_path / "float", vision_quantization="w8a16")
    assert tower_and_decoder(llm) == ({"w8a16"}, {"w8a8-dynamic"})
    assert llm.quantization is not None
    assert llm.quantization.endswith(", tower w8a16")
    exact = logits_of(open_llm(tmp_path / "float"))
    assert 0 < distance(logits_of(llm), exact) < 0.05
    quantize(tiny_checkpoint, tmp_path / "int8", vision="all", **plain)
    with pytest.raises(OptionError, match=r"vision_quantization 'w8a16': visual\.blocks.* is w8a8-dynamic already"):
        open_llm(tmp_path / "int8", vision_quantization="w8a16")


def test_what_needs_calibration_is_refused_before_loading(tiny_checkpoint: Path) -> None:
    with pytest.raises(OptionError, match="needs activations measured"):
        open_llm(tiny_checkpoint, quantization="w8a8")


# --- weights where they lie in the files -----------------------------------------------------------------------------


def mapped_bytes(llm: LLM, folder: Path) -> int:
    """Of the linears' values, how many bytes are memory of the folder's one file."""
    file_bytes = (folder / "model.safetensors").stat().st_size
    values = [layer.weight.values for layer in linears(llm)]
    return sum(tensor.nbytes for tensor in values if tensor.untyped_storage().nbytes() == file_bytes)


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "fp8"])
def test_what_is_written_for_serving_is_used_where_it_lies(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """All of it: what runs as one product lies side by side."""
    monkeypatch.setattr(formats, "MAPPED_BYTES", 0)
    quantize(tiny_checkpoint, tmp_path / "out", scheme=scheme, smooth="none", rounding="rtn")
    llm = open_llm(tmp_path / "out")
    assert mapped_bytes(llm, tmp_path / "out") == sum(layer.weight.values.nbytes for layer in linears(llm))
    copied = open_llm(tmp_path / "out", mmap=False)
    assert mapped_bytes(copied, tmp_path / "out") == 0
    assert torch.equal(logits_of(llm), logits_of(copied))


def test_what_is_held_otherwise_than_the_file_has_it_is_not_mapped(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four bits in bytes, which are packed: mapped, they would lie in memory twice."""
    monkeypatch.setattr(formats, "MAPPED_BYTES", 0)
    written = quantized_folder.write_quantized(tiny_checkpoint, tmp_path / "w4a8", "vllm-ascend", W4A8[32])
    asked: list[str] = []
    mapped = Shards.mapped

    def noted(shards: Shards, names: Sequence[str]) -> Tensor:
        asked.extend(names)
        return mapped(shards, names)

    monkeypatch.setattr(Shards, "mapped", noted)
    open_llm(tmp_path / "w4a8")
    assert {weight.scheme for weight in written.values()} == {W4A8[32]}
    assert asked
    assert not {f"{module}.weight" for module in written} & set(asked)


def test_float_weights_are_used_where_they_lie_unless_another_type_is_asked_for(tiny_checkpoint: Path) -> None:
    llm, copied = open_llm(tiny_checkpoint), open_llm(tiny_checkpoint, mmap=False)
    assert mapped_bytes(llm, tiny_checkpoint) > 0
    assert mapped_bytes(copied, tiny_checkpoint) == 0
    assert torch.equal(logits_of(llm), logits_of(copied))
    assert mapped_bytes(open_llm(tiny_checkpoint, dtype="bfloat16"), tiny_checkpoint) == 0


@pytest.mark.parametrize(
    ("tied", "options", "is_mapped"),
    [
        (False, {"quantization": "w8a16"}, True),
        (False, {"quantization": "w8a16", "mmap": False}, False),
        (True, {"quantization": "w8a16"}, False),  # every token reads it
        (True, {"quantization": "w8a16", "head_quantization": "w8a16"}, True),
        (True, {"vision_quantization": "w8a16"}, True),
    ],
)
def test_an_embedding_of_which_tokens_read_a_row_stays_in_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool, options: dict[str, Any], is_mapped: bool
) -> None:
    monkeypatch.setattr(formats, "MAPPED_BYTES", 0)
    build(tmp_path / "model", Shape("small", tied=tied), seed=1)
    llm = open_llm(tmp_path / "model", **options)
    model, file_bytes = llm.engine.runner.model, (tmp_path / "model" / "model.safetensors").stat().st_size
    found = model.language.embed_tokens.weight.values
    assert (found.untyped_storage().nbytes() == file_bytes) == is_mapped
    assert torch.equal(found, open_llm(tmp_path / "model").engine.runner.model.language.embed_tokens.weight.values)
    tower = [
        layer.weight.values for layer in model.visual.modules() if isinstance(layer, Linear) and layer.is_quantizable
    ]
    assert all(tensor.untyped_storage().nbytes() != file_bytes for tensor in tower)  # it is quantized in all cases


def test_a_verify_that_cannot_be_called_is_refused_before_the_long_work(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="verify is True; give what"):
        quantize(tiny_checkpoint, tmp_path / "out", verify=True)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="verify is True; give what"):
        quantize_exactly(tiny_checkpoint, tmp_path / "out", tmp_path, verify=True)  # type: ignore[arg-type]
