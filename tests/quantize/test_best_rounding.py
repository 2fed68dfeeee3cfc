"""Steps, clip search and GPTQ against slow, plain versions of themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.quantize.clip import search_steps
from saccade.quantize.gptq import corrections, gptq
from saccade.quantize.steps import (
    Steps,
    as_weight,
    dequantized,
    limits,
    max_steps,
    nearest,
    round_to_nearest,
    static_part,
    upwards,
)
from saccade.schemes.affine import dequantize
from saccade.schemes.scheme import FP8, W4A8, W4A16, W8A8, W8A8_DYNAMIC, W8A16, Scheme

SCHEMES = [W8A16, W8A8_DYNAMIC, W4A16[32], W4A8[32], FP8]
names = [scheme.name for scheme in SCHEMES]


def heavy_tailed(rows: int = 24, columns: int = 128, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    return 0.02 * normal * (1 + torch.rand(rows, columns, generator=generator).pow(8) * 8)


def correlated(columns: int = 128, seed: int = 0) -> Tensor:
    """Inputs [n, H] whose channels depend on each other and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
    return torch.randn(1024, columns, generator=generator) @ mixing * torch.rand(columns, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_unclipped_steps_reach_the_largest_value(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = heavy_tailed()
    steps = max_steps(weight, scheme, dtype)
    wrong = (dequantized(round_to_nearest(weight, steps), steps) - weight).abs()
    half = steps.of(0, 128) / 2 if not scheme.is_float else weight.abs() * 2**-4 + steps.of(0, 128) * 2**-10
    assert bool((wrong <= half * 1.0001).all())


def test_a_step_is_rounded_upwards_to_the_stored_type() -> None:
    step = (0.1 + torch.rand(1000)) * torch.logspace(-3, 3, 1000)
    for dtype in (torch.bfloat16, torch.float16):
        stored = upwards(step, dtype)
        assert bool((stored >= step).all())
        assert torch.equal(stored.to(dtype).float(), stored)
        assert bool((stored <= step * 1.01 + 1e-7).all())


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_a_weight_of_steps_and_multiples_stands_for_their_product(scheme: Scheme) -> None:
    weight = heavy_tailed()
    steps = search_steps(weight, scheme, torch.bfloat16)
    multiples = round_to_nearest(weight, steps)
    made = as_weight(multiples, steps, None)
    torch.testing.assert_close(dequantize(made), dequantized(multiples, steps), rtol=1e-6, atol=0)


def weighted_error(weight: Tensor, steps: Steps, importance: Tensor) -> Tensor:
    return ((dequantized(round_to_nearest(weight, steps), steps) - weight).square() * importance).sum(1)


@pytest.mark.parametrize("scheme", [W8A16, W4A16[32], W4A8[32]], ids=lambda scheme: scheme.name)
def test_searched_steps_err_less_in_every_row(scheme: Scheme) -> None:
    weight, importance = heavy_tailed(), torch.rand(128).pow(4)
    found = weighted_error(weight, search_steps(weight, scheme, torch.float32, importance), importance)
    plain = weighted_error(weight, max_steps(weight, scheme, torch.float32), importance)
    assert bool((found <= plain * 1.0001).all())
    assert float(found.sum()) < 0.97 * float(plain.sum())


def test_a_searched_group_is_as_good_as_one_tried_exhaustively() -> None:
    """Every clipping point in thousandths, group by group."""
    weight = heavy_tailed(4, 64)
    found = weighted_error(weight, search_steps(weight, W4A16[32]), torch.ones(64)).sum()
    total = 0.0
    for group in weight.view(-1, 32):
        total += min(
            float((nearest(group, torch.tensor(ratio * float(group.abs().max()) / 7), W4A16[32]) * (
                ratio * float(group.abs().max()) / 7
            ) - group).square().sum())
            for ratio in torch.arange(0.4, 1.2, 0.001).tolist()
        )  # fmt: skip
    assert float(found) < 1.05 * total


def test_whole_group_scales_cost_little() -> None:
    weight = heavy_tailed(64, 512)
    free = weighted_error(weight, search_steps(weight, W4A16[128]), torch.ones(512)).sum()
    whole = weighted_error(weight, search_steps(weight, W4A8[128]), torch.ones(512)).sum()
    assert float(whole) < 1.06 * float(free)
    steps = search_steps(weight, W4A8[128])
    assert steps.group is not None
    assert torch.equal(steps.group, steps.group.round())
    assert int(steps.group.max()) <= 16


def plain_gptq(weight: Tensor, hessian: Tensor, steps: Steps) -> Tensor:
    """Optimal brain quantization with a fixed order (the paper's equations 2 and 3), the inverse updated column by column."""
    damped = hessian.double().clone()
    damped.diagonal().add_(0.01 * float(hessian.diagonal().mean()))
    inverse = torch.linalg.inv(damped)
    work, out = weight.double().clone(), torch.zeros_like(weight)
    step = steps.of(0, weight.shape[1]).expand_as(weight)
    for at in hessian.diagonal().argsort(descending=True, stable=True).tolist():
        out[:, at] = nearest(work[:, at].float(), step[:, at], steps.scheme)
        wrong = (work[:, at] - out[:, at].double() * step[:, at]) / inverse[at, at]
        work -= wrong[:, None] * inverse[at]
        inverse -= inverse[:, at : at + 1] * inverse[at : at + 1] / inverse[at, at]
        inverse[at, :] = inverse[:, at] = 0
        inverse[at, at] = 1
    return out


def corrected(weight: Tensor, hessian: Tensor, steps: Steps) -> Tensor:
    return gptq(weight, corrections(hessian), steps).float()


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_gptq_is_optimal_brain_quantization_in_that_order(scheme: Scheme) -> None:
    weight, x = heavy_tailed(), correlated()
    hessian = x.t() @ x / len(x)
    steps = search_steps(weight, scheme, torch.float32, hessian.diagonal())
    ours, theirs = corrected(weight, hessian[None], steps), plain_gptq(weight, hessian, steps)
    assert float((ours != theirs).float().mean()) < 0.002  # a tie broken by the last bit moves what follows


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_gptq_brings_the_output_nearer(scheme: Scheme) -> None:
    weight, x = heavy_tailed(), correlated()
    hessian = x.t() @ x / len(x)
    steps = search_steps(weight, scheme, torch.float32, hessian.diagonal())

    def wrong(multiples: Tensor) -> float:
        return float(((dequantized(multiples, steps) - weight) @ x.t()).square().sum())

    rounded = wrong(round_to_nearest(weight, steps))
    whole = wrong(corrected(weight, hessian[None], steps))
    blocks = torch.stack([hessian[at : at + 32, at : at + 32] for at in range(0, 128, 32)])
    assert whole < 0.6 * rounded
    assert whole < wrong(corrected(weight, blocks, steps)) < rounded


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_gptq_may_take_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch, scheme: Scheme) -> None:
    weight, x = heavy_tailed(), correlated()
    hessian = torch.stack([(x.t() @ x)[at : at + 64, at : at + 64] for at in (0, 64)])
    steps = search_steps(weight, scheme)
    whole = corrected(weight, hessian, steps)
    monkeypatch.setattr("saccade.quantize.gptq.ROWS_AT_ONCE", 7)
    assert float((corrected(weight, hessian, steps) != whole).float().mean()) < 0.002  # sums of another order


def test_gptq_stands_channels_that_are_always_zero() -> None:
    weight, x = heavy_tailed(), correlated()
    x[:, 5] = x[:, 90] = 0
    steps = max_steps(weight, W8A16, torch.float32)
    multiples = corrected(weight, (x.t() @ x)[None], steps)
    assert bool(multiples.isfinite().all())
    assert torch.equal(corrected(weight, torch.zeros(1, 128, 128), steps), round_to_nearest(weight, steps).float())


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_multiples_keep_their_limits(scheme: Scheme) -> None:
    weight, x = heavy_tailed() * 50, correlated()
    low, high = (-448, 448) if scheme.is_float else limits(scheme)
    for multiples in (
        round_to_nearest(weight, max_steps(weight / 2, scheme, torch.float32)).float(),
        corrected(weight, (x.t() @ x)[None], max_steps(weight / 2, scheme, torch.float32)),
    ):
        assert float(multiples.min()) >= low
        assert float(multiples.max()) <= high


def test_the_constants_of_a_static_linear_are_its_bias_and_zero_point() -> None:
    weight, bias = heavy_tailed(), torch.randn(24)
    steps = max_steps(weight, W8A8, torch.float32)
    multiples = round_to_nearest(weight, steps)
    scale, zero = torch.tensor([0.03]), torch.tensor([-17.0])
    static = static_part(multiples, steps, scale, zero, bias)
    x = torch.randn(50, 128)
    levels = (x / scale + zero).round().clamp(-128, 127)
    wanted = (levels - zero).double() * scale @ dequantized(multiples, steps).double().t() + bias
    got = (levels.double() @ multiples.double().t() + static.quant_bias) * static.deq_scale
    assert float((got - wanted).abs().max()) <= float(static.deq_scale.max())  # half a unit of quant_bias, and rounding
    assert as_weight(multiples, steps, bias, static).static is static
