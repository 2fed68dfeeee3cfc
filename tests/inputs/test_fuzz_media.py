"""Damaged media end in a valid result or a MediaError: never another exception, a crash, a hang or memory without bound.

`SACCADE_FUZZ_ROUNDS=50 pytest tests/inputs/test_fuzz_media.py` tries fifty times as many files, with other seeds.
"""

from __future__ import annotations

import faulthandler
import io
import os
import random
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from PIL import Image

from saccade.base.errors import MediaError
from saccade.checkpoints.config import ModelConfig
from saccade.inputs.media import MediaLimits, MediaOptions, open_picture
from saccade.inputs.pixels import prepare_video

ROUNDS = int(os.environ.get("SACCADE_FUZZ_ROUNDS", "1"))
PICTURES_PER_FORMAT = 1000
VIDEOS_PER_FORMAT = 40
SLOWEST_S = 30.0  # of this process's own work: what takes longer hangs
MOST_MEMORY = 1 << 30  # bytes above what the process held before
LIMITS = MediaLimits(max_pixels_per_image=4_000_000, max_pixels_per_frame=1_000_000, max_video_frames=10_000)

if ROUNDS > 1:
    faulthandler.enable()


def damaged(data: bytes, others: list[bytes], generator: random.Random) -> bytes:
    """One damaged copy: flipped bits, wild bytes, a cut, a doubled or missing stretch, or another file's part."""
    out = bytearray(data)
    for _ in range(generator.choice((1, 1, 2, 5))):
        kind = generator.randrange(7)
        at = generator.randrange(min(len(out), generator.choice((64, 512, len(out)))) or 1)
        if kind == 0:
            out[at] ^= 1 << generator.randrange(8)
        elif kind == 1:
            out[at] = generator.choice((0, 1, 0x7F, 0x80, 0xFF, generator.randrange(256)))
        elif kind == 2:
            length = generator.choice((2, 4, 8))
            out[at : at + length] = generator.choice((b"\xff", b"\0", b"\x7f", b"\x80")) * length
        elif kind == 3:
            del out[max(at, 1) :]
        elif kind == 4:
            del out[at : at + generator.randrange(1, 64)]
        elif kind == 5:
            stretch = out[at : at + generator.randrange(1, 256)]
            out[at:at] = stretch * generator.choice((1, 2, 50))
        else:
            other = generator.choice(others)
            start = generator.randrange(len(other))
            out[at:at] = other[start : start + generator.randrange(1, 512)]
        if not out:
            return b"\0"
    return bytes(out)


@dataclass
class Watch:
    """How long one file took, and how far memory has grown."""

    before: int
    tried: int = 0
    accepted: int = 0

    def run(self, what: str, action: Callable[[], object]) -> None:
        started = time.process_time()
        self.tried += 1
        try:
            action()
            self.accepted += 1
        except MediaError:
            pass
        assert time.process_time() - started < SLOWEST_S, f"{what}: took too long"
        assert peak_memory() - self.before < MOST_MEMORY, f"{what}: took too much memory"


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.fixture
def watch() -> Watch:
    return Watch(peak_memory())


def small_pictures() -> dict[str, bytes]:
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    smooth = image.resize((48, 40), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    rgba = smooth.convert("RGBA")
    rgba.putalpha(100)
    wanted: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "jpeg": (smooth, "JPEG", {"exif": exif}),
        "progressive jpeg": (smooth, "JPEG", {"progressive": True}),
        "cmyk jpeg": (smooth.convert("CMYK"), "JPEG", {}),
        "png": (rgba, "PNG", {"exif": exif}),
        "palette png": (smooth.convert("P"), "PNG", {"transparency": 3}),
        "16-bit png": (Image.fromarray(generator.integers(0, 65536, (24, 32), dtype=np.uint16)), "PNG", {}),
        "animated png": (rgba, "PNG", {"save_all": True, "append_images": [rgba, rgba]}),
        "webp": (smooth, "WEBP", {"exif": exif}),
        "lossless webp": (rgba, "WEBP", {"lossless": True}),
        "gif": (smooth, "GIF", {"save_all": True, "append_images": [image], "transparency": 3}),
        "bmp": (smooth, "BMP", {}),
        "tiff": (smooth, "TIFF", {"exif": exif}),
        "lzw tiff": (rgba, "TIFF", {"compression": "tiff_lzw"}),
        "jpeg tiff": (smooth, "TIFF", {"compression": "jpeg"}),
        "fax tiff": (smooth.convert("1"), "TIFF", {"compression": "group4"}),
    }
    files = {}
    for name, (picture, format, options) in wanted.items():
        file = io.BytesIO()
        picture.save(file, format, **options)
        files[name] = file.getvalue()
    return files


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow speaks of damaged TIFF tags
@pytest.mark.parametrize("name", small_pictures())
def test_damaged_pictures(name: str, watch: Watch) -> None:
    files = small_pictures()
    others = list(files.values())
    for number in range(PICTURES_PER_FORMAT * ROUNDS):
        data = damaged(files[name], others, random.Random(f"{name} {number}"))
        watch.run(f"{name} {number}", lambda data=data: open_picture(data, LIMITS))
    assert 0 < watch.accepted < watch.tried


VIDEOS: dict[str, dict[str, Any]] = {
    "mp4, MPEG-4": {},
    "mp4, H.264": {"codec": "libx264", "b_frames": 2},
    "matroska, H.264": {"container": "matroska", "codec": "libx264"},
    "webm, VP8": {"container": "webm", "codec": "libvpx"},
    "webm, VP9": {"container": "webm", "codec": "libvpx-vp9"},
    "avi, MPEG-4": {"container": "avi", "rate": 25},
    "transport stream": {"container": "mpegts", "codec": "libx264"},
    "gif": {"container": "gif", "codec": "gif"},
}


@pytest.mark.parametrize("name", VIDEOS)
def test_damaged_videos(name: str, watch: Watch, make_video: Callable[..., bytes], config: ModelConfig) -> None:
    data = make_video([40 * index for index in range(30)], gop=6, **VIDEOS[name])
    others = [make_video([0, 40, 80]), data]
    options = MediaOptions(num_frames=4, max_pixels=20_000)
    for number in range(VIDEOS_PER_FORMAT * ROUNDS):
        broken = damaged(data, others, random.Random(f"{name} {number}"))
        watch.run(f"{name} {number}", lambda broken=broken: prepare_video(broken, options, config, LIMITS, 0))
    assert watch.accepted > 0
