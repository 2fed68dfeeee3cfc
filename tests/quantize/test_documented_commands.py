"""The command lines of msModelSlim's documentation, word by word: each makes a checkpoint that opens and answers.

The model is random, and as wide as groups of 256 columns need.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch

from saccade import LLM, SamplingParams
from saccade.checkpoints.formats import open_checkpoint
from saccade.schemes import scheme as schemes
from saccade.schemes.scheme import Scheme
from tests.parity.oracle import Shape, build
from tests.parity.test_transformers import picture
from tests.test_cli import Run, run

__all__ = ["run"]
WIDE = Shape("wide", hidden=256, mrope=(8, 12, 12), vision_hidden=256, vision_heads=4, depth=2)
PLACES = "--model_path {model} --calib_images {photos} --save_directory {out}"
W8A8 = f"python quant_qwen2_5vl.py {PLACES} --w_bit 8 --a_bit 8 --device_type npu --trust_remote_code True"
W4A8 = (
    f"python quant_qwen2_5vl.py {PLACES} --w_bit 4 --a_bit 8 --act_method 1 --device_type npu --trust_remote_code True "
    "--anti_method m4 --open_outlier False --is_dynamic True --is_lowbit True --group_size 256"
)
LINES = {
    f"{W8A8} --anti_method m2 --mindie_format": schemes.W8A8,
    f"{W8A8} --anti_method m2": schemes.W8A8,
    f"{W8A8} --anti_method m4 --mindie_format": schemes.W8A8,
    f"{W8A8} --anti_method m4": schemes.W8A8,
    W4A8: schemes.W4A8[256],
}
PAGE = (Path(__file__).parents[2] / "docs" / "quantization-exact.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    build(folder, WIDE, seed=3, dtype=torch.bfloat16)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number, size in enumerate([(84, 56), (56, 56)]):
        picture(*size, number).save(folder / f"{number}.jpg")
    return folder


@pytest.mark.parametrize(("line", "scheme"), LINES.items())
def test_each_makes_a_checkpoint_that_answers(
    run: Run, model: Path, photos: Path, tmp_path: Path, line: str, scheme: Scheme
) -> None:
    out = tmp_path / "out"
    words = shlex.split(line.format(model=model, photos=photos, out=out))[2:]
    code, said, noted = run("quantize", *words)
    assert code == 0, said + noted
    assert "computed on the CPU" in noted
    kind = "w8a8" if scheme == schemes.W8A8 else "w4a8_dynamic"
    assert (out / f"quant_model_weight_{kind}.safetensors").exists()
    suffix = f"_{kind}" if "--mindie_format" in words else ""
    assert (out / f"quant_model_description{suffix}.json").exists()
    weight = open_checkpoint(out).weight("model.layers.0.self_attn.q_proj")
    assert weight is not None
    assert weight.scheme == scheme
    llm = LLM(out, device="cpu", kv_cache_tokens=1024)
    output = llm.ask("What?", images=[photos / "0.jpg"], sampling_params=SamplingParams(max_tokens=4, min_tokens=4))
    assert len(output.outputs[0].token_ids) == 4


def test_the_page_has_them_all() -> None:
    for line in LINES:
        named = line.format(model="MODEL", photos="PHOTOS", out="OUT")
        assert named.replace("python quant_qwen2_5vl.py", "    saccade quantize") in PAGE.splitlines()
