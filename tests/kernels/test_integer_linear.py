"""Quantized linears: whole numbers are equal to an int64 oracle, floating-point sums near a float64 one, scales as said."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.kernels import reference
from saccade.kernels.record import Kernels
from saccade.schemes.affine import dequantize, integer_values, quantize_rows_int8, quantize_weight
from saccade.schemes.packing import pack, unpack
from saccade.schemes.scheme import DENSE, SCHEMES, W4A8, W8A8, W8A8_DYNAMIC, Static, Weight

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(0, 16, 8), (1, 1, 1), (1, 129, 65), (7, 64, 3), (17, 130, 129), (33, 3000, 40)]


def integers(*shape: int, low: int = -128, high: int = 127, seed: int = 0) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def oracle(a: Tensor, b: Tensor) -> Tensor:
    return (a.cpu().long()[:, None] * b.cpu().long()[None]).sum(-1)


def static_weight(rows: int, columns: int, zero: float = 3.0, bias: bool = True, scale: float = 0.05) -> Weight:
    """A weight as calibration would give it; the bias is in quant_bias, and a wrong one beside it must not be added."""
    values = integers(rows, columns, low=-127)
    weight_scale = torch.linspace(1e-3, 2e-3, rows)
    deq_scale = weight_scale * scale
    quant_bias = torch.linspace(-9, 9, rows) / deq_scale - zero * values.float().sum(1)
    static = Static(torch.tensor([scale]), torch.tensor([zero]), quant_bias.round().to(torch.int32), deq_scale)
    return Weight(values, weight_scale, torch.full((rows,), 1e6) if bias else None, W8A8, static=static)


@pytest.mark.parametrize(("rows", "columns", "outputs"), SIZES)
def test_the_integer_product_is_exact(device: torch.device, rows: int, columns: int, outputs: int) -> None:
    a, b = integers(rows, columns).to(device), integers(outputs, columns, seed=1).to(device)
    got = reference.int_matmul(a, b)
    assert got.dtype == torch.int32
    assert torch.equal(got.cpu().long(), oracle(a, b))


@pytest.mark.parametrize(("low", "high"), [(-128, -128), (127, 127), (-128, 127), (127, -128)])
def test_the_integer_product_is_exact_at_the_extremes(device: torch.device, low: int, high: int) -> None:
    """The widest layer of the published models has 29,568 columns."""
    a = torch.full((3, 29_568), low, dtype=torch.int8, device=device)
    b = torch.full((8, 29_568), high, dtype=torch.int8, device=device)
    assert (reference.int_matmul(a, b) == 29_568 * low * high).all()


@pytest.mark.parametrize(("rows", "columns", "outputs"), SIZES)
def test_the_way_for_processors_without_int8_products_is_exact_too(
    monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, outputs: int
) -> None:
    monkeypatch.setattr(reference, "_int_mm_is_exact", lambda: False)
    a, b = integers(rows, columns), integers(outputs, columns, seed=1)
    assert torch.equal(reference.int_matmul(a, b).long(), oracle(a, b))
    extreme = torch.full((2, 5000), -128, dtype=torch.int8)
    assert (reference.int_matmul(extreme, extreme) == 5000 * 2**14).all()


@pytest.mark.parametrize(("rows", "columns", "outputs"), SIZES[1:])
def test_filling_up_for_cublas_changes_no_sum(device: torch.device, rows: int, columns: int, outputs: int) -> None:
    a, b = integers(rows, columns).to(device), integers(outputs, columns, seed=1).to(device)
    assert torch.equal(reference._int_matmul_cuda(a, b).cpu().long(), oracle(a, b))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero", [-97.0, 0.0, 127.0, -300.0])
@pytest.mark.parametrize("rows", [0, 1, 7, 129])
def test_static_activations(kernels: Kernels, device: torch.device, dtype: torch.dtype, zero: float, rows: int) -> None:
    weight = static_weight(33, 65, zero)
    assert weight.static is not None
    x = (torch.randn(rows, 65, generator=torch.Generator().manual_seed(2)) * 9).to(dtype)
    x_q = torch.clamp(torch.round(x.float() / weight.static.scale + zero), -128, 127)
    total = oracle(x_q.to(torch.int8), weight.values) + weight.static.quant_bias.long()
    expected = (total.float() * weight.static.deq_scale).to(dtype)
    got = kernels.linear(x.to(device), weight.to(device, dtype))
    assert got.dtype == dtype
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 7, 129])
@pytest.mark.parametrize("scheme", [W8A8_DYNAMIC, *W4A8.values()], ids=lambda scheme: scheme.name)
def test_dynamic_activations(
    kernels: Kernels, device: torch.device, dtype: torch.dtype, bias: bool, rows: int, scheme: object
) -> None:
    assert scheme in SCHEMES.values()
    b = torch.randn(33).to(dtype) if bias else None
    weight = quantize_weight(Weight(torch.randn(33, 256), bias=b), scheme)  # type: ignore[arg-type]
    assert weight.scale is not None
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(3)).to(dtype)
    if rows:
        x[0] = 0
    scale = (x.float().abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    x_q = torch.clamp(torch.round(x.float() / scale[:, None]), -128, 127)
    expected = oracle(x_q.to(torch.int8), integer_values(weight)).float() * scale[:, None] * weight.scale
    expected = expected if b is None else expected + b.float()
    got = kernels.linear(x.to(device), weight.to(device, dtype))
    assert got.dtype == dtype
    if device.type == "cpu":
        assert torch.equal(got, expected.to(dtype))
    else:  # a device may fuse the last product and sum
        torch.testing.assert_close(
            got.cpu(), expected.to(dtype), rtol=2e-6 if dtype == torch.float32 else 8e-3, atol=1e-6
        )


def float_weights(rows: int, columns: int, bias: Tensor | None) -> dict[str, Weight]:
    """Every scheme whose products are not whole numbers throughout, zero points included."""
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(4))
    names = ("w8a16", "w4a16-g32", "w4a16-g64", "w4a16-asym-g32", "w4a8-float-g32", "w4a8-float-g64", "fp8")
    return {name: quantize_weight(Weight(w, bias=bias), SCHEMES[name]) for name in names}


def float_oracle(x: Tensor, weight: Weight) -> Tensor:
    """x: [T, H]. Returns [T, O] float64: row by row, from a weight formed value by value."""
    scheme = weight.scheme
    values = unpack(weight.values).double() if scheme.weight_bits == 4 else weight.values.double()
    assert weight.scale is not None
    size = scheme.group_size or values.shape[1]
    scale = weight.scale.double().view(len(values), -1).repeat_interleave(size, dim=1)
    zero = 0 if weight.zero is None else weight.zero.double().repeat_interleave(size, dim=1)
    w = (values - zero) * scale
    rows = []
    for row in x.float():
        if scheme.activation == "none":
            rows.append(w @ row.double())
            continue
        s = (row.abs().max() / (448 if scheme.is_float else 127)).clamp(min=torch.finfo(torch.float32).tiny)
        row_q = (row / s).to(torch.float8_e4m3fn).double() if scheme.is_float else (row / s).round().double()
        rows.append(w @ row_q * s.double())
    y = torch.stack(rows) if rows else torch.empty(0, len(w), dtype=torch.float64)
    return y if weight.bias is None else y + weight.bias.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 7, 129])
def test_floating_point_scales_inside_the_sum(
    kernels: Kernels, device: torch.device, dtype: torch.dtype, has_bias: bool, rows: int
) -> None:
    """Weights alone quantized, or with a scale for each group, or e4m3."""
    bias = torch.randn(33).to(dtype) if has_bias else None
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(3)).to(dtype)[:, ::2]
    if rows:
        x[0] = 0
    for name, weight in float_weights(33, 128, bias).items():
        expected = float_oracle(x, weight)
        got = kernels.linear(x.to(device), weight.to(device, dtype)).cpu()
        assert (got.dtype, got.shape) == (dtype, (rows, 33)), name
        # 16 bits: weights are rounded to them; 32: sums of 128 terms are, and a typical result is 10 with terms up to 10.
        ulp = torch.finfo(dtype).eps
        atol = (256 if dtype == torch.float32 else 24) * ulp
        torch.testing.assert_close(got.double(), expected, rtol=2 * ulp, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_large_values_in_float16_do_not_overflow_on_the_way(kernels: Kernels, device: torch.device) -> None:
    """127 * 1024 is beyond float16; the weighted sum is not."""
    weight = quantize_weight(Weight(torch.ones(8, 1024)), SCHEMES["w8a16"]).to(device, torch.float16)
    y = kernels.linear(torch.ones(2, 1024, dtype=torch.float16, device=device), weight)
    assert (y == 1024).all()


def test_four_bits_are_multiplied_group_by_group() -> None:
    """The formula with partial sums of each group, every nibble at its extreme, gives the very same whole numbers."""
    values, group_scale = integers(4, 96, low=-8, high=7), integers(4, 3, low=1, high=15, seed=1)
    values[0], group_scale[0] = -8, 16
    values[1], group_scale[1] = 7, 17
    weight = Weight(pack(values), torch.ones(4), None, W4A8[32], group_scale)
    x = integers(5, 96, seed=2)
    partial = torch.stack([oracle(x[:, g : g + 32], values[:, g : g + 32]) for g in (0, 32, 64)], dim=-1)
    expected = (partial * group_scale.long()).sum(-1)
    assert torch.equal(reference.int_matmul(x, integer_values(weight)).long(), expected)


def test_tiles_of_rows_and_outputs_meet_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = Weight(torch.randn(41, 64), bias=torch.randn(41))
    names = ("w8a16", "w4a16-g32", "w4a8-g32", "w4a8-float-g32", "fp8")
    weights = [static_weight(41, 64), *(quantize_weight(dense, SCHEMES[name]) for name in names)]
    x = torch.randn(23, 128)[:, ::2]
    whole = [reference.linear(x, weight) for weight in weights]
    monkeypatch.setattr(reference, "INPUT_TILE", 5)
    monkeypatch.setattr(reference, "OUTPUT_TILE", 7)
    for weight, y in zip(weights, whole, strict=True):  # float32 sums of another shape may be taken in another order
        exact = weight.scheme.name in ("w8a8", "w8a16", "w4a8-g32")
        assert torch.allclose(reference.linear(x, weight), y, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-5)


@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if scheme not in (DENSE, W8A8)])
def test_what_is_no_number_does_not_hide(kernels: Kernels, device: torch.device, name: str) -> None:
    weight = quantize_weight(Weight(torch.randn(8, 256)), SCHEMES[name]).to(device, torch.float32)
    x = torch.randn(3, 256, device=device)
    x[0, 0], x[1, 0] = float("nan"), float("inf")
    y = kernels.linear(x, weight)
    assert not y[:2].isfinite().any()
    assert y[2].isfinite().all()


@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if scheme not in (DENSE, W8A8)])
def test_a_quantized_linear_is_near_its_dequantized_self(kernels: Kernels, device: torch.device, name: str) -> None:
    weight = quantize_weight(Weight(torch.randn(64, 512), bias=torch.randn(64)), SCHEMES[name])
    x = torch.randn(40, 512)
    near = x @ dequantize(weight).T + weight.bias
    got = kernels.linear(x.to(device), weight.to(device, torch.float32)).cpu()
    # int8 activations of normal rows: a step of max/127, uniform error; e4m3 ones have 4 significant bits
    assert (got - near).norm() <= (0.04 if SCHEMES[name].is_float else 0.012) * near.norm()


def test_a_row_of_zeros_stays_zero() -> None:
    x_q, scale = reference.quantize_rows(torch.zeros(2, 8))
    assert (x_q == 0).all()
    assert (scale > 0).all()
    x_q, scale = quantize_rows_int8(torch.full((1, 8), 1e-42))  # below the smallest normal number
    assert torch.isfinite(x_q * scale).all()
