"""The Triton back end, whole: for NVIDIA GPUs, and for the CPU in Triton's interpreter. Dense linears stay torch's."""

from __future__ import annotations

from saccade.kernels import triton_attention, triton_decoder, triton_heads, triton_linear, triton_rows, triton_sampling
from saccade.kernels.record import OPS, Kernels


def kernels() -> Kernels:
    return Kernels(
        linear=triton_linear.linear,
        rms_norm=triton_rows.rms_norm,
        rope=triton_heads.rope,
        silu_mul=triton_rows.silu_mul,
        attention_varlen=triton_attention.attention_varlen,
        store_kv=triton_heads.store_kv,
        attention_paged=triton_attention.attention_paged,
        sources=dict.fromkeys(OPS, "triton"),
        plan_decoder=triton_decoder.plan_decoder,
        likeliest=triton_sampling.likeliest,
    )
