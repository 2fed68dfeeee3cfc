"""The CPU back end: every op in C++. Each op's own file knows its calls, and what it leaves to the reference."""

from __future__ import annotations

from saccade.kernels import cpu_attention, cpu_decoder, cpu_linear, cpu_small
from saccade.kernels.library import Library
from saccade.kernels.record import OPS, Kernels


def kernels(library: Library) -> Kernels:
    return Kernels(
        linear=cpu_linear.linear(library),
        rms_norm=cpu_small.rms_norm(library),
        rope=cpu_small.rope(library),
        silu_mul=cpu_small.silu_mul(library),
        attention_varlen=cpu_attention.attention_varlen(library),
        store_kv=cpu_small.store_kv(library),
        attention_paged=cpu_attention.attention_paged(library),
        sources=dict.fromkeys(OPS, "cpu"),
        plan_decoder=cpu_decoder.plan_decoder(library),
        alike_rows=cpu_linear.alike_rows,
    )
