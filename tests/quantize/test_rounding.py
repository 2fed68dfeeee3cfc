"""Weights and ranges become integers: against scalar arithmetic, and rule by rule."""

from __future__ import annotations

import pytest
import torch

from saccade.checkpoints import ascend
from saccade.quantize.exact_format import int4_linear, int8_linear
from saccade.quantize.rounding import (
    activation_parameters,
    dequantization,
    fake_activation,
    fake_weight,
    integer_bias,
    round_weight,
    round_weight_4bit,
    row_scale,
)
from saccade.schemes.packing import unpack_row_pairs

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_quotients_are_rounded_to_the_type_before_they_are_rounded_to_integers(dtype: torch.dtype) -> None:
    weight = (torch.randn(7, 129, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    weight[3] = 0
    scale = row_scale(weight.abs().amax(1))
    values = round_weight(weight, scale)
    for row in range(7):
        largest = max(abs(value) for value in weight[row].tolist())
        assert scale[row].item() == max((torch.tensor(largest) / 127).to(dtype).item(), 2.0**-23)
        for column in range(129):
            quotient = torch.tensor(weight[row, column].item() / scale[row].item()).to(dtype).item()
            assert values[row, column].item() == max(-127, min(127, round(quotient)))


def test_calibration_reaches_one_integer_lower_than_the_file() -> None:
    """With a scale that was rounded down, a negative extreme is -128 in calibration and -127 on disk."""
    weight = torch.tensor([[-1.0, 0.5]])
    scale = torch.tensor([[1 / 128]])
    assert round_weight(weight, scale).tolist() == [[-127, 64]]
    assert fake_weight(weight, scale).tolist() == [[-1.0, 0.5]]


def test_a_zero_point_comes_from_the_scale_before_it_is_rounded() -> None:
    low, high = torch.tensor(-0.3), torch.tensor(1.7)
    scale, zero = activation_parameters(low, high, torch.bfloat16)
    exact = 2.0 / 255
    assert scale.item() == torch.tensor(exact).bfloat16().item()
    assert zero.item() == round(0.3 / exact) - 128
    assert scale.shape == zero.shape == (1,)
    kept, _ = activation_parameters(low, high, torch.float16)
    assert kept.dtype == torch.float32


@pytest.mark.parametrize(("low", "high", "zero"), [(0.5, 2.0, -128), (-2.0, -0.5, 127), (0.0, 0.0, -128)])
def test_zero_is_always_representable(low: float, high: float, zero: int) -> None:
    scale, found = activation_parameters(torch.tensor(low), torch.tensor(high), torch.float32)
    assert found.item() == zero
    assert fake_activation(torch.zeros(3), scale, found).tolist() == [0.0, 0.0, 0.0]


def test_a_static_linear_computes_in_integers_what_calibration_computed() -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((5, 64), (8, 64), (8,)))
    scale, zero = activation_parameters(x.min(), x.max(), torch.float32)
    stored = {entry.name: entry.tensor for entry in int8_linear("l", weight, bias, (scale, zero), "W8A8")}
    levels = (x / scale + zero).round().clamp(-128, 127)
    sums = levels.double() @ stored["l.weight"].double().T + stored["l.quant_bias"]
    bits = stored["l.deq_scale"]  # not a bfloat16 model: float32 bits in the low half of an int64
    assert bits.dtype == torch.int64
    deq_scale = bits.to(torch.int32).view(torch.float32)
    assert torch.equal(deq_scale, dequantization(scale, stored["l.weight_scale"]))
    weights = fake_weight(weight, stored["l.weight_scale"])
    expected = torch.nn.functional.linear(fake_activation(x, scale, zero), weights, bias)
    assert torch.allclose((sums * deq_scale).float(), expected, atol=2 * float(deq_scale.max()))


def test_integer_bias_counts_the_zero_point_out() -> None:
    values = torch.tensor([[100, -20], [1, 1]], dtype=torch.int8)
    found = integer_bias(torch.tensor([3.0, -1.0]), torch.tensor([0.5, 0.25]), torch.tensor([7.0]), values)
    assert found.tolist() == [6 - 7 * 80, -4 - 7 * 2]
    assert integer_bias(None, torch.tensor([0.5, 0.25]), torch.tensor([7.0]), values).tolist() == [-560, -14]


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_four_bit_weights_follow_their_two_stages(group_size: int) -> None:
    weight = torch.randn(6, 256, generator=torch.Generator().manual_seed(2)).bfloat16()
    weight[4] = 0
    values, first, second = round_weight_4bit(weight, group_size)
    assert (values.dtype, first.shape, second.shape) == (torch.int8, (6, 1), (6, 256 // group_size))
    for row in range(6):
        largest = weight[row].float().abs().max()
        assert torch.equal(first[row, 0], largest / 119)
        for group in range(256 // group_size):
            columns = slice(group * group_size, (group + 1) * group_size)
            levels = [round((w / first[row, 0]).item()) if largest > 0 else 0 for w in weight[row, columns].float()]
            step = round(max(torch.tensor(max(map(abs, levels)) / 7).item(), 1))
            assert second[row, group].item() == step
            assert values[row, columns].tolist() == [max(-8, min(7, round(level / step))) for level in levels]
    assert values[4].eq(0).all()


def test_a_group_scale_rounded_down_clips_its_group() -> None:
    """Whole-number group scales are rounded to nearest: a fault of the reference that is kept. 10 / 7 becomes 1, so 10 becomes 7."""
    weight = torch.zeros(2, 64)
    weight[:, 0], weight[:, 40] = 119.0, 10.0
    values, first, second = round_weight_4bit(weight, 32)
    assert (first[0].item(), second[0].tolist(), values[0, 40].item()) == (1.0, [17.0, 1.0], 7)


@pytest.mark.parametrize("is_mindie", [False, True])
def test_both_layouts_hold_the_same_four_bit_values(is_mindie: bool) -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(2))
    stored = {
        entry.name: entry.tensor for entry in int4_linear("a.o_proj", weight, None, 32, "W4A8_DYNAMIC", is_mindie)
    }
    values, _, _ = round_weight_4bit(weight, 32)
    found = stored["a.o_proj.weight"]
    assert torch.equal(found if is_mindie else unpack_row_pairs(found), values)
    assert stored["a.o_proj.weight_offset_second"].dtype == torch.int64
    assert ("a.o_proj.scale_bias" in stored) is not is_mindie


def test_scale_bias_is_summed_by_the_name_of_the_layer() -> None:
    """The tower's attention, which no rule of the reference names, is written unsummed: a fault that is kept."""
    parts = torch.ones(2, 64, dtype=torch.int8), torch.ones(2, 1), torch.ones(2, 2)
    for as_the_original in (False, True):
        sums = ascend.scale_bias("model.layers.0.self_attn.q_proj", *parts, as_the_original=as_the_original)
        assert sums.tolist() == [[512.0], [512.0]]
        sums = ascend.scale_bias("model.layers.0.self_attn.o_proj", *parts, as_the_original=as_the_original)
        assert sums.tolist() == [[32.0] * 16] * 2
    assert ascend.scale_bias("visual.blocks.0.attn.proj", *parts, as_the_original=True).shape == (2, 64)
    assert ascend.scale_bias("visual.blocks.0.attn.proj", *parts).shape == (2, 16)
