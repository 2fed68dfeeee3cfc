"""Pictures and videos at the model's size, and the patch rows the tower is fed.

Knows both resize rules (Pillow's for pictures, torch's for video frames; sections 5 and 6), normalisation and row order;
knows no files' formats and no prompts.
"""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from saccade.base.errors import MediaError, OptionError
from saccade.checkpoints.config import ModelConfig
from saccade.geometry import Grid, fit_size, frame_pixel_limits
from saccade.inputs.media import Picture, Pixels, open_picture
from saccade.inputs.options import MediaLimits, MediaOptions
from saccade.inputs.prompt import MediaReceipt, Medium
from saccade.inputs.video import Clip, sample_frames

DEFAULT_LIST_FPS = 2.0  # what a list of frames without a rate is taken to be sampled at


# --- patch rows ------------------------------------------------------------------------------------------------------


def patches(frames: Tensor, config: ModelConfig) -> Tensor:
    """Patch rows of a medium: [F, 3, H, W] uint8 -> [P, 1176] float32 on the same device, equal to transformers' processor bit for bit.

    A single frame is taken twice in time, an odd count repeats the last. Rows run over time pairs, block rows, block columns,
    and the rows and columns inside a 2 x 2 block; inside a row: channel, time, y, x. Values are (v / 255 - mean) / std.
    """
    vision = config.vision
    count, channels, height, width = frames.shape
    size, merge, pair = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    rows, columns = height // (size * merge), width // (size * merge)
    # A picture's second frame is a copy of the first: normalise it once and copy floats at the very end.
    num_distinct = 1 if count == 1 else pair
    if count % num_distinct:
        frames = torch.cat([frames, frames[-1:].expand(num_distinct - count % num_distinct, -1, -1, -1)])
    blocks = frames.reshape(-1, num_distinct, channels, rows, merge, size, columns, merge, size)
    # -> time pair, block row, block column, row, column in block, channel, time, y, x
    blocks = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    values = blocks.to(torch.float32, memory_format=torch.contiguous_format).view(
        -1, channels, num_distinct, size * size
    )
    # transformers multiplies by 1/255 in float64 and rounds; on whole levels this division gives the same 256 floats. All three
    # are tensors: a card takes a division by a Python number for a product with its reciprocal.
    levels, mean, std = (
        torch.tensor(numbers, dtype=torch.float32, device=frames.device).view(-1, 1, 1)
        for numbers in ([255.0], config.preprocessing.image_mean, config.preprocessing.image_std)
    )
    values.div_(levels).sub_(mean).div_(std)
    return values.expand(-1, -1, pair, -1).reshape(-1, vision.patch_values)


# --- pictures --------------------------------------------------------------------------------------------------------


def prepare_image(
    source: object, options: MediaOptions, config: ModelConfig, limits: MediaLimits, index: int
) -> Medium:
    """A picture at the model's size (section 5.1), by Pillow's bicubic filter on 8-bit channels.

    `index`: its place among the conversation's pictures. Raises MediaError or OptionError.
    """
    start = time.perf_counter()
    picture = open_picture(source, limits)
    decode_s = time.perf_counter() - start
    height, width = _image_size(picture, options, config)
    _check_tokens(1, height, width, picture.source, config)
    return _medium(
        "image",
        index,
        _resized(picture.image, height, width)[None],
        config,
        source=picture.source,
        sha256=picture.sha256,
        original_size=picture.image.size,
        orientation=picture.orientation,
        notes=picture.notes,
        decode_s=decode_s,
    )


def _image_size(
    picture: Picture, options: MediaOptions, config: ModelConfig, *, lift_sides: bool = False
) -> tuple[int, int]:
    """(height, width) of a picture after resizing. A part's limits replace the checkpoint's."""
    lowest = config.preprocessing.min_pixels if options.min_pixels is None else options.min_pixels
    highest = config.preprocessing.max_pixels if options.max_pixels is None else options.max_pixels
    if options.min_pixels is None and options.max_pixels is not None:
        lowest = min(lowest, highest)
    if options.max_pixels is None and options.min_pixels is not None:
        highest = max(lowest, highest)
    height = picture.image.height if options.resized_height is None else options.resized_height
    width = picture.image.width if options.resized_width is None else options.resized_width
    factor, what = config.vision.factor, f"{picture.source}: picture"
    return fit_size(height, width, lowest, highest, factor, lift_sides=lift_sides, what=what)


def _resized(image: Image.Image, height: int, width: int) -> Tensor:
    """[3, H, W] uint8."""
    pixels = np.array(image.resize((width, height), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _check_tokens(count: int, height: int, width: int, label: str, config: ModelConfig) -> None:
    """Refuses a medium that cannot fit any prompt, before its pixels are made. Raises MediaError."""
    num_tokens = -(-count // config.vision.temporal_patch_size) * (height * width // config.vision.factor**2)
    longest = config.text.max_position_embeddings
    if num_tokens > longest:
        raise MediaError(
            f"{label}: {count} x {width} x {height} pixels make {num_tokens} tokens, the model takes {longest};"
            " lower max_pixels" + (" or the number of frames" if count > 1 else "")
        )


# --- videos ----------------------------------------------------------------------------------------------------------


def prepare_video(
    source: object, options: MediaOptions, config: ModelConfig, limits: MediaLimits, index: int
) -> Medium:
    """The chosen frames of a video at the model's size (section 6).

    `source`: an encoded video, or its frames: a list of pictures, or an array [F, ...] of them, sampled at the option `fps`.
    Only the chosen frames are kept, at their final size. Raises MediaError or OptionError.
    """
    if isinstance(source, (np.ndarray, Tensor)):
        if source.ndim != 4:
            raise MediaError(f"video array of shape {tuple(source.shape)}; pass frames as [F, H, W, 3] or [F, 3, H, W]")
        source = list(source)
    if isinstance(source, (list, tuple)):
        return _prepare_frame_list(source, options, config, limits, index)
    original_size = (0, 0)
    resize_s = 0.0

    def prepare(clip: Clip) -> Callable[[Pixels], Tensor]:
        fit = _frame_size(len(clip.indices), options, config)
        _check_tokens(len(clip.indices), *fit(clip.size[1], clip.size[0]), "video", config)
        target: tuple[int, int] | None = None

        def keep(pixels: Pixels) -> Tensor:
            nonlocal target, original_size, resize_s
            start = time.perf_counter()
            if target is None:  # only a decoded frame tells how the video is to be turned
                target = fit(*pixels.shape[:2])
                original_size = (pixels.shape[1], pixels.shape[0])
            resized = _resized_frame(pixels, *target)
            resize_s += time.perf_counter() - start
            return resized

        return keep

    start = time.perf_counter()
    sampled = sample_frames(source, options, limits, prepare)
    decode_s = time.perf_counter() - start - resize_s
    return _medium(
        "video",
        index,
        torch.stack(sampled.frames),
        config,
        source=sampled.label,
        sha256=sampled.sha256,
        original_size=original_size,
        orientation=sampled.orientation,
        frame_indices=sampled.clip.indices,
        frame_times_s=sampled.clip.times_s,
        second_per_grid=sampled.clip.second_per_grid,
        decode_s=decode_s,
    )


def _frame_size(count: int, options: MediaOptions, config: ModelConfig) -> Callable[[int, int], tuple[int, int]]:
    """The function from a frame's (height, width) to its size at the model."""
    factor = config.vision.factor
    if options.resized_height is not None and options.resized_width is not None:
        height, width = options.resized_height, options.resized_width
        lowest, highest = config.preprocessing.min_pixels, config.preprocessing.max_pixels
        return lambda *_: fit_size(height, width, lowest, highest, factor, lift_sides=True)
    smallest = config.preprocessing.video_min_pixels if options.min_pixels is None else options.min_pixels
    largest = config.preprocessing.video_max_pixels if options.max_pixels is None else options.max_pixels
    lowest, highest = frame_pixel_limits(count, factor, smallest, largest, options.total_pixels)
    if options.min_pixels is None:
        lowest = min(lowest, highest)
    return lambda height, width: fit_size(height, width, lowest, highest, factor, lift_sides=True)


def _resized_frame(pixels: Pixels, height: int, width: int) -> Tensor:
    """[H', W', 3] -> [3, H, W] uint8: float32 bicubic with antialiasing, clipped, rounded with halves to even."""
    frame = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    if frame.shape[1:] == (height, width):
        return frame
    resized = torch.nn.functional.interpolate(
        frame[None].float(), size=(height, width), mode="bicubic", antialias=True, align_corners=False
    )
    return resized[0].clamp_(0, 255).round_().to(torch.uint8)


def _prepare_frame_list(
    source: Sequence[object], options: MediaOptions, config: ModelConfig, limits: MediaLimits, index: int
) -> Medium:
    """A video given as its frames, each resized as a picture, to the size of the first. Raises MediaError or OptionError."""
    for name in ("num_frames", "start_s", "end_s"):
        if getattr(options, name) is not None:
            raise OptionError(f"{name} does not apply to a list of frames; pass the frames to look at, and their fps")
    if not 1 <= len(source) <= limits.max_sampled_frames:
        raise MediaError(f"video of {len(source)} frames; pass 1 to {limits.max_sampled_frames}")
    if options.total_pixels is not None:
        lowest = config.preprocessing.min_pixels if options.min_pixels is None else options.min_pixels
        highest = config.preprocessing.max_pixels if options.max_pixels is None else options.max_pixels
        cap = max(options.total_pixels // len(source) * config.vision.temporal_patch_size, int(lowest * 1.05))
        options = replace(options, max_pixels=min(highest, cap))
    fps = DEFAULT_LIST_FPS if options.fps is None else options.fps
    decode_s = 0.0
    frames: list[Tensor] = []
    digests: list[str] = []
    notes: dict[str, None] = {}  # distinct, in order
    original_size = (0, 0)
    for frame in source:
        start = time.perf_counter()
        picture = open_picture(frame, limits)
        decode_s += time.perf_counter() - start
        if not frames:
            original_size = picture.image.size
            height, width = _image_size(picture, options, config, lift_sides=True)
            _check_tokens(len(source), height, width, "list of frames", config)
        elif picture.image.size != original_size:
            raise MediaError(
                f"frame {len(frames)} is {picture.image.size}, the first is {original_size}; make all one size"
            )
        frames.append(_resized(picture.image, height, width))
        digests.append(picture.sha256)
        notes.update(dict.fromkeys(picture.notes))
    return _medium(
        "video",
        index,
        torch.stack(frames),
        config,
        source=f"list of {len(frames)} frames",
        sha256=hashlib.sha256("".join(digests).encode()).hexdigest(),
        original_size=original_size,
        frame_indices=tuple(range(len(frames))),
        frame_times_s=tuple(position / fps for position in range(len(frames))),
        second_per_grid=config.vision.temporal_patch_size / fps,
        notes=tuple(notes),
        decode_s=decode_s,
    )


# --- what both end in ------------------------------------------------------------------------------------------------


def _medium(
    kind: Literal["image", "video"],
    index: int,
    frames: Tensor,
    config: ModelConfig,
    *,
    source: str,
    sha256: str,
    original_size: tuple[int, int],
    orientation: int = 1,
    frame_indices: tuple[int, ...] = (),
    frame_times_s: tuple[float, ...] = (),
    second_per_grid: float = 0.0,
    notes: tuple[str, ...] = (),
    decode_s: float,
) -> Medium:
    """The medium of model-size frames [F, 3, H, W] uint8, with its receipt and key."""
    vision = config.vision
    count, _, height, width = frames.shape
    grid = Grid(-(-count // vision.temporal_patch_size), height // vision.patch_size, width // vision.patch_size)
    key = hashlib.sha256(f"{kind} {tuple(frames.shape)} ".encode() + struct.pack("<f", second_per_grid))
    key.update(frames.numpy().tobytes())
    receipt = MediaReceipt(
        kind=kind,
        index=index,
        source=source,
        sha256=sha256,
        original_size=original_size,
        model_size=(width, height),
        grid=grid,
        num_tokens=grid.num_tokens(vision.spatial_merge_size),
        orientation=orientation,
        frame_indices=frame_indices,
        frame_times_s=frame_times_s,
        second_per_grid=second_per_grid,
        notes=notes,
    )
    return Medium(frames, receipt, key.digest(), decode_s)
