"""A back end's step of the whole decoder gives what its ops give one by one, to the bit."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from saccade.kernels.record import DecoderLayerWeights, DecoderWeights, Kernels, PagedLayout
from saccade.schemes.affine import quantize_weight
from saccade.schemes.scheme import SCHEMES, W8A8, Static, Weight

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 4, 2, 16
CASES = [
    ("dense", torch.float32, False),
    ("dense", torch.bfloat16, True),
    ("w8a16", torch.bfloat16, False),
    ("w8a8", torch.bfloat16, True),
    ("w8a8-dynamic", torch.bfloat16, False),
    ("w8a8-dynamic", torch.float32, True),
    ("w4a8-g32", torch.bfloat16, False),
    ("w4a16-g32", torch.bfloat16, True),
    ("fp8", torch.bfloat16, False),
]


def three_sequences() -> PagedLayout:
    """One token after 8 others, a prompt of 5, one token after 69 others; each in blocks of its own."""
    tables = torch.randperm(60)[: 3 * 18].reshape(3, 18)
    slots = [tables[0, 2] * 4, *(tables[1, n // 4] * 4 + n % 4 for n in range(5)), tables[2, 17] * 4 + 1]
    return PagedLayout((1, 5, 1), (9, 5, 70), tables, torch.stack(slots))


def weight(scheme: str, num_outputs: int, num_columns: int, dtype: torch.dtype, has_bias: bool = False) -> Weight:
    values = torch.randn(num_outputs, num_columns) / num_columns**0.5
    bias = torch.randn(num_outputs).to(dtype) if has_bias else None
    if scheme != "w8a8":
        dense = Weight(values.to(dtype), bias=bias)
        return dense if scheme == "dense" else quantize_weight(dense, SCHEMES[scheme])
    quantized = quantize_weight(Weight(values.to(dtype)), SCHEMES["w8a16"])
    assert quantized.scale is not None
    step = torch.tensor([0.02])
    quant_bias = torch.randint(-99, 99, (num_outputs,), dtype=torch.int32)
    static = Static(step, torch.tensor([3.0]), quant_bias, quantized.scale * step)
    return replace(quantized, scheme=W8A8, static=static)


def decoder(scheme: str, dtype: torch.dtype) -> DecoderWeights:
    def gain() -> Tensor:
        return (1 + 0.1 * torch.randn(HIDDEN)).to(dtype)

    def layer() -> DecoderLayerWeights:
        return DecoderLayerWeights(
            input_gain=gain(),
            qkv=weight(scheme, (HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN, dtype, has_bias=True),
            output=weight(scheme, HIDDEN, HEADS * HEAD_DIM, dtype),
            post_gain=gain(),
            gate_up=weight(scheme, 2 * INNER, HIDDEN, dtype),
            down=weight(scheme, HIDDEN, INNER, dtype),
        )

    return DecoderWeights((layer(), layer()), gain(), 1e-6, HEADS)


def one_by_one(
    kernels: Kernels, weights: DecoderWeights, cache: Tensor, x: Tensor, cos: Tensor, sin: Tensor, layout: PagedLayout
) -> Tensor:
    residual: Tensor | None = None
    sizes = [HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM]
    for layer, (k_cache, v_cache) in zip(weights.layers, cache, strict=True):
        x, residual = kernels.rms_norm(x, layer.input_gain, weights.eps, residual)
        q, k, v = (part.unflatten(1, (-1, HEAD_DIM)) for part in kernels.linear(x, layer.qkv).split(sizes, dim=-1))
        q, k = kernels.rope(q, k, cos, sin)
        kernels.store_kv(k, v, k_cache, v_cache, layout)
        x = kernels.attention_paged(q, k_cache, v_cache, layout, HEAD_DIM**-0.5)
        x = kernels.linear(x.flatten(1), layer.output)
        x, residual = kernels.rms_norm(x, layer.post_gain, weights.eps, residual)
        x = kernels.linear(kernels.silu_mul(kernels.linear(x, layer.gate_up)), layer.down)
    return kernels.rms_norm(x, weights.gain, weights.eps, residual)[0]


@pytest.mark.parametrize("kernels", ["cpu", "triton"], indirect=True)
@pytest.mark.parametrize(("scheme", "dtype", "has_int8_cache"), CASES)
def test_the_step_has_the_bits_of_the_ops(
    kernels: Kernels, device: torch.device, scheme: str, dtype: torch.dtype, has_int8_cache: bool
) -> None:
    torch.manual_seed(1)
    assert kernels.plan_decoder is not None
    with device:
        weights = decoder(scheme, dtype)
        x, angles = torch.randn(7, HIDDEN).to(dtype), torch.rand(7, HEAD_DIM // 2) * 6
        row, kind = (HEAD_DIM + 4, torch.int8) if has_int8_cache else (HEAD_DIM, dtype)
        cache = torch.randint(0, 60, (2, 2, 60, 4, KV_HEADS, row)).to(kind)  # such bytes make scales that are numbers
        brought = (angles.cos(), angles.sin(), three_sequences())
    ops_cache = cache.clone()
    step = kernels.plan_decoder(weights, cache)
    if step is None:
        pytest.skip(f"this back end would rather be called op by op for {scheme}")
    got, expected = step(x, *brought), one_by_one(kernels, weights, ops_cache, x, *brought)
    assert got.isfinite().all()
    assert torch.equal(got, expected)
    assert torch.equal(cache, ops_cache)


@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [("dense", torch.float32), ("dense", torch.bfloat16), ("w8a16", torch.float32), ("w8a16", torch.bfloat16)],
)
def test_one_row_goes_from_product_to_product_with_its_norms(
    monkeypatch: pytest.MonkeyPatch, kernels: Kernels, device: torch.device, scheme: str, dtype: torch.dtype
) -> None:
    """The ops' numbers up to the order of sums: squares are added by tile. Tiles that the sizes do not fill."""
    monkeypatch.setattr("saccade.kernels.triton_cuts.ONE_ROW_TILE", (16, 32))
    torch.manual_seed(1)
    assert kernels.plan_decoder is not None
    with device:
        weights = decoder(scheme, dtype)
        x, angles = torch.randn(1, HIDDEN).to(dtype), torch.rand(1, HEAD_DIM // 2) * 6
        cache = torch.randn(2, 2, 60, 4, KV_HEADS, HEAD_DIM).to(dtype)
        layout = PagedLayout((1,), (70,), torch.randperm(60)[:18][None], torch.tensor([17 * 4 + 1]))
    ops_cache = cache.clone()
    brought = (angles.cos(), angles.sin(), layout)
    step = kernels.plan_decoder(weights, cache)
    assert step is not None
    got, expected = step(x, *brought), one_by_one(kernels, weights, ops_cache, x, *brought)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(cache, ops_cache, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
@pytest.mark.parametrize(
    ("scheme", "num_rows", "of_a_layer"),
    [("dense", 1, 6), ("w8a16", 1, 6), ("w8a16", 4, 8), ("w8a8", 1, 9), ("w8a8-dynamic", 1, 10), ("w4a16-g32", 1, 8)],
)
def test_how_many_launches_a_layer_is(
    monkeypatch: pytest.MonkeyPatch,
    kernels: Kernels,
    device: torch.device,
    scheme: str,
    num_rows: int,
    of_a_layer: int,
) -> None:
    """Of contexts too short to be split among programs, and outputs too few for it; the docs count one more for attention's parts."""
    torch.manual_seed(1)
    assert kernels.plan_decoder is not None
    with device:
        weights = decoder(scheme, torch.bfloat16)
        x, angles = torch.randn(num_rows, HIDDEN).bfloat16(), torch.rand(num_rows, HEAD_DIM // 2) * 6
        cache = torch.randn(2, 2, 60, 4, KV_HEADS, HEAD_DIM).bfloat16()
        tables = torch.arange(num_rows * 2).view(num_rows, 2)
        layout = PagedLayout((1,) * num_rows, (7,) * num_rows, tables, tables[:, 1] * 4 + 2)
    step = kernels.plan_decoder(weights, cache)
    assert step is not None
    counts = []
    launcher = type(import_module("saccade.kernels.triton_rows")._rms_norm)
    launch = launcher.__getitem__

    def counted(kernel: Any, grid: Any) -> Any:
        counts.append(kernel)
        return launch(kernel, grid)

    monkeypatch.setattr(launcher, "__getitem__", counted)
    step(x, angles.cos(), angles.sin(), layout)
    beside = (
        2 if num_rows == 1 and scheme in ("dense", "w8a16") else 1
    )  # the last norm; and the first, which has no product before it
    assert len(counts) == 2 * of_a_layer + beside
