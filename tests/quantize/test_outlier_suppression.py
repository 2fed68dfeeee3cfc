"""m2: the shared and abandoned work of the search changes no winner and no bit of what is compared."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.kernels import ordered
from saccade.quantize import outlier_suppression, trials
from saccade.quantize.objectives import DecoderAttention, GateUp, Objective, TowerAttention
from saccade.quantize.outlier_suppression import scale_at, search, thresholds
from saccade.quantize.trials import ScaledWeight, fake_range
from tests.quantize import oracle

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
H = 96


def activations(num_rows: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Some channels ten times as wide as the others, as after a norm with outlier gains."""
    generator = torch.Generator().manual_seed(seed)
    gain = torch.ones(H)
    gain[torch.randperm(H, generator=generator)[:4]] = 12
    return (torch.randn(num_rows, H, generator=generator) * gain).to(dtype)


def objectives(num_rows: int, dtype: torch.dtype) -> dict[str, tuple[Objective, oracle.Result, int]]:
    """Name -> (objective, its obvious version, rows of the weight)."""
    bounds = (0, 8, 72, 100, num_rows)
    angles = torch.rand(num_rows, 32, generator=torch.Generator().manual_seed(1)) * 30
    bias = torch.linspace(-1, 1, 2 * 50).to(dtype)
    tower = TowerAttention(4, 56, angles.cos(), angles.sin(), bounds)
    decoder = DecoderAttention(4, 2, 32, 1e6, torch.arange(num_rows))
    return {
        "tower attention": (tower, oracle.tower_attention(tower), 3 * 4 * 32),
        "decoder attention": (decoder, oracle.decoder_attention(decoder), 8 * 32),
        "gate and up with bias": (GateUp(bias), oracle.gate_up(GateUp(bias)), 2 * 50),
        "gate and up": (GateUp(), oracle.gate_up(GateUp()), 2 * 50),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["tower attention", "decoder attention", "gate and up with bias", "gate and up"])
def test_the_winner_is_that_of_trying_every_candidate_whole(name: str, dtype: torch.dtype) -> None:
    num_rows = 300
    objective, result, num_outputs = objectives(num_rows, dtype)[name]
    weight = (torch.randn(num_outputs, H, generator=torch.Generator().manual_seed(2)) * 0.1).to(dtype)
    x = activations(num_rows, dtype)
    found, expected = search(x, weight, objective), oracle.search(x, weight, result)
    assert torch.equal(found, expected)
    assert bool((found > 1).any())


@pytest.mark.parametrize("name", ["decoder attention", "gate and up with bias", "gate and up"])
def test_trying_candidates_with_fast_products_first_changes_no_winner(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_rows, fast = 300, 0
    objective, result, num_outputs = objectives(num_rows, torch.bfloat16)[name]
    weight = (torch.randn(num_outputs, H, generator=torch.Generator().manual_seed(4)) * 0.1).bfloat16()
    x = activations(num_rows, torch.bfloat16, seed=5)

    def counted(a: Tensor, b: Tensor) -> Tensor:
        nonlocal fast
        fast += 1
        return (a.float() @ b.float()).to(a.dtype)

    monkeypatch.setattr(outlier_suppression, "trial", trials.WholeTrial)
    monkeypatch.setattr(trials, "has_fast_products", lambda dtype: False)
    monkeypatch.setattr(trials, "product_in_float32", counted)
    assert torch.equal(search(x, weight, objective), oracle.search(x, weight, result))
    assert fast


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "bounds", [(0, 700), (0, 400, 700), tuple(range(0, 701, 28)), (0, 64, 128, 140, 700), (0, 640, 704, 708)]
)
def test_attention_by_pieces_has_the_bits_of_attention_at_once(bounds: tuple[int, ...], dtype: torch.dtype) -> None:
    angles = torch.rand(bounds[-1], 64, generator=torch.Generator().manual_seed(1)) * 30
    objective = TowerAttention(2, 56, angles.cos(), angles.sin(), bounds)
    x, weight = activations(bounds[-1], dtype), (torch.randn(3 * 2 * 64, H) * 0.1).to(dtype)
    pieces = torch.stack(list(objective.pieces(x, weight)))
    assert torch.equal(pieces, oracle.tower_attention(objective)(ordered.matmul(x, weight.T)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_updated_step_by_step_are_those_rounded_anew(dtype: torch.dtype) -> None:
    x, weight = activations(50, dtype), (torch.randn(70, H, generator=torch.Generator().manual_seed(3)) * 0.1).to(dtype)
    weight[5] = 0
    high, low = x.amax(0), x.amin(0)
    scaled = ScaledWeight(weight)
    for threshold in thresholds(high, low):
        scale = scale_at(threshold, high, low)
        assert torch.equal(scaled.at(scale), oracle.rounded_w(weight * scale))
        assert torch.equal(
            fake_range(x / scale, threshold), oracle.rounded_x(x / scale, torch.tensor(threshold).to(dtype))
        )


def test_small_activations_are_left_alone() -> None:
    x = torch.full((3, H), 0.05)
    assert torch.equal(search(x, torch.ones(4, H), GateUp()), torch.ones(H))


def test_candidates_count_steps_by_the_maximum_alone() -> None:
    """The step count ignores the minimum: a fault of the reference that is kept."""
    wide = list(thresholds(torch.tensor([100.0]), torch.tensor([-1.0])))
    mirrored = list(thresholds(torch.tensor([1.0]), torch.tensor([-100.0])))
    assert len(wide) in (200, 201)
    assert len(mirrored) in (100, 101)
    assert wide[0] == mirrored[0] == 100.0


def test_candidates_that_are_one_in_the_models_type_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = activations(40, torch.bfloat16)
    x[0, 0] = 300
    weight = (torch.randn(64, H, generator=torch.Generator().manual_seed(6)) * 0.1).bfloat16()
    tried: list[float] = []

    class Counted(trials.WholeTrial):
        def loss_below(self, bound: float, threshold: float, scale: Tensor) -> float:
            tried.append(threshold)
            return super().loss_below(bound, threshold, scale)

    monkeypatch.setattr(outlier_suppression, "trial", Counted)
    assert torch.equal(search(x, weight, GateUp()), oracle.search(x, weight, oracle.gate_up(GateUp())))
    assert len(tried) == len(set(tried)) < len(list(thresholds(x.amax(0), x.amin(0))))
