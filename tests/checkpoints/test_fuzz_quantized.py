"""Descriptions of quantized checkpoints with anything in any place, and tensors of any shape: a SaccadeError or none, never another."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch

from saccade.base.errors import CheckpointError
from saccade.checkpoints import awq_gptq, compressed_tensors
from saccade.checkpoints.stored import Stored
from saccade.schemes.scheme import FP8, W4A8, W4A16_ASYM, W8A8, W8A16, Scheme, Weight
from tests.checkpoints.making import InMemory
from tests.quantized_folder import rounded

NAME = "model.layers.0.mlp.up_proj"
JUNK: list[Any] = [
    None,
    True,
    -1,
    0,
    3,
    1e300,
    "",
    "re:(",
    "int",
    [],
    [None],
    {},
    {"a": 1},
    "x" * 5000,
    float("nan"),
    1 << 70,
]
SCHEMES = [W8A16, W8A8, FP8, W4A8[32], W4A16_ASYM[32]]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, as the keys that lead there."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        found += places(child, (*path, key))
    return found


def with_junk(value: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    changed = copy.deepcopy(value)
    *parents, key = chance.choice(places(changed))
    parent = changed
    for step in parents:
        parent = parent[step]
    if chance.random() < 0.2 and isinstance(parent, dict):
        del parent[key]
    else:
        parent[key] = chance.choice(JUNK)
    return changed


def use(stored: Stored, tensors: InMemory) -> None:
    """As opening and loading do."""
    assert stored.summary
    if stored.is_quantized(NAME) and not stored.find_problems(tensors, NAME, (8, 64)):
        assert stored.read(tensors, NAME).scheme == stored.scheme(tensors, NAME)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_any_compressed_tensors_section(scheme: Scheme) -> None:
    entry = compressed_tensors.config_entry({NAME: scheme, "lm_head": W8A16})
    tensors = InMemory(compressed_tensors.write(NAME, rounded(Weight(torch.randn(8, 64)), scheme), torch.bfloat16))
    chance = random.Random(0)
    refused = 0
    for _ in range(300):
        try:
            use(compressed_tensors.parse(with_junk(entry, chance)), tensors)
        except CheckpointError:
            refused += 1
    assert 50 < refused < 300


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_any_tensors_under_a_compressed_tensors_section(scheme: Scheme) -> None:
    stored = compressed_tensors.parse(compressed_tensors.config_entry({NAME: scheme}))
    whole = compressed_tensors.write(NAME, rounded(Weight(torch.randn(8, 64)), scheme), torch.bfloat16)
    chance = random.Random(1)
    for _ in range(200):
        use_or_refuse(stored, whole, chance)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_any_awq_or_gptq_section_and_tensors(method: str) -> None:
    section = {"quant_method": method, "bits": 4, "group_size": 32, "sym": False, "version": "gemm", "zero_point": True}
    words = (64, 1) if method == "awq" else (8, 8)
    whole = {
        f"{NAME}.qweight": torch.ones(words, dtype=torch.int32),
        f"{NAME}.qzeros": torch.ones(2, 1, dtype=torch.int32),
        f"{NAME}.scales": torch.ones(2, 8),
        f"{NAME}.g_idx": torch.arange(64) // 32,
    }
    if method == "gptq":
        section["version"] = "gptq"
    use(awq_gptq.parse(section, list(whole)), InMemory(whole))
    chance = random.Random(2)
    for _ in range(200):
        changed = {**with_junk(section, chance), "quant_method": method}
        try:
            use(awq_gptq.parse(changed, list(whole)), InMemory(whole))
        except CheckpointError:
            continue
    stored = awq_gptq.parse(section, list(whole))
    for _ in range(200):
        use_or_refuse(stored, whole, chance)


def use_or_refuse(stored: Stored, whole: dict[str, torch.Tensor], chance: random.Random) -> None:
    """One tensor gone, or of another shape or type, or with other numbers."""
    tensors = dict(whole)
    name = chance.choice(list(tensors))
    dtype = chance.choice([torch.int8, torch.int32, torch.int64, torch.float32, torch.bfloat16, tensors[name].dtype])
    shape = chance.choice([(), (1,), (8,), (8, 1), (8, 64), (4, 64), (0,), (2, 2, 2), tuple(tensors[name].shape)])
    if chance.random() < 0.2:
        del tensors[name]
    else:
        number = chance.choice([0, 1, -1, 100])
        tensors[name] = torch.full(shape, number).to(dtype)
    try:
        use(stored, InMemory(tensors))
    except CheckpointError:
        return
