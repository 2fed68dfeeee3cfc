"""What lies on disk between the beginning of a quantization and its end, so that a killed one goes on where it was.

Beside the folder to come, `OUT.partial` holds a part for every finished block (a safetensors file that appeared whole), the
hidden rows behind the last of them, and progress.json, whose replacement is what finishes a block: whatever was written
without it is written again. The key says what the result depends on; with another key everything starts anew.
Knows files; knows no model.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade.base.errors import CheckpointError
from saccade.checkpoints.shard_writer import ShardWriter, unwritable
from saccade.checkpoints.shards import Shards

PROGRESS = "progress.json"
MAX_MEMORY_BYTES = 1 << 30  # of hidden rows; beyond that they are a mapped file


@dataclass
class Progress:
    key: str
    done: int = 0  # finished blocks
    hidden: list[Any] | None = None  # [file name, type, shape]
    records: list[Any] = field(default_factory=list)  # one per finished block
    seconds: float = 0.0  # spent on finished blocks, by all processes
    is_complete: bool = False  # no block is left: the result is being put in its place, or is there


class State:
    """A quantization's folder. `records` are what its finished blocks left to be reported, in JSON's types."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        self._since = time.perf_counter()
        with _writing(folder):
            shutil.rmtree(self._removed, ignore_errors=True)
            self._progress = self._opened(key)
            (folder / "parts").mkdir(parents=True, exist_ok=True)
            self._remove_unfinished()
            if not (folder / PROGRESS).exists():
                self._write_progress()

    @property
    def done(self) -> int:
        return self._progress.done

    @property
    def records(self) -> list[Any]:
        return self._progress.records

    @property
    def seconds(self) -> float:
        """Spent so far, by every process that took part, on what was not lost."""
        return self._progress.seconds + time.perf_counter() - self._since

    def hidden(self) -> Tensor | None:
        """The rows behind the last finished block."""
        if self._progress.hidden is None:
            return None
        name, dtype, shape = self._progress.hidden
        size = int(torch.Size(shape).numel())
        rows = torch.from_file(str(self.folder / name), shared=False, size=size, dtype=getattr(torch, dtype)).view(
            shape
        )
        return rows if rows.nbytes > MAX_MEMORY_BYTES else rows.clone()

    def room_for(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Rows to be filled by the block now under way; `finish` takes them."""
        return new_rows(shape, dtype, self.folder / f"hidden-{self.done}.mapped")

    def finish(self, tensors: Iterable[tuple[str, Tensor]], hidden: Tensor | None, record: Any) -> None:
        """Makes the block's tensors, the rows behind it and its record last, in this order."""
        number = self.done
        with _writing(self.folder):
            with ShardWriter(self._part(number), 1 << 62) as writer:
                for name, tensor in tensors:
                    writer.add(name, tensor)
            saved: list[Any] | None = None
            if hidden is not None:
                saved = [f"hidden-{number}.bin", str(hidden.dtype).removeprefix("torch."), list(hidden.shape)]
                self._save_rows(hidden, self.folder / saved[0])
            records = [*self.records, record]
            seconds, self._since = self.seconds, time.perf_counter()
            self._progress = Progress(self._progress.key, number + 1, saved, records, seconds)
            self._write_progress()
            self._remove_unfinished()

    def complete(self) -> None:
        """No block is left."""
        self._progress.is_complete, self._progress.hidden = True, None
        with _writing(self.folder):
            self._write_progress()
            self._remove_unfinished()

    def tensors(self) -> Iterator[tuple[str, Shards]]:
        """Every tensor's name and where to read it, block by block, a block's weights first: what runs as one product (q, k, v) can
        then be used where it lies."""
        for number in range(self.done):
            if any(self._part(number).glob("*.safetensors")):
                part = Shards(self._part(number))
                for name in sorted(part.names(), key=lambda name: not name.endswith((".weight", ".weight_packed"))):
                    yield name, part

    def remove(self) -> None:
        """At one stroke, so that no half of it is ever taken for a state."""
        if self.folder.exists():
            self.folder.rename(self._removed)
        shutil.rmtree(self._removed, ignore_errors=True)

    @property
    def _removed(self) -> Path:
        return self.folder.with_name(f".{self.folder.name}.removed")

    def _opened(self, key: str) -> Progress:
        path = self.folder / PROGRESS
        if not self.folder.exists():
            return Progress(key)
        if not path.exists() and any(self.folder.iterdir()):
            if not (self.folder / "parts").exists():
                raise CheckpointError(f"{self.folder} exists and was not made by saccade quantize; move it away")
            self.remove()
            return Progress(key)
        try:
            found = Progress(**json.loads(path.read_text())) if path.exists() else Progress(key)
        except (ValueError, TypeError):
            found = Progress("")
        if found.key != key:
            self.remove()
            return Progress(key)
        return found

    @property
    def result(self) -> Path:
        """Where the folder to come is put together; what a killed run left of it is gone."""
        return self.folder / "result"

    def _part(self, number: int) -> Path:
        return self.folder / "parts" / f"{number:05}"

    def _remove_unfinished(self) -> None:
        """What no progress.json speaks of."""
        shutil.rmtree(self.result, ignore_errors=True)
        parts = {f"{number:05}" for number in range(self.done)}
        for path in (self.folder / "parts").iterdir():
            if path.name not in parts:
                shutil.rmtree(path, ignore_errors=True)
        kept = self._progress.hidden[0] if self._progress.hidden else None
        for path in self.folder.glob("hidden-*"):
            if path.name != kept:
                path.unlink()

    def _save_rows(self, rows: Tensor, path: Path) -> None:
        mapped = path.with_suffix(".mapped")
        if mapped.exists():  # the rows are this file's
            with mapped.open("rb+") as file:
                os.fsync(file.fileno())
            mapped.rename(path)
            return
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            file.write(rows.contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)

    def _write_progress(self) -> None:
        path = self.folder / PROGRESS
        partial = path.with_suffix(".partial")
        with partial.open("w") as file:
            json.dump(self._progress.__dict__, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def is_complete(folder: Path, key: str) -> bool:
    """Whether a state with this key had no block left."""
    try:
        found = Progress(**json.loads((folder / PROGRESS).read_text()))
    except (OSError, ValueError, TypeError):
        return False
    return found.key == key and found.is_complete


def new_rows(shape: tuple[int, ...], dtype: torch.dtype, path: Path | None) -> Tensor:
    """Uninitialized rows in memory, or, beyond MAX_MEMORY_BYTES, in a file mapped at `path`."""
    size = int(torch.Size(shape).numel())
    if path is None or size * dtype.itemsize <= MAX_MEMORY_BYTES:
        return torch.empty(shape, dtype=dtype)
    with _writing(path), path.open("wb") as file:
        # A file whose blocks are claimed only when they are written to ends the process where the disk is full.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, max(1, size * dtype.itemsize))
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)


class _writing:
    """Turns a disk that refuses into an error that names it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise CheckpointError(unwritable(self._folder, error)) from error
