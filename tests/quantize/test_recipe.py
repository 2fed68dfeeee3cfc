"""Which options go together: what the reference would fail on after hours is refused at once, with the reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from saccade.base.errors import OptionError
from saccade.checkpoints.config import read_config
from saccade.quantize.recipe import ExactRecipe

W4: dict[str, Any] = {"w_bit": 4, "is_lowbit": True, "is_dynamic": True, "open_outlier": False}


@pytest.mark.parametrize(
    ("options", "scheme"),
    [
        ({}, "W8A8"),
        ({"open_outlier": False}, "W8A8"),
        ({"act_method": 3}, "W8A8"),
        ({"is_lowbit": True}, "W8A8"),
        ({"device_type": "npu", "trust_remote_code": True}, "W8A8"),
        ({"is_dynamic": True}, "W8A8_DYNAMIC"),
        ({"is_dynamic": True, "group_size": 512}, "W8A8_DYNAMIC"),
        (W4, "W4A8_DYNAMIC"),
        (W4 | {"group_size": 256, "act_method": 1, "anti_method": "m4"}, "W4A8_DYNAMIC"),
    ],
)
def test_legal_combinations_have_a_scheme(options: dict[str, Any], scheme: str) -> None:
    assert ExactRecipe(**options).scheme == scheme


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"w_bit": 3}, "w_bit is 3"),
        ({"a_bit": 16}, "a_bit is 16"),
        ({"act_method": 0}, "act_method is 0"),
        ({"anti_method": "m1"}, "anti_method is 'm1'"),
        ({"group_size": 100}, "group_size is 100"),
        ({"part_file_size": 0}, "part_file_size is 0"),
        ({"device_type": "cuda"}, "device_type is 'cuda'"),
        ({"act_method": 3, "is_lowbit": True}, "act_method 3 does not go with is_lowbit"),
        (W4 | {"is_lowbit": False}, "w_bit 4 needs is_lowbit True"),
        (W4 | {"is_dynamic": False}, "the reference fails on it"),
        (W4 | {"is_dynamic": False, "open_outlier": True}, "sparse"),
        (W4 | {"open_outlier": True}, "needs open_outlier False"),
        (W4 | {"group_size": 512}, "group_size 512 is refused"),
    ],
)
def test_illegal_combinations_say_why(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        ExactRecipe(**options)


def test_groups_must_divide_the_models_widths(tiny_checkpoint: Path) -> None:
    config = read_config(tiny_checkpoint)
    ExactRecipe(**W4, group_size=32).check_model(
        replace(
            config,
            text=replace(config.text, hidden_size=64, num_heads=2, head_dim=32),
            vision=replace(config.vision, hidden_size=64, intermediate_size=10),
        )
    )
    narrow = replace(config, vision=replace(config.vision, hidden_size=96))
    with pytest.raises(OptionError, match=r"group_size 64 does not divide the 96 columns of visual.*use 32"):
        ExactRecipe(**W4, group_size=64).check_model(narrow)
    ExactRecipe().check_model(narrow)
