"""What the program says about its own running: one logger, memory, progress.

Knows clocks, this process and the terminal; knows nothing of what is measured. Quiet unless somebody listens.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

logger = logging.getLogger("saccade")
logger.addHandler(logging.NullHandler())


def current_rss_bytes() -> int:
    """Memory this process holds now."""
    import psutil  # here and below: a model on a card runs without it

    return int(psutil.Process().memory_info().rss)


def peak_memory_bytes() -> int:
    """The most memory this process has held so far."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    try:  # getrusage would count the parent's peak too: Linux carries it over when a process starts another program
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere


def give_back_memory() -> None:
    """Gives the system what the C library keeps of memory that was freed: glibc alone keeps much, and can be told."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def available_memory_bytes() -> int:
    """Memory this process may still take without swapping: the machine's, or its control group's where that is less."""
    import psutil

    available = int(psutil.virtual_memory().available)
    return min([available, *_control_group_room(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def _control_group_room(membership: Path, root: Path) -> Iterator[int]:
    """Bytes left under every limit above this process, in cgroup v2 and v1. Page cache that can go counts as free."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            base, limit, usage, cache = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        own = PurePosixPath(group.lstrip("/"))
        for level in dict.fromkeys(
            [own, *own.parents]
        ):  # inside a container the own path may not exist, but the root does
            folder = base / level
            try:
                room = int((folder / limit).read_text()) - int((folder / usage).read_text())
                statistics = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no such level, or the limit reads "max"
                continue
            yield max(0, room + int(statistics.get(cache, 0)))


def gigabytes(size_bytes: int) -> str:
    """A size for people: 4.09 GB, 12.3 MB."""
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:.1f} MB"


@contextmanager
def progress(total: int, label: str) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal's stderr, and silence elsewhere. Yields `advance(count)`."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)
