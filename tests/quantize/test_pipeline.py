"""The whole way on a tiny model: what is written, what is refused, and what is left behind when something fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from saccade.base.errors import CheckpointError, MediaError, OptionError
from saccade.checkpoints.config import read_config
from saccade.checkpoints.formats import open_checkpoint
from saccade.inputs.chat import ChatTokenizer
from saccade.quantize import pipeline
from saccade.quantize.calibration import Sample, list_pictures, load_sample, open_rgb
from saccade.quantize.pipeline import quantize_exact
from saccade.quantize.recipe import ExactRecipe
from tests.test_cli import Run, run

__all__ = ["run"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate([(90, 60), (56, 84), (100, 100)]):
        pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def half_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, declared and thus read as bfloat16."""
    folder = tmp_path_factory.mktemp("half")
    for path in tiny_checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    settings = json.loads((folder / "config.json").read_text())
    settings["torch_dtype"] = "bfloat16"
    settings.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("act_method", [1, 2, 3])
@pytest.mark.parametrize("anti_method", ["m2", "m4"])
def test_a_quantized_checkpoint_is_read_back(
    tiny_checkpoint: Path, pictures: Path, tmp_path: Path, anti_method: Any, act_method: int
) -> None:
    recipe = ExactRecipe(anti_method=anti_method, act_method=act_method)
    report = quantize_exact(tiny_checkpoint, tmp_path / "out", recipe, pictures)
    checkpoint = open_checkpoint(tmp_path / "out")
    weight = checkpoint.weight("model.layers.0.self_attn.q_proj")
    assert weight is not None
    assert weight.values.dtype == torch.int8
    assert report.num_samples == 3
    assert report.num_tensors == len(checkpoint.shards.names())
    assert report.output_bytes < report.source_bytes


def test_passing_block_by_block_is_passing_sample_by_sample(
    tiny_checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    """One sample more changes no earlier one's contribution: min-max means show every sample's own extremes."""
    recipe = ExactRecipe(act_method=1)
    folders = []
    for count in (1, 3):
        subset = tmp_path / f"pictures-{count}"
        subset.mkdir()
        for path in sorted(pictures.iterdir())[:count]:
            (subset / path.name).write_bytes(path.read_bytes())
        quantize_exact(tiny_checkpoint, tmp_path / f"out-{count}", recipe, subset)
        folders.append(load_file(tmp_path / f"out-{count}" / "quant_model_weight_w8a8.safetensors"))
    first = "visual.blocks.0.attn.qkv"
    assert torch.equal(folders[0][f"{first}.weight"], folders[1][f"{first}.weight"])
    assert not torch.equal(folders[0][f"{first}.input_scale"], folders[1][f"{first}.input_scale"])


def test_shards_are_numbered_even_when_there_is_one(tiny_checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize_exact(tiny_checkpoint, out, ExactRecipe(is_dynamic=True, part_file_size=1), pictures)
    stem = "quant_model_weight_w8a8_dynamic"
    index = json.loads((out / f"{stem}.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f"{stem}-00001-of-00001.safetensors"}
    tensors = load_file(out / f"{stem}-00001-of-00001.safetensors")
    description = json.loads((out / "quant_model_description.json").read_text())
    assert list(index["weight_map"]) == [name for name in description if name in tensors]
    assert tensors.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize("is_dynamic", [False, True])
def test_the_low_bit_quantizer_keeps_scales_of_8_bit_weights_in_float32(
    half_checkpoint: Path, pictures: Path, tmp_path: Path, is_dynamic: bool
) -> None:
    report = quantize_exact(
        half_checkpoint, tmp_path / "out", ExactRecipe(is_lowbit=True, is_dynamic=is_dynamic), pictures
    )
    tensors = load_file(tmp_path / "out" / f"quant_model_weight_{report.scheme.lower()}.safetensors")
    scales = {name: tensor.dtype for name, tensor in tensors.items() if name.endswith("_scale")}
    assert set(scales.values()) == {torch.float32}
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert any(name.endswith("input_scale") for name in scales) is not is_dynamic


def test_both_layouts_hold_the_same_weights(tiny_checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    for is_mindie in (False, True):
        recipe = ExactRecipe(anti_method="m4", is_dynamic=True, mindie_format=is_mindie)
        quantize_exact(tiny_checkpoint, tmp_path / str(is_mindie), recipe, pictures)
    file = "quant_model_weight_w8a8_dynamic.safetensors"
    ours, mindies = load_file(tmp_path / "False" / file), load_file(tmp_path / "True" / file)
    assert {name for name in mindies if name not in ours} == {name for name in mindies if ".module." in name}
    assert all(torch.equal(tensor, mindies[name]) for name, tensor in ours.items())


def test_nothing_is_left_when_a_picture_cannot_be_read(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "notes.txt").write_text("not a picture")
    with pytest.raises(MediaError, match=r"notes\.txt is not a picture"):
        quantize_exact(tiny_checkpoint, tmp_path / "out", ExactRecipe(), tmp_path / "pictures")
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


def test_nothing_is_left_when_the_work_fails_midway(
    tiny_checkpoint: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.Run, "write_linear", fail)
    with pytest.raises(KeyboardInterrupt):
        quantize_exact(tiny_checkpoint, tmp_path / "out", ExactRecipe(), pictures)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_checkpoint_is_kept_without_force(tiny_checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    recipe = ExactRecipe(is_dynamic=True, anti_method="m4")
    quantize_exact(tiny_checkpoint, tmp_path / "out", recipe, pictures)
    with pytest.raises(CheckpointError, match="not empty"):
        quantize_exact(tiny_checkpoint, tmp_path / "out", recipe, pictures)
    quantize_exact(tiny_checkpoint, tmp_path / "out", recipe, pictures, force=True)
    with pytest.raises(CheckpointError, match="quantized already"):
        quantize_exact(tmp_path / "out", tmp_path / "again", recipe, pictures)


def test_an_empty_folder_of_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is empty"):
        list_pictures(tmp_path, "name")
    with pytest.raises(OptionError, match="not a folder"):
        list_pictures(tmp_path / "absent", "name")


def test_a_transparent_picture_lies_on_white_and_no_picture_is_turned(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_rgb(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 2)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_rgb(tmp_path / "turned.jpg").size == (4, 2)


def test_a_sample_is_the_fixed_question_about_a_picture(tiny_checkpoint: Path, pictures: Path) -> None:
    config = read_config(tiny_checkpoint)
    tokenizer = ChatTokenizer(tiny_checkpoint, config)
    sample: Sample = load_sample(pictures / "0.png", tokenizer, config)
    text = tokenizer.decode(sample.token_ids.tolist(), skip_special=False)
    assert text.endswith("Please describe this picture in detail.<|im_end|>\n<|im_start|>assistant\n")
    assert text.startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
    )
    assert (sample.token_ids == config.image_token_id).sum().item() == 3 * 2  # 90 x 60 -> 84 x 56


def test_the_command_takes_the_references_spellings(
    run: Run, tiny_checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    paths = (
        "--model_path",
        str(tiny_checkpoint),
        "--calib_images",
        str(pictures),
        "--save_directory",
        str(tmp_path / "out"),
    )
    code, out, err = run("quantize", *paths, "--is_dynamic", "True", "--anti_method", "m4", "--mindie_format")
    assert (code, err) == (0, "")
    assert out.startswith("quantized to W8A8_DYNAMIC")
    assert (tmp_path / "out" / "quant_model_description_w8a8_dynamic.json").exists()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--is_dynamic", "yes"), "'yes' is not one of 'True', 'False'"),
        (("--w_bit", "4"), "w_bit 4 needs is_lowbit True"),
        (("--act_method", "7"), "act_method is 7"),
    ],
)
def test_the_command_refuses_with_exit_code_2(
    run: Run, tiny_checkpoint: Path, pictures: Path, tmp_path: Path, flags: tuple[str, ...], reason: str
) -> None:
    paths = (
        "--model_path",
        str(tiny_checkpoint),
        "--calib_images",
        str(pictures),
        "--save_directory",
        str(tmp_path / "out"),
    )
    code, _, err = run("quantize", *paths, *flags)
    assert code == 2
    assert reason in err
    assert not (tmp_path / "out").exists()
