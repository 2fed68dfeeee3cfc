"""Tensors by name into safetensors files: a folder that appears whole or not at all.

Knows the safetensors format, the shard index and the file system; knows no model: names are opaque here.
Writing happens in a hidden sibling folder that takes the visible name when it is complete.
"""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from saccade.base.errors import CheckpointError
from saccade.checkpoints.shards import CHUNK_BYTES, DTYPE_NAMES, MAX_DIMENSIONS, bytes_of

DEFAULT_SHARD_BYTES = 5_000_000_000  # the habit of published checkpoints


@dataclass(frozen=True)
class FileNames:
    """How a writer calls its files. `is_always_indexed`: a single shard, too, is numbered and has an index, in order of writing."""

    stem: str = "model"
    is_always_indexed: bool = False
    has_metadata: bool = True


class ShardWriter:
    """Writes a checkpoint folder in bounded memory; nothing is visible until `close`.

    A context manager: leaving it normally closes, leaving it by an exception discards. Tensors go to disk as they come, in
    shards of at most `max_shard_bytes` (more only for a single tensor that is larger). Equal input gives equal bytes.
    An existing folder is refused, unless it is empty, or `force` is set and it is a checkpoint.
    `hidden`: where it lies until then, on the same disk; by default a sibling of the folder.
    Raises CheckpointError for that and for a disk that refuses.
    """

    def __init__(
        self,
        folder: Path,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        *,
        force: bool = False,
        names: FileNames | None = None,
        hidden: Path | None = None,
    ) -> None:
        assert max_shard_bytes > 0, "a shard holds at least one byte"
        self._files = names or FileNames()
        self.folder = folder.resolve()
        self.max_shard_bytes = max_shard_bytes
        self._force = force
        self._require_replaceable()
        self._names: dict[str, None] = {}  # in order of writing
        self._sealed: list[tuple[Path, list[str]]] = []
        self._total_bytes = 0
        self._shard: _OpenShard | None = None
        self._is_complete = False
        self._hidden = hidden or self.folder.parent / f".{self.folder.name}.{secrets.token_hex(4)}.partial"
        with self._writing(self._hidden):
            self._hidden.mkdir(parents=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor. It is copied first only if it is strided or on a device."""
        tensor = tensor.detach().to("cpu").contiguous()
        self.add_chunks(name, tensor.dtype, tuple(tensor.shape), [tensor])

    def add_chunks(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], chunks: Iterable[Tensor]) -> None:
        """Writes one tensor given as successive contiguous CPU pieces of its flat values."""
        assert name not in self._names, f"{name} is written twice"
        assert not self._is_complete, f"{name} comes after the last shard"
        nbytes = math.prod(shape) * dtype.itemsize
        if self._shard is not None and not self._shard.has_room(name, nbytes, self.max_shard_bytes):
            self._seal()
        file = self._hidden / f"{len(self._sealed) + 1}.partial"
        with self._writing(file):
            if self._shard is None:
                self._shard = _OpenShard(file)
            self._shard.add(name, dtype, shape, nbytes, chunks)
        self._names[name] = None
        self._total_bytes += nbytes

    def add_file(self, name: str, content: str | bytes) -> None:
        """Puts a small file such as config.json beside the shards."""
        path = self._hidden / name
        assert path.parent == self._hidden, f"{name} is not a plain file name"
        assert not path.exists(), f"{name} is written twice"
        with self._writing(path), path.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            _sync(file)

    def complete(self) -> Path:
        """Completes the shards and their index. Returns the folder they lie in, hidden still; small files may follow."""
        self._seal()
        weight_map: dict[str, str] = {}
        stem, is_indexed = self._files.stem, self._files.is_always_indexed or len(self._sealed) > 1
        for number, (path, names) in enumerate(self._sealed, start=1):
            shard = f"{stem}-{number:05}-of-{len(self._sealed):05}" if is_indexed else stem
            with self._writing(path):
                path.rename(self._hidden / f"{shard}.safetensors")
            weight_map.update(dict.fromkeys(names, f"{shard}.safetensors"))
        if is_indexed:
            order = self._names if self._files.is_always_indexed else sorted(weight_map)
            index = {
                "metadata": {"total_size": self._total_bytes},
                "weight_map": {name: weight_map[name] for name in order},
            }
            end = "" if self._files.is_always_indexed else "\n"
            self.add_file(f"{stem}.safetensors.index.json", json.dumps(index, indent=2) + end)
        self._is_complete = True
        return self._hidden

    def close(self) -> None:
        """Completes what is not complete, and gives the folder its name."""
        try:
            if not self._is_complete:
                self.complete()
            self._publish()
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Removes everything written so far."""
        if self._shard is not None:
            self._shard.abandon()
            self._shard = None
        shutil.rmtree(self._hidden, ignore_errors=True)

    def _require_replaceable(self) -> None:
        if not self.folder.exists():
            return
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} exists and is not a folder; choose another name")
        if not any(self.folder.iterdir()):
            return
        if not self._force:
            raise CheckpointError(
                f"{self.folder} exists and is not empty; choose another name, or force its replacement"
            )
        if not (self.folder / "config.json").exists():
            raise CheckpointError(
                f"{self.folder} is not a checkpoint (no config.json), so it is not replaced even by force"
            )

    def _seal(self) -> None:
        if self._shard is not None:
            with self._writing(self._shard.path):
                self._shard.seal(self._files.has_metadata)
            self._sealed.append((self._shard.path, self._shard.names()))
            self._shard = None

    def _publish(self) -> None:
        """Renames the hidden folder. A folder it replaces steps aside first, and comes back if the second rename fails."""
        self._require_replaceable()
        aside = self._hidden.with_suffix(".replaced")
        with self._writing(self.folder):
            _sync_folder(self._hidden)
            replaces = self.folder.exists()
            if replaces:
                self.folder.rename(aside)
            try:
                self._hidden.rename(self.folder)
            except OSError:
                if replaces:
                    aside.rename(self.folder)
                raise
            _sync_folder(self.folder.parent)
        if replaces:
            shutil.rmtree(aside, ignore_errors=True)

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(unwritable(path, error)) from error


def unwritable(path: Path, error: OSError) -> str:
    """What to say of a file or folder that the system did not write."""
    remedy = "; make room and do it again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return f"{path} cannot be written: {error.strerror or error}{remedy}"


class _OpenShard:
    """One file being written: room for a header, the body, and at the end the tensors of ragged size.

    A reader may view a tensor in place, so each has to start at a multiple of its item size, and the format allows no gaps.
    Tensors whose size is a multiple of 8 bytes keep every offset aligned; the few others wait in a second file and are
    appended when the shard is sealed, the widest items first.
    """

    _BODY_START = 1 << 20  # room for a header of several thousand tensors
    _COMPACT_BYTES = 64 << 20  # a smaller body is moved up to its header, so small files carry no padding

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("w+b")
        self._file.seek(self._BODY_START)
        self._ragged_file = path.with_suffix(".ragged").open("w+b")
        self._body: list[tuple[str, torch.dtype, tuple[int, ...], int]] = []
        self._ragged: list[tuple[str, torch.dtype, tuple[int, ...], int]] = []
        self._nbytes = 0
        self._header_bytes = 100

    def names(self) -> list[str]:
        return [name for name, *_ in self._body]

    def has_room(self, name: str, nbytes: int, max_bytes: int) -> bool:
        fits_header = self._header_bytes + self._entry_bytes(name) <= self._BODY_START - 8
        return fits_header and (self._nbytes + nbytes <= max_bytes or self._nbytes == 0)

    def add(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], nbytes: int, chunks: Iterable[Tensor]) -> None:
        file, entries = (self._ragged_file, self._ragged) if nbytes % 8 else (self._file, self._body)
        written = 0
        for chunk in chunks:
            assert chunk.dtype == dtype, f"{name}: a {chunk.dtype} chunk of a {dtype} tensor"
            buffer = bytes_of(chunk)
            for start in range(0, len(buffer), CHUNK_BYTES):
                written += file.write(buffer[start : start + CHUNK_BYTES])
        assert written == nbytes, f"{name}: {written} bytes for shape {shape} of {dtype}"
        entries.append((name, dtype, shape, nbytes))
        self._nbytes += nbytes
        self._header_bytes += self._entry_bytes(name)

    def seal(self, has_metadata: bool) -> None:
        end = self._BODY_START + sum(entry[3] for entry in self._body)
        start = 0
        moves = []
        for entry in self._ragged:
            moves.append((entry, start))
            start += entry[3]
        for entry, start in sorted(moves, key=lambda move: -move[0][1].itemsize):
            self._copy(self._ragged_file, start, self._file, end, entry[3])
            self._body.append(entry)
            end += entry[3]
        self._ragged_file.close()
        self.path.with_suffix(".ragged").unlink()

        header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if has_metadata else {}
        offset = 0
        for name, dtype, shape, nbytes in self._body:
            offsets = [offset, offset + nbytes]
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
            offset += nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        body_start = self._BODY_START
        if self._nbytes < self._COMPACT_BYTES:
            body_start = 8 + (len(text) + 7) // 8 * 8
            self._copy(self._file, self._BODY_START, self._file, body_start, self._nbytes)
            self._file.truncate(body_start + self._nbytes)
        assert 8 + len(text) <= body_start, "the header outgrew its room"
        self._file.seek(0)
        self._file.write((body_start - 8).to_bytes(8, "little") + text.ljust(body_start - 8))
        _sync(self._file)
        self._file.close()

    def abandon(self) -> None:
        for file in (self._file, self._ragged_file):
            with suppress(OSError):  # what cannot be flushed is about to be removed
                file.close()

    @staticmethod
    def _entry_bytes(name: str) -> int:
        """A bound on what a tensor adds to the header."""
        return 6 * len(name) + 60 + 20 * (MAX_DIMENSIONS + 2)

    @staticmethod
    def _copy(source: BinaryIO, start: int, target: BinaryIO, to: int, nbytes: int) -> None:
        """Copies in chunks; within one file only towards the front."""
        for done in range(0, nbytes, CHUNK_BYTES):
            source.seek(start + done)
            chunk = source.read(min(CHUNK_BYTES, nbytes - done))
            target.seek(to + done)
            target.write(chunk)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Makes renames inside a folder durable, where the system can open a folder."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
