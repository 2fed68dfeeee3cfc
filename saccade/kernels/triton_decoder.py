"""A step of the whole decoder with fewer launches than its ops one by one: what goes through the same rows goes through them once.

Of a layer: norm with quantization; rotary with storing keys and values; gating with quantization, and both with the product before
where they can. Every launch is one that the host
queues or a recording replays, and of a small model's step they take as long as reading its weights.
"""

from __future__ import annotations

from torch import Tensor

from saccade.kernels.record import DecoderStep, DecoderWeights, PagedLayout
from saccade.kernels.triton_attention import attention_paged
from saccade.kernels.triton_heads import rope_and_store
from saccade.kernels.triton_linear import gated_rows, linear, product
from saccade.kernels.triton_rows import norm_rows, rms_norm


def plan_decoder(weights: DecoderWeights, cache: Tensor) -> DecoderStep:
    def step(x: Tensor, cos: Tensor, sin: Tensor, layout: PagedLayout) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        residual: Tensor | None = None
        for layer, (k_cache, v_cache) in zip(weights.layers, cache, strict=True):
            rows, residual = norm_rows(x, layer.input_gain, weights.eps, residual, layer.qkv)
            qkv = product(rows, layer.qkv, x.dtype)
            q = rope_and_store(qkv, cos, sin, k_cache, v_cache, layout, weights.num_heads)
            attended = attention_paged(q, k_cache, v_cache, layout, q.shape[-1] ** -0.5)
            x = linear(attended.flatten(1), layer.output)
            rows, residual = norm_rows(x, layer.post_gain, weights.eps, residual, layer.gate_up)
            x = product(gated_rows(rows, layer.gate_up, layer.down, x.dtype), layer.down, x.dtype)
        return rms_norm(x, weights.gain, weights.eps, residual)[0]

    return step
