"""A step of the whole decoder in one call: a model's layers as the library knows them, described once."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from saccade.kernels.cpu_attention import int64s
from saccade.kernels.cpu_linear import DTYPES, Layer, describe
from saccade.kernels.library import Library
from saccade.kernels.record import KV_SCALE_BYTES, DecoderStep, DecoderWeights, PagedLayout, PlanDecoder
from saccade.schemes.scheme import Weight


class LayerPlan(ctypes.Structure):
    """SaccadeDecoderLayer of csrc/decoder.h."""

    _fields_ = tuple(
        (name, c_void_p)
        for name in ("input_gain", "post_gain", "qkv", "output", "gate_up", "down", "k_cache", "v_cache")
    )


class Decoder(ctypes.Structure):
    """SaccadeDecoder of csrc/decoder.h."""

    _fields_ = (
        ("layers", c_void_p),
        ("num_layers", c_int64),
        ("gain", c_void_p),
        ("hidden_size", c_int64),
        ("intermediate_size", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("block_size", c_int64),
        ("eps", c_float),
        ("dtype", c_int32),
        ("has_int8_cache", c_int32),
    )


class Step(ctypes.Structure):
    """SaccadeStep of csrc/decoder.h."""

    _fields_ = (
        ("x", c_void_p),
        ("hidden", c_void_p),
        ("workspace", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("slots", c_void_p),
        ("query_lengths", c_void_p),
        ("context_lengths", c_void_p),
        ("block_tables", c_void_p),
        ("table_width", c_int64),
        ("num_sequences", c_int64),
        ("num_tokens", c_int64),
    )


def plan_decoder(library: Library) -> PlanDecoder:
    """The planner over `library`. It has no plan for layers that the library does not compute."""
    call = library.functions.saccade_decode
    call.argtypes, call.restype = [c_void_p, c_void_p], None

    def plan(weights: DecoderWeights, cache: Tensor) -> DecoderStep | None:
        dtype = weights.gain.dtype
        if (
            cache.device.type != "cpu"
            or dtype not in DTYPES
            or cache.dtype not in (dtype, torch.int8)
            or not cache.is_contiguous()
        ):
            return None
        linears: list[Layer] = []

        def address(weight: Weight) -> int:
            layer = describe(weight, dtype)
            if layer is None:
                raise LookupError
            linears.append(layer)
            return ctypes.addressof(layer)

        layers = (LayerPlan * len(weights.layers))()
        try:
            for planned, layer, (k_cache, v_cache) in zip(layers, weights.layers, cache, strict=True):
                planned.input_gain, planned.post_gain = layer.input_gain.data_ptr(), layer.post_gain.data_ptr()
                planned.qkv, planned.output = address(layer.qkv), address(layer.output)
                planned.gate_up, planned.down = address(layer.gate_up), address(layer.down)
                planned.k_cache, planned.v_cache = k_cache.data_ptr(), v_cache.data_ptr()
        except LookupError:
            return None
        first = weights.layers[0]
        heads, kv_heads, row = weights.num_heads, *cache.shape[-2:]
        has_int8_cache = cache.dtype == torch.int8
        head_dim = row - (KV_SCALE_BYTES if has_int8_cache else 0)
        intermediate_size = first.down.in_features
        decoder = Decoder(
            layers=ctypes.addressof(layers),
            num_layers=len(layers),
            gain=weights.gain.data_ptr(),
            hidden_size=len(weights.gain),
            intermediate_size=intermediate_size,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            block_size=cache.shape[3],
            eps=weights.eps,
            dtype=DTYPES[dtype],
            has_int8_cache=has_int8_cache,
        )
        width = 2 * len(weights.gain) + max((2 * heads + 2 * kv_heads) * head_dim, 3 * intermediate_size)
        kept = (weights, cache, linears, layers)  # what the addresses point to

        def step(x: Tensor, cos: Tensor, sin: Tensor, layout: PagedLayout) -> Tensor:
            assert kept, "the plan's numbers are alive"
            x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
            hidden, workspace = x.new_empty(x.shape), x.new_empty(len(x), width)
            tables, slots = layout.block_tables.contiguous(), layout.slots.contiguous()
            queries, contexts = int64s(layout.query_lengths), int64s(layout.context_lengths)
            brought = Step(
                x.data_ptr(),
                hidden.data_ptr(),
                workspace.data_ptr(),
                cos.data_ptr(),
                sin.data_ptr(),
                slots.data_ptr(),
                ctypes.addressof(queries),
                ctypes.addressof(contexts),
                tables.data_ptr(),
                tables.shape[1],
                len(queries),
                len(x),
            )
            call(ctypes.byref(decoder), ctypes.byref(brought))
            return hidden

        return step

    return plan
