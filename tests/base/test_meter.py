"""Memory and progress."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from saccade.base import meter


def test_memory_held_now_is_at_most_the_peak() -> None:
    assert 1 << 20 < meter.current_rss_bytes() <= meter.peak_memory_bytes() + (64 << 20)
    assert meter.available_memory_bytes() > 0


def test_the_peak_of_a_parent_process_is_not_ours() -> None:
    held = bytearray(300 << 20)
    program = "from saccade.base.meter import peak_memory_bytes\nprint(peak_memory_bytes())"
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert int(run.stdout) < len(held)


def write_group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)


def test_a_control_group_bounds_memory_and_its_idle_cache_is_free(tmp_path: Path) -> None:
    write_group(tmp_path, memory__max="max\n", memory__current="1\n", memory__stat="")
    write_group(
        tmp_path / "a", memory__max="1000\n", memory__current="900\n", memory__stat="anon 5\ninactive_file 50\n"
    )
    write_group(tmp_path / "a" / "b", memory__max="700\n", memory__current="600\n", memory__stat="inactive_file 7\n")
    (tmp_path / "membership").write_text("0::/a/b\n")
    assert sorted(meter._control_group_room(tmp_path / "membership", tmp_path)) == [107, 150]


def test_the_older_control_groups_are_read_too(tmp_path: Path) -> None:
    group = tmp_path / "memory"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text("500")
    (group / "memory.usage_in_bytes").write_text("450")
    (group / "memory.stat").write_text("total_inactive_file 20\n")
    (tmp_path / "membership").write_text("9:cpu,cpuacct:/x\n4:memory:/docker/abc\n")
    assert list(meter._control_group_room(tmp_path / "membership", tmp_path)) == [70]


def test_a_machine_without_control_groups_is_unbounded_by_them(tmp_path: Path) -> None:
    assert list(meter._control_group_room(tmp_path / "absent", tmp_path)) == []


def test_progress_is_silent_off_a_terminal_and_costs_no_import() -> None:
    program = """
import sys
from saccade.base.meter import progress
with progress(3, "reading") as advance:
    advance(1)
assert "rich" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert run.stdout == run.stderr == b""


def test_progress_shows_its_label_on_a_terminal() -> None:
    pty = pytest.importorskip("pty")
    program = "from saccade.base.meter import progress\nwith progress(2, 'reading') as advance: advance(2)"
    main, terminal = pty.openpty()
    subprocess.run([sys.executable, "-c", program], check=True, stderr=terminal, env={**os.environ, "TERM": "xterm"})
    os.close(terminal)
    assert b"reading" in os.read(main, 1 << 16)
    os.close(main)


def test_the_log_is_quiet_by_default() -> None:
    program = "from saccade.base.meter import logger\nlogger.warning('x')"
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert run.stdout == run.stderr == b""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what is freed, and can be told")
def test_freed_memory_is_given_back() -> None:
    """A program of its own: how much this one's C library keeps depends on the tests before."""
    program = """
from saccade.base.meter import current_rss_bytes, give_back_memory
pieces = [bytearray(100_000) for _ in range(1000)]
last = bytearray(100_000)
before = current_rss_bytes()
del pieces
kept = before - current_rss_bytes()
give_back_memory()
print(kept, before - current_rss_bytes())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    kept, given = map(int, done.stdout.split())
    assert kept < 10_000_000
    assert given > 90_000_000
