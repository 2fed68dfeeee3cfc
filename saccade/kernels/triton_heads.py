"""Triton: the ops whose rows are heads. Rotary, storing keys and values, and both in one launch.

All arithmetic is float32 and rounds where the reference rounds. Knows no matrices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.record import PagedLayout
from saccade.kernels.triton_common import IS_INTERPRETED, ROUNDED_EACH, VARYING, narrow, unbroken, whole
from saccade.schemes.affine import TINY

ROWS = 64 if IS_INTERPRETED else 8  # of a program; the interpreter pays for programs, not for numbers

_TINY = tl.constexpr(TINY)


@triton.jit
def _rotated(x_ptr, cos_ptr, sin_ptr, token, head, is_row, x_token, x_head, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """The two halves of heads [ROWS, BLOCK], rotated, in the type of x."""
    element = tl.arange(0, BLOCK)[None, :]
    inside = is_row[:, None] & (element < HALF)
    dtype = x_ptr.dtype.element_ty
    cos = tl.load(cos_ptr + token[:, None] * HALF + element, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + token[:, None] * HALF + element, mask=inside, other=0.0)
    source = x_ptr + (token * x_token + head * x_head)[:, None] + element
    low = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    return narrow(low * cos - high * sin, dtype), narrow(high * cos + low * sin, dtype)


@triton.jit
def _rotate(
    x_ptr, y_ptr, cos_ptr, sin_ptr, program, T, x_token, x_head,
    N: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (program * ROWS + tl.arange(0, ROWS)).to(tl.int64)  # token by token, head by head
    token, head = row // N, row % N
    low, high = _rotated(x_ptr, cos_ptr, sin_ptr, token, head, token < T, x_token, x_head, HALF, BLOCK)
    element = tl.arange(0, BLOCK)[None, :]
    inside = (token < T)[:, None] & (element < HALF)
    target = y_ptr + row[:, None] * (2 * HALF) + element
    tl.store(target, low, mask=inside)
    tl.store(target + HALF, high, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def _rope(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, T, q_programs, q_token, q_head, k_token, k_head,
    N: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < q_programs:
        _rotate(q_ptr, q_out_ptr, cos_ptr, sin_ptr, program, T, q_token, q_head, N, HALF, ROWS, BLOCK)
    else:
        _rotate(k_ptr, k_out_ptr, cos_ptr, sin_ptr, program - q_programs, T, k_token, k_head, K, HALF, ROWS, BLOCK)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q, k = unbroken(q), unbroken(k)
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    num_tokens, num_heads, head_dim = q.shape
    if num_tokens:
        num_kv_heads, half = k.shape[1], head_dim // 2
        q_programs, k_programs = (triton.cdiv(num_tokens * heads, ROWS) for heads in (num_heads, num_kv_heads))
        _rope[(q_programs + k_programs,)](
            q, k, cos.contiguous(), sin.contiguous(), q_out, k_out, num_tokens, q_programs,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1),
            N=num_heads, K=num_kv_heads, HALF=half, ROWS=ROWS, BLOCK=triton.next_power_of_2(half), num_warps=4, **ROUNDED_EACH,
        )  # fmt: skip
    return q_out, k_out


# --- the cache -------------------------------------------------------------------------------------------------------


@triton.jit
def _int8_scale(largest):
    """A row's scale, [ROWS] float32."""
    return tl.maximum(tl.div_rn(largest, tl.zeros_like(largest) + 127.0), _TINY)


@triton.jit
def _int8(x, scale):
    x = tl.div_rn(x, tl.zeros_like(x) + scale[:, None])
    return whole(tl.minimum(tl.maximum(x, -127.0), 127.0)).to(tl.int8)


@triton.jit
def _store_row(
    x_ptr, cache_ptr, scale_ptr, row, slot, T, x_token, x_head, K, D, ROW: tl.constexpr, BLOCK: tl.constexpr
):
    token, head = row // K, row % K
    element = tl.arange(0, BLOCK)[None, :]
    inside = (token < T)[:, None] & (element < D)
    x = tl.load(x_ptr + (token * x_token + head * x_head)[:, None] + element, mask=inside, other=0.0)
    at = slot * K + head
    if scale_ptr is not None:
        x = x.to(tl.float32)
        scale = _int8_scale(tl.max(tl.abs(x), axis=1))
        tl.store(scale_ptr + at * (ROW // 4), scale, mask=token < T)
        x = _int8(x, scale)
    tl.store(cache_ptr + (at * ROW)[:, None] + element, x, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def _store_kv(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, k_scale_ptr, v_scale_ptr, slots_ptr, T, k_token, k_head, v_token, v_head,
    K: tl.constexpr, D: tl.constexpr, ROW: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    slot = tl.load(slots_ptr + row // K, mask=row // K < T, other=0).to(tl.int64)
    _store_row(k_ptr, k_cache_ptr, k_scale_ptr, row, slot, T, k_token, k_head, K, D, ROW, BLOCK)
    _store_row(v_ptr, v_cache_ptr, v_scale_ptr, row, slot, T, v_token, v_head, K, D, ROW, BLOCK)


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, layout: PagedLayout) -> None:
    k, v = unbroken(k), unbroken(v)
    num_tokens, num_heads, head_dim = k.shape
    if num_tokens:
        _store_kv[(triton.cdiv(num_tokens * num_heads, ROWS),)](
            k, v, k_cache, v_cache, *scales_of(k_cache, v_cache), layout.slots, num_tokens,
            k.stride(0), k.stride(1), v.stride(0), v.stride(1), K=num_heads, D=head_dim, ROW=k_cache.shape[-1],
            ROWS=ROWS, BLOCK=triton.next_power_of_2(head_dim), num_warps=4, **ROUNDED_EACH,
        )  # fmt: skip


def scales_of(*caches: Tensor) -> tuple[Tensor | None, ...]:
    """Of int8 caches, the float32 that the last four bytes of each row are; None of others."""
    return tuple(cache.view(torch.float32)[..., -1] if cache.dtype == torch.int8 else None for cache in caches)


# --- both ------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=VARYING)
def _rope_and_store(
    qkv_ptr, cos_ptr, sin_ptr, q_ptr, k_cache_ptr, v_cache_ptr, k_scale_ptr, v_scale_ptr, slots_ptr, T, q_programs, qkv_token,
    N: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, ROW: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = 2 * HALF
    program = tl.program_id(0)
    if program < q_programs:
        _rotate(qkv_ptr, q_ptr, cos_ptr, sin_ptr, program, T, qkv_token, D, N, HALF, ROWS, BLOCK)
    else:
        row = ((program - q_programs) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        token, head = row // K, row % K
        slot = tl.load(slots_ptr + token, mask=token < T, other=0).to(tl.int64)
        k_ptr = qkv_ptr + N * D
        low, high = _rotated(k_ptr, cos_ptr, sin_ptr, token, head, token < T, qkv_token, D, HALF, BLOCK)
        at = slot * K + head
        if k_scale_ptr is not None:
            low, high = low.to(tl.float32), high.to(tl.float32)
            scale = _int8_scale(tl.maximum(tl.max(tl.abs(low), axis=1), tl.max(tl.abs(high), axis=1)))
            tl.store(k_scale_ptr + at * (ROW // 4), scale, mask=token < T)
            low, high = _int8(low, scale), _int8(high, scale)
        element = tl.arange(0, BLOCK)[None, :]
        inside = (token < T)[:, None] & (element < HALF)
        target = k_cache_ptr + (at * ROW)[:, None] + element
        tl.store(target, low, mask=inside)
        tl.store(target + HALF, high, mask=inside)
        _store_row(k_ptr + K * D, v_cache_ptr, v_scale_ptr, row, slot, T, qkv_token, D, K, D, ROW, 2 * BLOCK)


def rope_and_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, layout: PagedLayout, num_heads: int
) -> Tensor:
    """qkv: [T, (N + 2 K) D]; caches as in StoreKv. Stores rotated keys, and values. Returns the rotated queries [T, N, D]."""
    num_tokens, num_kv_heads = len(qkv), k_cache.shape[2]
    half = cos.shape[1]
    q = torch.empty(num_tokens, num_heads, 2 * half, dtype=qkv.dtype, device=qkv.device)
    if num_tokens:
        q_programs, k_programs = (triton.cdiv(num_tokens * heads, ROWS) for heads in (num_heads, num_kv_heads))
        _rope_and_store[(q_programs + k_programs,)](
            qkv, cos, sin, q, k_cache, v_cache, *scales_of(k_cache, v_cache), layout.slots, num_tokens, q_programs, qkv.stride(0),
            N=num_heads, K=num_kv_heads, HALF=half, ROW=k_cache.shape[-1],
            ROWS=ROWS, BLOCK=triton.next_power_of_2(half), num_warps=4, **ROUNDED_EACH,
        )  # fmt: skip
    return q
