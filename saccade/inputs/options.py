"""What may be read, and how one medium is sized and sampled, each declared once with its unit and help line.

Knows options and the names callers use for them; knows no media, and imports nothing heavy, so that a command line can be
built from it at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from saccade.base.errors import OptionError
from saccade.base.options import check_values, option, suggestion


@dataclass(frozen=True)
class MediaLimits:
    """What may be read at all. Every limit is checked before decoding; an excess is a MediaError."""

    max_image_bytes: int = option(64 << 20, "largest encoded picture, in bytes", low=1)
    max_video_bytes: int = option(2 << 30, "largest video file, in bytes", low=1)
    max_pixels_per_image: int = option(
        178_956_970, "largest picture, in pixels; Pillow reads no more", low=1, high=178_956_970
    )
    max_pixels_per_frame: int = option(36_000_000, "largest video frame, in pixels", low=1)
    max_sampled_frames: int = option(768, "most frames taken from a video", low=2)
    max_video_frames: int = option(1_000_000, "most frames in a video file", low=2)
    max_video_pixels: int = option(10**12, "most pixels in all frames of a video file", low=1)
    max_video_duration_s: float = option(4 * 3600.0, "longest video, in seconds", low=0)
    allow_local_paths: bool = option(True, "read files of this machine")

    def __post_init__(self) -> None:
        check_values(self)


@dataclass(frozen=True)
class MediaOptions:
    """How one medium is sized and sampled; None leaves it to the checkpoint or the published rule.

    `min_pixels`/`max_pixels` replace the checkpoint's limits (they do not stack). `fps` and `num_frames` exclude each other.
    Raises OptionError for values out of range.
    """

    min_pixels: int | None = option(None, "smallest area after resizing, in pixels", low=1)
    max_pixels: int | None = option(None, "largest area after resizing, in pixels", low=1)
    total_pixels: int | None = option(None, "largest area of all frames of a video together, in pixels", low=1)
    resized_height: int | None = option(None, "height to aim for, in pixels; goes with the width", low=1)
    resized_width: int | None = option(None, "width to aim for, in pixels; goes with the height", low=1)
    fps: float | None = option(None, "frames looked at per second of video (2)", low=1e-6, high=1e6)
    num_frames: int | None = option(None, "frames looked at, in place of a rate", low=2)
    min_frames: int | None = option(None, "fewest frames looked at (4)", low=1)
    max_frames: int | None = option(None, "most frames looked at (768)", low=2)
    start_s: float | None = option(None, "where the clip starts in the video, in seconds", low=0, high=1e9)
    end_s: float | None = option(None, "where the clip ends in the video, in seconds", low=0, high=1e9)
    frame_rounding: Literal["down", "nearest"] | None = option(
        None, "how frame counts become even: down (the default), or nearest, as older tools did"
    )

    def __post_init__(self) -> None:
        check_values(self)
        if self.start_s is not None and self.end_s is not None and self.start_s >= self.end_s:
            raise OptionError(f"start_s {self.start_s:g} is not before end_s {self.end_s:g}")
        if self.fps is not None and self.num_frames is not None:
            raise OptionError(f"fps {self.fps:g} and num_frames {self.num_frames} exclude each other; give one")
        if (self.resized_height is None) != (self.resized_width is None):
            raise OptionError("resized_height and resized_width belong together; give both or neither")
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise OptionError(f"min_pixels {self.min_pixels} is larger than max_pixels {self.max_pixels}")
        if self.min_frames is not None and self.max_frames is not None and self.min_frames > self.max_frames:
            raise OptionError(f"min_frames {self.min_frames} is larger than max_frames {self.max_frames}")

    def overridden_by(self, values: Mapping[str, object], kind: Literal["image", "video"]) -> MediaOptions:
        """These options with those of a message part on top, in any of their common spellings.

        A part's `fps` displaces a default `num_frames` and the other way round. Raises OptionError for a name that is
        unknown (naming the nearest known one) or does not apply to the kind of medium.
        """
        changes: dict[str, Any] = {}
        for spelling, value in values.items():
            name = _SPELLINGS.get(spelling, spelling)
            if name not in _NAMES:
                raise OptionError(f"{kind} part has an unknown key {spelling!r}{suggestion(str(spelling), _KNOWN)}")
            if kind == "image" and name not in _IMAGE_NAMES:
                raise OptionError(f"{spelling!r} applies to videos, not to a picture; remove it")
            if value is None or name == "raw_fps":  # tells where a list of frames came from; nothing follows from it
                continue
            if name in changes:
                raise OptionError(f"{spelling!r} says {name} a second time; give it once")
            changes[name] = value if name == "frame_rounding" else _number(spelling, value, whole=name in _COUNTS)
        base = self
        if "fps" in changes:
            base = replace(base, num_frames=None)
        elif "num_frames" in changes:
            base = replace(base, fps=None)
        return replace(base, **changes)


_SPELLINGS = {
    "nframes": "num_frames",
    "video_start": "start_s",
    "start": "start_s",
    "video_end": "end_s",
    "end": "end_s",
    "sample_fps": "fps",
}
_NAMES = [*(field.name for field in fields(MediaOptions)), "raw_fps"]
_KNOWN = [*_NAMES, *_SPELLINGS, "detail"]
_IMAGE_NAMES = ("min_pixels", "max_pixels", "resized_height", "resized_width")
_COUNTS = (*_IMAGE_NAMES, "total_pixels", "num_frames", "min_frames", "max_frames")


def _number(name: str, value: object, *, whole: bool) -> int | float:
    """A number as JSON or as text ("1", as some callers write rates). Raises OptionError for anything else."""
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        number = float(value)
        if not math.isfinite(number) or (whole and number != int(number)):
            raise ValueError
    except ValueError:
        raise OptionError(f"{name} is {value!r}; give a {'whole ' if whole else ''}number") from None
    return int(number) if whole else number
