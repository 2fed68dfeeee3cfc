"""Sizes and patch rows against the published table and transformers' Pillow processor."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from saccade.base.errors import MediaError, OptionError
from saccade.checkpoints.config import ModelConfig
from saccade.geometry import Grid
from saccade.inputs.media import MediaLimits, MediaOptions
from saccade.inputs.pixels import patches, prepare_image, prepare_video


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth, with edges: a small noise enlarged."""
    return noise(max(width // 16, 2), max(height // 16, 2), seed).resize((width, height), Image.Resampling.BICUBIC)


def oracle_rows(image: Image.Image, config: ModelConfig) -> tuple[torch.Tensor, list[int]]:
    """(rows, grid) by transformers' Pillow processor."""
    processors = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    limits = config.preprocessing
    processor = processors.Qwen2VLImageProcessorPil(min_pixels=limits.min_pixels, max_pixels=limits.max_pixels)
    result = processor(images=[image], return_tensors="pt")
    return result["pixel_values"], result["image_grid_thw"][0].tolist()


@pytest.mark.parametrize("make", [noise, photo])
@pytest.mark.parametrize(
    "size", [(56, 56), (28, 28), (5, 5), (70, 42), (333, 217), (101, 640), (1000, 747), (28, 2000), (10, 1000)]
)
def test_rows_equal_transformers_to_the_bit(
    make: Any, size: tuple[int, int], config: ModelConfig, defaults: MediaOptions, limits: MediaLimits
) -> None:
    image = make(*size)
    medium = prepare_image(image, defaults, config, limits, 0)
    rows, grid = oracle_rows(image, config)
    assert medium.receipt.grid == Grid(*grid)
    assert torch.equal(patches(medium.frames, config), rows)


def test_all_levels_of_all_channels_normalise_as_in_transformers(
    config: ModelConfig, defaults: MediaOptions, limits: MediaLimits
) -> None:
    levels = np.arange(56 * 56, dtype=np.uint8).reshape(56, 56)
    image = Image.fromarray(np.stack([levels, levels[::-1], levels.T], axis=-1))
    rows, _ = oracle_rows(image, config)
    assert torch.equal(patches(prepare_image(image, defaults, config, limits, 0).frames, config), rows)


@pytest.mark.parametrize(
    ("size", "token_limits", "model_size", "num_tokens"),
    [
        ((1000, 747), None, (1008, 756), 972),
        ((1000, 1000), None, (1008, 1008), 1296),
        ((1920, 1080), None, (1932, 1092), 2691),
        ((3840, 2160), None, (3836, 2156), 10549),
        ((4000, 3000), None, (4004, 2996), 15301),
        ((6000, 4000), None, (4368, 2912), 16224),
        ((224, 224), None, (224, 224), 64),
        ((28, 28), None, (56, 56), 4),
        ((20, 20), None, (56, 56), 4),
        ((5, 5), None, (56, 56), 4),
        ((200, 150), (256, 1280), (532, 392), 266),
        ((3000, 2000), (256, 1280), (1204, 812), 1247),
    ],
)
def test_the_published_table_of_sizes(
    size: tuple[int, int],
    token_limits: tuple[int, int] | None,
    model_size: tuple[int, int],
    num_tokens: int,
    config: ModelConfig,
    limits: MediaLimits,
) -> None:
    options = MediaOptions()
    if token_limits:
        options = MediaOptions(min_pixels=token_limits[0] * 784, max_pixels=token_limits[1] * 784)
    receipt = prepare_image(Image.new("RGB", size), options, config, limits, 3).receipt
    assert (receipt.original_size, receipt.model_size) == (size, model_size)
    assert (receipt.num_tokens, receipt.index) == (num_tokens, 3)


def test_the_published_example_has_972_tokens(
    published_media: Path, config: ModelConfig, defaults: MediaOptions, limits: MediaLimits
) -> None:
    path = published_media / "examples_image1.jpg"
    medium = prepare_image(path, defaults, config, limits, 0)
    assert medium.receipt.num_tokens == 972
    assert torch.equal(patches(medium.frames, config), oracle_rows(Image.open(path).convert("RGB"), config)[0])


def test_an_aspect_ratio_of_200_passes_and_of_201_does_not(
    config: ModelConfig, defaults: MediaOptions, limits: MediaLimits
) -> None:
    prepare_image(Image.new("RGB", (2000, 10)), defaults, config, limits, 0)
    with pytest.raises(MediaError, match="200"):
        prepare_image(Image.new("RGB", (2010, 10)), defaults, config, limits, 0)


def test_a_parts_limits_replace_the_checkpoints(config: ModelConfig, limits: MediaLimits) -> None:
    narrow = replace(config, preprocessing=replace(config.preprocessing, min_pixels=50_000, max_pixels=100_000))
    image = Image.new("RGB", (1000, 1000))

    def area(**options: int) -> int:
        return math.prod(prepare_image(image, MediaOptions(**options), narrow, limits, 0).receipt.model_size)

    assert area() <= 100_000
    assert area(max_pixels=500_000) > 400_000  # above the file's
    assert area(max_pixels=20_000) <= 20_000  # below the file's smallest
    assert area(min_pixels=2_000_000) >= 2_000_000  # above the file's largest


def test_a_wanted_size_goes_through_the_same_rule(config: ModelConfig, limits: MediaLimits) -> None:
    options = MediaOptions(resized_height=300, resized_width=500)
    assert prepare_image(Image.new("RGB", (64, 64)), options, config, limits, 0).receipt.model_size == (504, 308)


def test_a_picture_that_fits_no_prompt_is_refused_before_it_is_made(config: ModelConfig, limits: MediaLimits) -> None:
    with pytest.raises(MediaError, match="lower max_pixels"):
        prepare_image(Image.new("RGB", (64, 64)), MediaOptions(min_pixels=10**12, max_pixels=10**13), config, limits, 0)
    with pytest.raises(OptionError):
        prepare_image(Image.new("RGB", (64, 64)), MediaOptions(max_pixels=1, min_pixels=2), config, limits, 0)


# --- several frames --------------------------------------------------------------------------------------------------


def naive_rows(frames: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Row by row, value by value, as section 5 tells it."""
    if len(frames) % 2:
        frames = torch.cat([frames, frames[-1:]])
    mean, std = np.float32(config.preprocessing.image_mean), np.float32(config.preprocessing.image_std)
    rows = []
    for pair in frames.numpy().reshape(-1, 2, *frames.shape[1:]):
        for top in range(0, frames.shape[2], 28):
            for left in range(0, frames.shape[3], 28):
                for y in (top, top + 14):
                    for x in (left, left + 14):
                        patch = pair[:, :, y : y + 14, x : x + 14].transpose(1, 0, 2, 3)  # channel, time, y, x
                        values = (patch * (1 / 255)).astype(np.float32)
                        rows.append(((values - mean.reshape(3, 1, 1, 1)) / std.reshape(3, 1, 1, 1)).reshape(-1))
    return torch.from_numpy(np.stack(rows))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
def test_frames_pair_up_and_an_odd_one_is_repeated(count: int, config: ModelConfig) -> None:
    frames = torch.randint(0, 256, (count, 3, 56, 84), dtype=torch.uint8, generator=torch.manual_seed(count))
    assert torch.equal(patches(frames, config), naive_rows(frames, config))


def test_a_checkpoint_may_see_videos_small(config: ModelConfig, limits: MediaLimits, make_video: Any) -> None:
    """Without its word, the published rule enlarges a small clip to 128 tokens a frame."""
    small = replace(config, preprocessing=replace(config.preprocessing, video_min_pixels=3136, video_max_pixels=12_544))
    video = make_video(range(0, 4000, 500), size=(160, 120))
    sizes = [prepare_video(video, MediaOptions(), c, limits, 0).receipt.model_size for c in (config, small)]
    assert sizes == [(392, 280), (112, 84)]
    asked = prepare_video(video, MediaOptions(max_pixels=50_000), small, limits, 0)
    assert asked.receipt.model_size == (168, 112)


def test_a_list_of_frames_is_resized_as_pictures_at_its_own_rate(
    config: ModelConfig, defaults: MediaOptions, limits: MediaLimits
) -> None:
    images = [photo(100, 80, seed) for seed in range(5)]
    medium = prepare_video(images, defaults.overridden_by({"sample_fps": 4}, "video"), config, limits, 1)
    receipt = medium.receipt
    assert receipt.kind == "video"
    assert receipt.grid == Grid(3, 6, 8)
    assert receipt.second_per_grid == 0.5
    assert receipt.frame_times_s == (0.0, 0.25, 0.5, 0.75, 1.0)
    for frame, image in zip(medium.frames, images, strict=True):
        assert torch.equal(frame, prepare_image(image, defaults, config, limits, 0).frames[0])
    assert prepare_video(images, defaults, config, limits, 0).receipt.second_per_grid == 1.0


def test_a_list_of_frames_may_be_an_array_or_files(
    tmp_path: Path, config: ModelConfig, defaults: MediaOptions, limits: MediaLimits
) -> None:
    images = [photo(60, 60, seed) for seed in range(4)]
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    array = np.stack([np.asarray(image) for image in images])
    keys = [
        prepare_video(source, defaults, config, limits, 0).key
        for source in (images, paths, array, torch.from_numpy(array).permute(0, 3, 1, 2))
    ]
    assert len(set(keys)) == 1


def test_total_pixels_holds_for_a_list_of_frames(config: ModelConfig, limits: MediaLimits) -> None:
    frames = [Image.new("RGB", (640, 480))] * 8
    receipt = prepare_video(frames, MediaOptions(total_pixels=8 * 50_000), config, limits, 0).receipt
    assert receipt.model_size[0] * receipt.model_size[1] <= 2 * 50_000


@pytest.mark.parametrize(
    ("frames", "options"),
    [
        ([], {}),
        ([Image.new("RGB", (60, 60)), Image.new("RGB", (60, 90))], {}),
        ([Image.new("RGB", (60, 60))] * 2, {"num_frames": 2}),
        ([Image.new("RGB", (60, 60))] * 2, {"start_s": 1}),
        (np.zeros((60, 60, 3), np.uint8), {}),
        ([Image.new("RGB", (60, 60)), "missing.png"], {}),
        ([Image.new("RGB", (60, 60))] * 769, {}),
    ],
)
def test_frame_lists_that_make_no_sense_are_refused(
    frames: Any, options: dict[str, Any], config: ModelConfig, limits: MediaLimits
) -> None:
    with pytest.raises((MediaError, OptionError)):
        prepare_video(frames, MediaOptions(**options), config, limits, 0)


def test_keys_tell_pixels_shapes_kinds_and_seconds_apart(
    config: ModelConfig, defaults: MediaOptions, limits: MediaLimits
) -> None:
    blank = Image.new("RGB", (56, 112))
    keys = [
        prepare_image(blank, defaults, config, limits, 0).key,
        prepare_image(Image.new("RGB", (112, 56)), defaults, config, limits, 0).key,
        prepare_image(Image.new("RGB", (56, 112), (0, 0, 1)), defaults, config, limits, 0).key,
        prepare_video([blank], defaults, config, limits, 0).key,
        prepare_video([blank] * 2, defaults, config, limits, 0).key,
        prepare_video([blank] * 2, MediaOptions(fps=1), config, limits, 0).key,
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == prepare_image(np.asarray(blank), defaults, config, limits, 7).key
