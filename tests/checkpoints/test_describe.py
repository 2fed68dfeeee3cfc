"""What `saccade inspect` knows, of whole and of damaged checkpoints."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from saccade.base.errors import CheckpointError
from saccade.checkpoints.describe import describe
from saccade.checkpoints.presets import PRESETS

from .making import SMALL, TIED, random_tensors, write_checkpoint, write_configs, write_json


def whole(folder: Path) -> Path:
    write_json(write_checkpoint(folder) / "tokenizer.json", {})
    return folder


def test_a_whole_checkpoint_is_ready_to_run(tmp_path: Path) -> None:
    description = describe(whole(tmp_path))
    tensors = random_tensors()
    assert description.problems == description.notes == ()
    assert description.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert description.size_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert (description.num_tensors, description.num_shards, description.layout) == (len(tensors), 1, "hub")
    assert description.dtypes == ("bfloat16",)
    assert [part.name for part in description.parts] == [
        "vision tower",
        "token embedding",
        "decoder layers",
        "final norm",
        "output head",
    ]
    assert "ready to run" in description.render()[0]


@pytest.mark.parametrize(
    ("preset", "tower", "cache"),
    [
        ("3b", 668_684_288, 36_864),
        ("7b", 676_550_144, 57_344),
        ("32b", 688_841_984, 262_144),
        ("72b", 704_573_696, 327_680),
    ],
)
def test_sizes_are_the_published_ones_even_without_weights(tmp_path: Path, preset: str, tower: int, cache: int) -> None:
    description = describe(write_configs(tmp_path, PRESETS[preset]))
    assert description.parts[0].parameters == tower
    assert description.cache_bytes_per_token == cache
    assert any("holds no *.safetensors file" in problem for problem in description.problems)


def test_every_problem_is_listed_and_shown(tmp_path: Path) -> None:
    tensors = random_tensors()
    del tensors["model.norm.weight"]
    tensors["lm_head.weight"] = torch.zeros(2, 2)
    description = describe(write_checkpoint(tmp_path, {**tensors, "stranger": torch.ones(1)}))
    assert len(description.problems) == 3
    for problem, words in zip(description.problems, ("model.norm.weight", "lm_head.weight", "tokenizer"), strict=True):
        assert words in problem
        assert any(problem in line for line in description.render())
    assert "stranger" in description.notes[0]
    assert "3 problems" in description.render()[0]


def test_a_truncated_file_is_a_problem_and_not_an_exception(tmp_path: Path) -> None:
    path = whole(tmp_path) / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    (problem,) = describe(tmp_path).problems
    assert "truncated" in problem


def test_a_head_beside_a_tied_embedding_is_not_counted(tmp_path: Path) -> None:
    tensors = random_tensors(TIED)
    size_bytes = sum(tensor.nbytes for tensor in tensors.values())
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_checkpoint(tmp_path, tensors, TIED)
    assert describe(tmp_path).size_bytes == size_bytes


def test_a_folder_without_a_usable_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        describe(tmp_path)


def test_rendering_fits_every_checkpoint_and_is_plain_text(tmp_path: Path) -> None:
    for config in (SMALL, TIED, *PRESETS.values()):
        lines = describe(write_configs(tmp_path, config)).render()
        assert all(line.isprintable() for line in lines)
