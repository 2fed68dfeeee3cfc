"""Statistics are gathered once: a second scheme runs nothing, and gets what it would have got alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from saccade.api import quantize
from saccade.quantize import run as running
from tests.quantize.test_best import hashes, kl
from tests.test_cli import Run, run

__all__ = ["run"]

FIRST: dict[str, Any] = {"scheme": "w8a8-dynamic", "samples": 4, "threads": 1}
SECOND: dict[str, Any] = {"scheme": "w4a16", "group_size": 32, "smooth": "m4", "samples": 4, "threads": 1}


def forbid(*_: Any, **__: Any) -> Any:
    raise AssertionError("the model is run")


def test_a_second_scheme_needs_no_forward(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize(small, tmp_path / "first", statistics=tmp_path / "kept", **FIRST)
    assert kl(small, tmp_path / "first") < 2e-3
    with monkeypatch.context() as patch:
        patch.setattr(running.Run, "watch", forbid)
        patch.setattr(running.Run, "pass_on", forbid)
        patch.setattr(running, "embedded_patches", forbid)
        quantize(small, tmp_path / "second", statistics=tmp_path / "kept", **SECOND)
    quantize(small, tmp_path / "alone", statistics=tmp_path / "fresh", **SECOND)
    assert hashes(tmp_path / "second") == hashes(tmp_path / "alone")
    assert kl(small, tmp_path / "second") < 0.06
    assert not list((tmp_path / "kept").rglob("hidden-*"))


@pytest.mark.parametrize("change", [{"samples": 3}, {"seed": 1}, {"rotate": True}, {"format": "mindie"}])
def test_what_statistics_depend_on_gathers_anew(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    quantize(small, tmp_path / "first", statistics=tmp_path / "kept", **FIRST)
    quantize(small, tmp_path / "other", statistics=tmp_path / "kept", **FIRST | change)
    assert len(list((tmp_path / "kept").iterdir())) == 2
    monkeypatch.setattr(running.Run, "watch", forbid)
    for number, options in enumerate((FIRST, FIRST | change)):
        quantize(small, tmp_path / f"again-{number}", statistics=tmp_path / "kept", **options)


def test_gathering_goes_on_where_it_was_stopped(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch, calls = running.Run.watch, []

    def stopped(self: running.Run, *given: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return watch(self, *given)

    monkeypatch.setattr(running.Run, "watch", stopped)
    with pytest.raises(KeyboardInterrupt):
        quantize(small, tmp_path / "out", statistics=tmp_path / "kept", **FIRST)
    quantize(small, tmp_path / "out", statistics=tmp_path / "kept", **FIRST)
    assert len(calls) == 3  # two decoder layers: the first once, the second twice
    quantize(small, tmp_path / "whole", statistics=tmp_path / "fresh", **FIRST)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_the_command_keeps_them(small: Path, tmp_path: Path, run: Run) -> None:
    given = ["--scheme", "w8a8-dynamic", "--samples", "3", "--threads", "1", "--no-verify"]
    code, _, _ = run("quantize", str(small), str(tmp_path / "out"), *given, "--statistics", str(tmp_path / "kept"))
    assert code == 0
    assert len(list((tmp_path / "kept").iterdir())) == 1
