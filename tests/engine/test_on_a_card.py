"""What holds for a model on a GPU, as far as that can be told without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from saccade import LLM
from saccade.base.errors import DeviceError
from saccade.engine.graphs import Cuda
from saccade.engine.runner import Runner, kernels_named, within_memory
from saccade.model import qwen2_5_vl
from tests.engine.test_engine import conversation

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


def test_a_kernel_that_triton_cannot_run_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = pytest.importorskip("triton.runtime.errors")
    triton_rows = pytest.importorskip("saccade.kernels.triton_rows")

    def launch(kernel: Any, grid: Any) -> Any:
        raise errors.OutOfResources(300_000, 101_376, "shared memory")

    monkeypatch.setattr(type(triton_rows._rms_norm), "__getitem__", launch)
    x = torch.zeros(1, 16)
    with pytest.raises(DeviceError, match=r"kernel of norm_rows .* cuda:1 .*300000.*'reference'"), kernels_named(CARD):
        triton_rows.rms_norm(x, x[0], 1e-6)
    with pytest.raises(ZeroDivisionError), kernels_named(CARD):
        raise ZeroDivisionError


class Cards:
    """torch.cuda as far as `Cuda` uses it: a list of what was done on which stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.streams = ["default"]
        for name in (
            "current_stream",
            "graph_pool_handle",
            "Stream",
            "CUDAGraph",
            "device",
            "stream",
            "graph",
            "Event",
        ):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)

    def current_stream(self, device: torch.device) -> Any:
        assert device == CARD
        return self.Stream(device, self.streams[-1])

    def graph_pool_handle(self) -> tuple[int, int]:
        return (0, 1)

    def Stream(self, device: torch.device, name: str = "side") -> Any:
        return SimpleNamespace(name=name, wait_stream=lambda other: self.done.append(f"{name} waits for {other.name}"))

    def CUDAGraph(self) -> Any:
        return SimpleNamespace(replay=lambda: self.done.append("replayed"))

    def Event(self) -> Any:
        return SimpleNamespace(
            record=lambda stream: self.done.append(f"marked on {stream.name}"), synchronize=lambda: None
        )

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        yield

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.streams.append(stream.name)
        try:
            yield
        finally:
            self.streams.pop()

    @contextmanager
    def graph(self, graph: Any, *, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        self.done.append(f"recording on {stream.name}, {capture_error_mode}")
        yield
        self.done.append("recorded")

    def end(self, index: int, pool: tuple[int, int]) -> None:
        self.done.append(f"the allocator of card {index} no longer waits")
        raise RuntimeError("it did not")


def test_a_step_is_computed_twice_and_recorded_on_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = Cards(monkeypatch)
    card = Cuda(CARD)

    def compute() -> torch.Tensor:
        cards.done.append(f"computed on {cards.streams[-1]}")
        return torch.zeros(1)

    replay, _ = card.record(compute)
    replay()
    card.mark()()
    assert cards.done == [
        "side waits for default",
        "computed on side",
        "computed on side",
        "recording on side, thread_local",
        "computed on side",
        "recorded",
        "default waits for side",
        "replayed",
        "marked on default",
    ]


@pytest.mark.parametrize("num_computed", [0, 2])
def test_a_recording_that_fails_leaves_the_card_as_it_was(monkeypatch: pytest.MonkeyPatch, num_computed: int) -> None:
    cards = Cards(monkeypatch)
    left = num_computed

    def compute() -> torch.Tensor:
        nonlocal left
        left -= 1
        if left < 0:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return torch.zeros(1)

    with pytest.raises(torch.OutOfMemoryError):
        Cuda(CARD).record(compute)
    assert cards.streams == ["default"]
    assert cards.done[-2:] == ["the allocator of card 1 no longer waits", "default waits for side"]


@pytest.mark.parametrize("scheme", [None, "w8a16", "w8a8-dynamic", "w4a16-g32", "fp8"])
def test_a_card_is_given_a_tower_of_whole_vectors_that_says_the_same(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, scheme: str | None
) -> None:
    features = []
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(qwen2_5_vl, "PADDED_ON", devices)
        llm = LLM(tiny_checkpoint, device="cpu", dtype="float32", quantization=scheme, mmap=False, kv_cache_tokens=512)
        mlp = llm.engine.runner.model.visual.layers[0].mlp
        width = mlp.down.weight.in_features
        assert (width % 128 == 0) == bool(devices)
        assert mlp.gate_up.weight.out_features == 2 * width
        features.append(torch.cat(llm.embed_media(conversation(2))))
    assert len(features[0])
    torch.testing.assert_close(features[0], features[1], rtol=1e-4, atol=1e-5)
