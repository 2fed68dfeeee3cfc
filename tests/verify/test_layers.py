"""Side by side: the two streams are the two models; smoothing and rotation are no error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saccade import LLM
from saccade.checkpoints.formats import open_checkpoint
from saccade.kernels import reference
from saccade.scoring import score_prompts
from saccade.verify.basis import find_rotation, turned
from saccade.verify.layers import SideBySide, run_side_by_side
from saccade.verify.options import VerifyOptions
from saccade.verify.samples import Sample, pack
from saccade.verify.verification import verify
from saccade.verify.weights import compare_weight, compare_weights
from tests.goldens import GOLDENS, needs_goldens

from .conftest import changed, edited

CPU = torch.device("cpu")
LAYER = "model.layers.0."
KV_HEADS, HEADS, HEAD_DIM = 2, 4, 16  # of the tiny model


def compare(source: Path, other: Path, samples: list[Sample]) -> SideBySide:
    return run_side_by_side(open_checkpoint(source), open_checkpoint(other), samples, reference.kernels(), CPU)


def served(folder: Path, samples: list[Sample]) -> Tensor:
    """[A, V] of all answers, through the paged cache and the serving kernels."""
    llm = LLM(folder, device="cpu", dtype="float32", kv_cache_tokens=2048)
    return torch.cat([scored.logits for scored in score_prompts(llm, ((s.prompt, s.answer) for s in samples))])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_each_half_computes_what_serving_computes(
    tiny_checkpoint: Path, samples: list[Sample], kind: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    found = compare(tiny_checkpoint, folder, samples)
    torch.testing.assert_close(found.exact, served(tiny_checkpoint, samples), rtol=0, atol=1e-4)
    # Where an activation lies between two integers, the order of a sum decides; a step of one number moves logits a little.
    assert (found.quantized - served(folder, samples)).norm() < 0.02 * found.exact.norm()
    assert (found.quantized - found.exact).norm() > 1e-3 * found.exact.norm()


def test_a_model_beside_itself_is_exact_everywhere(tiny_checkpoint: Path, samples: list[Sample]) -> None:
    found = compare(tiny_checkpoint, tiny_checkpoint, samples)
    assert {db for layer in found.layers for db in layer.output_db.values()} == {200.0}
    assert {db for block in found.blocks for db in (*block.delta_db.values(), *block.stream_db.values())} == {200.0}
    assert len(found.layers) == 3 * 5 + 2 + 2 * 7  # tower, merger, decoder
    assert torch.equal(found.exact, found.quantized)


def test_a_placeholder_in_an_answer_stands_for_no_picture(tiny_checkpoint: Path, samples: list[Sample]) -> None:
    config = open_checkpoint(tiny_checkpoint).config
    said = replace(samples[0], answer=(config.image_token_id, *samples[0].answer))
    assert torch.equal(pack([said], config).media_rows, pack(samples[:1], config).media_rows)


def test_kinds_of_tokens_are_told_apart(tiny_checkpoint: Path, dynamic: Path, samples: list[Sample]) -> None:
    packed = pack(samples, open_checkpoint(tiny_checkpoint).config)
    counts = {kind: int(packed.mask(kind).sum()) for kind in ("first", "picture", "text")}
    assert counts["first"] == 2
    assert counts["picture"] == 6  # 84 x 56 pixels
    layers = {layer.module: layer for layer in compare(tiny_checkpoint, dynamic, samples).layers}
    assert set(layers[f"{LAYER}self_attn.q_proj"].output_db) == {"text", "picture", "first"}
    assert set(layers["visual.blocks.0.attn.qkv"].output_db) == {"picture"}


def test_the_parts_of_an_error_are_told_apart(tiny_checkpoint: Path, dynamic: Path, samples: list[Sample]) -> None:
    layers = {layer.module: layer for layer in compare(tiny_checkpoint, dynamic, samples).layers}
    q, o = (layers[f"{LAYER}self_attn.{part}"] for part in ("q_proj", "o_proj"))
    assert q.input_db == 200  # nothing quantized lies between the stream and it
    assert o.input_db is not None
    assert o.rounding_db is not None
    assert 20 < o.input_db < 60
    assert 35 < o.rounding_db < 60
    assert layers["visual.merger.mlp.2"].rounding_db is None  # it is dense


def test_the_error_of_a_layer_is_found_at_that_layer(
    tiny_checkpoint: Path, samples: list[Sample], tmp_path: Path
) -> None:
    """Layers after it in its block inherit it, other blocks' own error is none, and the stream carries it on."""
    name = "model.layers.0.mlp.gate_proj"
    weight = open_checkpoint(tiny_checkpoint).tensor(f"{name}.weight")
    noise = 0.01 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    folder = edited(tiny_checkpoint, tmp_path / "x", lambda t: t.update({f"{name}.weight": weight + noise}))
    found = compare(tiny_checkpoint, folder, samples)
    layers = {layer.module: layer.output_db["text"] for layer in found.layers if "text" in layer.output_db}
    assert layers[name] == pytest.approx(40, abs=1)
    assert layers["model.layers.0.mlp.up_proj"] > 100
    assert layers["model.layers.0.mlp.down_proj"] < 45
    assert layers["model.layers.1.mlp.gate_proj"] == 200
    blocks = {block.block: block for block in found.blocks}
    assert blocks["model.layers.1"].delta_db["text"] == 200
    assert blocks["model.layers.1"].stream_db["text"] < 70


def smooth(tensors: dict[str, Tensor]) -> None:
    """Factors of channels between every pair that allows them, in the first decoder layer."""
    generator = torch.Generator().manual_seed(1)

    def factors(count: int) -> Tensor:
        return torch.exp(torch.randn(count, generator=generator))

    c = factors(64)
    tensors[f"{LAYER}input_layernorm.weight"] /= c
    for part in "qkv":
        tensors[f"{LAYER}self_attn.{part}_proj.weight"] *= c
    c = factors(KV_HEADS * HEAD_DIM)
    tensors[f"{LAYER}self_attn.v_proj.weight"] /= c[:, None]
    tensors[f"{LAYER}self_attn.v_proj.bias"] /= c
    columns = c.view(KV_HEADS, 1, HEAD_DIM).expand(-1, HEADS // KV_HEADS, -1).flatten()
    tensors[f"{LAYER}self_attn.o_proj.weight"] *= columns
    c = factors(96)
    tensors[f"{LAYER}mlp.up_proj.weight"] /= c[:, None]
    tensors[f"{LAYER}mlp.down_proj.weight"] *= c


def test_smoothing_is_no_error(tiny_checkpoint: Path, samples: list[Sample], tmp_path: Path) -> None:
    folder = edited(tiny_checkpoint, tmp_path / "x", smooth)
    found = compare(tiny_checkpoint, folder, samples)
    assert not found.is_rotated
    assert min(db for layer in found.layers for db in layer.output_db.values()) > 100
    ranges = {layer.module: layer.ranges for layer in found.layers}
    smoothed, same = (ranges[f"{LAYER}{name}"] for name in ("self_attn.q_proj", "mlp.gate_proj"))
    assert smoothed is not None
    assert same is not None
    assert smoothed.before[-1] != pytest.approx(smoothed.after[-1], rel=0.01)
    assert same.before == pytest.approx(same.after, rel=1e-4)


def test_smoothed_weights_are_compared_in_their_own_basis(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = edited(tiny_checkpoint, tmp_path / "x", smooth)
    source, other = open_checkpoint(tiny_checkpoint), open_checkpoint(folder)
    measures = {measure.module: measure for measure in compare_weights(source, other, None)}
    basis = {
        name: measures[f"{LAYER}{name}"].basis for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    }
    assert basis == {"self_attn.q_proj": "smoothed", "self_attn.v_proj": "rescaled", "mlp.down_proj": "rescaled"}
    assert min(measure.db for measure in measures.values()) > 70  # fitted from sums of float32 products
    assert not any(measure.bad_rows for measure in measures.values())


def rotate(tensors: dict[str, Tensor]) -> None:
    """The residual stream by a random orthogonal matrix, gains of norms first folded into the linears behind them, and the
    values of each key head by one of their own."""
    rotation, _ = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(2)))
    behind = {"model.norm": ["lm_head"]}
    for index in range(2):
        layer = f"model.layers.{index}"
        behind[f"{layer}.input_layernorm"] = [f"{layer}.self_attn.{part}_proj" for part in "qkv"]
        behind[f"{layer}.post_attention_layernorm"] = [f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"]
        heads = torch.linalg.qr(torch.randn(KV_HEADS, HEAD_DIM, HEAD_DIM, generator=torch.Generator().manual_seed(3)))[
            0
        ]
        v, o = (f"{layer}.self_attn.{part}_proj" for part in "vo")
        tensors[f"{v}.weight"] = turned(tensors[f"{v}.weight"].T, heads).T
        tensors[f"{v}.bias"] = turned(tensors[f"{v}.bias"][None], heads)[0]
        tensors[f"{o}.weight"] = turned(tensors[f"{o}.weight"], heads.repeat_interleave(HEADS // KV_HEADS, 0))
        for name in (f"{layer}.self_attn.o_proj.weight", f"{layer}.mlp.down_proj.weight"):
            tensors[name] = rotation.T @ tensors[name]
    for norm, modules in behind.items():
        for module in modules:
            tensors[f"{module}.weight"] = (tensors[f"{module}.weight"] * tensors[f"{norm}.weight"]) @ rotation
        tensors[f"{norm}.weight"] = torch.ones(64)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] @ rotation
    tensors["visual.merger.mlp.2.weight"] = rotation.T @ tensors["visual.merger.mlp.2.weight"]
    tensors["visual.merger.mlp.2.bias"] = tensors["visual.merger.mlp.2.bias"] @ rotation


def test_rotation_is_no_error(tiny_checkpoint: Path, samples: list[Sample], tmp_path: Path) -> None:
    folder = edited(tiny_checkpoint, tmp_path / "x", rotate)
    found = compare(tiny_checkpoint, folder, samples)
    assert found.is_rotated
    assert min(db for layer in found.layers for db in layer.output_db.values()) > 80
    assert min(db for block in found.blocks for db in block.stream_db.values()) > 80
    source, other = open_checkpoint(tiny_checkpoint), open_checkpoint(folder)
    measures = list(compare_weights(source, other, find_rotation(source, other)))
    assert min(measure.db for measure in measures) > 80
    assert {measure.bias for measure in measures} == {"same"}


def test_damage_to_the_embedding_is_not_taken_for_a_rotation(tiny_checkpoint: Path, tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    folder = edited(tiny_checkpoint, tmp_path / "x", lambda t: t.update({name: changed(t[name], slice(0, 40), 0.0)}))
    source, other = open_checkpoint(tiny_checkpoint), open_checkpoint(folder)
    assert find_rotation(source, other) is None
    measure = compare_weight(source, other, "model.embed_tokens", None)
    assert measure.bad_rows == tuple(range(40))


def test_a_tied_head_is_the_embedding_of_each_model(tmp_path: Path) -> None:
    from saccade.api import messages_for
    from saccade.verify.verification import answer
    from tests.parity.oracle import SHAPES, build

    source = tmp_path / "tied"
    build(source, SHAPES[1], seed=3)
    samples = answer(LLM(source, device="cpu", kv_cache_tokens=2048), [messages_for("Say hello.")], 4)
    found = compare(source, source, samples)
    torch.testing.assert_close(found.exact, served(source, samples), rtol=0, atol=1e-4)
    assert torch.equal(found.exact, found.quantized)


@needs_goldens
def test_what_the_reference_gets_wrong_is_found(tmp_path: Path) -> None:
    """Its 4-bit files hold vision scale_bias that no engine loads, and leave merges.txt behind."""
    case = GOLDENS / "w4a8_m4_vllm"
    report = verify(case / "output", case / "input", options=VerifyOptions(hashes=False))
    checks = {check.name: check for check in report.checks}
    assert checks["files"].details[0].startswith("merges.txt")
    assert [line.split(":")[0] for line in checks["numbers"].details] == [
        "visual.blocks.0.attn.qkv",
        "visual.blocks.0.attn.proj",
    ]
    assert all("scale_bias has shape" in line for line in checks["numbers"].details)
    assert checks["weights"].verdict == "warn"  # outliers moved into groups of 256 weights of 4 bits: 9 dB
    assert "6 rescaled between layers" in checks["weights"].facts
