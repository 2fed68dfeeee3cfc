"""Triton: attention within segments, and over the paged cache.

Flash attention (arXiv 2205.14135): a program holds a tile of queries and goes through their keys once, with a running
softmax in float32. Over the cache the query heads that share a key head are rows of one tile (GQA packed), and where there
are too few tiles to fill the card, as in decoding, the keys of a tile are split among programs (flash-decoding) and their
parts merged by a second kernel. Letters: N query heads, K key heads, R = N / K, D head size.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.record import PagedLayout, Segments
from saccade.kernels.triton_common import FUSED, VARYING, dot, narrow, operand, unbroken
from saccade.kernels.triton_heads import scales_of

KEY_TILE = 64
MAX_SPLITS = 32
_LOG2_E = math.log2(math.e)


# --- a tile of queries and a tile of keys -----------------------------------------------------------------------------


@triton.jit
def _take(acc, largest, total, q, k, v, seen, scale):
    """One tile of keys into the running softmax. q: [M, D]; k: [D, C]; v: [C, D]; seen: [M, C]; scale: times log2 e."""
    scores = tl.where(seen, dot(q, k, tl.zeros(seen.shape, dtype=tl.float32)) * scale, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(scores, axis=1))
    # A row that has seen no key yet has the largest score -inf; 0 in its place keeps the difference from being NaN.
    base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
    weights = tl.exp2(scores - base[:, None])
    fade = tl.exp2(largest - base)
    acc = dot(narrow(weights, v.dtype), v, acc * fade[:, None])
    return acc, new_largest, total * fade + tl.sum(weights, axis=1)


# --- within segments --------------------------------------------------------------------------------------------------


@triton.jit
def _varlen(
    q_ptr, k_ptr, v_ptr, out_ptr, tiles_ptr, scale,
    q_token, q_head, k_token, k_head, v_token, v_head, out_token, out_head,
    R: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr, CAUSAL: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    first, start, stop = (
        tl.load(tiles_ptr + tile * 3),
        tl.load(tiles_ptr + tile * 3 + 1),
        tl.load(tiles_ptr + tile * 3 + 2),
    )
    row = first + tl.arange(0, M)
    element = tl.arange(0, D_BLOCK)
    is_row, is_element = row < stop, element < D
    q_at = q_ptr + row.to(tl.int64)[:, None] * q_token + head * q_head + element[None, :]
    q = tl.load(q_at, mask=is_row[:, None] & is_element[None, :], other=0.0)
    acc = tl.zeros([M, D_BLOCK], dtype=tl.float32)
    largest = tl.full([M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([M], dtype=tl.float32)
    last = tl.minimum(first + M, stop) if CAUSAL else stop
    for at in range(start, last, C):
        column = at + tl.arange(0, C)
        is_column = column < stop
        k_at = k_ptr + column.to(tl.int64)[None, :] * k_token + (head // R) * k_head + element[:, None]
        v_at = v_ptr + column.to(tl.int64)[:, None] * v_token + (head // R) * v_head + element[None, :]
        k = tl.load(k_at, mask=is_column[None, :] & is_element[:, None], other=0.0)
        v = tl.load(v_at, mask=is_column[:, None] & is_element[None, :], other=0.0)
        seen = is_column[None, :] & (row[:, None] >= 0)
        if CAUSAL:
            seen = seen & (column[None, :] <= row[:, None])
        acc, largest, total = _take(acc, largest, total, q, k, v, seen, scale)
    out_at = out_ptr + row.to(tl.int64)[:, None] * out_token + head * out_head + element[None, :]
    out = narrow(acc / total[:, None], out_ptr.dtype.element_ty)
    tl.store(out_at, out, mask=is_row[:, None] & is_element[None, :])


def attention_varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, causal: bool = False) -> Tensor:
    q, k, v = (unbroken(x) for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    num_tokens, num_heads, head_dim = q.shape
    if num_tokens == 0:
        return out
    rows = _query_tile(q.dtype, max(segments.lengths))
    tiles = _segment_tiles(segments, rows, q.device)
    _varlen[(len(tiles), num_heads)](
        q, k, v, out, tiles, scale * _LOG2_E,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), out.stride(0), out.stride(1),
        R=num_heads // k.shape[1], D=head_dim, D_BLOCK=_head_block(head_dim), CAUSAL=causal,
        M=rows, C=_key_tile(q.dtype), num_warps=4 if rows <= 64 else 8, num_stages=2, **FUSED,
    )  # fmt: skip
    return out


@lru_cache(maxsize=16)
def _segment_tiles(segments: Segments, rows: int, device: torch.device) -> Tensor:
    """[tiles, 3] int32: first row, and start and stop of its segment. Kept, for every layer asks for the same."""
    tiles = [
        (first, start, start + length)
        for start, length in zip(segments.starts, segments.lengths, strict=True)
        for first in range(start, start + length, rows)
    ]
    return torch.tensor(tiles, dtype=torch.int32, device=device)


# --- over the cache ---------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=VARYING)
def _paged(
    q_ptr, k_cache_ptr, v_cache_ptr, out_ptr, acc_ptr, largest_ptr, total_ptr,
    k_scale_ptr, v_scale_ptr, tiles_ptr, contexts_ptr, tables_ptr, scale, table_stride, q_token, q_head,
    BLOCK_SIZE: tl.constexpr, K: tl.constexpr, R: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr, ROW: tl.constexpr,
    QUERIES: tl.constexpr, M: tl.constexpr, C: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, first = tl.load(tiles_ptr + tile * 4), tl.load(tiles_ptr + tile * 4 + 1)
    num_queries, from_end = tl.load(tiles_ptr + tile * 4 + 2), tl.load(tiles_ptr + tile * 4 + 3)
    context = tl.load(contexts_ptr + sequence)
    place = context - from_end  # of the tile's first query
    lane = tl.arange(0, M)
    query, head = lane // R, kv_head * R + lane % R
    element = tl.arange(0, D_BLOCK)
    is_row, is_element = (query < num_queries) & (lane < QUERIES * R), element < D
    inside = is_row[:, None] & is_element[None, :]
    token = (first + query).to(tl.int64)
    q = tl.load(q_ptr + token[:, None] * q_token + head[:, None] * q_head + element[None, :], mask=inside, other=0.0)
    acc = tl.zeros([M, D_BLOCK], dtype=tl.float32)
    largest = tl.full([M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([M], dtype=tl.float32)

    stop = tl.minimum(place + num_queries, context)  # the last query sees so many keys
    share = tl.cdiv(tl.cdiv(stop, SPLITS), C) * C
    begin = split * share
    for at in range(begin, tl.minimum(begin + share, stop), C):
        column = at + tl.arange(0, C)
        is_column = column < stop
        # Where no key is, none is read: what lies there may be anything, NaN included.
        block = tl.load(tables_ptr + sequence * table_stride + column // BLOCK_SIZE, mask=is_column, other=0)
        slot = block.to(tl.int64) * BLOCK_SIZE + column % BLOCK_SIZE
        at_key = (slot * K + kv_head) * ROW
        k = tl.load(
            k_cache_ptr + at_key[None, :] + element[:, None], mask=is_column[None, :] & is_element[:, None], other=0.0
        )
        v = tl.load(
            v_cache_ptr + at_key[:, None] + element[None, :], mask=is_column[:, None] & is_element[None, :], other=0.0
        )
        seen = is_column[None, :] & (column[None, :] <= (place + query)[:, None])
        if k_scale_ptr is not None:
            # The scale of a key is its score's, in float32; that of a value goes into it before the product.
            at_scale = (slot * K + kv_head) * (ROW // 4)
            k_scale = tl.load(k_scale_ptr + at_scale, mask=is_column, other=0.0)
            v_scale = tl.load(v_scale_ptr + at_scale, mask=is_column, other=0.0)
            wide_v = narrow(v.to(tl.float32) * v_scale[:, None], q.dtype)
            acc, largest, total = _take(
                acc, largest, total, q, operand(k, q.dtype), wide_v, seen, scale * k_scale[None, :]
            )
        else:
            acc, largest, total = _take(acc, largest, total, q, k, v, seen, scale)

    if SPLITS == 1:
        out_at = out_ptr + (token[:, None] * (K * R) + head[:, None]) * D + element[None, :]
        tl.store(out_at, narrow(acc / total[:, None], out_ptr.dtype.element_ty), mask=inside)
    else:
        part = (token * (K * R) + head) * SPLITS + split
        tl.store(acc_ptr + part[:, None] * D + element[None, :], acc, mask=inside)
        tl.store(largest_ptr + part, largest, mask=is_row)
        tl.store(total_ptr + part, total, mask=is_row)


@triton.jit
def _merge(
    acc_ptr, largest_ptr, total_ptr, out_ptr, D: tl.constexpr, D_BLOCK: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """The parts of one head of one query: each weighs 2^(its largest score)."""
    row = tl.program_id(0).to(tl.int64)
    split, element = tl.arange(0, SPLITS), tl.arange(0, D_BLOCK)
    largest = tl.load(largest_ptr + row * SPLITS + split)
    weight = tl.exp2(largest - tl.max(largest, axis=0))  # a part without keys: 2^-inf
    total = tl.sum(tl.load(total_ptr + row * SPLITS + split) * weight, axis=0)
    at = acc_ptr + (row * SPLITS + split)[:, None] * D + element[None, :]
    acc = tl.sum(tl.load(at, mask=(element < D)[None, :], other=0.0) * weight[:, None], axis=0)
    tl.store(out_ptr + row * D + element, narrow(acc / total, out_ptr.dtype.element_ty), mask=element < D)


def attention_paged(q: Tensor, k_cache: Tensor, v_cache: Tensor, layout: PagedLayout, scale: float) -> Tensor:
    q = unbroken(q)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    num_tokens, num_heads, head_dim = q.shape
    if num_tokens == 0:
        return out
    block_size, num_kv_heads = k_cache.shape[1:3]
    share = num_heads // num_kv_heads
    longest = max(layout.query_lengths)
    rows = max(16, triton.next_power_of_2(share)) if longest == 1 else max(64, triton.next_power_of_2(share))
    queries = rows // share
    if (tiles := layout.derived.get(queries)) is None:  # kept with the layout, which a recorded step keeps too
        tiles = layout.derived[queries] = _query_tiles(layout.query_lengths, queries, q.device)
    splits = _num_splits(len(tiles) * num_kv_heads, max(layout.context_lengths), q.device)
    parts = (num_tokens * num_heads * splits) if splits > 1 else 0
    acc = torch.empty(parts * head_dim, dtype=torch.float32, device=q.device)
    largest, total = (torch.empty(parts, dtype=torch.float32, device=q.device) for _ in range(2))
    _paged[(len(tiles), num_kv_heads, splits)](
        q, k_cache, v_cache, out, acc, largest, total, *scales_of(k_cache, v_cache),
        tiles, layout.contexts, layout.block_tables, scale * _LOG2_E, layout.block_tables.stride(0), q.stride(0), q.stride(1),
        BLOCK_SIZE=block_size, K=num_kv_heads, R=share, D=head_dim, D_BLOCK=_head_block(head_dim), ROW=k_cache.shape[-1],
        QUERIES=queries, M=rows, C=_key_tile(q.dtype), SPLITS=splits, num_warps=4, num_stages=2, **FUSED,
    )  # fmt: skip
    if splits > 1:
        block = triton.next_power_of_2(head_dim)
        _merge[(num_tokens * num_heads,)](
            acc, largest, total, out, D=head_dim, D_BLOCK=block, SPLITS=splits, num_warps=2, **FUSED
        )
    return out


def _query_tiles(query_lengths: tuple[int, ...], queries: int, device: torch.device) -> Tensor:
    """[tiles, 4] int32: sequence, first row, number of queries, and how far the first stands from the context's end.

    Knows nothing of contexts, so a recorded step whose contexts grow keeps its tiles.
    """
    tiles, row = [], 0
    for sequence, length in enumerate(query_lengths):
        for first in range(0, length, queries):
            tiles.append((sequence, row + first, min(queries, length - first), length - first))
        row += length
    return torch.tensor(tiles, dtype=torch.int32, device=device)


def _num_splits(num_programs: int, longest_context: int, device: torch.device) -> int:
    """A power of two that gives every multiprocessor about two programs, of at least two tiles of keys each."""
    wanted = 2 * _num_multiprocessors(device) // num_programs
    useful = longest_context // (2 * KEY_TILE)
    splits = 1
    while 2 * splits <= min(wanted, useful, MAX_SPLITS):
        splits *= 2
    return splits


@lru_cache(maxsize=16)
def _num_multiprocessors(device: torch.device) -> int:
    """Interpreted, a few: so that splitting is what the tests see, too."""
    return 8 if device.type == "cpu" else int(torch.cuda.get_device_properties(device).multi_processor_count)


def _query_tile(dtype: torch.dtype, longest: int) -> int:
    return 128 if longest > 256 and dtype != torch.float32 else 64


def _key_tile(dtype: torch.dtype) -> int:
    """float32 tiles are twice as large, and shared memory is not."""
    return KEY_TILE // 2 if dtype == torch.float32 else KEY_TILE


def _head_block(head_dim: int) -> int:
    """A power of two; matrix units take 16 columns or more."""
    return max(16, int(triton.next_power_of_2(head_dim)))
