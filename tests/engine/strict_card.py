"""A device without numbers that holds a recording to what a CUDA graph allows: everything it touches lies on the device, nothing is
read back, and what it reads of earlier is still there when it is replayed.

Tensors are torch's "meta" ones, and Triton's launches are noted, not made: what is tested is where things lie, not what they are.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from saccade.kernels import triton_attention, triton_cuts, triton_heads, triton_linear, triton_rows

CARD = torch.device("meta")
MULTIPROCESSORS = 132  # of an H200
READING = ("item", "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim")


class Watch(TorchDispatchMode):
    """Refuses what a recording must not do; keeps what it read that it did not make, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[int, StorageWeakRef] = {}
        self._made: list[Tensor] = []  # kept until the recording ends, so that no address is used twice

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.overloadpacket.__name__
        assert name not in READING, f"{name} waits for the device"
        self.note(name, (args, kwargs))
        out = op(*args, **(kwargs or {}))
        for tensor in tensors_in(out):
            assert tensor.device == CARD, f"{name} makes a tensor on the host"
        self._made += tensors_in(out)
        return out

    def note(self, name: str, arguments: Any) -> None:
        made = {tensor.untyped_storage()._cdata for tensor in self._made}
        for tensor in tensors_in(arguments):
            assert tensor.device == CARD, f"{name} reads a tensor of the host"
            storage = tensor.untyped_storage()
            if storage._cdata not in made:
                self.read[storage._cdata] = StorageWeakRef(storage)

    def end(self) -> None:
        self._made.clear()


class Apart(TorchDispatchMode):
    """Refuses operations on tensors of the host and of the device together, but for copies: a card would wait, or refuse them, too."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.overloadpacket.__name__
        devices = {tensor.device for tensor in tensors_in((args, kwargs))}
        assert len(devices) < 2 or name in ("copy_", "_to_copy"), (
            f"{name} is given tensors of the host and of the device"
        )
        return op(*args, **(kwargs or {}))


def tensors_in(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class StrictCard:
    """Computes twice as a card does, and a third time under watch."""

    device = CARD

    def __init__(self) -> None:
        self.watched: list[Watch] = []
        self.num_launches = 0

    def record(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        for _ in range(2):
            compute()
        with Watch() as watch:
            self.watched.append(watch)
            output = compute()
        watch.end()
        return self.replay, output

    def replay(self) -> None:
        gc.collect()
        for watch in self.watched:
            gone = [key for key, reference in watch.read.items() if reference.expired()]
            assert not gone, f"{len(gone)} of {len(watch.read)} tensors that the recording reads are gone"

    def host_words(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int64)

    def copy(self, target: Tensor, source: Tensor) -> None:
        if target.device == CARD:
            target.copy_(source)

    def mark(self) -> Callable[[], object]:
        return lambda: None


@contextmanager
def launches_noted(monkeypatch: pytest.MonkeyPatch, card: StrictCard) -> Iterator[None]:
    """Triton's launches do nothing, what they are given is looked at where a recording is under way; sizes are an H200's."""

    def launch(kernel: Any, grid: Any) -> Callable[..., None]:
        def note(*args: Any, **kwargs: Any) -> None:
            card.num_launches += 1
            modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
            for watch in (mode for mode in modes if isinstance(mode, Watch)):
                watch.note(str(kernel), (args, kwargs))
            assert all(tensor.device == CARD for tensor in tensors_in((args, kwargs))), (
                f"{kernel} is given a tensor of the host"
            )

        return note

    with monkeypatch.context() as patch:
        patch.setattr(type(triton_rows._rms_norm), "__getitem__", launch)
        patch.setattr(triton_cuts, "num_programs", lambda device: 4 * MULTIPROCESSORS)
        patch.setattr(triton_attention, "_num_multiprocessors", lambda device: MULTIPROCESSORS)
        patch.setattr(triton_cuts, "_table", lambda device: {})
        patch.setattr(triton_linear, "IS_INTERPRETED", False)  # so that e4m3 goes to torch where it would on a card
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        patch.setattr(triton_heads, "ROWS", 8)
        patch.setattr(triton_rows, "ROWS", 1)
        yield
