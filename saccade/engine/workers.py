"""Several processes, one model: rank 0 leads, the others follow.

Rank 0 schedules, samples and talks to the caller, and before each computation tells the others which one it is; they make
the same calls of the same Runner over their share of the model. So there is one scheduler, one source of random numbers and
one clock, and ranks cannot come to different decisions. The leader starts the others itself (`start`), or a launcher has
started all (torchrun). When a process ends, the messages' connections close and every other ends too: none waits for ever.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from saccade.base.errors import DeviceError, OptionError, SaccadeError
from saccade.base.ranks import ALONE, Ranks, connect, disconnect, launched_size, local_rank, require_disconnected
from saccade.engine.batch import Batch
from saccade.engine.runner import Runner, VisionTimes
from saccade.inputs.prompt import Medium

T = TypeVar("T")

FOLLOWER = "saccade.follower"  # the module a started process runs
STARTED = "SACCADE_STARTED"  # set for processes that a leader started
MEETING_S = 120.0  # for processes to start, import torch and meet
PARTING_S = 20.0  # for followers to end by themselves, or for the leader to leave an exchange that was given up
WATCH_S = 0.2  # between looks at whether all processes live


class Crew:
    """The processes that work on one model, as its leader sees them: those it started, and whether they still answer."""

    def __init__(self, ranks: Ranks, processes: Sequence[subprocess.Popen[bytes]] = ()) -> None:
        self.ranks = ranks
        self.processes = list(processes)
        self.is_broken = False
        self.is_closed = ranks.is_alone
        self.is_computing = False
        self.runner: Callable[[], Runner | None] = lambda: None  # a weak reference
        if not ranks.is_alone and ranks.leads:
            atexit.register(self.close)  # after the groups were made, so that it runs before torch ends them
        self.ending = threading.Lock()
        if self.processes:
            threading.Thread(target=self._watch, name="saccade-watch", daemon=True).start()

    def _watch(self) -> None:
        """Ends an exchange that waits for a process which has ended: on GPUs nothing else does within a recorded step."""
        while all(process.poll() is None for process in self.processes):
            if self.is_closed:
                return
            time.sleep(WATCH_S)
        with self.ending:
            if self.is_closed:
                return
            self.is_broken = True
            self.ranks.abandon()
        deadline = time.monotonic() + PARTING_S
        while self.is_computing and time.monotonic() < deadline:
            time.sleep(WATCH_S)
        if self.is_computing:  # it cannot be reached any more, and would hold its GPU for ever
            print(f"saccade: {self.gone() or 'a rank is gone'}, and rank 0 waits for it in vain", file=sys.stderr)
            os._exit(1)

    def close(self) -> None:
        """Sends the followers home; those that do not go are ended. Does nothing the second time."""
        with self.ending:
            if self.is_closed:
                return
            self.is_closed = True
        atexit.unregister(self.close)
        if not self.is_broken:
            with contextlib.suppress(RuntimeError):  # they are gone already
                self.ranks.tell(None)
        if (runner := self.runner()) is not None:
            runner.forget_recordings()
        _end(self.processes, 0.0 if self.is_broken else PARTING_S)
        disconnect()

    def agree(self, number: int) -> int:
        """The leader's number, everywhere. Waits until every rank has come so far: here it shows if one could not load."""
        if self.ranks.is_alone:
            return number
        if not self.ranks.leads:
            self.ranks.meet()
            told = self.ranks.hear()
            if told is None:
                sys.exit(0)  # the leader gave up
            return int(told)
        try:
            self.ranks.meet()
            self.ranks.tell(number)
        except RuntimeError as error:
            raise self.broken(error) from error
        return number

    def broken(self, error: Exception) -> SaccadeError:
        """What to raise when an exchange failed: who is gone, as far as it is known."""
        self.is_broken = True
        time.sleep(0.5)  # the connection closes before the process has ended
        gone = self.gone()
        self.close()
        return DeviceError(f"{gone or f'a rank is gone ({error})'}; what it said stands above")

    def require_whole(self) -> None:
        """Raises RuntimeError when a process has ended."""
        if self.is_broken:
            raise RuntimeError("a process has ended")

    def gone(self) -> str:
        """Which processes have ended; empty if none has."""
        codes = {rank: process.poll() for rank, process in enumerate(self.processes, start=1)}
        return "; ".join(f"rank {rank} ended with exit code {code}" for rank, code in codes.items() if code is not None)


class LeadingRunner(Runner):
    """A Runner that tells the followers what it is about to compute."""

    def __init__(self, crew: Crew, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.crew = crew
        crew.runner = weakref.ref(self)

    def embed_media(self, media: Sequence[Medium]) -> tuple[list[Tensor], VisionTimes]:
        return self._together("embed_media", media, lambda: super(LeadingRunner, self).embed_media(media))

    def run(self, batch: Batch, features: Sequence[Tensor]) -> Tensor:
        return self._together("run", batch, lambda: super(LeadingRunner, self).run(batch, features))

    def head(self, hidden: Tensor, rows: Sequence[int]) -> Tensor:
        return self._together("head", rows, lambda: self._arrived(super(LeadingRunner, self).head(hidden, rows)))

    @staticmethod
    def _arrived(logits: Tensor) -> Tensor:
        """Computed, not merely queued: whoever waits for the card waits here, where a dead rank is an error with its name."""
        if logits.device.type == "cuda":
            torch.cuda.current_stream(logits.device).synchronize()
        return logits

    def _together(self, name: str, argument: Any, compute: Callable[[], T]) -> T:
        if self.crew.is_closed:
            raise DeviceError("this model's processes have ended; open it again")
        self.crew.is_computing = True
        try:
            self.crew.require_whole()
            self.crew.ranks.tell((name, argument))
            result = compute()
            self.crew.require_whole()  # where an exchange was given up, this is no result
            return result
        except RuntimeError as error:
            raise self.crew.broken(error) from error
        except BaseException:  # an interrupt, say: the others are somewhere within this computation and will not hear
            self.crew.is_broken = True
            self.crew.close()
            raise
        finally:
            self.crew.is_computing = False


def follow(runner: Runner) -> None:
    """Computes what the leader tells until it says that there is no more. The runner is of no use then.

    Raises DeviceError when the leader is gone.
    """
    features: list[Tensor] = []
    hidden: Tensor | None = None
    while (message := _heard(runner.model.ranks)) is not None:
        name, argument = message
        if name == "embed_media":
            features, _ = runner.embed_media(argument)
        elif name == "run":
            hidden = runner.run(argument, features if argument.placements else [])
        else:
            assert hidden is not None, "logits before a step"
            runner.head(hidden, argument)
    runner.forget_recordings()


def _heard(ranks: Ranks) -> Any:
    try:
        return ranks.hear()
    except RuntimeError as error:
        raise DeviceError("rank 0 is gone") from error


# --- meeting ----------------------------------------------------------------------------------------------------------


def meet(count: int, device: torch.device, start: Mapping[str, Any] | None) -> Crew:
    """This process's crew of `count`: the one a launcher started, or one started here; alone if 1.

    `start`: keywords of the LLM that a started process opens; None if it could not open the same.
    Raises OptionError when the numbers do not fit, DeviceError when a process ends before all have met.
    """
    launched = launched_size()
    if launched > 1:
        if count not in (1, launched):
            raise OptionError(f"tensor_parallel {count}, but the launcher started {launched} processes; leave it out")
        return Crew(connect(int(os.environ["RANK"]), launched, device, _leaders_store()))
    if count == 1:
        return Crew(ALONE)
    require_disconnected()
    if device.type == "cuda" and torch.cuda.device_count() < count:
        raise DeviceError(f"tensor_parallel {count} takes as many GPUs, and there are {torch.cuda.device_count()}")
    if start is None:
        raise OptionError(
            f"tensor_parallel {count} needs a checkpoint folder, or a launcher: torchrun --nproc-per-node {count}"
        )
    return _start(count, device, start)


def own_device(device: torch.device) -> torch.device:
    """Of several launched processes, each has its own GPU."""
    if device.type == "cuda" and launched_size() > 1:
        if local_rank() >= (count := torch.cuda.device_count()):
            raise DeviceError(f"rank {local_rank()} of this machine takes a GPU of its own, and there is {count}")
        return torch.device("cuda", local_rank())
    return device


def _start(count: int, device: torch.device, start: Mapping[str, Any]) -> Crew:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = []
    for rank in range(1, count):
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": store.port,
        }
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}, STARTED: "1"}
        process = subprocess.Popen([sys.executable, "-m", FOLLOWER], stdin=subprocess.PIPE, env=environment)
        assert process.stdin is not None, "a pipe was asked for"
        process.stdin.write(json.dumps(dict(start)).encode())
        process.stdin.close()
        processes.append(process)
    try:
        _await(store, processes)
        return Crew(connect(0, count, device, store), processes)
    except BaseException:
        _end(processes, 0.0)
        raise


def _leaders_store() -> Any:
    """Where a process started by a leader meets it, having said that it lives; None under a launcher, which has its own ways."""
    if STARTED not in os.environ:
        return None
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    store.set(f"here/{os.environ['RANK']}", "")
    return store


def _await(store: Any, processes: Sequence[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + MEETING_S
    names = [f"here/{rank}" for rank in range(1, len(processes) + 1)]
    while not store.check(names):
        for rank, process in enumerate(processes, start=1):
            if process.poll() is not None:
                raise DeviceError(
                    f"rank {rank} ended with exit code {process.returncode} before it met the others; what it said stands above"
                )
        if time.monotonic() > deadline:
            raise DeviceError(f"the other ranks did not come within {MEETING_S:.0f} s; is the machine very busy?")
        time.sleep(0.05)


def _end(processes: Sequence[subprocess.Popen[bytes]], patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
