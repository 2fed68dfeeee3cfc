"""Tensors by name out of safetensors files.

Knows the safetensors format, the shard index and the file system; knows no model: names are opaque here.
Opening reads headers only. A body is read once, straight into the memory it is meant for, or used where it lies, mapped.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import stat
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade.base.errors import CheckpointError
from saccade.checkpoints.json_file import parse_json, printable, read_json

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_INDEX_BYTES = 64 << 20
MAX_DIMENSIONS = 16
CHUNK_BYTES = 16 << 20  # what a conversion, a check or a copy holds at a time
MADV_POPULATE_READ = 22  # Linux 5.14: puts pages in place, and says so if it cannot; Python has no name for it

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
        self._mapped: dict[Path, tuple[mmap.mmap, Tensor]] = {}
        self._bytes_read = 0
        self._lock = threading.Lock()
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
                self._fill(file, info, start, bytes_of(out))
                return
            unit_bytes = info.dtype.itemsize if in_order else row_bytes
            for chunk, first_value in self._chunks(file, info, start, (last - first) * row_bytes, unit_bytes):
                if in_order:
                    out.view(-1)[first_value : first_value + chunk.numel()].copy_(chunk)
                else:
                    block = chunk.view(-1, *info.shape[1:])
                    row = first_value * info.dtype.itemsize // row_bytes
                    out[row : row + len(block)].copy_(block if columns is None else block[:, left:right])

    def lie_together(self, names: Sequence[str]) -> bool:
        """Whether the rows of these tensors follow each other in one file, in this order, where their type may lie in memory."""
        first, *_ = infos = [self.info(name) for name in names]
        return (
            first.offset % first.dtype.itemsize == 0
            and first.numel > 0
            and first.shape != ()
            and all(
                (after.file, after.offset) == (before.file, before.offset + before.nbytes)
                and (after.dtype, after.shape[1:]) == (before.dtype, before.shape[1:])
                for before, after in pairwise(infos)
            )
        )

    def mapped(self, names: Sequence[str]) -> Tensor:
        """The rows of tensors that lie together as one tensor, where they lie: nothing is copied.

        Its memory is the system's cache of the file, shared with whoever else maps it, for as long as the tensor lives; pages that
        are written to become this process's own. All of it is there when this returns (Linux 5.14 and later). A file that is
        overwritten later changes the tensor; one that is cut short ends the process where it is read.
        """
        assert self.lie_together(names), f"{', '.join(names)} do not lie together"
        first, last = self.info(names[0]), self.info(names[-1])
        end = last.offset + last.nbytes
        with self._open(first) as file, self._lock:
            if first.file not in self._mapped:
                memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                self._mapped[first.file] = memory, torch.frombuffer(memory, dtype=torch.uint8)
            memory, whole = self._mapped[first.file]
            self._bytes_read += end - first.offset
        if sys.platform == "linux":
            page = first.offset // mmap.PAGESIZE * mmap.PAGESIZE
            try:
                memory.madvise(MADV_POPULATE_READ, page, end - page)
            except OSError as error:
                if error.errno != errno.EINVAL:  # of an older kernel, where pages come when they are touched
                    where = f"{', '.join(names)} cannot be read from {first.file}"
                    raise CheckpointError(f"{where}: {error.strerror or error}; fetch the file again") from error
        rows = sum(self.info(name).shape[0] for name in names)
        return whole[first.offset : end].view(first.dtype).view(rows, *first.shape[1:])

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
        with self._lock:
            self._bytes_read += done

    def _chunks(
        self, file: FileIO, info: TensorInfo, start: int, nbytes: int, unit_bytes: int
    ) -> Iterator[tuple[Tensor, int]]:
        """Flat pieces of `nbytes` from `start` with the index of their first value, in whole units of `unit_bytes`."""
        step = max(1, CHUNK_BYTES // unit_bytes) * unit_bytes
        scratch = torch.empty(min(step, nbytes) // info.dtype.itemsize, dtype=info.dtype)
        buffer = bytes_of(scratch)
        for done in range(0, nbytes, step):
            size = min(step, nbytes - done)
            self._fill(file, info, start + done, buffer[:size])
            yield scratch[: size // info.dtype.itemsize], done // info.dtype.itemsize


def _bounds(selection: slice | None, length: int) -> tuple[int, int]:
    first, last, step = (selection or slice(None)).indices(length)
    assert (step, first <= last) == (1, True), f"{selection} is not an ascending range"
    return first, last


def bytes_of(tensor: Tensor) -> memoryview:
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
