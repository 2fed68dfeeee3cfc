"""Sizes, grids, windows, positions and the way back, against the numbers of the model's description."""

from __future__ import annotations

import pytest
import torch

from saccade.base.errors import MediaError, OptionError, PromptError
from saccade.geometry import (
    Grid,
    PixelMap,
    Span,
    fit_size,
    frame_pixel_limits,
    num_frames_to_sample,
    patch_coordinates,
    slice_lengths,
    spread_frames,
    token_positions,
    window_order,
)

LOW, HIGH = 3136, 12_845_056


@pytest.mark.parametrize(
    ("width", "height", "low", "high", "expected"),
    [
        (1000, 747, LOW, HIGH, (756, 1008)),
        (1000, 1000, LOW, HIGH, (1008, 1008)),
        (1920, 1080, LOW, HIGH, (1092, 1932)),
        (3840, 2160, LOW, HIGH, (2156, 3836)),
        (4000, 3000, LOW, HIGH, (2996, 4004)),
        (6000, 4000, LOW, HIGH, (2912, 4368)),
        (224, 224, LOW, HIGH, (224, 224)),
        (28, 28, LOW, HIGH, (56, 56)),
        (20, 20, LOW, HIGH, (56, 56)),
        (5, 5, LOW, HIGH, (56, 56)),
        (70, 98, LOW, HIGH, (112, 56)),  # halves go to the even multiple
        (10, 1000, LOW, HIGH, (560, 28)),
        (200, 150, 256 * 784, 1280 * 784, (392, 532)),
        (3000, 2000, 256 * 784, 1280 * 784, (812, 1204)),
    ],
)
def test_a_picture_is_resized_as_in_training(
    width: int, height: int, low: int, high: int, expected: tuple[int, int]
) -> None:
    assert fit_size(height, width, low, high, 28) == expected


def test_lifting_sides_first_is_the_other_rule_for_strips() -> None:
    assert fit_size(1000, 10, LOW, HIGH, 28, lift_sides=True) == (1008, 28)


def test_an_aspect_ratio_of_200_passes_and_201_does_not() -> None:
    assert fit_size(200, 40_000, LOW, HIGH, 28)
    assert fit_size(28, 28 * 200, LOW, HIGH, 28)
    with pytest.raises(MediaError, match="aspect ratio"):
        fit_size(10, 2010, LOW, HIGH, 28)


def test_limits_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(OptionError, match="min_pixels 10000 is larger than max_pixels 5000"):
        fit_size(100, 100, 10_000, 5_000, 28)


def test_patches_stand_in_blocks_of_the_merger() -> None:
    expected = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    assert patch_coordinates(Grid(1, 4, 6), 2).tolist()[:8] == [list(pair) for pair in expected]


def test_windows_are_cut_from_the_top_left_and_edges_are_smaller() -> None:
    order, lengths = window_order([Grid(1, 12, 10)], 2, 4)
    by_hand = [
        0,
        1,
        2,
        3,
        5,
        6,
        7,
        8,
        10,
        11,
        12,
        13,
        15,
        16,
        17,
        18,
        4,
        9,
        14,
        19,
        20,
        21,
        22,
        23,
        25,
        26,
        27,
        28,
        24,
        29,
    ]
    assert order.tolist() == by_hand
    assert lengths == [64, 16, 32, 8]


def test_a_side_divisible_by_the_window_gives_no_empty_window() -> None:
    _, lengths = window_order([Grid(1, 8, 8)], 2, 4)
    assert lengths == [64]


def test_the_published_picture_and_video_have_the_published_windows() -> None:
    _, picture = window_order([Grid(1, 54, 72)], 2, 4)
    assert sorted(picture) == [48] * 9 + [64] * 54
    _, video = window_order([Grid(15, 36, 20)], 2, 4)
    assert sorted(video) == [16] * 15 + [32] * 90 + [64] * 120
    assert slice_lengths([Grid(15, 36, 20)]) == [720] * 15


def test_several_media_keep_their_units_apart() -> None:
    order, lengths = window_order([Grid(1, 4, 4), Grid(2, 4, 8)], 2, 4)
    assert order.tolist() == list(range(20))
    assert lengths == [16, 32, 32]


def test_a_small_picture_takes_three_axis_positions() -> None:
    positions, after = token_positions(11, [Span(3, Grid(1, 4, 6))], 2, 2)
    assert positions.tolist() == [
        [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7],
        [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7],
        [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7],
    ]
    assert after == 8


def test_a_small_video_tells_true_seconds() -> None:
    positions, after = token_positions(16, [Span(2, Grid(3, 4, 4), 1.5)], 2, 2)
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 5, 5, 5, 5, 8, 8, 8, 8, 9, 10],
        [0, 1, 2, 2, 3, 3, 2, 2, 3, 3, 2, 2, 3, 3, 9, 10],
        [0, 1, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 9, 10],
    ]
    assert after == 11


@pytest.mark.parametrize(
    ("grid", "seconds", "text_resumes", "after"),
    [
        (Grid(1, 54, 72), 0.0, 51, 61),
        (Grid(15, 36, 20), 1.98887, 71, 81),
        (Grid(15, 36, 20), 1.0, 44, 54),
        (Grid(14, 36, 20), 2.13093, 71, 81),
    ],
)
def test_the_reference_prompts_resume_where_published(
    grid: Grid, seconds: float, text_resumes: int, after: int
) -> None:
    tokens = grid.num_tokens(2)
    positions, following = token_positions(25 + tokens, [Span(15, grid, seconds)], 2, 2)
    assert positions[:, 15 + tokens].tolist() == [text_resumes] * 3
    assert following == after


def test_video_times_are_reckoned_in_float32() -> None:
    seconds = 1.0999999999999999
    positions, _ = token_positions(100, [Span(0, Grid(100, 2, 2), seconds)], 2, 2)
    times = positions[0].tolist()
    by_hand = [int(torch.tensor(float(k)) * torch.tensor(seconds) * torch.tensor(2.0)) for k in range(100)]
    assert times == by_hand
    assert times != [int(k * seconds * 2) for k in range(100)]


def test_overlapping_media_are_refused() -> None:
    with pytest.raises(PromptError, match="overlap"):
        token_positions(20, [Span(2, Grid(1, 4, 4)), Span(4, Grid(1, 4, 4))], 2, 2)
    with pytest.raises(PromptError, match="overrun"):
        token_positions(5, [Span(2, Grid(1, 4, 4))], 2, 2)


PANDA = (895, 895_000 / 29_833)  # frames and average rate of a 29.83 s clip


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 58),
        ({"fps": 1.0}, 28),
        ({"fps": 1.0, "round_to_even": True}, 30),
        ({"fps": 4.0}, 118),
        ({"nframes": 16}, 16),
    ],
)
def test_the_published_clip_gives_the_published_frame_counts(options: dict[str, float], count: int) -> None:
    assert num_frames_to_sample(*PANDA, **options) == count  # type: ignore[arg-type]


def test_frames_are_spread_with_both_ends() -> None:
    assert spread_frames(895, 28)[:4] == [0, 33, 66, 99]
    assert spread_frames(895, 28)[-2:] == [861, 894]
    assert spread_frames(895, 30)[:4] == [0, 31, 62, 92]
    assert spread_frames(895, 30)[-2:] == [863, 894]


def test_a_frame_count_out_of_reach_is_refused() -> None:
    with pytest.raises(MediaError, match="1 frames"):
        num_frames_to_sample(1, 30.0)
    with pytest.raises(MediaError, match="choose 2 to 10"):
        num_frames_to_sample(10, 30.0, nframes=40)
    with pytest.raises(OptionError, match="exclude each other"):
        num_frames_to_sample(100, 30.0, fps=1.0, nframes=4)


def test_frame_sizes_follow_the_clip_limits() -> None:
    low, high = frame_pixel_limits(28, 28, None, 360 * 420, None)
    assert fit_size(640, 360, low, high, 28, lift_sides=True) == (504, 280)
    low, high = frame_pixel_limits(58, 28, None, None, None)
    assert fit_size(640, 360, low, high, 28, lift_sides=True) == (644, 364)
    assert frame_pixel_limits(768, 28, None, None, 784 * 24576) == (128 * 784, int(128 * 784 * 1.05))


def test_model_pixels_map_back_to_the_original() -> None:
    pixels = PixelMap((1008, 756), (1000, 747))
    assert pixels.to_original(1008, 756) == (1000, 747)
    assert pixels.to_original(504, 378) == (500, 373.5)
    assert pixels.to_original(-5, 9999) == (0, 747)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_points_map_back_through_the_orientation(orientation: int) -> None:
    """Pillow's own transpose is the oracle: the marked pixel of the stored raster is found again."""
    from PIL import Image, ImageOps

    stored = Image.new("L", (5, 3))
    stored.putpixel((4, 1), 255)
    stored.getexif()[0x0112] = orientation
    exif = stored.getexif()
    exif[0x0112] = orientation
    import io

    file = io.BytesIO()
    stored.save(file, "PNG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(file))
    (x, y) = next(
        (x, y) for x in range(upright.width) for y in range(upright.height) if upright.getpixel((x, y)) == 255
    )
    pixels = PixelMap(upright.size, upright.size, orientation)
    assert pixels.to_stored(x + 0.5, y + 0.5) == pytest.approx((4.5, 1.5))
