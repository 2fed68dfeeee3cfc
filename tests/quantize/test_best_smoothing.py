"""Statistics, static ranges, smoothing and rotation, as functions of tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saccade import LLM
from saccade.api import quantize
from saccade.checkpoints.formats import open_checkpoint
from saccade.quantize.learned_scale import COMPENSATED, learned_scale
from saccade.quantize.ranges import METHODS, Method, fake_static, parameters, static_parameters
from saccade.quantize.rotation import hadamard, rotation
from saccade.quantize.smoothing import SMOOTHINGS, Smoothing, _rounded_input, best_scale, loss, rounded_gain, trial
from saccade.quantize.statistics import FIRST, PICTURE, TEXT, Seen, Watcher, hessian_block, tokens_of
from saccade.schemes.affine import dequantize
from saccade.schemes.scheme import W4A8, W4A16, W8A8, W8A8_DYNAMIC, Scheme
from saccade.scoring import score_answers

KINDS = torch.tensor([FIRST] + [TEXT] * 40 + [PICTURE] * 200, dtype=torch.int8)


def inputs(columns: int = 64, seed: int = 0) -> Tensor:
    """One row for each of KINDS; pictures have outliers in channel 3, text in channel 9, and the first token both, only larger."""
    x = torch.randn(len(KINDS), columns, generator=torch.Generator().manual_seed(seed))
    x[KINDS != TEXT, 3] *= 60
    x[KINDS != PICTURE, 9] *= 40
    x[0] *= 2
    return x


def watched(x: Tensor, block: int | None = None, is_balanced: bool = True) -> Seen:
    tokens = tokens_of(KINDS, 20, seed=1, is_balanced=is_balanced)
    watcher = Watcher(x.shape[1], torch.device("cpu"), block)
    for first in range(0, len(x), 50):
        watcher.see(x[first : first + 50], tokens[first : first + 50])
    return watcher.seen()


# --- statistics ------------------------------------------------------------------------------------------------------


def test_kinds_weigh_the_same_in_correlations_and_the_first_token_nothing() -> None:
    x = inputs()
    seen = watched(x, 64)
    text, picture = x[KINDS == TEXT].double(), x[KINDS == PICTURE].double()
    hessian = (text.t() @ text / len(text) + picture.t() @ picture / len(picture)) / 2
    assert seen.hessian is not None
    torch.testing.assert_close(seen.hessian[0].double(), hessian, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(seen.mean_square.double(), hessian.diagonal(), rtol=1e-4, atol=1e-3)
    assert torch.equal(seen.high[TEXT], x[KINDS == TEXT].amax(0))
    assert torch.equal(seen.largest[FIRST], x[0].abs())
    assert torch.equal(seen.largest[PICTURE], x[KINDS == PICTURE].abs().amax(0))
    torch.testing.assert_close(seen.mean_abs[TEXT], x[KINDS == TEXT].abs().mean(0))


def test_without_balance_tokens_weigh_the_same() -> None:
    x = inputs()
    torch.testing.assert_close(watched(x, is_balanced=False).mean_square, x[1:].square().mean(0), rtol=1e-4, atol=1e-3)


def test_kept_rows_are_rows_and_drawn_by_the_seed() -> None:
    x = inputs()
    seen = watched(x)
    assert seen.kinds.bincount().tolist() == [20, 20, 1]
    assert all(bool((x[kind == KINDS] == row).all(1).any()) for row, kind in zip(seen.rows, seen.kinds, strict=True))
    drawn = [tokens_of(KINDS, 20, seed).sampled for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_dividing_what_was_seen_is_seeing_what_was_divided() -> None:
    x, scale = inputs(), torch.rand(64) + 0.5
    divided, seen = watched(x, 16).divided(scale), watched(x / scale, 16)
    for name in ("low", "high", "mean_abs", "mean_square", "hessian", "rows"):
        torch.testing.assert_close(getattr(divided, name), getattr(seen, name), rtol=1e-3, atol=1e-3)


def test_a_hessian_is_cut_into_blocks_that_divide_it() -> None:
    assert hessian_block(2048, 4096) == 2048
    assert hessian_block(11008, 4096) == 2752
    assert hessian_block(29568, 4096) == 3696


# --- static ranges ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_ranges_are_searched_in_the_right_place(method: Method) -> None:
    """Normal values with a few far outliers: only `minmax` gives all its levels to them."""
    rows = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    rows[7, 5], rows[11, 5] = 60.0, -3.0
    scale, zero = static_parameters(rows, float(rows.min()), 60.0, method, torch.ones(64), torch.float32)
    low, high = float((-128 - zero) * scale), float((127 - zero) * scale)
    assert -8 < low < -2.5
    if method == "minmax":
        assert 59 < high < 61
    elif method == "percentile":
        assert 3 < high < 5
    usual = rows[20:]
    wrong = float((fake_static(usual, scale, zero) - usual).square().mean())
    plain = float((fake_static(usual, *parameters(float(rows.min()), 60.0, torch.float32)) - usual).square().mean())
    assert wrong <= plain * 1.001
    if method == "mse":
        total = float((fake_static(rows, scale, zero) - rows).square().sum())
        others = [
            static_parameters(rows, float(rows.min()), 60.0, other, torch.ones(64), torch.float32) for other in METHODS
        ]
        assert total <= min(float((fake_static(rows, *other) - rows).square().sum()) for other in others) * 1.001


def test_the_zero_point_fits_int8_and_zero_is_exact() -> None:
    for low, high in ((0.0, 5.0), (-5.0, 0.0), (2.0, 5.0), (-7.0, -1.0), (0.0, 0.0), (-1e-30, 1e-30)):
        scale, zero = parameters(low, high, torch.float32)
        assert -128 <= float(zero) <= 127
        assert float(zero) == round(float(zero))
        assert float(fake_static(torch.zeros(1), scale, zero)) == 0
        assert float(scale) > 0


def test_a_bfloat16_scale_has_a_reciprocal_that_loses_little() -> None:
    generator = torch.Generator().manual_seed(0)
    losses = []
    for high in (torch.rand(50, generator=generator) * 10 + 1).tolist():
        scale, _ = parameters(-1.0, high, torch.bfloat16)
        assert torch.equal(scale.to(torch.bfloat16).float(), scale)
        assert float(scale) == pytest.approx((high + 1) / 255, rel=0.04)
        losses.append(abs(float(scale) * float((1 / scale).to(torch.bfloat16)) - 1))
    assert max(losses) < 0.0025  # up to 0.0039 for a scale taken as it comes


# --- smoothing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [W8A8_DYNAMIC, W8A8, W4A8[32], W4A16[32]], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("method", [method for method in SMOOTHINGS if method != "none"])
def test_a_found_scale_makes_the_output_less_wrong(method: Smoothing, scheme: Scheme) -> None:
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(2))
    seen = watched(inputs())
    attempt = trial([weight[:32], weight[32:]], seen, scheme, None, torch.float32)
    exact = attempt.seen.rows @ attempt.weight.t()
    before, after = (loss(attempt, scale, exact) for scale in (torch.ones(64), best_scale(attempt, method)))
    assert after <= before
    if scheme.activation != "none":
        assert after < (0.5 if scheme.weight_bits == 8 else 0.95) * before


def test_a_fixed_range_is_tried_as_the_weight_feels_it() -> None:
    """Values of a channel that no output reads may be clipped for the others' sake."""
    x = torch.randn(len(KINDS), 2, generator=torch.Generator().manual_seed(0))
    x[:, 1] *= 20
    seen = watched(x)
    errors = [
        (_rounded_input(seen, W8A8, False, importance) - seen.rows)[:, 0].norm()
        for importance in (torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    ]
    assert errors[0] < errors[1] / 2


def test_searching_is_as_good_as_the_best_method() -> None:
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(2))
    attempt = trial([weight], watched(inputs()), W8A8_DYNAMIC, None, torch.float32)
    exact = attempt.seen.rows @ attempt.weight.t()
    losses = {method: loss(attempt, best_scale(attempt, method), exact) for method in SMOOTHINGS if method != "none"}
    assert losses["search"] == min(losses.values())


def expected_noise(rows: Tensor, shares: Tensor, weight: Tensor, scheme: Scheme, scale: Tensor) -> Tensor:
    """What `learned_scale` descends, for dynamic activations, as its file's first lines put it."""
    x, w = (rows / scale).square(), (weight * scale).square()
    step = x.amax(1, keepdim=True) / (12 * 127.0**2)
    inputs_noise = shares @ ((x * step / (x + step)) @ w.sum(0))
    size, levels = (scheme.group_size, 7) if scheme.group_size else (w.shape[1], 127)
    steps = w.view(len(w), -1, size).amax(2) * (COMPENSATED / (12 * levels**2))
    return inputs_noise + (steps.sum(0) * (shares @ x).view(-1, size).sum(1)).sum()


@pytest.mark.parametrize("scheme", [W8A8_DYNAMIC, W4A8[32]], ids=lambda scheme: scheme.name)
def test_a_learned_scale_lies_where_the_expected_noise_is_flat(scheme: Scheme) -> None:
    """Against torch's own gradient from the formula: what is left of it is small beside what it was, and the noise far less."""
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(2))
    rows = inputs()
    shares = torch.full((len(rows),), 1 / len(rows))
    found = learned_scale(rows, shares, weight, scheme, torch.arange(64), torch.ones(64))
    sizes = []
    with torch.inference_mode(False), torch.enable_grad():
        for scale in (torch.ones(64), found):
            log = scale.log().clone().requires_grad_(True)
            noise = expected_noise(rows, shares, weight, scheme, log.exp())
            noise.backward()  # type: ignore[no-untyped-call]
            assert log.grad is not None
            sizes.append((float(noise.detach()), float(log.grad.norm())))
    (noise_before, slope_before), (noise_after, slope_after) = sizes
    assert noise_after < 0.6 * noise_before
    assert slope_after < 0.2 * slope_before


def test_scales_are_tried_on_other_tokens_than_they_are_learned_from() -> None:
    """An outlier that every sample shows is smoothed, one that held-out tokens lack is not."""
    rows = torch.randn(160, 64, generator=torch.Generator().manual_seed(0))
    kinds = torch.full((160,), PICTURE, dtype=torch.int8)
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(2))

    def found(is_spiked: Tensor) -> Tensor:
        x = rows.clone()
        x[is_spiked, 5] *= 30
        watcher = Watcher(64, torch.device("cpu"), None)
        watcher.see(x, tokens_of(kinds, 160, seed=0))
        return best_scale(trial([weight], watcher.seen(), W8A8_DYNAMIC, None, torch.float32), "learned")

    assert float(found(torch.ones(160, dtype=torch.bool))[5]) > 3
    assert float(found(torch.arange(160) // 10 % 4 != 3)[5]) == 1


def test_grouped_columns_share_a_scale() -> None:
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(2))
    columns = torch.arange(64) % 16
    attempt = trial([weight], watched(inputs()), W8A8_DYNAMIC, columns, torch.float32)
    scale = best_scale(attempt, "m4")
    assert scale.shape == (16,)
    assert float(scale[3] / scale.median()) > 2  # channel 3's outliers


def test_a_gain_that_rounds_loses_nothing() -> None:
    gain, scale = torch.randn(64).to(torch.bfloat16).float(), torch.rand(64) + 0.3
    gain[5] = 0
    new, factor = rounded_gain(gain, scale, torch.bfloat16)
    assert torch.equal(new.to(torch.bfloat16).float(), new)
    torch.testing.assert_close(new * factor, gain, rtol=1e-6, atol=0)
    assert bool((factor / scale - 1).abs().max() < 2**-7)


# --- rotation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 448, 84, 7])
def test_a_rotation_is_orthogonal_and_spreads_a_spike(size: int) -> None:
    turn = rotation(size, 0, "stream")
    matrix = turn(torch.eye(size))
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(size), rtol=0, atol=1e-4)
    if size >= 64:
        assert float(matrix.abs().max()) < 5 / size**0.5
    assert torch.equal(matrix, rotation(size, 0, "stream")(torch.eye(size)))
    assert not torch.equal(matrix, rotation(size, 0, "other")(torch.eye(size)))
    assert not torch.equal(matrix, rotation(size, 1, "stream")(torch.eye(size)))


def test_the_hadamard_transform_is_the_matrix() -> None:
    matrix = torch.ones(1, 1)
    for _ in range(5):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    x = torch.randn(3, 32)
    torch.testing.assert_close(hadamard(x), x @ matrix / 32**0.5)


# --- keys ------------------------------------------------------------------------------------------------------------


def test_spiked_keys_are_folded_into_the_queries_without_rounding(small: Path, tmp_path: Path) -> None:
    """What is written has keys of one size; folded and unfolded, the model in float32 says the same."""
    from saccade.evals.outliers import inject

    inject(open_checkpoint(small), "k-spikes").save(tmp_path / "spiked")
    options: dict[str, Any] = {"scheme": "w8a16", "smooth": "none", "rounding": "rtn", "threads": 1}
    for folds in (False, True):
        quantize(tmp_path / "spiked", tmp_path / str(folds), fold_keys=folds, **options)
    spreads, said = [], []
    for folds in (False, True):
        written = open_checkpoint(tmp_path / str(folds))
        weight = written.weight("model.layers.0.self_attn.k_proj")
        assert weight is not None
        assert weight.bias is not None
        size = (dequantize(weight).square().sum(1) + weight.bias.float().square()).sqrt()
        spreads.append(float(size.max() / size.median()))
        llm = LLM(tmp_path / str(folds), device="cpu", dtype="float32", kv_cache_tokens=1024)
        conversation = [{"role": "user", "content": "Count to three."}]
        said.append(next(iter(score_answers(llm, [(conversation, "1, 2, 3")]))).logits)
    assert spreads[0] > 50
    assert spreads[1] < 10
    torch.testing.assert_close(said[1], said[0], rtol=1e-3, atol=1e-3)
