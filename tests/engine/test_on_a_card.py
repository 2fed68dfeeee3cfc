"""What holds for a model on a GPU, as far as that can be told without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from saccade.base.errors import DeviceError
from saccade.engine.runner import Runner, within_memory

CARD = torch.device("cuda", 1)


@pytest.mark.parametrize("method", ["embed_media", "run", "begin", "launch", "head"])
def test_a_call_makes_the_models_card_the_current_one_and_says_when_it_is_full(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Triton launches on the current device of the thread that calls, whatever device its tensors are on."""
    current: list[torch.device] = []
    seen: list[torch.device] = []

    class Full:
        def __getattr__(self, name: str) -> Any:
            seen.extend(current)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore")

    @contextmanager
    def become(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", become)
    runner = Runner.__new__(Runner)
    runner.model, runner.graphs = SimpleNamespace(device=CARD, head=None), Full()  # type: ignore[assignment]
    runner.encoder_cache = Full()  # type: ignore[assignment]
    arguments = {"embed_media": ([Full()],), "launch": (Full(), [])}.get(method, (Full(), ()))
    options = {"is_first": True} if method == "launch" else {}
    with pytest.raises(
        DeviceError, match=r"cuda:1 has .*\(CUDA out of memory. Tried to allocate 20 GiB.\); compute less"
    ):
        getattr(runner, method)(*arguments, **options)
    assert seen == [CARD]


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="illegal"), within_memory(CARD, "buy a larger one"):
        raise RuntimeError("illegal memory access")
