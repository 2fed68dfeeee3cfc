"""What tests share: tiny random models in process, with transformers kept out of it where it is not the oracle."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each of the workers; before torch is imported
    os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():  # Triton's kernels are interpreted on the CPU; to be said before its first import
    os.environ["TRITON_INTERPRET"] = "1"

from saccade.kernels.library import Library, load


@pytest.fixture(params=load().supported if isinstance(load(), Library) else [])  # type: ignore[union-attr]
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of the C++ kernels that runs here, one after the other; without the library, none."""
    library = load()
    assert isinstance(library, Library)
    before = library.isa
    library.use(request.param)
    yield request.param
    library.use(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For torch: last bits depend on the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random float32 checkpoint with a working tokenizer."""
    from tests.parity.oracle import SHAPES, build

    folder = tmp_path_factory.mktemp("tiny-checkpoint")
    build(folder, SHAPES[0], seed=7)
    return folder


@pytest.fixture(scope="session")
def open_tiny(tiny_checkpoint: Path) -> Callable[..., Any]:
    """LLM over the tiny checkpoint, with options of the test's choice."""
    from saccade import LLM

    def open_with(**options: Any) -> LLM:
        return LLM(tiny_checkpoint, device="cpu", dtype="float32", **{"kv_cache_tokens": 8192, **options})

    return open_with
