"""The CPU back end: the reference with those ops replaced that exist in C++. Each op's own file knows its calls."""

from __future__ import annotations

from dataclasses import replace

from saccade.kernels import cpu_attention, cpu_linear, cpu_small, reference
from saccade.kernels.library import Library
from saccade.kernels.record import Kernels


def kernels(library: Library) -> Kernels:
    """Every op, from `library` where it has it."""
    ops = {
        "linear": cpu_linear.linear(library),
        "rms_norm": cpu_small.rms_norm(library),
        "rope": cpu_small.rope(library),
        "silu_mul": cpu_small.silu_mul(library),
        "attention_varlen": cpu_attention.attention_varlen(library),
        "store_kv": cpu_small.store_kv(library),
        "attention_paged": cpu_attention.attention_paged(library),
    }
    whole = reference.kernels()
    return replace(whole, **ops, sources={**whole.sources, **dict.fromkeys(ops, "cpu")})  # type: ignore[arg-type]
