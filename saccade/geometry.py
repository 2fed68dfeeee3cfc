"""Where things are: sizes, patch grids, window order, token counts, three-axis positions, and the way back to the picture.

Pure functions of integers (section numbers refer to the Qwen2.5-VL model description: size rule 5.1, frames 6, tower order 8, ids 9).
Knows no weights, no files and no pixels' values. Letters: t, h, w are a grid's sides in patches (time, height, width).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.base.errors import MediaError, OptionError, PromptError

MAX_ASPECT_RATIO = 200


@dataclass(frozen=True)
class Grid:
    """A medium cut into patches: t time slices of h x w patches each."""

    t: int
    h: int
    w: int

    @property
    def num_patches(self) -> int:
        return self.t * self.h * self.w

    def num_tokens(self, merge_size: int) -> int:
        """Language-model tokens: one per merge_size x merge_size patches."""
        return self.num_patches // merge_size**2


# --- sizes -----------------------------------------------------------------------------------------------------------


def fit_size(
    height: int,
    width: int,
    min_pixels: int,
    max_pixels: int,
    factor: int,
    *,
    lift_sides: bool = False,
    what: str = "picture",
) -> tuple[int, int]:
    """The size (height, width) a picture is resized to: multiples of `factor`, area within the limits, aspect ratio kept.

    `lift_sides` raises each side to `factor` before the area tests (the rule of qwen-vl-utils, used for video frames).
    Raises MediaError above an aspect ratio of 200 (exactly 200 passes), OptionError for impossible limits; `what` it speaks of.
    """
    if min_pixels > max_pixels:
        raise OptionError(
            f"min_pixels {min_pixels} is larger than max_pixels {max_pixels}; lower one or raise the other"
        )
    if height < 1 or width < 1:
        raise MediaError(f"{what} of {width} x {height} pixels has no area")
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise MediaError(f"{what} of {width} x {height} pixels: aspect ratio over {MAX_ASPECT_RATIO}; crop or pad it")
    # Python's round: halves go to the even multiple (70 px -> 56), as in training.
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if lift_sides:
        new_height, new_width = max(factor, new_height), max(factor, new_width)
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    if new_height == 0 or new_width == 0:
        raise OptionError(
            f"min_pixels {min_pixels} leaves a picture of {width} x {height} without area; use at least {factor * factor}"
        )
    return new_height, new_width


# --- the vision tower ------------------------------------------------------------------------------------------------


def patch_coordinates(grid: Grid, merge_size: int) -> Tensor:
    """Row and column of every patch in block order (the rows of a merged unit stand together). Returns [P, 2] int64."""
    rows = torch.arange(grid.h).view(grid.h // merge_size, 1, merge_size, 1)
    columns = torch.arange(grid.w).view(1, grid.w // merge_size, 1, merge_size)
    shape = (grid.h // merge_size, grid.w // merge_size, merge_size, merge_size)
    coordinates = torch.stack([rows.expand(shape), columns.expand(shape)], dim=-1).reshape(-1, 2)
    return coordinates.repeat(grid.t, 1)


def window_order(grids: Sequence[Grid], merge_size: int, window_units: int) -> tuple[Tensor, list[int]]:
    """The order in which the tower sees merged units, and the windows' lengths.

    Each time slice's unit grid is split into window_units x window_units windows from the top left; edge windows are smaller.
    Returns (order [U] int64: order[i] is the unit that stands at i, lengths in patches of the windows; none is zero).
    """
    orders: list[Tensor] = []
    lengths: list[int] = []
    offset = 0
    for grid in grids:
        rows, columns = grid.h // merge_size, grid.w // merge_size
        units = torch.arange(offset, offset + grid.t * rows * columns).view(grid.t, rows, columns)
        for time_slice in units:
            for band in time_slice.split(window_units, dim=0):
                for window in band.split(window_units, dim=1):
                    orders.append(window.reshape(-1))
                    lengths.append(window.numel() * merge_size**2)
        offset += units.numel()
    return (torch.cat(orders) if orders else torch.empty(0, dtype=torch.int64)), lengths


def slice_lengths(grids: Iterable[Grid]) -> list[int]:
    """Lengths in patches of the time slices: what a full-attention block of the tower attends within."""
    return [grid.h * grid.w for grid in grids for _ in range(grid.t)]


# --- positions of tokens ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """A run of placeholder tokens: where it starts in the prompt, its patch grid, and its seconds per time slice (0: a picture)."""

    start: int
    grid: Grid
    second_per_grid: float = 0.0


def token_positions(
    num_tokens: int, spans: Sequence[Span], merge_size: int, tokens_per_second: float
) -> tuple[Tensor, int]:
    """Three-axis rotary positions (time, height, width) of a prompt, by the rule used in training.

    A text token advances all axes by one. A medium's token (k, i, j) stands at s + (T_k, i, j) with
    T_k = trunc(k * second_per_grid * tokens_per_second), in float32 and in that order; text resumes one past the largest.
    Returns (positions [3, T] int64, the position of the next token). Raises PromptError if spans overlap or overrun.
    """
    pieces: list[Tensor] = []
    end, position = 0, 0
    for span in spans:
        length = span.grid.num_tokens(merge_size)
        if span.start < end or span.start + length > num_tokens:
            raise PromptError(
                f"media tokens {span.start}..{span.start + length} overlap others or overrun the prompt of {num_tokens} tokens"
            )
        pieces.append(torch.arange(position, position + span.start - end).expand(3, -1))
        position += span.start - end
        rows, columns = span.grid.h // merge_size, span.grid.w // merge_size
        seconds = torch.tensor(span.second_per_grid, dtype=torch.float32)
        times = (torch.arange(span.grid.t) * seconds * tokens_per_second).long()
        shape = (span.grid.t, rows, columns)
        medium = torch.stack(
            [
                times.view(-1, 1, 1).expand(shape),
                torch.arange(rows).view(1, -1, 1).expand(shape),
                torch.arange(columns).view(1, 1, -1).expand(shape),
            ]
        ).reshape(3, -1)
        pieces.append(medium + position)
        position += int(medium.max()) + 1
        end = span.start + length
    pieces.append(torch.arange(position, position + num_tokens - end).expand(3, -1))
    return torch.cat(pieces, dim=1), position + num_tokens - end


# --- video frames ----------------------------------------------------------------------------------------------------


def num_frames_to_sample(
    num_frames: int,
    frame_rate: float,
    *,
    fps: float | None = None,
    nframes: int | None = None,
    min_frames: int | None = None,
    max_frames: int | None = None,
    round_to_even: bool = False,
) -> int:
    """How many of a video's frames are looked at: an even number (section 6).

    `fps` and `nframes` exclude each other; the default is 2 frames per second, at least 4 and at most 768.
    `round_to_even` is the older rounding (qwen-vl-utils up to 0.0.8, PaddleMIX): halves to the even pair instead of down.
    Raises OptionError when both are given, MediaError when the result is not within 2..num_frames.
    """
    if fps is not None and nframes is not None:
        raise OptionError(f"fps {fps} and num_frames {nframes} exclude each other; give one")
    if nframes is not None:
        count = round(nframes / 2) * 2
    else:
        lowest = math.ceil((4 if min_frames is None else min_frames) / 2) * 2
        highest = (min(768, num_frames) if max_frames is None else max_frames) // 2 * 2
        wanted = num_frames / frame_rate * (2.0 if fps is None else fps)
        if round_to_even:
            count = round(min(max(wanted, lowest), highest) / 2) * 2
        else:
            count = math.floor(min(max(wanted, lowest), highest, num_frames) / 2) * 2
    if not 2 <= count <= num_frames:
        raise MediaError(f"video of {num_frames} frames: {count} frames asked for; choose 2 to {num_frames}")
    return count


def spread_frames(num_frames: int, count: int) -> list[int]:
    """Indices of `count` frames spread evenly over 0..num_frames-1, both ends included (float32 linspace, halves to even)."""
    return torch.linspace(0, num_frames - 1, count).round().long().tolist()


def frame_pixel_limits(
    count: int, factor: int, min_pixels: int | None, max_pixels: int | None, total_pixels: int | None
) -> tuple[int, int]:
    """Smallest and largest area of one of `count` sampled frames, so that the clip stays under `total_pixels` (section 6)."""
    unit = factor * factor
    lowest = 128 * unit if min_pixels is None else min_pixels
    total = 128_000 * unit * 0.9 if total_pixels is None else total_pixels
    cap = max(min(768 * unit, total / count * 2), int(lowest * 1.05))
    return lowest, int(cap if max_pixels is None else min(max_pixels, cap))


# --- the way back ----------------------------------------------------------------------------------------------------

# EXIF orientation -> how a point of the upright picture (as fractions x, y) reads in the stored raster.
_STORED = {
    1: lambda x, y: (x, y),
    2: lambda x, y: (1 - x, y),
    3: lambda x, y: (1 - x, 1 - y),
    4: lambda x, y: (x, 1 - y),
    5: lambda x, y: (y, x),
    6: lambda x, y: (y, 1 - x),
    7: lambda x, y: (1 - y, 1 - x),
    8: lambda x, y: (1 - y, x),
}


@dataclass(frozen=True)
class PixelMap:
    """From the pixels the model speaks of to those of the picture it was shown. Sizes are (width, height).

    `original_size` is the upright picture (EXIF orientation applied); `to_stored` goes on to the raster as it lies in the file.
    """

    model_size: tuple[int, int]
    original_size: tuple[int, int]
    orientation: int = 1

    def to_original(self, x: float, y: float) -> tuple[float, float]:
        """A point in the upright original, clipped to the picture."""
        width, height = self.original_size
        return (
            min(max(x * width / self.model_size[0], 0.0), float(width)),
            min(max(y * height / self.model_size[1], 0.0), float(height)),
        )

    def to_stored(self, x: float, y: float) -> tuple[float, float]:
        """A point of the upright original in the raster as stored, before orientation was applied."""
        width, height = self.original_size
        u, v = _STORED[self.orientation](x / width, y / height)
        if self.orientation >= 5:
            width, height = height, width
        return u * width, v * height
