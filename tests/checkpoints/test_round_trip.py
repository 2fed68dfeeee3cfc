"""Every scheme through every format: what is written comes back bit for bit, and the folder answers questions."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from saccade import cli
from saccade.base.errors import OptionError
from saccade.checkpoints.describe import describe
from saccade.checkpoints.formats import linears, open_checkpoint
from saccade.checkpoints.presets import PRESETS
from saccade.checkpoints.writing import FORMATS, companions, format_named, require_writable
from saccade.demo import FOLDER, questions
from saccade.planning import stand_ins
from saccade.schemes.loading import Loading
from saccade.schemes.scheme import (
    DENSE,
    FP8,
    W4A8,
    W4A8_FLOAT,
    W4A16,
    W4A16_ASYM,
    W8A8,
    W8A8_DYNAMIC,
    W8A16,
    Scheme,
)
from tests.checkpoints.making import assert_same
from tests.quantized_folder import is_decoder_linear, write_quantized

MODEL = FOLDER / "model"
ANYWHERE = (W8A16, W8A8, W8A8_DYNAMIC, W4A8[64])  # in every format
BY_FORMAT = {
    "compressed-tensors": (*ANYWHERE, FP8, W4A16[64], W4A16_ASYM[64], W4A8_FLOAT[64]),
    "vllm-ascend": ANYWHERE,
    "mindie": ANYWHERE,
}
CASES = [(name, scheme) for name, schemes in BY_FORMAT.items() for scheme in schemes]


@pytest.mark.parametrize(("format_name", "scheme"), CASES, ids=lambda value: getattr(value, "name", value))
def test_a_written_folder_comes_back_and_answers(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    format_name: str,
    scheme: Scheme,
) -> None:
    out = tmp_path / "out"
    written = write_quantized(MODEL, out, format_name, scheme)
    checkpoint = open_checkpoint(out)
    assert set(written) == {module for module in linears(checkpoint.config) if is_decoder_linear(module)}
    for module, weight in written.items():
        assert_same(checkpoint.weight(module), weight)
    described = describe(out)
    assert described.problems == described.notes == ()
    assert described.schemes[scheme.name] == len(written)
    question = questions()[0]
    arguments = ["ask", question.question, "--image", str(question.images[0]), "--model", str(out), "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["saccade", *arguments, "--kv-cache-tokens", "512"])
    cli.main()
    answer = capsys.readouterr().out.strip()
    # One range for all inputs is no calibration: such a model answers anything at all.
    assert answer == question.answer if scheme != W8A8 else answer


def test_the_tower_may_be_quantized_in_every_format(tmp_path: Path) -> None:
    """688 columns are no multiple of 32, so its down_proj is int8; a vLLM Ascend folder takes 4 bits of its attention, too."""

    def is_chosen(module: str) -> bool:
        return "merger" not in module and module != "lm_head"

    for format_name in FORMATS:
        written = write_quantized(MODEL, tmp_path / format_name, format_name, W4A8[64], is_chosen)
        checkpoint = open_checkpoint(tmp_path / format_name)
        assert {checkpoint.scheme(module).name for module in written} == {"w4a8-g64", "w8a8-dynamic"}
        for module, weight in written.items():
            assert_same(checkpoint.weight(module), weight)
        assert checkpoint.weight("visual.merger.mlp.0") is None


@pytest.mark.parametrize(
    ("format_name", "assignment", "words"),
    [
        ("mindie", {"model.layers.0.mlp.down_proj": FP8}, "the mindie format has no fp8; it has w8a8, w8a8-dynamic"),
        (
            "vllm-ascend",
            {"model.layers.0.mlp.down_proj": W4A8[32], "model.layers.1.mlp.down_proj": W4A8[64]},
            r"has one group size for all layers, not \[32, 64\]",
        ),
        ("vllm-ascend", {"visual.merger.mlp.0": W4A8[32]}, "of which the vllm-ascend format has no scale_bias"),
        (
            "compressed-tensors",
            {"model.layers.0.self_attn.q_proj": W8A16, "model.layers.0.self_attn.v_proj": DENSE},
            "q_proj is w8a16 and .*v_proj dense; engines run them as one",
        ),
    ],
)
def test_what_a_format_or_an_engine_cannot_take_is_said_before_writing(
    format_name: str, assignment: dict[str, Scheme], words: str
) -> None:
    with pytest.raises(OptionError, match=words):
        require_writable(format_named(format_name, torch.bfloat16), assignment)


def test_formats_are_known_by_name() -> None:
    assert [format_named(name, torch.bfloat16).name for name in FORMATS] == list(FORMATS)
    with pytest.raises(OptionError, match="format 'gguf' is unknown; choose one of compressed-tensors, vllm-ascend"):
        format_named("gguf", torch.bfloat16)


def test_what_belongs_to_the_model_comes_along_and_old_descriptions_do_not(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "merges.txt", "chat_template.jinja", "model.safetensors.index.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "quant_model_description.json").write_text("{}")
    (tmp_path / "README.md").write_text("")
    assert [name for name, _ in companions(tmp_path)] == ["chat_template.jinja", "merges.txt", "tokenizer.json"]


def test_layers_that_groups_do_not_divide_are_named_with_what_they_become() -> None:
    assert list(stand_ins(PRESETS["72b"], Loading(W4A8[256], W4A8[256]))) == [
        "32 layers of 3456 columns become w4a8-g128: groups of 256 do not divide them",
        "80 layers of 29568 columns become w4a8-g128: groups of 256 do not divide them",
    ]
    assert list(stand_ins(PRESETS["7b"], Loading(W4A16[64], W4A16[64]))) == [
        "32 layers of 3420 columns become w8a16: groups of 64 do not divide them"
    ]
    assert list(stand_ins(PRESETS["72b"], Loading(FP8, FP8))) == []
