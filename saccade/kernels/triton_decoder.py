"""A step of the whole decoder with fewer launches than its ops one by one: what goes through the same rows goes through them once.

Of a layer: norm with quantization; rotary with storing keys and values; gating with quantization, and both with the product before
where they can. Every launch is one that the host
queues or a recording replays, and of a small model's step they take as long as reading its weights.
One row has fewer still where each of its products has the kernel for one row: norms go with the products before and behind them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.kernels.record import DecoderLayerWeights, DecoderStep, DecoderWeights, PagedLayout
from saccade.kernels.triton_attention import attention_paged
from saccade.kernels.triton_heads import rope_and_store
from saccade.kernels.triton_linear import (
    Gate,
    gated_rows,
    goes_with_stream,
    into_stream,
    linear,
    of_stream,
    product,
)
from saccade.kernels.triton_rows import norm_rows, rms_norm


def plan_decoder(weights: DecoderWeights, cache: Tensor) -> DecoderStep:
    def attended(qkv: Tensor, cos: Tensor, sin: Tensor, layer_cache: Tensor, layout: PagedLayout) -> Tensor:
        k_cache, v_cache = layer_cache
        q = rope_and_store(qkv, cos, sin, k_cache, v_cache, layout, weights.num_heads)
        return attention_paged(q, k_cache, v_cache, layout, q.shape[-1] ** -0.5).flatten(1)

    def step(x: Tensor, cos: Tensor, sin: Tensor, layout: PagedLayout) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        if len(x) == 1 and all(_goes_with_stream(layer, x.dtype) for layer in weights.layers):
            return one_row(x, cos, sin, layout)
        residual: Tensor | None = None
        for layer, layer_cache in zip(weights.layers, cache, strict=True):
            rows, residual = norm_rows(x, layer.input_gain, weights.eps, residual, layer.qkv)
            qkv = product(rows, layer.qkv, x.dtype)
            x = linear(attended(qkv, cos, sin, layer_cache, layout), layer.output)
            rows, residual = norm_rows(x, layer.post_gain, weights.eps, residual, layer.gate_up)
            x = product(gated_rows(rows, layer.gate_up, layer.down, x.dtype), layer.down, x.dtype)
        return rms_norm(x, weights.gain, weights.eps, residual)[0]

    def one_row(x: Tensor, cos: Tensor, sin: Tensor, layout: PagedLayout) -> Tensor:
        total, stream, eps = x, None, weights.eps
        for layer, layer_cache in zip(weights.layers, cache, strict=True):
            qkv = _first(x, layer, eps) if stream is None else of_stream(stream, layer.input_gain, eps, layer.qkv)
            stream = into_stream(attended(qkv, cos, sin, layer_cache, layout), layer.output, total)
            gated = of_stream(stream, layer.post_gain, eps, layer.gate_up, Gate(x.dtype, None))
            stream = into_stream(gated, layer.down, stream.total)
            total = stream.total
        return rms_norm(total, weights.gain, eps)[0]

    return step


def _first(x: Tensor, layer: DecoderLayerWeights, eps: float) -> Tensor:
    """The product of a row that no product added to the stream."""
    return product(norm_rows(x, layer.input_gain, eps, None, layer.qkv)[0], layer.qkv, x.dtype)


def _goes_with_stream(layer: DecoderLayerWeights, dtype: torch.dtype) -> bool:
    return all(goes_with_stream(weight, dtype) for weight in (layer.qkv, layer.output, layer.gate_up, layer.down))
