"""The CPU back end: the reference with those ops replaced that exist in C++. Each op's own file knows its calls."""

from __future__ import annotations

from dataclasses import replace

from saccade.kernels import cpu_linear, reference
from saccade.kernels.library import Library
from saccade.kernels.record import Kernels


def kernels(library: Library) -> Kernels:
    """Every op, from `library` where it has it."""
    ops = {
        "linear": cpu_linear.linear(library),
    }
    whole = reference.kernels()
    return replace(whole, **ops, sources={**whole.sources, **dict.fromkeys(ops, "cpu")})  # type: ignore[arg-type]
