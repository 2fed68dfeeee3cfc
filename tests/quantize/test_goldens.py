"""Exact mode against checkpoints that msModelSlim wrote: every tensor and every JSON file, byte for byte."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from saccade.checkpoints.config import read_config
from saccade.cli.flags import script_options
from saccade.inputs.chat import ChatTokenizer
from saccade.inputs.pixels import patches
from saccade.quantize.calibration import list_pictures, load_sample
from saccade.quantize.pipeline import Report, quantize_exact
from saccade.quantize.recipe import ExactRecipe
from tests.goldens import CASES, GOLDENS, needs_goldens

Found = tuple[Path, Path, Report]

pytestmark = needs_goldens


@pytest.fixture(scope="module", params=CASES)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """(the case, our checkpoint, what was found on the way)."""
    case = GOLDENS / request.param
    out = tmp_path_factory.mktemp("exact") / request.param
    return case, out, quantized(case, out)


def quantized(case: Path, out: Path) -> Report:
    """The case by its own command line."""
    reports: list[Report] = []

    @click.command()
    @script_options(ExactRecipe)
    def parse(**values: object) -> None:
        reports.append(quantize_exact(case / "input", out, ExactRecipe(**values), case / "images"))  # type: ignore[arg-type]

    parse(args=(case / "args.txt").read_text().split(), standalone_mode=False)
    return reports[0]


def assert_equal_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        assert torch.equal(actual[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), name


def test_every_tensor_is_the_references(found: Found) -> None:
    case, out, _ = found
    [weights] = (case / "output").glob("*.safetensors")
    assert_equal_bits(load_file(out / weights.name), load_file(weights))


def test_every_other_file_is_the_references(found: Found) -> None:
    case, out, _ = found
    assert {path.name for path in out.iterdir()} == {path.name for path in (case / "output").iterdir()}
    for path in (case / "output").glob("*.json"):
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_smoothing_is_the_references(found: Found) -> None:
    """m2: the scale of each search; m4: the activations' maxima, which the reference records in another order."""
    case, _, report = found
    if (path := case / "record" / "smooth_scales.safetensors").exists():
        expected, actual = load_file(path), report.scales
        assert len(actual) == len(expected)
        for name in actual:
            assert any(torch.equal(actual[name], tensor) for tensor in expected.values()), name
    if (path := case / "record" / "act_absmax.safetensors").exists():
        expected, actual = load_file(path), report.activation_maxima
        for name, tensor in expected.items():
            assert any(torch.equal(tensor, mine) for mine in actual.values()), name


@pytest.mark.parametrize("name", CASES)
def test_calibration_samples_are_the_references(name: str) -> None:
    case = GOLDENS / name
    recorded = load_file(case / "record" / "calib_inputs.safetensors")
    config = read_config(case / "input")
    tokenizer = ChatTokenizer(case / "input", config)
    pictures = list_pictures(case / "images", "name")
    assert len(pictures) * 4 == len(recorded)
    for i, path in enumerate(pictures):
        sample = load_sample(path, tokenizer, config)
        assert torch.equal(sample.token_ids[None], recorded[f"{i}.input_ids"])
        assert torch.equal(patches(sample.frames, config), recorded[f"{i}.pixel_values"])
        [grid] = sample.grids
        assert [[grid.t, grid.h, grid.w]] == recorded[f"{i}.image_grid_thw"].tolist()
