"""For every test here, one thread: bits depend on their number, and small tensors gain nothing from more. And a small checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint whose columns groups of 32 divide, in bfloat16."""
    from tests.parity.oracle import Shape, build

    folder = tmp_path_factory.mktemp("small")
    shape = Shape("small", hidden=64, heads=4, kv_heads=2, vision_hidden=64, vision_heads=2, vision_intermediate=96)
    build(folder, shape, seed=3, dtype=torch.bfloat16)
    return folder
