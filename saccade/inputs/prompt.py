"""What the engine is given: a prompt, its media, and the receipt of what was done to each medium."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from saccade.geometry import Grid, PixelMap, Span


@dataclass(frozen=True)
class MediaReceipt:
    """What happened to one picture or video between the caller's hands and the model. Sizes are (width, height) in pixels."""

    kind: Literal["image", "video"]
    index: int  # among the pictures, or among the videos, of the conversation
    source: str  # a short label: a path, "bytes", "data URI", "PIL image", ...; never the content
    sha256: str  # of the encoded bytes when there were any, else of the raw pixels
    original_size: tuple[int, int]  # upright
    model_size: tuple[int, int]
    grid: Grid
    num_tokens: int
    orientation: int = 1  # EXIF orientation that was applied
    frame_indices: tuple[int, ...] = ()  # videos: which frames of the file
    frame_times_s: tuple[float, ...] = ()  # videos: their true times in the original video
    second_per_grid: float = 0.0  # videos: seconds between time slices, as the model is told
    notes: tuple[str, ...] = ()  # e.g. "16-bit grey scaled to 8 bits"

    @property
    def pixel_map(self) -> PixelMap:
        return PixelMap(self.model_size, self.original_size, self.orientation)


@dataclass(frozen=True)
class Medium:
    """A picture or video as the tower will see it, before normalisation.

    `frames`: [F, 3, H, W] uint8 at the model's size; F is 1 for a picture, even for a video. Both resize rules end in whole
    grey levels, so nothing is lost and a prepared medium costs a byte per value.
    `key`: digest of frames, shape, kind and seconds per grid; equal keys mean equal features and equal positions.
    `decode_s`: what reading and decoding took, resizing left out.
    """

    frames: Tensor
    receipt: MediaReceipt
    key: bytes
    decode_s: float = 0.0


@dataclass(frozen=True)
class Prompt:
    """Token ids with media placeholders widened, the media in order of appearance, and everyone's position."""

    token_ids: tuple[int, ...]
    positions: Tensor  # [3, T] int64
    next_position: int  # of the first generated token, on all axes
    media: tuple[Medium, ...] = ()
    spans: tuple[Span, ...] = field(default=())  # one per medium
    prepare_s: float = 0.0  # what all of this took, the media's decode_s included

    def __len__(self) -> int:
        return len(self.token_ids)

    def is_visual(self) -> Tensor:
        """[T] bool: the tokens that stand for pictures and videos."""
        found = torch.zeros(len(self), dtype=torch.bool)
        for span, medium in zip(self.spans, self.media, strict=True):
            found[span.start : span.start + medium.receipt.num_tokens] = True
        return found
