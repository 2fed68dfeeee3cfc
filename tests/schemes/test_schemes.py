"""Packing, rounding and stacking of weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from saccade.base.errors import CheckpointError, OptionError
from saccade.schemes.affine import (
    dequantize,
    integer_values,
    join_group_scales,
    loading_scheme,
    quantize_groups_int4,
    quantize_weight,
    settled_scales,
    split_group_scales,
    static_weight,
)
from saccade.schemes.packing import pack, pack_row_pairs, unpack, unpack_row_pairs
from saccade.schemes.scheme import (
    FP8,
    SCHEMES,
    W4A8,
    W4A8_FLOAT,
    W4A16,
    W4A16_ASYM,
    W8A8,
    W8A8_DYNAMIC,
    W8A16,
    Scheme,
    Static,
    Weight,
    fitting,
    scheme_of,
    stack,
)


def nibbles(rows: int, columns: int) -> Tensor:
    """Every value from -8 to 7 somewhere."""
    return (
        ((torch.arange(rows * columns) * 7 + torch.arange(rows * columns) // 16) % 16 - 8)
        .to(torch.int8)
        .view(rows, columns)
    )


@pytest.mark.parametrize(("rows", "columns"), [(0, 32), (1, 32), (3, 96), (4, 64)])
def test_packing_and_back_is_the_same(rows: int, columns: int) -> None:
    values = nibbles(rows, columns)
    assert pack(values).shape == (rows, columns // 2)
    assert torch.equal(unpack(pack(values)), values)


def test_a_packed_byte_holds_columns_sixteen_apart() -> None:
    values = nibbles(2, 64)
    packed = pack(values).int()
    for row in range(2):
        for column in range(64):
            byte = int(packed[row, column // 32 * 16 + column % 16])
            nibble = byte >> 4 if column % 32 >= 16 else byte & 15
            assert nibble == int(values[row, column]) & 15


@pytest.mark.parametrize("rows", [0, 2, 6])
def test_row_pairs_share_bytes_the_even_row_low(rows: int) -> None:
    values = nibbles(rows, 5)
    packed = pack_row_pairs(values)
    assert torch.equal(unpack_row_pairs(packed), values)
    expected = (values[1::2].int() & 15) * 16 + (values[0::2].int() & 15)
    assert torch.equal(packed.int() & 255, expected)


def test_packed_rows_are_stacked_and_split_like_any_rows() -> None:
    values = nibbles(5, 64)
    assert torch.equal(torch.cat([pack(values[:2]), pack(values[2:])]), pack(values))


@pytest.mark.parametrize("name", [name for name in SCHEMES if name not in ("dense", "w8a8")])
def test_rounding_to_nearest_is_within_half_a_step(name: str) -> None:
    scheme = SCHEMES[name]
    w = torch.randn(16, 512) * torch.logspace(-3, 2, 16)[:, None]
    w[3] = 0
    weight = quantize_weight(Weight(w), scheme)
    assert weight.scale is not None
    step = weight.scale.view(16, -1, 1).expand(16, 512 // (scheme.group_size or 512), 1)
    if weight.group_scale is not None:
        step = step * (weight.group_scale[:, :, None] + 7.5)  # the rounding, and 7.5 times that of the group's scale
    error = (dequantize(weight) - w).view(*step.shape[:2], -1).abs()
    if scheme.is_float:  # 4 significant bits, and below the smallest exponent a 2^-9th of the scale
        step = (w.abs() / 8).view(error.shape).clamp(min=float(2**-9) * step)
    slack = 0.53 if scheme.has_float_groups else 0.501  # a scale rounded down to bfloat16 clips the largest a little
    slack += scheme.is_asymmetric / 2  # and a zero point rounded by half a step clips one end by as much
    assert (error <= step * slack).all()
    assert (dequantize(weight)[3] == 0).all()


def test_four_bit_values_times_their_group_scale_fit_int8() -> None:
    values, _, group_scale = quantize_groups_int4(torch.randn(64, 256) ** 3, 32)
    assert (values.min(), values.max()) == (-8, 7)
    assert (group_scale.min(), group_scale.max()) == (1, 16)
    weight = quantize_weight(Weight(torch.randn(64, 256) ** 3), W4A8[32])
    exact = unpack(weight.values).view(64, 8, 32).int() * weight.group_scale[:, :, None].int()  # type: ignore[index]
    assert torch.equal(integer_values(weight).int(), exact.flatten(1))


def test_whole_number_group_scales_cost_nothing_on_normal_numbers() -> None:
    w = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    errors = [(dequantize(quantize_weight(Weight(w), scheme)) - w).norm() for scheme in (W4A8[128], W4A8_FLOAT[128])]
    assert errors[0] < 1.02 * errors[1]


def test_bytes_are_those_of_all_tensors() -> None:
    weight = Weight(torch.zeros(8, 256, dtype=torch.bfloat16), bias=torch.zeros(8, dtype=torch.bfloat16))
    assert weight.size_bytes == 8 * 256 * 2 + 16
    assert quantize_weight(weight).size_bytes == 8 * 256 + 8 * 4 + 16
    assert quantize_weight(weight, W4A8[64]).size_bytes == 8 * 128 + 8 * 4 + 8 * 4 + 16
    assert quantize_weight(weight, W4A16[64]).size_bytes == 8 * 128 + 8 * 4 * 4 + 16
    assert (W4A8[64].bytes_per_weight, W4A16[64].bytes_per_weight) == (0.5 + 1 / 64, 0.5 + 4 / 64)


def test_a_four_bit_value_is_counted_from_its_zero_point() -> None:
    values, scale, zero = nibbles(2, 64), torch.tensor([[1.0, 2.0], [0.5, 4.0]]), torch.tensor([[-8, 0], [7, 3]])
    weight = Weight(pack(values), scale, None, W4A16_ASYM[32], zero=zero.to(torch.int8))
    for row in range(2):
        for column in range(64):
            group = column // 32
            expected = (int(values[row, column]) - int(zero[row, group])) * float(scale[row, group])
            assert float(dequantize(weight)[row, column]) == expected


def test_scales_of_float_groups_are_kept_by_files_as_they_are() -> None:
    for scheme in (W4A16[64], W4A8_FLOAT[64]):
        scale = quantize_weight(Weight(torch.randn(8, 128)), scheme).scale
        assert scale is not None
        assert torch.equal(scale, scale.to(torch.bfloat16).float())


@pytest.mark.parametrize(
    ("scheme", "columns", "expected"),
    [
        (W4A8[256], 11_008, W4A8[256]),
        (W4A8[256], 29_568, W4A8[128]),  # 72B's down_proj
        (W4A16[128], 3420, W8A16),  # the vision tower's down_proj
        (W4A8[256], 3420, W8A8_DYNAMIC),
        (W4A8_FLOAT[64], 96, W4A8_FLOAT[32]),
        (FP8, 3420, FP8),
        (W8A8, 3, W8A8),
    ],
)
def test_a_layer_that_groups_do_not_divide_takes_the_nearest_scheme_that_fits(
    scheme: Scheme, columns: int, expected: Scheme
) -> None:
    assert fitting(scheme, columns) == expected


def test_zero_points_serve_groups_that_lie_to_one_side() -> None:
    w = torch.rand(8, 128) + 1
    errors = [(dequantize(quantize_weight(Weight(w), scheme)) - w).norm() for scheme in (W4A16_ASYM[32], W4A16[32])]
    assert errors[0] < errors[1]
    assert torch.equal(dequantize(quantize_weight(Weight(torch.zeros(2, 64)), W4A16_ASYM[32])), torch.zeros(2, 64))


def test_two_stages_multiplied_out_come_apart_again() -> None:
    """Settled scales to the bit; any others within float32's rounding; what is no product, not at all."""
    scale = torch.rand(64) + 0.1
    group_scale = torch.randint(1, 18, (64, 40), dtype=torch.int8)
    group_scale[0], group_scale[1], group_scale[2, 20:] = 6, 17, 13
    settled = settled_scales(scale, group_scale)
    assert torch.equal(settled_scales(*settled)[0], settled[0])
    torch.testing.assert_close(join_group_scales(*settled), join_group_scales(scale, group_scale), rtol=2**-18, atol=0)
    found = split_group_scales(join_group_scales(*settled))
    assert found is not None
    assert torch.equal(found[0], settled[0])
    assert torch.equal(found[1], settled[1])
    product = join_group_scales(scale, group_scale)
    found = split_group_scales(product)
    assert found is not None
    torch.testing.assert_close(join_group_scales(*found), product, rtol=2**-22, atol=0)
    assert split_group_scales(torch.rand(4, 40) + 0.1) is None
    assert split_group_scales(torch.tensor([[1.0, 18.0]])) is None
    assert split_group_scales(torch.zeros(2, 3)) is None


def test_a_calibrated_weight_counts_its_bias_and_zero_point_in_steps_of_the_product() -> None:
    values, bias = torch.tensor([[100, -20], [0, 0]], dtype=torch.int8), torch.tensor([3.0, -1.0])
    weight = static_weight(values, torch.tensor([1.0, 1e-38]), bias, (torch.tensor([0.5]), torch.tensor([7])))
    assert weight.static is not None
    assert weight.static.quant_bias[0] == 6 - 7 * 80
    # A row of zeros, whose scale says nothing, still gives its bias.
    assert float(weight.static.quant_bias[1] * weight.static.deq_scale[1]) == pytest.approx(-1.0, rel=1e-6)
    assert weight.scale is not None
    again = static_weight(values, weight.scale, bias, (torch.tensor([0.5]), torch.tensor([7])))
    assert all(torch.equal(a, b) for a, b in zip(weight.tensors(), again.tensors(), strict=True))


def test_parts_are_stacked_by_rows() -> None:
    parts = {name: Weight(torch.randn(rows, 64), bias=torch.randn(rows)) for name, rows in (("q", 6), ("k", 3))}
    for scheme in (W8A16, W8A8_DYNAMIC, W4A8[32], W4A16[32], W4A16_ASYM[32], FP8):
        both = stack({name: quantize_weight(part, scheme) for name, part in parts.items()})
        whole = quantize_weight(Weight(torch.cat([part.values for part in parts.values()])), scheme)
        assert torch.equal(dequantize(both), dequantize(whole))
        assert torch.equal(both.bias, torch.cat([part.bias for part in parts.values()]))  # type: ignore[misc, arg-type]


def w8a8_weight(scale: float, zero: float = -3.0, bias: bool = True) -> Weight:
    static = Static(torch.tensor([scale]), torch.tensor([zero]), torch.ones(4, dtype=torch.int32), torch.ones(4))
    return Weight(
        torch.ones(4, 8, dtype=torch.int8), torch.ones(4), torch.ones(4) if bias else None, W8A8, static=static
    )


def test_static_parts_are_stacked_when_they_see_the_input_alike() -> None:
    both = stack({"q": w8a8_weight(0.5), "k": w8a8_weight(0.5)})
    assert both.static is not None
    assert (len(both.static.quant_bias), len(both.static.deq_scale), len(both.static.scale)) == (8, 8, 1)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (w8a8_weight(0.25), r"q has the input scale 0\.5 and k 0\.25"),
        (w8a8_weight(0.5, zero=4.0), "q has the input zero -3 and k 4"),
        (w8a8_weight(0.5, bias=False), "q has a bias and k has no bias"),
        (Weight(torch.ones(4, 8, dtype=torch.int8), torch.ones(4), torch.ones(4), W8A16), "q is w8a8 and k is w8a16"),
    ],
)
def test_parts_that_differ_are_refused_by_name(other: Weight, words: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{words}; .*so they must be quantized alike"):
        stack({"q": w8a8_weight(0.5), "k": other})


def test_a_weight_moves_whole() -> None:
    weight = w8a8_weight(0.5).to(torch.device("cpu"), torch.bfloat16)
    assert weight.bias is not None
    assert (weight.bias.dtype, weight.values.dtype) == (torch.bfloat16, torch.int8)
    assert [tensor.shape for tensor in weight.tensors()] == [tensor.shape for tensor in w8a8_weight(0.5).tensors()]
    with pytest.raises(AssertionError, match="scales of dense"):
        replace(weight, scheme=SCHEMES["dense"])


def test_names_are_looked_up_and_static_is_not_made_while_loading() -> None:
    assert scheme_of("weight_only_int8") is W8A16
    assert loading_scheme(None).is_dense
    with pytest.raises(OptionError, match=r"'w3a3' is unknown; choose one of dense, w8a16, w8a8, "):
        scheme_of("w3a3")
    with pytest.raises(OptionError, match=r"'w8a8' needs activations measured on pictures.*use w8a8-dynamic"):
        loading_scheme("w8a8")
