"""Options are what their annotations say, wherever they come from: a wrong type is an error, not another meaning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from saccade import LLM
from saccade.base.errors import OptionError, PromptError
from saccade.engine.options import EngineOptions, SamplingParams
from saccade.inputs.options import MediaLimits, MediaOptions
from saccade.quantize.best_recipe import BestRecipe, read_recipe
from saccade.quantize.recipe import ExactRecipe
from saccade.verify.options import VerifyOptions


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SamplingParams(max_tokens=None), "max_tokens is None; it must be a whole number"),  # type: ignore[arg-type]
        (lambda: SamplingParams(max_tokens=2.5), "max_tokens is 2.5; it must be a whole number"),  # type: ignore[arg-type]
        (lambda: SamplingParams(n=True), "n is True; it must be a whole number"),
        (lambda: SamplingParams(temperature="0"), "temperature is '0'; it must be a number"),  # type: ignore[arg-type]
        (lambda: SamplingParams(temperature=False), "temperature is False; it must be a number"),
        (lambda: SamplingParams(ignore_eos="no"), "ignore_eos is 'no'; it must be True or False"),  # type: ignore[arg-type]
        (lambda: SamplingParams(stop=5), "stop is 5; it must be a list, each a text"),  # type: ignore[arg-type]
        (lambda: SamplingParams(stop_token_ids=[1.5]), "each a whole number"),  # type: ignore[list-item, arg-type]
        (lambda: EngineOptions(kv_cache_dtype="fp8"), "kv_cache_dtype is 'fp8'; use one of auto, model, int8"),  # type: ignore[arg-type]
        (lambda: EngineOptions(prefix_cache="off"), "prefix_cache is 'off'; it must be True or False"),  # type: ignore[arg-type]
        (lambda: EngineOptions(quantization=8), "quantization is 8; it must be a text"),  # type: ignore[arg-type]
        (lambda: MediaOptions(max_pixels=1e6), "max_pixels is 1000000.0; it must be a whole number"),  # type: ignore[arg-type]
        (lambda: MediaLimits(allow_local_paths=0), "allow_local_paths is 0; it must be True or False"),  # type: ignore[arg-type]
        (lambda: VerifyOptions(max_kl="1"), "max_kl is '1'; it must be a number"),  # type: ignore[arg-type]
        (lambda: ExactRecipe(is_dynamic="True"), "is_dynamic is 'True'; it must be True or False"),  # type: ignore[arg-type]
        (lambda: BestRecipe(rules=("*",)), "rules is .*; it must be a list, each a Rule"),  # type: ignore[arg-type]
    ],
)
def test_another_type_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


@pytest.mark.parametrize(
    "line",
    [
        "rotate: 'no'",
        "fold-keys: 'false'",
        "seed: 1.5",
        "samples: 2.5",
        "calibration: 5",
        "calibration: null",
        "smooth: [m2]",
    ],
)
def test_a_recipes_values_are_what_they_have_to_be(tmp_path: Path, line: str) -> None:
    (tmp_path / "r.yaml").write_text(line)
    with pytest.raises(OptionError, match=f"{line.partition(':')[0].replace('-', '_')} is "):
        read_recipe(tmp_path / "r.yaml", {})


def test_what_means_the_same_is_taken() -> None:
    assert EngineOptions(dtype=torch.float16, device=torch.device("cpu")) == EngineOptions(
        dtype="float16", device="cpu"
    )  # type: ignore[arg-type]
    assert SamplingParams(temperature=1, stop=["a"], stop_token_ids={3}) == SamplingParams(  # type: ignore[arg-type]
        temperature=1.0, stop=("a",), stop_token_ids=(3,)
    )
    recipe = BestRecipe(calibration=Path("photos"))  # type: ignore[arg-type]
    assert recipe.digest() == BestRecipe(calibration="photos").digest()


@pytest.mark.parametrize("given", [{"media": {"fps": 1}}, {"limits": 3}, {"kernels": "reference"}])
def test_a_model_is_not_opened_with_what_it_would_stumble_over_later(
    tiny_checkpoint: Path, given: dict[str, Any]
) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(given))} is .*; give a "):
        LLM(tiny_checkpoint, device="cpu", **given)


def test_questions_and_parameters_of_another_type_are_refused_by_name(tiny_checkpoint: Path) -> None:
    llm = LLM(tiny_checkpoint, device="cpu", kv_cache_tokens=256)
    asked = [{"role": "user", "content": "Hello"}]
    for params in (3, "temperature=0", {"max_tokens": 2}, [{"max_tokens": 2}]):
        with pytest.raises(OptionError, match=r"sampling_params is .*; give SamplingParams"):
            llm.chat(asked, params)  # type: ignore[arg-type]
        with pytest.raises(OptionError, match=r"sampling_params is .*; give SamplingParams"):
            llm.stream(asked, params)  # type: ignore[arg-type]
    for messages in (None, 5, "Hello"):
        with pytest.raises(PromptError, match=r"messages is .*; give"):
            llm.chat(messages)  # type: ignore[arg-type]
