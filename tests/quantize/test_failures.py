"""What goes wrong on the way: a full disk, a source that vanishes, pictures and checkpoints that are damaged. Each error names the
value and what to do; nothing half-written is visible; afterwards the same command goes on."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from saccade.api import quantization_job, quantize
from saccade.base.errors import CheckpointError, MediaError
from saccade.checkpoints import shard_writer
from saccade.quantize import run as running
from saccade.quantize import state
from saccade.quantize.drawn_samples import drawn
from tests.quantize.test_best import hashes

OPTIONS: dict[str, Any] = {"scheme": "w8a8-dynamic", "smooth": "none", "samples": 2, "threads": 1}


@pytest.fixture
def source(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "source"))


def assert_taken_up_again(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "out", **OPTIONS)
    quantize(source, tmp_path / "whole", **OPTIONS)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    "number", [3, 40, 90]
)  # of the tensor: in the first blocks, in later ones, in the finished folder
def test_a_disk_that_fills_up_on_the_way(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    add, written = shard_writer._OpenShard.add, []

    def full(self: Any, *given: Any) -> None:
        written.append(given[0])
        if len(written) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer._OpenShard, "add", full)
        with pytest.raises(CheckpointError, match=r"out.*: No space left on device; make room and do it again"):
            quantize(source, tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial", "source"]
    assert_taken_up_again(source, tmp_path)


def test_hidden_rows_claim_their_disk_before_they_are_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapped file that finds no block when it is written to would end the process."""

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(state, "MAX_MEMORY_BYTES", 0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(CheckpointError, match=r"hidden-0.mapped.*No space left on device; make room"):
            quantize(source, tmp_path / "out", **OPTIONS)
    assert_taken_up_again(source, tmp_path)


def test_a_source_that_vanishes_on_the_way(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, embedding = source / "model.safetensors", running.Run.embedding

    def vanished(self: running.Run) -> None:
        weights.rename(tmp_path / "elsewhere")
        embedding(self)

    with monkeypatch.context() as patch:
        patch.setattr(running.Run, "embedding", vanished)
        with pytest.raises(
            CheckpointError, match=r"embed_tokens.* cannot be read from .*source/model.safetensors: No such"
        ):
            quantize(source, tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()
    (tmp_path / "elsewhere").rename(weights)
    assert_taken_up_again(source, tmp_path)


def test_a_source_that_changes_on_the_way_is_noticed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedding = running.Run.embedding

    def changed(self: running.Run) -> None:
        content = (source / "model.safetensors").read_bytes()
        (source / "model.safetensors").write_bytes(content[:-8] + bytes(8))
        os.utime(source / "model.safetensors", ns=(0, 0))
        embedding(self)

    monkeypatch.setattr(running.Run, "embedding", changed)
    with pytest.raises(CheckpointError, match=r"model.safetensors"):
        quantize(source, tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_a_picture_that_breaks_off_is_named_before_the_work(source: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    drawn(1).picture.save(tmp_path / "photos" / "whole.png")
    drawn(2).picture.save(tmp_path / "photos" / "torn.jpg")
    content = (tmp_path / "photos" / "torn.jpg").read_bytes()
    (tmp_path / "photos" / "torn.jpg").write_bytes(content[: len(content) // 3])
    with pytest.raises(MediaError, match=r"torn\.jpg"):
        quantization_job(
            source, tmp_path / "out", **OPTIONS | {"samples": None, "calibration": str(tmp_path / "photos")}
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "source"]


def test_a_checkpoint_cut_short_is_named_before_the_work(source: Path, tmp_path: Path) -> None:
    content = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*fetch it again"):
        quantize(source, tmp_path / "out", **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_weight_that_is_no_number_is_named(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.up_proj.weight in .* holds NaN"):
        quantize(source, tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()
