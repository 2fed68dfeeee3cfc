"""Attention in C++: what the library is told of rows, segments and a paged cache, and the calls."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from saccade.kernels import reference
from saccade.kernels.cpu_linear import DTYPES
from saccade.kernels.cpu_small import are_ours, heads_together
from saccade.kernels.library import Library
from saccade.kernels.record import AttentionPaged, AttentionVarlen, PagedLayout, Segments


class Attention(ctypes.Structure):
    """SaccadeAttention of csrc/attention.h."""

    _fields_ = (
        ("q", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("out", c_void_p),
        ("query_lengths", c_void_p),
        ("context_lengths", c_void_p),
        ("block_tables", c_void_p),
        ("table_width", c_int64),
        ("block_size", c_int64),
        ("num_sequences", c_int64),
        ("q_stride", c_int64),
        ("k_stride", c_int64),
        ("v_stride", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("scale", c_float),
        ("causal", c_int32),
        ("dtype", c_int32),
        ("is_int8", c_int32),
    )


def attention_varlen(library: Library) -> AttentionVarlen:
    """The op over `library`. Types it does not know and inputs that want gradients go to the reference."""
    call = _function(library)

    def run(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, causal: bool = False) -> Tensor:
        if not are_ours(q, k, v):
            return reference.attention_varlen(q, k, v, segments, scale, causal)
        q, k, v = heads_together(q), heads_together(k), heads_together(v)
        lengths = int64s(segments.lengths)
        op = _attention(q, k, v, lengths, lengths, scale)
        op.k_stride, op.v_stride, op.causal = k.stride(0), v.stride(0), causal
        return call(op, q)

    return run


def attention_paged(library: Library) -> AttentionPaged:
    """The op over `library`; caches with gaps go to the reference."""
    call = _function(library)

    def run(q: Tensor, k_cache: Tensor, v_cache: Tensor, layout: PagedLayout, scale: float) -> Tensor:
        is_int8 = k_cache.dtype == torch.int8
        known = are_ours(q) if is_int8 else are_ours(q, k_cache, v_cache)
        if not (known and k_cache.is_contiguous() and v_cache.is_contiguous()):
            return reference.attention_paged(q, k_cache, v_cache, layout, scale)
        q, tables = heads_together(q), layout.block_tables.contiguous()
        queries, contexts = int64s(layout.query_lengths), int64s(layout.context_lengths)
        op = _attention(q, k_cache, v_cache, queries, contexts, scale)
        op.block_tables, op.table_width, op.block_size = tables.data_ptr(), tables.shape[1], k_cache.shape[1]
        op.k_stride, op.v_stride, op.causal = k_cache.stride(1), v_cache.stride(1), True
        op.is_int8 = is_int8
        return call(op, q)

    return run


Int64s = ctypes.Array[c_int64]


def _attention(
    q: Tensor, k: Tensor, v: Tensor, query_lengths: Int64s, context_lengths: Int64s, scale: float
) -> Attention:
    """What both ops have in common. The caller keeps the tensors and arrays alive until the call."""
    return Attention(
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        query_lengths=ctypes.addressof(query_lengths),
        context_lengths=ctypes.addressof(context_lengths),
        num_sequences=len(query_lengths),
        q_stride=q.stride(0),
        num_heads=q.shape[1],
        num_kv_heads=k.shape[-2],
        head_dim=q.shape[2],
        scale=scale,
        dtype=DTYPES[q.dtype],
    )


def _function(library: Library) -> Callable[[Attention, Tensor], Tensor]:
    function = library.functions.saccade_attention
    function.argtypes, function.restype = [c_void_p], None

    def call(op: Attention, q: Tensor) -> Tensor:
        out = q.new_empty(q.shape)
        op.out = out.data_ptr()
        function(ctypes.byref(op))
        return out

    return call


def int64s(values: Sequence[int]) -> Int64s:
    return (c_int64 * len(values))(*values)
