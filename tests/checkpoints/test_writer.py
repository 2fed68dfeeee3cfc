"""Writing shards: other programs read them, nothing half-done is ever seen, nothing of the user's is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from saccade.base.errors import CheckpointError
from saccade.checkpoints.shard_writer import ShardWriter
from saccade.checkpoints.shards import Shards

RAGGED = [torch.int8, torch.float64, torch.bfloat16, torch.float32, torch.bool, torch.float16, torch.uint8, torch.int64]


def write(folder: Path, tensors: dict[str, Tensor], max_shard_bytes: int = 1 << 30) -> Path:
    with ShardWriter(folder, max_shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    return folder


def ragged_tensors() -> dict[str, Tensor]:
    """Every type in sizes that would misalign its neighbours if they were laid down as they come."""
    sizes = [(dtype, size) for size in (3, 0, 1, 8, 5) for dtype in RAGGED]
    return {f"{number} {dtype}": torch.arange(size).to(dtype) for number, (dtype, size) in enumerate(sizes)}


@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 64, 1])
def test_the_safetensors_library_and_we_read_what_is_written(tmp_path: Path, max_shard_bytes: int) -> None:
    tensors = ragged_tensors()
    folder = write(tmp_path / "out", tensors, max_shard_bytes)
    theirs: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        theirs |= load_file(path)
    ours = Shards(folder)
    assert set(theirs) == set(ours.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(theirs[name], tensor)
        assert torch.equal(ours.read(name), tensor)
        assert ours.info(name).offset % tensor.dtype.itemsize == 0


def test_strided_tensors_and_tensors_in_pieces_are_written_as_their_values(tmp_path: Path) -> None:
    tensor = torch.randn(6, 4)
    with ShardWriter(tmp_path / "out") as writer:
        writer.add("strided", tensor.t())
        writer.add_chunks("pieces", tensor.dtype, (6, 4), iter(tensor.split(2)))
    shards = Shards(tmp_path / "out")
    assert torch.equal(shards.read("strided"), tensor.t())
    assert torch.equal(shards.read("pieces"), tensor)


def test_shards_are_named_and_indexed_as_published_ones_are(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", {name: torch.ones(16) for name in "abcde"}, max_shard_bytes=128)
    names = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
    assert sorted(os.listdir(folder)) == [*names, "model.safetensors.index.json"]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 64
    assert index["weight_map"] == dict(zip("abcde", [names[0], names[0], names[1], names[1], names[2]], strict=True))


def test_one_shard_has_no_index_and_no_padding(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", {"w": torch.ones(16)})
    assert os.listdir(folder) == ["model.safetensors"]
    assert (folder / "model.safetensors").stat().st_size < 64 + 200


def test_a_large_shard_is_written_once_behind_a_padded_header(tmp_path: Path) -> None:
    tensors = {"w": torch.arange(20 << 20, dtype=torch.int32), "odd": torch.ones(3)}
    folder = write(tmp_path / "out", tensors)
    theirs = load_file(folder / "model.safetensors")
    assert all(torch.equal(theirs[name], tensor) for name, tensor in tensors.items())


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", ragged_tensors(), 64), write(tmp_path / "b", ragged_tensors(), 64)
    assert sorted(os.listdir(first)) == sorted(os.listdir(second))
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in os.listdir(first))


def test_nothing_is_visible_before_the_end(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "out") as writer:
        writer.add("w", torch.ones(4))
        writer.add_file("config.json", "{}")
        assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == []
    assert sorted(os.listdir(tmp_path)) == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == "{}"


def test_an_exception_midway_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted() -> Iterator[Tensor]:
        yield torch.ones(4)
        raise KeyboardInterrupt

    def attempt() -> None:
        with ShardWriter(tmp_path / "out", 8) as writer:
            writer.add("v", torch.ones(4))
            writer.add_chunks("w", torch.float32, (8,), interrupted())

    with pytest.raises(KeyboardInterrupt):
        attempt()
    assert os.listdir(tmp_path) == []


def test_a_killed_writer_leaves_no_visible_folder(tmp_path: Path) -> None:
    program = f"""
import os, signal, torch
from pathlib import Path
from saccade.checkpoints.shard_writer import ShardWriter
writer = ShardWriter(Path({str(tmp_path / "out")!r}), 8)
writer.add("v", torch.ones(4))
writer.add("w", torch.ones(4))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == []


def test_an_existing_folder_is_kept_unless_forced(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", {"w": torch.zeros(4)})
    with pytest.raises(CheckpointError, match=r"out exists and is not empty"):
        ShardWriter(folder)
    with pytest.raises(CheckpointError, match=r"out is not a checkpoint \(no config\.json\)"):
        ShardWriter(folder, force=True)
    (folder / "config.json").write_text("{}")
    with ShardWriter(folder, force=True) as writer:
        writer.add("w", torch.ones(4))
        assert torch.equal(Shards(folder).read("w"), torch.zeros(4))
    assert torch.equal(Shards(folder).read("w"), torch.ones(4))
    assert os.listdir(folder) == ["model.safetensors"]
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_that_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "out")
    writer.add("w", torch.ones(4))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "theirs").write_text("precious")
    with pytest.raises(CheckpointError, match="out exists and is not empty"):
        writer.close()
    assert (tmp_path / "out" / "theirs").read_text() == "precious"
    assert os.listdir(tmp_path) == ["out"]


def test_an_empty_folder_is_taken_and_a_file_is_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", {"w": torch.ones(4)})
    (tmp_path / "file").write_text("precious")
    with pytest.raises(CheckpointError, match="file exists and is not a folder"):
        ShardWriter(tmp_path / "file", force=True)


def test_a_disk_that_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
        write(tmp_path / "out", {"w": torch.ones(4)})
    assert os.listdir(tmp_path) == []
