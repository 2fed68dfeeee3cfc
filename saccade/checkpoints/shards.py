"""Tensors by name out of safetensors files, and back into them.

Knows the safetensors format, the shard index and the file system; knows no model: names are opaque here.
Opening reads headers only. A body is read once, straight into the memory it is meant for; nothing is mapped.
Writing happens in a hidden sibling folder that takes the visible name when it is complete.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from saccade.base.errors import CheckpointError
from saccade.checkpoints.json_file import parse_json, printable, read_json

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_INDEX_BYTES = 64 << 20
MAX_DIMENSIONS = 16
CHUNK_BYTES = 16 << 20  # what a conversion, a check or a copy holds at a time
DEFAULT_SHARD_BYTES = 5_000_000_000  # the habit of published checkpoints

# The format's name of each type torch has.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. `name` is the file's own; `offset` counts from the start of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Shards:
    """The tensors of one folder, read lazily and from any thread.

    `model.safetensors` if there is one, else the shards of the folder's `*.safetensors.index.json`, else every
    `*.safetensors`. Raises CheckpointError, naming file and tensor, for anything malformed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tensors: dict[str, TensorInfo] = {}
        self._stamps: dict[Path, tuple[int, int, int]] = {}  # inode, size, time: the file the header was read from
        self._bytes_read = 0
        self._count = threading.Lock()
        single = folder / "model.safetensors"
        indexes = sorted(folder.glob("*.safetensors.index.json"))
        if single.exists():
            self._add_files([single])
        elif len(indexes) > 1:
            names = ", ".join(path.name for path in indexes)
            raise CheckpointError(f"{folder} holds several indexes ({names}); keep the one that belongs to its shards")
        elif indexes:
            self._add_indexed(indexes[0])
        else:
            self._add_files(self._loose_files())

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(self._stamps)

    @property
    def bytes_read(self) -> int:
        """Bytes read from the files so far, headers included."""
        return self._bytes_read

    def names(self) -> list[str]:
        return list(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise CheckpointError(f"no tensor {name} in {self.folder}")
        return self._tensors[name]

    def read(self, name: str) -> Tensor:
        """The tensor in new memory of exactly its size."""
        info = self.info(name)
        out = torch.empty(info.shape, dtype=info.dtype)
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: Tensor, rows: slice | None = None, columns: slice | None = None) -> None:
        """Fills `out` with the tensor, or with its `rows` (of dimension 0) and `columns` (of dimension 1).

        Only the chosen rows are read. A contiguous `out` on the CPU of the file's type, all columns wanted, is filled in
        place; in any other case (another type, device or stride, or some columns) chunks of CHUNK_BYTES pass between.
        """
        info = self.info(name)
        num_rows = info.shape[0] if info.shape else 1
        first, last = _bounds(rows, num_rows)
        assert columns is None or len(info.shape) > 1, f"{name} of shape {info.shape} has no columns"
        left, right = _bounds(columns, info.shape[1] if len(info.shape) > 1 else 1)
        in_order = columns is None and out.is_contiguous()
        shape = info.shape if rows is None else (last - first, *info.shape[1:])
        shape = shape if columns is None else (shape[0], right - left, *shape[2:])
        assert tuple(out.shape) == shape, f"{name}: out has shape {tuple(out.shape)}, the selection {shape}"
        assert out.dtype.is_floating_point == info.dtype.is_floating_point, f"{name}: {info.dtype} into {out.dtype}"
        out = out.detach()
        if out.numel() == 0:
            return
        row_bytes = info.nbytes // num_rows
        start = info.offset + first * row_bytes
        with self._open(info) as file:
            if in_order and out.dtype == info.dtype and out.device.type == "cpu":
                self._fill(file, info, start, _bytes_of(out))
                return
            unit_bytes = info.dtype.itemsize if in_order else row_bytes
            for chunk, first_value in self._chunks(file, info, start, (last - first) * row_bytes, unit_bytes):
                if in_order:
                    out.view(-1)[first_value : first_value + chunk.numel()].copy_(chunk)
                else:
                    block = chunk.view(-1, *info.shape[1:])
                    row = first_value * info.dtype.itemsize // row_bytes
                    out[row : row + len(block)].copy_(block if columns is None else block[:, left:right])

    def check_finite(self, name: str) -> None:
        """Reads the tensor in chunks. Raises CheckpointError naming tensor, file and place of the first NaN or infinity."""
        info = self.info(name)
        if not info.dtype.is_floating_point or info.numel == 0:
            return
        with self._open(info) as file:
            for chunk, first_value in self._chunks(file, info, info.offset, info.nbytes, info.dtype.itemsize):
                values = chunk.float() if info.dtype.itemsize == 1 else chunk
                bad = ~torch.isfinite(values)
                if bool(bad.any()):
                    position = int(bad.view(torch.uint8).argmax())
                    place = torch.unravel_index(torch.tensor(first_value + position), info.shape)
                    what = "NaN" if bool(values[position].isnan()) else "an infinity"
                    raise CheckpointError(
                        f"{name} in {info.file} holds {what} at {[int(index) for index in place]}; the file is damaged, "
                        "fetch it again"
                    )

    def _loose_files(self) -> list[Path]:
        files = sorted(self.folder.glob("*.safetensors"))
        if files:
            return files
        pickled = sorted([*self.folder.glob("*.bin"), *self.folder.glob("*.pt"), *self.folder.glob("*.pth")])
        if pickled:
            raise CheckpointError(
                f"{self.folder} holds only pickled weights ({pickled[0].name}), which are never loaded because unpickling "
                "runs code from the file; convert them to safetensors with transformers' save_pretrained, on a machine "
                "that may run that code"
            )
        raise CheckpointError(f"{self.folder} holds no *.safetensors file; was the download complete?")

    def _add_files(self, files: Iterable[Path]) -> None:
        for path in files:
            for info in self._read_header(path).values():
                if (other := self._tensors.get(info.name)) is not None:
                    raise CheckpointError(
                        f"{info.name} is both in {other.file} and in {path}; keep one, or add an index"
                    )
                self._tensors[info.name] = info

    def _add_indexed(self, index: Path) -> None:
        weight_map = read_json(index, MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index} holds no weight_map object")
        headers: dict[str, dict[str, TensorInfo]] = {}
        for name, file_name in weight_map.items():
            if not isinstance(file_name, str) or not _is_plain_file_name(file_name):
                raise CheckpointError(
                    f"{index}: {printable(name)} lies in {printable(file_name)}, which is not a plain file name"
                )
            path = self.folder / file_name
            if file_name not in headers:
                if not path.exists():
                    raise CheckpointError(
                        f"{path} does not exist, and {index.name} says it holds {printable(name)}; fetch it"
                    )
                headers[file_name] = self._read_header(path)
            if name not in headers[file_name]:
                raise CheckpointError(f"{printable(name)} is not in {path}, where {index.name} says it is")
            self._tensors[name] = headers[file_name][name]

    def _read_header(self, path: Path) -> dict[str, TensorInfo]:
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path} is not a regular file")
            self._stamps[path] = _stamp(status)
            if status.st_size < 8:
                raise CheckpointError(
                    f"{path} has {status.st_size} bytes, too few for a safetensors file; fetch it again"
                )
            with path.open("rb", buffering=0) as file:
                length = int.from_bytes(file.read(8), "little")
                if length > min(MAX_HEADER_BYTES, status.st_size - 8):
                    raise CheckpointError(
                        f"{path} claims a header of {length} bytes and has {status.st_size} in all (the format allows "
                        f"{MAX_HEADER_BYTES}); it is damaged or no safetensors file, fetch it again"
                    )
                text = file.read(length)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        self._bytes_read += 8 + len(text)
        return _parse_header(text, path, status.st_size)

    @contextmanager
    def _open(self, info: TensorInfo) -> Iterator[FileIO]:
        """A reader of the tensor's file, refused if it is no longer the file whose header was read."""
        try:
            with info.file.open("rb", buffering=0) as file:
                if _stamp(os.fstat(file.fileno())) != self._stamps[info.file]:
                    raise CheckpointError(
                        f"{info.file} changed after it was opened, while reading {info.name}; open it again"
                    )
                yield file
        except OSError as error:
            raise CheckpointError(f"{info.name} cannot be read from {info.file}: {error.strerror or error}") from error

    def _fill(self, file: FileIO, info: TensorInfo, offset: int, buffer: memoryview) -> None:
        """Reads at `offset` until `buffer` is full; the kernel may return less than asked, at 2 GiB for one."""
        file.seek(offset)
        done = 0
        while done < len(buffer):
            count = file.readinto(buffer[done:])
            if not count:
                raise CheckpointError(
                    f"{info.file} ends at byte {offset + done}, inside {info.name}, which lies in bytes {info.offset} to "
                    f"{info.offset + info.nbytes}; the file was truncated, fetch it again"
                )
            done += count
        with self._count:
            self._bytes_read += done

    def _chunks(
        self, file: FileIO, info: TensorInfo, start: int, nbytes: int, unit_bytes: int
    ) -> Iterator[tuple[Tensor, int]]:
        """Flat pieces of `nbytes` from `start` with the index of their first value, in whole units of `unit_bytes`."""
        step = max(1, CHUNK_BYTES // unit_bytes) * unit_bytes
        scratch = torch.empty(min(step, nbytes) // info.dtype.itemsize, dtype=info.dtype)
        buffer = _bytes_of(scratch)
        for done in range(0, nbytes, step):
            size = min(step, nbytes - done)
            self._fill(file, info, start + done, buffer[:size])
            yield scratch[: size // info.dtype.itemsize], done // info.dtype.itemsize


def _bounds(selection: slice | None, length: int) -> tuple[int, int]:
    first, last, step = (selection or slice(None)).indices(length)
    assert (step, first <= last) == (1, True), f"{selection} is not an ascending range"
    return first, last


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return (status.st_ino, status.st_size, status.st_mtime_ns)


def _is_plain_file_name(name: str) -> bool:
    return (
        name.endswith(".safetensors")
        and name.isprintable()
        and not name.startswith(".")
        and not set("/\\:") & set(name)
    )


def _parse_header(text: bytes, path: Path, file_bytes: int) -> dict[str, TensorInfo]:
    """The tensors a header describes. They must cover the file's body exactly, as the format demands."""
    header = parse_json(text, f"the header of {path}")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"the __metadata__ of {path} is not an object of strings")
    base = 8 + len(text)
    tensors = {name: _parse_tensor(name, entry, path, base) for name, entry in header.items()}
    end = base
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        where = f"{printable(info.name)} in {path} lies in bytes {info.offset} to {info.offset + info.nbytes}"
        if info.offset + info.nbytes > file_bytes:
            raise CheckpointError(
                f"{where}, and the file has {file_bytes}; it was truncated or damaged, fetch it again"
            )
        if info.offset != end:
            fault = "overlapping the tensor before it" if info.offset < end else f"leaving a gap after byte {end}"
            raise CheckpointError(f"{where}, {fault}; the header is damaged, fetch the file again")
        end = info.offset + info.nbytes
    if end != file_bytes:
        raise CheckpointError(
            f"{path} has {file_bytes} bytes and its tensors end at {end}; it is damaged, fetch it again"
        )
    return tensors


def _parse_tensor(name: str, entry: Any, path: Path, base: int) -> TensorInfo:
    where = f"{printable(name)} in {path}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(
            f"{where} lacks dtype, shape or data_offsets; the header is damaged, fetch the file again"
        )
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(f"{where} has the dtype {printable(entry['dtype'])}; known are {', '.join(DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _is_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(
            f"{where} has the shape {printable(shape)}; at most {MAX_DIMENSIONS} sizes from 0 are expected"
        )
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{where} has the data_offsets {printable(offsets)}; an ascending pair from 0 is expected"
        )
    nbytes = offsets[1] - offsets[0]
    if nbytes != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{where} has {nbytes} bytes, and {entry['dtype']} of shape {shape} needs another number")
    return TensorInfo(name, dtype, tuple(shape), path, base + offsets[0], nbytes)


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


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
    Raises CheckpointError for that and for a disk that refuses.
    """

    def __init__(
        self,
        folder: Path,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        *,
        force: bool = False,
        names: FileNames | None = None,
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
        self._hidden = self.folder.parent / f".{self.folder.name}.{secrets.token_hex(4)}.partial"
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

    def close(self) -> None:
        """Completes the shards and their index, and gives the folder its name."""
        try:
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
            raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error


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
            buffer = _bytes_of(chunk)
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
