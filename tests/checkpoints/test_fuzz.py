"""Thousands of damaged files: the answer is always a CheckpointError, soon, and in little memory.

Seeded, so that a failure can be repeated: the case's number is in the assertion's message.
"""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from saccade.base.errors import CheckpointError
from saccade.base.meter import peak_memory_bytes
from saccade.checkpoints.config import read_config
from saccade.checkpoints.describe import describe
from saccade.checkpoints.formats import open_checkpoint
from saccade.checkpoints.shards import Shards

from .making import SMALL, random_tensors, write_checkpoint, write_sharded

MAX_CASE_S = 30.0  # of this process's own work: what takes longer hangs
MAX_GROWTH_BYTES = 200 << 20  # the headers of a config that claims 10,000 layers; its weights would be terabytes

NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 1 << 31, 1 << 60, 1 << 64, 10**300, -(1 << 63), 0.5, -0.0, 1e308, 1e-320,
    "", "x", "\ud800", "\x00", "\x1b[31m", "../../etc/passwd", "a" * 5000, [], [[]], [0], [1 << 60], [-1], [0.5], ["x"],
    [[0]] * 50, {}, {"": {}}, {"type": "yarn"}, {"rope_type": 3}, list(range(1000)), [1 << 20] * 16,
]  # fmt: skip


@contextmanager
def bounded(case: object) -> Iterator[None]:
    """Only a CheckpointError with a message of moderate length may come out, and soon."""
    start = time.process_time()
    message = ""
    try:
        yield
    except CheckpointError as error:
        message = str(error)
    except Exception as error:
        raise AssertionError(f"case {case}: {type(error).__name__}: {error}") from error
    assert len(message) < 20_000, case
    assert time.process_time() - start < MAX_CASE_S, case


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    before = peak_memory_bytes()
    yield
    assert peak_memory_bytes() - before < MAX_GROWTH_BYTES


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, removed, repeated or inserted, mostly near the front, where the header is."""
    result = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = min(int(rng.expovariate(1 / 300)), len(result) - 1) if result else 0
        action = rng.randrange(5)
        if action == 0:
            result[at : at + 1] = bytes([rng.randrange(256)])
        elif action == 1:
            result[at : at + 1] = rng.choice([b'"', b"{", b"}", b"[", b"]", b",", b":", b"-", b"9", b"e", b"\\"])
        elif action == 2:
            del result[at : at + rng.randint(1, 40)]
        elif action == 3:
            result[at:at] = result[at : at + rng.randint(1, 40)]
        else:
            del result[rng.randrange(len(result) + 1) :]
    return bytes(result)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    keys: Any = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [pair for key in keys for pair in ((value, key), *places(value[key]))]


def damaged_json(value: Any, rng: random.Random) -> Any:
    """One to three values replaced by nasty ones, removed, or moved to another name."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        spots = places(value)
        if not spots:
            break
        container, key = rng.choice(spots)
        action = rng.randrange(8)
        if action == 0:
            del container[key]
        elif action == 1 and isinstance(container, dict):
            container[rng.choice(["x", "", "__metadata__", "\ud800"])] = container.pop(key)
        elif action == 2 and type(container[key]) is int:
            container[key] += rng.choice([-1, 1, 4, 1000])
        else:
            container[key] = copy.deepcopy(rng.choice(NASTY))
    return value


def encode(value: Any) -> bytes:
    return json.dumps(value).encode()


def put(path: Path, data: bytes) -> None:
    """Writes to a new file: rewriting one in place makes some file systems flush it to the disk, thousands of times here."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def read_everything(folder: Path) -> None:
    shards = Shards(folder)
    for name in shards.names():
        shards.read(name)
        shards.check_finite(name)


def test_any_damage_to_a_header_or_body_is_refused(tmp_path: Path) -> None:
    names = ["model.norm.weight", "visual.merger.ln_q.weight", "model.layers.0.self_attn.q_proj.bias"]
    data = save({name: random_tensors()[name] for name in names}, metadata={"format": "pt"})
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    for case in range(10_000):
        rng = random.Random(case)
        if case % 2:
            file = damaged_bytes(data, rng)
        else:
            text = encode(damaged_json(header, rng))
            file = len(text).to_bytes(8, "little") + text + body
        put(tmp_path / "model.safetensors", file)
        with bounded(case):
            read_everything(tmp_path)


def test_a_header_that_claims_the_world_allocates_nothing(tmp_path: Path) -> None:
    for case in range(2000):
        rng = random.Random(case)
        shape = [1 << rng.randrange(62) for _ in range(rng.randint(1, 4))]
        end = rng.choice([8, 1 << 60, (1 << 63) - 1, shape[0] * 4])
        entry = {"dtype": rng.choice(["F32", "BF16", "I64"]), "shape": shape, "data_offsets": [0, end]}
        text = encode({"w": entry})
        claimed = len(text) if rng.random() < 0.8 else 1 << rng.randrange(64)
        put(tmp_path / "model.safetensors", claimed.to_bytes(8, "little") + text + bytes(8))
        with bounded(case):
            read_everything(tmp_path)


def test_any_damage_to_an_index_is_refused(tmp_path: Path) -> None:
    tensors = random_tensors()
    write_sharded(tmp_path, {name: tensors[name] for name in list(tensors)[:6]})
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for case in range(4000):
        rng = random.Random(case)
        put(path, damaged_bytes(encode(index), rng) if case % 2 else encode(damaged_json(index, rng)))
        with bounded(case):
            Shards(tmp_path)


FILES = ("config.json", "generation_config.json", "preprocessor_config.json")


def _open(folder: Path) -> None:
    open_checkpoint(folder)


def _describe(folder: Path) -> None:
    assert describe(folder).render()


@pytest.mark.parametrize("use", [read_config, _open, _describe], ids=["read", "open", "describe"])
def test_any_damage_to_the_configuration_is_refused(tmp_path: Path, use: Callable[[Path], object]) -> None:
    write_checkpoint(tmp_path)
    originals = {name: json.loads((tmp_path / name).read_text()) for name in FILES}
    nested = {name: value for name, value in originals["config.json"].items() if name != "vision_config"}
    originals["config.json"] = originals["config.json"] | {"text_config": nested}
    for case in range(6000 if use is read_config else 2000):
        rng = random.Random(case)
        name = FILES[case % 3 if case % 4 else 0]
        original = originals[name]
        if name == "config.json" and case % 8 < 4:
            original = {key: value for key, value in original.items() if key != "text_config"}
        text = damaged_bytes(encode(original), rng) if case % 5 == 0 else encode(damaged_json(original, rng))
        put(tmp_path / name, text)
        with bounded(case):
            use(tmp_path)
        put(tmp_path / name, encode(originals[name]))


@pytest.mark.parametrize("use", [_open, _describe], ids=["open", "describe"])
def test_a_config_that_claims_ten_thousand_layers_is_answered_soon(
    tmp_path: Path, use: Callable[[Path], object]
) -> None:
    write_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["depth"] = config["num_hidden_layers"] = 10_000
    put(tmp_path / "config.json", encode(config))
    with bounded("10,000 layers"):
        use(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    field=st.sampled_from(["vision_config", "rope_scaling", "eos_token_id", "architectures", "torch_dtype"]), value=JSON
)
def test_any_json_in_the_place_of_a_field_is_read_or_refused(tmp_path: Path, field: str, value: Any) -> None:
    folder = tmp_path / "checkpoint"
    if not folder.exists():
        write_checkpoint(folder)
        (folder / "original.json").write_bytes((folder / "config.json").read_bytes())
    original = json.loads((folder / "original.json").read_text())
    put(folder / "config.json", encode({**original, field: value}))
    with bounded(value):
        assert read_config(folder).text.vocab_size == SMALL.text.vocab_size


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300))
def test_any_bytes_in_the_place_of_a_file_are_refused(tmp_path: Path, data: bytes) -> None:
    put(tmp_path / "model.safetensors", data)
    with bounded(data):
        read_everything(tmp_path)
    put(tmp_path / "config.json", data)
    with pytest.raises(CheckpointError):
        read_config(tmp_path)
