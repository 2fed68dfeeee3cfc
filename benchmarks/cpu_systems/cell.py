"""What one measurement is given, and what it answers: the small language between benchmarks/cpu.py and the programs beside this file.

Each of those runs one system in a process of its own, perhaps under an interpreter of its own: `run_x.py '{"model": …}'` prints its
answer as one line of JSON, the last on stdout. Knows Python and numpy only, since that is all these interpreters share.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SYSTEM_PROMPT = "You are a helpful assistant."


@dataclass(frozen=True)
class Cell:
    """One question about one picture or video. `frames`: file of [F, H, W, 3] uint8; a picture is one frame."""

    model: str  # folder or file, in whatever form the system reads
    media: str  # picture or video
    frames: str
    question: str
    threads: int
    tokens_out: int
    options: dict[str, Any]  # what tells two systems of one library apart

    def load_frames(self) -> np.ndarray:
        return np.load(self.frames)

    def other_frames(self) -> np.ndarray:
        """As many pixels, other ones: an answer about these warms up everything but a cache of pictures."""
        return np.ascontiguousarray(self.load_frames()[:, :, ::-1])


def read_cell() -> Cell:
    return Cell(**json.loads(sys.argv[1]))


def reply(**numbers: Any) -> None:
    """Fields of benchmarks/cpu.py's Record; those of no library's own are added here."""
    print(json.dumps({"peak_memory_bytes": peak_memory_bytes(), **numbers}), flush=True)


def peak_memory_bytes() -> int:
    """The most this process has held, as Linux counts it: mapped files included once they are read."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The same function, whose every call leaves its seconds behind."""

    def call(*args: Any, **keywords: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **keywords)
        seconds.append(time.perf_counter() - start)
        return result

    return call
