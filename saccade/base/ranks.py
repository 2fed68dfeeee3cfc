"""This process among its tensor-parallel peers; alone, every exchange is a no-op.

Knows process groups; knows no models. Tensors travel by NCCL between GPUs and by gloo between CPUs, messages always by gloo,
which notices at once when a peer's process ends.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

from saccade.base.errors import OptionError

FOREVER = timedelta(days=365)  # a follower waits for its next message as long as the leader lives
EXCHANGE = timedelta(minutes=5)  # within a step all ranks are about equally far, but one may still compile a kernel


@dataclass(frozen=True)
class Ranks:
    """Rank 0 leads: it schedules and samples, and tells the others what to compute."""

    rank: int = 0
    size: int = 1
    tensors: Any = None  # the group that adds and joins tensors
    messages: Any = None  # the group that tells

    @property
    def is_alone(self) -> bool:
        return self.size == 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def add(self, x: Tensor) -> Tensor:
        """The sum over all ranks, the same bits on each."""
        if self.is_alone:
            return x
        x = x.contiguous()
        dist.all_reduce(x, group=self.tensors)
        return x

    def join(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """x: [R, widths[rank]]. Returns every rank's columns in order of rank, [R, sum(widths)]."""
        if self.is_alone:
            return x
        widest = max(widths)
        padded = torch.nn.functional.pad(x, (0, widest - x.shape[1])).contiguous()
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self.tensors)
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)

    def tell(self, message: Any) -> None:
        """From the leader to all others."""
        if not self.is_alone:
            dist.broadcast_object_list([message], src=0, group=self.messages)

    def hear(self) -> Any:
        """The leader's next message."""
        box = [None]
        dist.broadcast_object_list(box, src=0, group=self.messages)
        return box[0]

    def abandon(self) -> None:
        """Ends what this rank waits for in exchanges that a dead peer never joins. gloo notices by itself, NCCL has to be told."""
        if self.tensors is not None and dist.get_backend(self.tensors) == "nccl":
            self.tensors.abort()

    def meet(self) -> None:
        """Waits until every rank is here."""
        if not self.is_alone:
            dist.barrier(group=self.messages)


ALONE = Ranks()
_meetings = itertools.count()


def launched_size() -> int:
    """How many processes torchrun, or whoever else set its variables, started; 1 without one."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in names) else 1


def local_rank() -> int:
    """Which of this machine's processes this is: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))


def connect(rank: int, size: int, device: torch.device, store: Any = None) -> Ranks:
    """Meets the others, at `store` or where the launcher's variables say. Raises OptionError if this process has met some already."""
    require_disconnected()
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # A name of its own for every meeting: what an earlier one left in the store would be taken for this one's.
    place = PrefixStore(f"saccade/{next(_meetings)}", _launchers_store() if store is None else store)
    dist.init_process_group(backend, rank=rank, world_size=size, timeout=EXCHANGE, store=place)
    messages = dist.new_group(backend="gloo", timeout=FOREVER)
    return Ranks(rank, size, dist.group.WORLD, messages)


def require_disconnected() -> None:
    if dist.is_initialized():
        raise OptionError("one tensor-parallel model at a time in a process; close() the other one first")


@cache
def _launchers_store() -> Any:
    store, _, _ = next(rendezvous("env://"))
    return store


def disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
