"""Which linears matter: the one that was spoilt comes first, and raising it is what a target asks for."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from saccade.base.errors import OptionError
from saccade.checkpoints.formats import open_checkpoint
from saccade.cli import main
from saccade.quantize.best_recipe import BestRecipe, Rule, read_recipe
from saccade.quantize.recipe import ExactRecipe
from saccade.quantize.report import MixedPrecision, Sensitivity
from saccade.schemes.scheme import DENSE, W4A16, W8A8_DYNAMIC, W8A16
from saccade.scoring import token_divergence
from saccade.verify.layers import run_side_by_side
from saccade.verify.options import VerifyOptions
from saccade.verify.samples import Sample
from saccade.verify.sensitivity import Product, Trials, bisect, mix, rank, recipe_text
from saccade.verify.verification import verify

from .conftest import PICTURE, edited

CPU = torch.device("cpu")
SPOILT = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def spoilt(dynamic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One linear with integers that are far too coarse, as if it had been rounded to 19 of them."""
    name = f"{SPOILT}.weight"
    return edited(
        dynamic,
        tmp_path_factory.mktemp("spoilt") / "x",
        lambda t: t.update({name: ((t[name].float() / 14).round() * 14).to(torch.int8)}),
    )


@pytest.fixture(scope="module")
def trials(tiny_checkpoint: Path, spoilt: Path, samples: list[Sample]) -> Trials:
    return Trials(open_checkpoint(tiny_checkpoint), open_checkpoint(spoilt), samples, CPU)


def test_what_is_measured_is_the_distance_of_the_two_models(
    trials: Trials, tiny_checkpoint: Path, spoilt: Path, samples: list[Sample]
) -> None:
    kernels = trials.model.kernels
    found = run_side_by_side(open_checkpoint(tiny_checkpoint), open_checkpoint(spoilt), samples, kernels, CPU)
    expected = float(token_divergence(found.exact, found.quantized).kl.mean())
    assert trials.kl() == pytest.approx(expected, rel=0.05)


def test_every_quantized_product_is_ranked_and_the_spoilt_one_first(trials: Trials) -> None:
    before = trials.kl()
    ranking = rank(trials)
    assert trials.kl() == before
    assert ranking[0].modules == (SPOILT,)
    assert ranking[0].kl > 3 * ranking[1].kl > 0
    assert len(ranking) == 3 * 4 + 2 * 4  # blocks of the tower and the decoder; q, k, v are one, gate and up are one
    assert {len(entry.modules) for entry in ranking} == {1, 2, 3}
    assert all(entry.bytes_saved > 0 for entry in ranking)


def test_a_target_raises_what_it_must_and_no_more(trials: Trials) -> None:
    ranking = rank(trials)
    before = trials.kl()
    mixed = mix(trials, ranking, before / 3)
    assert mixed.kl_before == before
    assert mixed.kl <= before / 3
    assert mixed.rules == ({"match": SPOILT, "scheme": "float"},)
    assert mixed.extra_bytes == 64 * 96 * 3 - 64 * 4  # float32 for int8, and no scales
    assert trials.kl() == before


def test_a_target_already_met_raises_nothing(trials: Trials) -> None:
    mixed = mix(trials, rank(trials), 100.0)
    assert (mixed.rules, mixed.extra_bytes, mixed.kl) == ((), 0, mixed.kl_before)


def test_a_target_of_nothing_makes_everything_float(trials: Trials) -> None:
    mixed = mix(trials, rank(trials), 0.0)
    assert mixed.kl < 1e-12  # the order of float32 sums follows from where tensors happen to lie in memory
    assert len(mixed.rules) == 3 * 5 + 2 * 7


def test_a_smoothed_static_folder_is_ranked_in_its_own_basis(
    tiny_checkpoint: Path, static: Path, samples: list[Sample]
) -> None:
    """All products raised, what is left is the smoothing's own rounding."""
    trials = Trials(open_checkpoint(tiny_checkpoint), open_checkpoint(static), samples, CPU)
    assert trials.unknown == []
    for product in trials.products:
        product.set(9)
    exact = trials.kl()
    for product in trials.products:
        product.set(0)
    assert 0 < exact < 0.01 * trials.kl()
    assert mix(trials, rank(trials), 0.0).kl == exact  # out of reach, and said to be


def test_ladders_end_in_float(trials: Trials) -> None:
    product = trials.products[0]
    assert product.ladder() == [W8A8_DYNAMIC, DENSE]
    four = Product(product.linear, product.at(W8A16), product.exact)
    assert [scheme.name for scheme in four.ladder()] == ["w8a16", "dense"]
    assert W4A16[32].weight_bits == 4


@pytest.mark.parametrize("answer", [1, 2, 7, 16])
def test_bisection_finds_the_first(answer: int) -> None:
    asked: list[int] = []
    assert bisect(0, 16, lambda number: asked.append(number) or number >= answer) == answer  # type: ignore[func-returns-value]
    assert len(asked) <= math.ceil(math.log2(16))


def test_the_recipe_can_be_read_as_yaml() -> None:
    yaml = pytest.importorskip("yaml")
    mixed = MixedPrecision(0.01, 0.1, 0.009, 1_000_000, ({"match": SPOILT, "scheme": "float"},))
    given = {"scheme": "w4a8", "group_size": None, "rules": [{"match": "*", "scheme": "w8a16"}]}
    read = yaml.safe_load(recipe_text(mixed, given))
    assert read == {
        "scheme": "w4a8",
        "rules": [{"match": SPOILT, "scheme": "float"}, {"match": "*", "scheme": "w8a16"}],
    }


@pytest.mark.parametrize(
    "made_by",
    [
        BestRecipe("w4a8", group_size=32, rotate=True).as_json() | {"samples_sha256": "0123"},
        BestRecipe("w8a8", activation_range="percentile", percentile=99.0, visual_scales=True).as_json(),
        {"mode": "exact", **asdict(ExactRecipe(anti_method="m4", act_method=1, part_file_size=2))},
        {"mode": "exact", **asdict(ExactRecipe(w_bit=4, is_lowbit=True, is_dynamic=True, open_outlier=False))},
        {},
    ],
)
def test_the_recipe_is_one_that_quantize_takes(made_by: dict[str, Any], tmp_path: Path) -> None:
    mixed = MixedPrecision(0.01, 0.1, 0.009, 1_000_000, ({"match": SPOILT, "scheme": "float"},))
    ranking = [Sensitivity((name,), "w4a16-asym-g128", 0.1, 100) for name in ("a", "b")]
    (tmp_path / "r.yaml").write_text(recipe_text(mixed, made_by, [*ranking, Sensitivity(("c",), "w8a16", 0.1, 100)]))
    recipe = read_recipe(tmp_path / "r.yaml", {})
    assert recipe.rules == (Rule(SPOILT, "float"),)
    if made_by.get("mode") == "exact":
        expected = ("w4a8", "m2", 64) if made_by["w_bit"] == 4 else ("w8a8", "m4", None)
        assert (recipe.scheme, recipe.smooth, recipe.group_size) == expected
        assert (recipe.format, recipe.activation_range == "minmax") == ("vllm-ascend", made_by["w_bit"] == 8)
    elif made_by:
        assert recipe.as_json() == {name: value for name, value in made_by.items() if name != "samples_sha256"} | {
            "rules": ({"match": SPOILT, "scheme": "float"},)
        }
    else:
        assert (recipe.scheme, recipe.group_size) == ("w4a16", 128)


def test_the_command_writes_report_and_recipe(
    tiny_checkpoint: Path,
    spoilt: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    PICTURE.save(tmp_path / "picture.png")
    given = ["verify", spoilt, "--against", tiny_checkpoint, "--image", tmp_path / "picture.png", "--answer-tokens", 3]
    given += ["--target-kl", "1e-5", "--write-recipe", tmp_path / "mixed.yaml", "--report", tmp_path / "report"]
    monkeypatch.setattr(sys, "argv", ["saccade", *map(str, given)])
    main()
    out = capsys.readouterr().out
    assert "mixed    mean KL" in out
    assert SPOILT in (tmp_path / "mixed.yaml").read_text()
    assert "What the answers feel most" in (tmp_path / "report" / "report.html").read_text()


def test_sensitivity_needs_something_to_be_near_to(dynamic: Path) -> None:
    with pytest.raises(OptionError, match="give it"):
        verify(dynamic, options=VerifyOptions(sensitivity=True))


def test_a_checkpoint_is_left_as_it_was(trials: Trials) -> None:
    """Ranking swaps weights in memory alone."""
    assert all(product.linear.weight is product.quantized for product in trials.products)
