"""Options of a medium: every common spelling is understood, nothing is ignored in silence."""

from __future__ import annotations

from typing import Any

import pytest

from saccade.base.errors import OptionError
from saccade.inputs.options import MediaLimits, MediaOptions


def test_a_part_overrides_the_defaults_one_by_one() -> None:
    defaults = MediaOptions(min_pixels=3136, max_pixels=50_000)
    assert defaults.overridden_by({"max_pixels": 9_000}, "image") == MediaOptions(min_pixels=3136, max_pixels=9_000)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ({"nframes": 16}, MediaOptions(num_frames=16)),
        ({"video_start": 1.5, "video_end": 4}, MediaOptions(start_s=1.5, end_s=4)),
        ({"start": 1, "end": 4}, MediaOptions(start_s=1, end_s=4)),
        ({"sample_fps": "1", "raw_fps": "24"}, MediaOptions(fps=1.0)),
        ({"max_pixels": 151200.0}, MediaOptions(max_pixels=151200)),
    ],
)
def test_spellings_of_other_tools_are_understood(written: dict[str, Any], meant: MediaOptions) -> None:
    assert MediaOptions().overridden_by(written, "video") == meant


def test_a_parts_rate_displaces_a_default_count_and_the_other_way_round() -> None:
    assert MediaOptions(num_frames=8).overridden_by({"fps": 1}, "video") == MediaOptions(fps=1)
    assert MediaOptions(fps=1).overridden_by({"num_frames": 8}, "video") == MediaOptions(num_frames=8)


def test_an_unknown_key_names_the_nearest_known_one() -> None:
    with pytest.raises(OptionError, match=r"'max_pixel'.*'max_pixels'"):
        MediaOptions().overridden_by({"max_pixel": 5}, "image")


def test_a_video_option_on_a_picture_is_refused_not_ignored() -> None:
    with pytest.raises(OptionError, match="fps"):
        MediaOptions().overridden_by({"fps": 2}, "image")


@pytest.mark.parametrize(
    "values",
    [
        {"fps": 0},
        {"fps": float("nan")},
        {"fps": True},
        {"fps": 1, "num_frames": 4},
        {"num_frames": 1},
        {"num_frames": 2.5},
        {"max_pixels": -1},
        {"min_pixels": 10, "max_pixels": 5},
        {"min_frames": 10, "max_frames": 4},
        {"resized_height": 280},
        {"start_s": 5, "end_s": 5},
        {"start_s": -1},
        {"end_s": float("inf")},
        {"frame_rounding": "up"},
    ],
)
def test_impossible_values_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        MediaOptions(**values)


@pytest.mark.parametrize("value", ["many", [1], {}, True, "nan", "1.5"])
def test_a_parts_value_must_be_a_number(value: object) -> None:
    with pytest.raises(OptionError, match="max_pixels"):
        MediaOptions().overridden_by({"max_pixels": value}, "image")


def test_limits_have_bounds_too() -> None:
    with pytest.raises(OptionError, match="max_image_bytes"):
        MediaLimits(max_image_bytes=0)
