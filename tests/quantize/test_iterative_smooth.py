"""m4: the scale's formula, and that folding it changes nothing but the balance."""

from __future__ import annotations

import torch

from saccade.quantize.fold import fold_linear, fold_norm
from saccade.quantize.iterative_smooth import grouped_scales, smooth_scale


def test_the_scale_is_a_ratio_of_powers_of_the_maxima() -> None:
    weights = [torch.tensor([[1.0, -2.0], [0.5, 0.0]]), torch.tensor([[-4.0, 1.0]])]
    scale = smooth_scale(torch.tensor([8.0, 0.0]), weights)
    assert torch.allclose(scale, torch.tensor([8**0.9 / 4**0.1, 1e-5]))


def test_every_step_is_rounded_to_the_type_and_so_are_the_exponents() -> None:
    alpha, rest = torch.tensor(0.9).bfloat16().item(), torch.tensor(1 - 0.9).bfloat16().item()
    activations = torch.rand(64, generator=torch.Generator().manual_seed(0)).bfloat16() * 9
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    for i, found in enumerate(smooth_scale(activations, [weight])):
        above = torch.tensor(float(activations[i]) ** alpha).bfloat16()
        below = torch.tensor(float(weight[:, i].abs().max()) ** rest).bfloat16()
        assert found == above / below


def test_grouped_heads_share_the_mean() -> None:
    scale = torch.arange(8.0)  # 4 query heads of size 2, 2 key heads
    rows, columns = grouped_scales(scale, 4, 2)
    assert rows.tolist() == [1, 2, 5, 6]
    assert columns.tolist() == [1, 2, 1, 2, 5, 6, 5, 6]
    assert grouped_scales(scale, 4, 4)[0].tolist() == scale.tolist()


def test_folding_keeps_products() -> None:
    generator = torch.Generator().manual_seed(0)
    gain, weight, x = (torch.randn(*shape, generator=generator) for shape in ((6,), (4, 6), (3, 6)))
    before = (x * gain) @ weight.T
    fold_norm(gain, [weight], torch.rand(6, generator=generator) + 0.5)
    assert torch.allclose((x * gain) @ weight.T, before, atol=1e-5)

    first, bias, second = (torch.randn(*shape, generator=generator) for shape in ((5, 6), (5,), (2, 5)))
    before = (x @ first.T + bias) @ second.T
    scale = torch.rand(5, generator=generator) + 0.5
    fold_linear(first, bias, second, scale, scale)
    assert torch.allclose((x @ first.T + bias) @ second.T, before, atol=1e-5)
