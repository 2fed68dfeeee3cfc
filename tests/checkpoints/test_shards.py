"""Reading tensors by name: what is read, when, into which memory, and what is refused."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from saccade.base.errors import CheckpointError
from saccade.checkpoints import shards as shards_module
from saccade.checkpoints.shards import Shards

from .making import write_json, write_raw, write_sharded

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int64, torch.bool]


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {str(dtype): torch.randn(5, 7, generator=generator).mul(50).to(dtype) for dtype in DTYPES}
    return tensors | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "deep": torch.randn(2, 3, 4, 5)}


def one_tensor(folder: Path, tensor: Tensor) -> Shards:
    save_file({"w": tensor}, folder / "model.safetensors")
    return Shards(folder)


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def test_what_the_safetensors_library_writes_is_read_bit_for_bit(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shards = Shards(tmp_path)
    assert set(shards.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert shards.read(name).dtype == tensor.dtype
        assert torch.equal(shards.read(name), tensor)


@pytest.mark.parametrize("has_index", [True, False])
def test_shards_are_read_with_and_without_an_index(tmp_path: Path, has_index: bool) -> None:
    tensors = some_tensors()
    write_sharded(tmp_path, tensors)
    if not has_index:
        (tmp_path / "model.safetensors.index.json").unlink()
    shards = Shards(tmp_path)
    assert len(shards.files) == 3
    assert all(torch.equal(shards.read(name), tensor) for name, tensor in tensors.items())


def test_opening_reads_headers_only_and_a_row_reads_only_itself(tmp_path: Path) -> None:
    """A file of 64 GB, sparse on the disk: the bytes read are counted, not timed."""
    rows, columns = 1 << 20, 1 << 15
    header = {"w": {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [0, rows * columns * 2]}}
    path = write_raw(tmp_path / "model.safetensors", header)
    header_bytes = path.stat().st_size
    os.truncate(path, header_bytes + rows * columns * 2)
    shards = Shards(tmp_path)
    assert shards.bytes_read == header_bytes
    out = torch.ones(1, columns, dtype=torch.bfloat16)
    shards.read_into("w", out, rows=slice(rows - 1, rows))
    assert not out.any()
    assert shards.bytes_read == header_bytes + columns * 2


def test_a_tensor_is_read_into_the_memory_it_is_given(tmp_path: Path) -> None:
    tensor = torch.randn(6, 4)
    shards = one_tensor(tmp_path, tensor)
    out = torch.zeros(6, 4)
    pointer = out.data_ptr()
    shards.read_into("w", out)
    assert out.data_ptr() == pointer
    assert torch.equal(out, tensor)


def test_reading_takes_the_memory_of_the_tensor_once(tmp_path: Path) -> None:
    """256 MB into place, converted to another type, and checked: the process grows by the results and chunks of 16 MiB."""
    size = 64 << 20
    path = write_raw(
        tmp_path / "model.safetensors", {"w": {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}}
    )
    os.truncate(path, path.stat().st_size + 4 * size)
    program = f"""
import torch
from pathlib import Path
from saccade.base.meter import current_rss_bytes, peak_memory_bytes
from saccade.checkpoints.shards import Shards
shards = Shards(Path({str(tmp_path)!r}))
torch.isfinite(torch.ones(1 << 22)).all()
before = current_rss_bytes()
out = shards.read("w")
print(peak_memory_bytes() - before)
del out
half = torch.empty({size}, dtype=torch.bfloat16)
shards.read_into("w", half)
shards.check_finite("w")
print(peak_memory_bytes() - before)
"""
    lines = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert int(lines[0]) < 4 * size * 1.05
    assert int(lines[1]) < 4 * size * 1.05


@pytest.mark.parametrize("chunk_bytes", [16 << 20, 64, 1])
def test_any_rows_columns_types_and_strides_are_as_if_the_whole_were_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(shards_module, "CHUNK_BYTES", chunk_bytes)
    tensor = torch.randn(9, 8, 3).bfloat16()
    shards = one_tensor(tmp_path, tensor)
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for rows in (None, slice(0, 9), slice(2, 5), slice(8, None), slice(4, 4)):
            for columns in (None, slice(1, 7), slice(0, 1)):
                expected = tensor[rows or slice(None), columns or slice(None)].to(dtype)
                narrow = torch.empty(expected.shape, dtype=dtype)
                shards.read_into("w", narrow, rows, columns)
                assert torch.equal(narrow, expected)
                wide = torch.full((len(expected), expected.shape[1] + 2, 3), 9.0, dtype=dtype)
                shards.read_into("w", wide[:, 1:-1], rows, columns)
                assert torch.equal(wide[:, 1:-1], expected)
                assert bool((wide[:, 0] == 9).all())


def test_threads_may_read_at_once(tmp_path: Path) -> None:
    tensors = {str(number): torch.full((1000,), float(number)) for number in range(50)}
    shards = Shards(write_sharded(tmp_path, tensors))
    with ThreadPoolExecutor(8) as pool:
        for name, tensor in zip(tensors, pool.map(shards.read, tensors), strict=True):
            assert torch.equal(tensor, tensors[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e5m2])
@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "an infinity")])
def test_a_value_that_is_not_finite_is_found_and_placed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, value: float, word: str
) -> None:
    monkeypatch.setattr(shards_module, "CHUNK_BYTES", 64)
    good, bad = torch.ones(9, 8), torch.ones(9, 8)
    bad[7, 3] = value
    save_file({"good": good.to(dtype), "bad": bad.to(dtype)}, tmp_path / "model.safetensors")
    shards = Shards(tmp_path)
    shards.check_finite("good")
    with pytest.raises(CheckpointError, match=rf"bad in .*model\.safetensors holds {word} at \[7, 3\]"):
        shards.check_finite("bad")


def test_a_truncated_file_is_refused_with_the_tensor_that_is_cut(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100), "b": torch.ones(50)}, tmp_path / "model.safetensors")
    os.truncate(tmp_path / "model.safetensors", (tmp_path / "model.safetensors").stat().st_size - 10)
    with pytest.raises(CheckpointError, match=r"b in .*model\.safetensors lies in bytes .* truncated"):
        Shards(tmp_path)


def test_a_file_truncated_after_opening_is_refused_with_the_tensor(tmp_path: Path) -> None:
    shards = one_tensor(tmp_path, torch.ones(100))
    os.truncate(tmp_path / "model.safetensors", 200)
    with pytest.raises(CheckpointError, match=r"model\.safetensors changed after it was opened, while reading w"):
        shards.read("w")


def test_a_file_cut_while_it_is_read_is_refused_with_the_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = one_tensor(tmp_path, torch.ones(100))
    os.truncate(tmp_path / "model.safetensors", 200)
    monkeypatch.setattr(shards_module, "_stamp", lambda status: shards._stamps[tmp_path / "model.safetensors"])
    with pytest.raises(CheckpointError, match=r"model\.safetensors ends at byte 200, inside w"):
        shards.read("w")


def test_a_file_that_vanished_is_refused_with_the_tensor(tmp_path: Path) -> None:
    shards = one_tensor(tmp_path, torch.ones(100))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"w cannot be read from .*model\.safetensors: No such file"):
        shards.read("w")


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({**GOOD, "data_offsets": [0, 80]}, "has 80 bytes, and F32 of shape"),
        ({**GOOD, "data_offsets": [8, 16]}, "lies in bytes .* truncated or damaged"),
        ({**GOOD, "data_offsets": [-8, 0]}, "has the data_offsets"),
        ({**GOOD, "data_offsets": [8, 0]}, "has the data_offsets"),
        ({**GOOD, "data_offsets": [0, 8, 8]}, "has the data_offsets"),
        ({**GOOD, "data_offsets": [0, 8.0]}, "has the data_offsets"),
        ({**GOOD, "shape": [1 << 60]}, "has 8 bytes, and F32 of shape"),
        ({**GOOD, "shape": [1 << 62, 1 << 62]}, "has 8 bytes, and F32 of shape"),
        ({**GOOD, "shape": [1 << 64]}, "has the shape"),
        ({**GOOD, "shape": [-1, -2]}, "has the shape"),
        ({**GOOD, "shape": [True, 2]}, "has the shape"),
        ({**GOOD, "shape": 2}, "has the shape"),
        ({**GOOD, "shape": [1] * 17}, "has the shape"),
        ({**GOOD, "dtype": "F31"}, "has the dtype F31; known are BOOL"),
        ({**GOOD, "dtype": ["F32"]}, "has the dtype"),
        ({"dtype": "F32", "shape": [2]}, "lacks dtype, shape or data_offsets"),
        ([], "lacks dtype, shape or data_offsets"),
    ],
)
def test_a_damaged_entry_is_refused_with_tensor_and_file(tmp_path: Path, entry: object, message: str) -> None:
    write_raw(tmp_path / "model.safetensors", {"w": entry}, bytes(8))
    with pytest.raises(CheckpointError, match=rf"w in .*model\.safetensors {message}"):
        Shards(tmp_path)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([0, 8], [4, 12], "overlapping"),
        ([0, 8], [0, 8], "overlapping"),
        ([0, 8], [12, 20], "leaving a gap"),
    ],
)
def test_tensors_that_overlap_or_leave_gaps_are_refused(
    tmp_path: Path, first: list[int], second: list[int], message: str
) -> None:
    header = {"v": {**GOOD, "data_offsets": first}, "w": {**GOOD, "data_offsets": second}}
    write_raw(tmp_path / "model.safetensors", header, bytes(20))
    with pytest.raises(CheckpointError, match=rf"w in .*model\.safetensors lies in bytes .*{message}"):
        Shards(tmp_path)


def test_bytes_after_the_last_tensor_are_refused(tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", {"w": GOOD}, bytes(9))
    with pytest.raises(CheckpointError, match=r"model\.safetensors has \d+ bytes and its tensors end at"):
        Shards(tmp_path)


@pytest.mark.parametrize(
    "data",
    [b"", b"1234567", b"\xff" * 8, (1 << 62).to_bytes(8, "little") + b"{}", (3).to_bytes(8, "little") + b"{}"],
)
def test_a_file_that_is_no_safetensors_is_refused_by_name(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors .*fetch it again"):
        Shards(tmp_path)


@pytest.mark.parametrize("header", [b"[]", b"{", b"\xff\xfe", b'{"w": NaN}', b'{"w": 1, "w": 2}', b"[" * 100_000])
def test_a_header_that_is_no_json_object_is_refused_by_name(tmp_path: Path, header: bytes) -> None:
    write_raw(tmp_path / "model.safetensors", header)
    with pytest.raises(CheckpointError, match=r"the header of .*model\.safetensors "):
        Shards(tmp_path)


def test_an_index_that_names_an_absent_file_is_refused_with_tensor_and_file(tmp_path: Path) -> None:
    write_sharded(tmp_path, some_tensors())
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"model-00002-of-00003\.safetensors does not exist, .* says it holds torch"
    ):
        Shards(tmp_path)


def test_an_index_that_misplaces_a_tensor_is_refused_with_tensor_and_file(tmp_path: Path) -> None:
    write_sharded(tmp_path, some_tensors())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00003.safetensors"
    write_json(tmp_path / "model.safetensors.index.json", index)
    with pytest.raises(CheckpointError, match=r"ghost is not in .*model-00001-of-00003\.safetensors, where"):
        Shards(tmp_path)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.bin", ".safetensors", 7, None]
)
def test_an_index_cannot_point_out_of_its_folder_or_at_other_files(tmp_path: Path, name: object) -> None:
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"w": name}})
    with pytest.raises(CheckpointError, match=r"index\.json: w lies in .*, which is not a plain file name"):
        Shards(tmp_path)


def test_a_tensor_in_two_files_without_an_index_is_refused_with_both(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"w": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"w is both in .*a\.safetensors and in .*b\.safetensors"):
        Shards(tmp_path)


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "executed"),))

    torch.save({"w": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pickled weights \(pytorch_model\.bin\), which are never loaded"):
        Shards(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors file"):
        Shards(tmp_path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a regular file"):
        Shards(tmp_path)


# --- where they lie ----------------------------------------------------------------------------------------------------


def neighbours(folder: Path) -> Shards:
    """`a` and `b` follow each other; `c` has other columns, `d` another type, and `odd` begins where no float32 may."""
    floats, bytes_ = {"a": [2, 3], "b": [1, 3], "c": [1, 2]}, {"d": [2, 2], "e": [1, 2]}
    header, start = {}, 0
    for name, shape in (floats | bytes_ | {"odd": [2]}).items():
        end = start + math.prod(shape) * (1 if name in bytes_ else 4)
        dtype = "I8" if name in bytes_ else "F32"
        header[name], start = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}, end
    write_raw(folder / "model.safetensors", header, bytes(range(start)))
    return Shards(folder)


@pytest.mark.parametrize(
    ("names", "expected"),
    [(names, True) for names in ("a", "ab", "de")] + [(names, False) for names in ("ba", "ac", "bc", "cd", "abc")],
)
def test_tensors_lie_together_when_they_follow_each_other_and_are_alike(
    tmp_path: Path, names: str, expected: bool
) -> None:
    assert neighbours(tmp_path).lie_together(list(names)) == expected


def test_a_tensor_at_an_address_that_its_type_cannot_have_is_not_used_where_it_lies(tmp_path: Path) -> None:
    assert not neighbours(tmp_path).lie_together(["odd"])


def test_what_is_mapped_equals_what_is_read_in_memory_of_the_file(tmp_path: Path) -> None:
    shards = neighbours(tmp_path)
    both, again = shards.mapped(["a", "b"]), shards.mapped(["b"])
    assert torch.equal(both, torch.cat([shards.read("a"), shards.read("b")]))
    assert again.data_ptr() == both[2].data_ptr()
    assert both.untyped_storage().nbytes() == (tmp_path / "model.safetensors").stat().st_size


def test_writing_into_what_is_mapped_leaves_the_file_alone(tmp_path: Path) -> None:
    shards = neighbours(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    shards.mapped(["a"]).fill_(7)
    assert (tmp_path / "model.safetensors").read_bytes() == content
    assert bool((shards.mapped(["a"]) == 7).all())


def test_what_is_mapped_outlives_the_reader_and_the_file(tmp_path: Path) -> None:
    expected = neighbours(tmp_path).read("a")
    tensor = neighbours(tmp_path).mapped(["a"])
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(tensor, expected)


def test_a_file_that_changed_is_not_mapped(tmp_path: Path) -> None:
    shards = neighbours(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 100)
    with pytest.raises(CheckpointError, match="changed after it was opened"):
        shards.mapped(["a"])


@pytest.mark.skipif(sys.platform != "linux", reason="pages are put in place by a call that Linux has")
def test_a_mapped_file_that_was_cut_short_is_an_error_not_the_end_of_the_process(tmp_path: Path) -> None:
    size = 1 << 20
    header = {"a": {"dtype": "I8", "shape": [16], "data_offsets": [0, 16]}}
    header["b"] = {"dtype": "I8", "shape": [size], "data_offsets": [16, 16 + size]}
    path = write_raw(tmp_path / "model.safetensors", header)
    os.truncate(path, path.stat().st_size + 16 + size)
    shards = Shards(tmp_path)
    shards.mapped(["a"])
    status = path.stat()
    os.truncate(path, 4096)
    # As if it were cut between the check and the use.
    shards._stamps[path] = (status.st_ino, 4096, path.stat().st_mtime_ns)
    with pytest.raises(CheckpointError, match=r"b cannot be read from .*: Bad address; fetch the file"):
        shards.mapped(["b"])
