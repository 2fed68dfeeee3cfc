"""Arithmetic in a fixed order: its definition written out, and torch's own results where this processor's torch adds alike."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.kernels import ordered
from saccade.kernels.library import Library, load

LANES = {"AVX2": 8, "AVX512": 16}.get(torch.backends.cpu.get_cpu_capability())

needs_library = pytest.mark.skipif(not isinstance(load(), Library), reason="the C++ kernels are not built")
needs_lanes = pytest.mark.skipif(LANES is None, reason="torch's own vectors are of another kind here")
pytestmark = [needs_library, pytest.mark.usefixtures("one_thread")]


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def by_pairs(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """The odd column's product is added first; products of bfloat16 are exact in float32."""
    a, b = (F.pad(t.float(), (0, t.shape[1] % 2)) for t in (a, b))
    total = torch.zeros(len(a), len(b))
    for i in range(0, a.shape[1], 2):
        for column in (i + 1, i):
            total = total + a[:, column, None] * b[:, column]
    return (total if bias is None else total + bias.float()).bfloat16()


@pytest.mark.parametrize(
    ("rows", "outputs", "columns"), [(1, 1, 1), (7, 33, 15), (13, 16, 64), (5, 70, 129), (0, 3, 4)]
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_go_by_pairs(isa: str, rows: int, outputs: int, columns: int, has_bias: bool) -> None:
    x, weight = random(rows, columns).bfloat16(), random(outputs, columns, seed=1).bfloat16()
    bias = random(outputs, seed=2).bfloat16() if has_bias else None
    assert torch.equal(ordered.linear(x, weight, bias), by_pairs(x, weight, bias))


def test_products_see_strides_and_batches() -> None:
    a, b = random(3, 9, 20).bfloat16(), random(3, 20, 11, seed=1).bfloat16()
    expected = torch.stack([by_pairs(x, y.T, None) for x, y in zip(a, b, strict=True)])
    assert torch.equal(ordered.matmul(a, b), expected)
    wide = random(3, 9, 40).bfloat16()[:, :, ::2]
    expected = torch.stack([by_pairs(x, y.T, None) for x, y in zip(wide, b, strict=True)])
    assert torch.equal(ordered.matmul(wide, b.transpose(1, 2).contiguous().transpose(1, 2)), expected)


def test_the_order_shows() -> None:
    """Sums of another order have other bits now and then: the test above sees it."""
    x, weight = random(64, 256).bfloat16(), random(64, 256, seed=1).bfloat16()
    swapped = torch.arange(256) ^ 1
    assert not torch.equal(ordered.linear(x, weight), ordered.linear(x[:, swapped], weight[:, swapped]))


def test_numbers_too_small_for_the_instruction_count_as_zero() -> None:
    x, weight = torch.tensor([[1e-39, 1.0]]).bfloat16(), torch.tensor([[2.0**120, 1.0]]).bfloat16()
    assert ordered.linear(x, weight).item() == 1.0


def test_a_convolution_goes_place_by_place() -> None:
    patches, weight = random(5, 3, 2, 4, 4).bfloat16(), random(8, 3, 2, 4, 4, seed=1).bfloat16()
    found = ordered.patch_convolution(patches, weight)
    rows = [F.pad(t, (0, 0, 0, 0, 0, 0, 0, 1)).permute(0, 2, 3, 4, 1).flatten(1) for t in (patches, weight)]
    assert torch.equal(found, by_pairs(*rows, None))
    exact = F.conv3d(patches.double(), weight.double(), stride=(2, 4, 4)).flatten(1)
    assert torch.allclose(found.double(), exact, rtol=2**-8, atol=1e-2)


@needs_lanes
@pytest.mark.parametrize("tokens", [1, 7, 38, 46, 82, 191, 200, 530, 800])
def test_attention_is_torchs_flash_attention(isa: str, tokens: int) -> None:
    """Its products may be summed in another order on this processor: a few of a thousand values may differ by a rounding."""
    q, k, v = (random(1, 3, tokens, 64, seed=i, scale=2 - i / 2).bfloat16() for i in range(3))
    assert LANES is not None
    found = ordered.causal_attention(q, k, v, LANES)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert (found != expected).float().mean() < 1e-3
    assert torch.allclose(found.float(), expected.float(), rtol=2**-7, atol=1e-4)


def test_attention_with_vectors_of_sixteen_is_not_that_of_eight() -> None:
    q, k, v = (random(1, 3, 46, 64, seed=i, scale=2).bfloat16() for i in range(3))
    assert not torch.equal(ordered.causal_attention(q, k, v, 8), ordered.causal_attention(q, k, v, 16))


@needs_lanes
@pytest.mark.parametrize("columns", [32, 33, 80, 127, 257, 1280, 3420, 18944, 70001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_torchs(isa: str, columns: int, dtype: torch.dtype) -> None:
    x = random(20, columns).abs().to(dtype)
    assert LANES is not None
    assert torch.equal(ordered.row_sums(x, LANES), x.sum(-1))
    assert torch.equal(ordered.row_sums(x[0], LANES), x[0].sum())


@needs_lanes
@pytest.mark.parametrize("columns", [1, 5, 8, 9, 38, 82, 257, 1000])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_softmax_is_torchs(isa: str, columns: int, scale: float) -> None:
    x = random(20, columns, scale=scale)
    x[3, : columns // 2] = float("-inf")
    assert LANES is not None
    assert torch.equal(ordered.softmax(x, LANES), x.softmax(-1))


def test_other_types_and_short_rows_are_torchs() -> None:
    x, weight = random(4, 12), random(5, 12, seed=1)
    assert torch.equal(ordered.linear(x, weight), F.linear(x, weight))
    assert torch.equal(ordered.row_sums(x), x.sum(-1))
    assert ordered.row_sums(x.half()).dtype == torch.float16


def test_gelu_is_rounded_once() -> None:
    x = torch.linspace(-6, 6, 4001).bfloat16()
    found = ordered.gelu(x)
    exact = F.gelu(x.double())
    assert found.dtype == torch.bfloat16
    assert ((found.double() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-40).all()


# --- what m2's search rounds and compares ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "outputs", "depth"), [(1, 1, 1), (7, 33, 15), (100, 70, 129), (197, 40, 300), (3, 2200, 12)]
)
def test_products_with_panels_are_those_with_the_weight(isa: str, rows: int, outputs: int, depth: int) -> None:
    x, weight = random(rows, depth + 3).bfloat16()[:, :depth], random(outputs, depth, seed=1).bfloat16()
    panels = ordered.panels(weight)
    assert torch.equal(ordered.product(x, panels), by_pairs(x, weight, None))
    other = ordered.panels(-weight, out=panels)
    assert other is panels
    assert torch.equal(ordered.product(x, panels), by_pairs(x, -weight, None))


@pytest.mark.parametrize("depth", [1, 15, 64, 133])
def test_panels_round_as_torch_does(isa: str, depth: int) -> None:
    weight, scale = random(37, depth, scale=0.1).bfloat16(), random(depth, seed=1).abs().add(1).bfloat16()
    weight[5], weight[6] = 0, weight[6] * 1e-38
    scaled = weight * scale
    step = torch.maximum(scaled.abs().amax(1, keepdim=True) / 127.0, torch.tensor(2.0**-23).bfloat16())
    expected = (scaled / step).round().clamp(-127, 127) * step
    x = random(9, depth, seed=2).bfloat16()
    assert torch.equal(ordered.product(x, ordered.panels(weight, scale)), by_pairs(x, expected, None))


@pytest.mark.parametrize("columns", [1, 16, 77])
@pytest.mark.parametrize("step", [0.02, 0.5])
def test_levels_are_those_of_torch(isa: str, columns: int, step: float) -> None:
    x, scale = random(21, columns, scale=3).bfloat16(), random(columns, seed=1).abs().add(1).bfloat16()
    step = torch.tensor(step).bfloat16().item()
    expected = (x / scale / step).round_().add_(127.0).clamp_(0, 255).sub_(127.0).mul_(step)
    assert torch.equal(ordered.levels(x, scale, step, 127.0), expected)


@pytest.mark.parametrize("columns", [16, 50, 1024])
@pytest.mark.parametrize("has_bias", [False, True])
def test_distances_of_gate_and_up_are_those_of_torch(isa: str, columns: int, has_bias: bool) -> None:
    both, exact = random(20, 2 * columns, scale=2).bfloat16(), random(20, columns, seed=1).bfloat16()
    bias = random(2 * columns, seed=2).bfloat16() if has_bias else None
    gate, up = (both if bias is None else both + bias).chunk(2, dim=-1)
    expected = ordered.row_sums(((F.silu(gate) * up).float() - exact.float()).abs_().pow_(2.0))
    assert torch.equal(ordered.gate_up_distances(both, bias, exact), expected)


@pytest.mark.parametrize("dim", [32, 64, 80])
def test_attention_within_segments_is_that_of_torch(isa: str, dim: int) -> None:
    """Over all patches with a mask, of which segments are any part in any order."""
    lengths, places = [64, 6, 230, 2], [128, 192, 202, 434]
    total, rows = 440, [p + i for n, p in zip(lengths, places, strict=True) for i in range(n)]
    angles = random(total, dim, seed=1)
    qkv, exact = random(total, 3 * dim, scale=2).bfloat16(), random(total, dim, seed=2).bfloat16()
    q, k, v = qkv.chunk(3, dim=1)
    q, k = ((t.float() * angles.cos() + turned(t.float()) * angles.sin()).bfloat16() for t in (q, k))
    mask = torch.full((total, total), torch.finfo(torch.bfloat16).min).bfloat16()
    for length, place in zip(lengths, places, strict=True):
        mask[place : place + length, place : place + length] = 0
    logits = ordered.matmul(q.contiguous(), k.T) / 7.5 + mask
    expected = ordered.matmul(ordered.softmax(logits).bfloat16(), v)[rows]
    bounds = (0, 64, 70, 300, 302)
    segments = ordered.Segments(angles.cos()[rows], angles.sin()[rows], bounds, 7.5)
    assert torch.equal(ordered.segment_attention(qkv[rows], segments), expected)
    distances = ordered.row_sums((expected - exact[rows]).abs_().pow_(2.0))
    assert torch.equal(ordered.segment_distances(qkv[rows], segments, exact[rows]), distances)


@pytest.mark.parametrize("columns", [16, 33, 200])
def test_causal_softmax_leaves_the_future_out(isa: str, columns: int) -> None:
    logits = random(3, columns - 5, columns, scale=3)
    future = torch.ones(columns, columns).triu(1).bool()[5:]
    expected = ordered.softmax(logits.masked_fill(future, torch.finfo(torch.bfloat16).min)).bfloat16()
    assert torch.equal(ordered.causal_softmax(logits, 5), expected)


def turned(x: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((-high, low), dim=-1)
