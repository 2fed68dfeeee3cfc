"""Every op in plain torch: the definition the other back ends are held to.

Differentiable but for the paged cache and for linears with quantized activations.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.kernels.record import KV_SCALE_BYTES, OPS, Kernels, PagedLayout, Segments
from saccade.schemes.affine import dequantize, integer_values, quantize_rows_fp8, quantize_rows_int8
from saccade.schemes.scheme import Static, Weight

FEW_ROWS = 32  # up to here a linear layer is bound by reading its weights, not by arithmetic
QUERY_TILE = 512  # queries whose mask over the context is held at once
INPUT_TILE = 1024  # rows of x, and
OUTPUT_TILE = 1024  # rows of the weight whose integer product is held at once on a CPU: 4 MiB, which stay in its cache
EXACT_COLUMNS = 1024  # products of two int8 are at most 2^14; up to 2^24, float32 holds every whole number


def linear(x: Tensor, weight: Weight) -> Tensor:
    if weight.scheme.activation != "none":
        return _quantized_linear(x, weight)
    if weight.scheme.is_dense:
        if x.dtype == torch.bfloat16 and x.device.type == "cpu" and 1 <= len(x) <= FEW_ROWS:
            return _few_rows(x, weight.values, weight.bias)
        return F.linear(x, weight.values, weight.bias)
    return _weight_only_linear(x, weight)


def _weight_only_linear(x: Tensor, weight: Weight) -> Tensor:
    """Whole numbers with one scale for a row are multiplied as they are, exact in bfloat16 and float32; the scale is float32.

    In float16, which such sums may leave, and with a scale for each group, the weight is dequantized in float32 and rounded to
    x.dtype, some of its rows at a time.
    """
    assert weight.scale is not None, f"{weight.scheme.name} weights have scales"
    if weight.scale.ndim == 1 and x.dtype != torch.float16:
        y = (F.linear(x, weight.values.to(x.dtype)).float() * weight.scale).to(x.dtype)
    else:
        tile = OUTPUT_TILE if x.device.type == "cpu" else max(weight.out_features, 1)
        rows = [slice(first, first + tile) for first in range(0, weight.out_features, tile)]
        y = torch.cat([F.linear(x, dequantize(weight, each).to(x.dtype)) for each in rows], dim=1)
    return y if weight.bias is None else y + weight.bias


def _quantized_linear(x: Tensor, weight: Weight) -> Tensor:
    """Quantized activations. In whole numbers but for the scales, which are float32, where a row has one; else float32.

    ms for 11008 x 2048, torch 2.13, one thread of a Xeon with AMX, 1 and 256 rows: dense bfloat16 3.7 and 22.4, 8 bits 2.2 and
    12.6, 4 bits, whose values are unpacked each time, 11.9 and 22.4.
    """
    assert weight.scale is not None, f"{weight.scheme.name} weights have scales"
    is_integer = weight.scale.ndim == 1 and not weight.scheme.is_float
    out = x.new_empty(len(x), weight.out_features)
    tile = OUTPUT_TILE if x.device.type == "cpu" else max(weight.out_features, 1)
    for row in range(0, len(x), INPUT_TILE):
        rows = slice(row, row + INPUT_TILE)
        if weight.static is not None:
            x_q, x_scale = quantize_static(x[rows], weight.static), None
        else:
            x_q, x_scale = (quantize_rows_fp8 if weight.scheme.is_float else quantize_rows)(x[rows])
        for first in range(0, weight.out_features, tile):
            outputs = slice(first, first + tile)
            if weight.static is not None:
                total = int_matmul(x_q, weight.values[outputs])
                y = total.add_(weight.static.quant_bias[outputs]).float().mul_(weight.static.deq_scale[outputs])
            else:
                assert x_scale is not None, "dynamic activations have a scale for each row"
                if is_integer:
                    y = int_matmul(x_q, integer_values(weight, outputs)).float()
                    y.mul_(x_scale[:, None]).mul_(weight.scale[outputs])
                else:
                    y = (x_q.float() @ dequantize(weight, outputs).t()).mul_(x_scale[:, None])
                if weight.bias is not None:
                    y += weight.bias[outputs].float()
            out[rows, outputs] = y  # rounds to x.dtype
    return out


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Dynamic activations: each row by its own largest magnitude. x: [T, H]. Returns ([T, H] int8, scale [T] float32).

    A row with a NaN or an infinity has a scale of that kind, so it comes out as NaN.
    """
    return quantize_rows_int8(x)


def quantize_static(x: Tensor, static: Static) -> Tensor:
    """Static activations: clamp(round(x / scale + zero), -128, 127) in float32, half to even. x: [T, H]. Returns int8."""
    return (x.float() / static.scale).add_(static.zero).round_().clamp_(-128, 127).to(torch.int8)


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a: [T, H] int8; b: [O, H] int8. Returns a b^T, [T, O] int32, exact: |sum| <= 2^14 H stays within int32 to H = 2^17 - 1."""
    if len(a) == 0:
        return torch.zeros(0, len(b), dtype=torch.int32, device=a.device)
    if a.device.type == "cuda":
        return _int_matmul_cuda(a, b)
    if _int_mm_is_exact():
        return torch._int_mm(a, b.t())
    out = torch.zeros(len(a), len(b), dtype=torch.int32, device=a.device)
    for first in range(0, a.shape[1], EXACT_COLUMNS):
        # Every partial sum, in whatever order, is a whole number of at most 1024 * 2^14 = 2^24: float32 rounds none of them.
        columns = slice(first, first + EXACT_COLUMNS)
        out += (a[:, columns].float() @ b[:, columns].float().t()).to(torch.int32)
    return out


def _int_matmul_cuda(a: Tensor, b: Tensor) -> Tensor:
    """cuBLAS takes more than 16 rows, and columns and outputs in eights; zeros that fill them up change no sum."""
    missing = (-a.shape[1] % 8, -len(b) % 8, max(0, 17 - len(a)))
    columns, outputs, rows = missing
    if rows or columns:
        a = F.pad(a, (0, columns, 0, rows))
    if outputs or columns:
        b = F.pad(b, (0, columns, 0, outputs))
    return torch._int_mm(a, b.t())[: len(a) - rows, : len(b) - outputs]


@cache
def _int_mm_is_exact() -> bool:
    """Whether torch's int8 product is exact on this processor.

    Without VNNI, libraries add pairs of products in 16 bits that saturate; the extremes would show it, at any number of rows.
    """
    extremes = torch.tensor([-128, 127], dtype=torch.int8)
    b = extremes.repeat(32)[:, None].repeat(1, 512)
    for rows in (1, 16, 64):
        a = extremes.flip(0).repeat(32)[:rows, None].repeat(1, 512)
        try:
            if not torch.equal(torch._int_mm(a, b.t()).long(), a.long() @ b.long().t()):
                return False
        except RuntimeError:  # not for this processor at all
            return False
    return True


def _few_rows(x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """The same product with the weight on the left, which torch reads faster on a CPU in bfloat16 (other types gain nothing).

    GB/s of weights, F.linear against this, torch 2.13, one thread of a Xeon with AMX, 500 MB of weights in turn:
    22016 x 2048: 11.4 -> 13.8 with 1 row, 10.5 -> 13.7 with 8, 9.4 -> 13.0 with 32; 2048 x 11008: 6.3 -> 14.2, 11.8 -> 14.6,
    9.2 -> 13.8; 2560 x 2048: 10.6 -> 12.7, 10.2 -> 13.1, 9.1 -> 12.0. The largest distance from float64 is the same for both.
    """
    if len(x) == 1:
        y = torch.mv(values, x[0]) if bias is None else torch.addmv(bias, values, x[0])
        return y[None]
    y = values @ x.t() if bias is None else torch.addmm(bias[:, None], values, x.t())
    return y.t().contiguous()


def rms_norm(x: Tensor, gain: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if residual is not None:
        x = x + residual
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return gain * normed.to(x.dtype), x


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[:, None, :], sin[:, None, :]
    low, high = x.float().chunk(2, dim=-1)
    return torch.cat([(low * cos - high * sin).to(x.dtype), (high * cos + low * sin).to(x.dtype)], dim=-1)


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def attention_varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, causal: bool = False) -> Tensor:
    k, v = _repeat_heads(k, q.shape[1]), _repeat_heads(v, q.shape[1])
    groups = segments.by_length
    if len(groups) == 1:  # all alike: a view, no gather
        length = segments.lengths[0]
        shape = (-1, length, *q.shape[1:])
        return _attend(q.reshape(shape), k.reshape(shape), v.reshape(shape), scale, causal).reshape(q.shape)
    out = torch.empty_like(q)
    for rows in groups.values():
        rows = rows.to(q.device)
        out[rows] = _attend(q[rows], k[rows], v[rows], scale, causal)
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None = None) -> Tensor:
    """q: [B, L, N, D]; k, v: [B, C, N, D]. Returns [B, L, N, D]. torch's fused kernel: no L x C matrix is ever whole."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=causal, scale=scale
    )
    return out.transpose(1, 2)


def _repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """[T, K, D] -> [T, N, D]: query head i reads key head i // (N / K)."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1)


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, layout: PagedLayout) -> None:
    for x, blocks in ((k, k_cache), (v, v_cache)):
        rows = _int8_rows(x) if blocks.dtype == torch.int8 else x
        blocks.view(-1, *blocks.shape[2:]).index_copy_(0, layout.slots, rows)


def _int8_rows(x: Tensor) -> Tensor:
    """x: [T, K, D]. Returns [T, K, D + 4] int8: values, and the bytes of their scale."""
    values, scale = quantize_rows_int8(x.flatten(0, 1))
    return torch.cat([values, scale[:, None].view(torch.int8)], dim=1).view(*x.shape[:2], -1)


def _floats(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a cache [..., D] as they are, or of an int8 one [..., D + 4] as values in `dtype`."""
    if rows.dtype != torch.int8:
        return rows
    values, scale = rows[..., :-KV_SCALE_BYTES], rows[..., -KV_SCALE_BYTES:].contiguous().view(torch.float32)
    return (values.float() * scale).to(dtype)


def attention_paged(q: Tensor, k_cache: Tensor, v_cache: Tensor, layout: PagedLayout, scale: float) -> Tensor:
    if all(length == 1 for length in layout.query_lengths):
        return _decode(q, k_cache, v_cache, layout, scale)
    out = torch.empty_like(q)
    start = 0
    block_size = k_cache.shape[1]
    for s, (length, context) in enumerate(zip(layout.query_lengths, layout.context_lengths, strict=True)):
        table = layout.block_tables[s, : -(-context // block_size)]
        k = _repeat_heads(_floats(k_cache[table].flatten(0, 1)[:context], q.dtype), q.shape[1])[None]
        v = _repeat_heads(_floats(v_cache[table].flatten(0, 1)[:context], q.dtype), q.shape[1])[None]
        queries = q[start : start + length][None]
        if length == context:
            out[start : start + length] = _attend(queries, k, v, scale, causal=True)[0]
        else:
            columns = torch.arange(context, device=q.device)
            for low in range(0, length, QUERY_TILE):
                high = min(low + QUERY_TILE, length)
                last = torch.arange(context - length + low, context - length + high, device=q.device)
                mask = columns <= last[:, None]
                out[start + low : start + high] = _attend(queries[:, low:high], k, v, scale, causal=False, mask=mask)[0]
        start += length
    return out


def _decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, layout: PagedLayout, scale: float) -> Tensor:
    """One query per sequence; the query heads of a key head are taken as its queries, sequences padded to the longest.

    A sequence is padded with its own last token: what else lies in the cache may be anything, NaN included, and a weight
    of zero does not silence a NaN.
    """
    num_sequences, num_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    contexts = torch.tensor(layout.context_lengths, device=q.device)[:, None]
    places = torch.arange(max(layout.context_lengths), device=q.device)[None]
    held = torch.minimum(places, contexts - 1)
    slots = layout.block_tables.gather(1, held // block_size) * block_size + held % block_size
    k = _floats(k_cache.flatten(0, 1)[slots], q.dtype).transpose(1, 2)  # [S, K, C, D]
    v = _floats(v_cache.flatten(0, 1)[slots], q.dtype).transpose(1, 2)
    mask = None if len(set(layout.context_lengths)) == 1 else (places < contexts)[:, None, None, :]
    grouped = q.view(num_sequences, num_kv_heads, num_heads // num_kv_heads, head_dim)
    out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale)
    return out.reshape(q.shape)


def kernels() -> Kernels:
    """The reference back end, whole."""
    return Kernels(
        linear=linear,
        rms_norm=rms_norm,
        rope=rope,
        silu_mul=silu_mul,
        attention_varlen=attention_varlen,
        store_kv=store_kv,
        attention_paged=attention_paged,
        sources=dict.fromkeys(OPS, "reference"),
    )
