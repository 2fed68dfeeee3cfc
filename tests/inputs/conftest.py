"""What the tests of inputs share: a model's numbers, a tokenizer, and a maker of small videos."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from saccade.checkpoints.config import GenerationConfig, ModelConfig, PreprocessingConfig, TextConfig, VisionConfig
from saccade.inputs.chat import ChatTokenizer
from saccade.inputs.options import MediaLimits, MediaOptions

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    return ModelConfig(
        vision=VisionConfig(hidden_size=128, out_hidden_size=256, tokens_per_second=2.0),
        text=TextConfig(1024, 256, 2, 4, 2, 64, 512, 1e-6, 1e6, (8, 12, 12), 128_000, False),
        preprocessing=PreprocessingConfig(),
        generation=GenerationConfig(eos_token_ids=(399,)),
        image_token_id=409,
        video_token_id=410,
        vision_start_token_id=406,
        vision_end_token_id=407,
        dtype="bfloat16",
    )


@pytest.fixture(scope="session")
def limits() -> MediaLimits:
    return MediaLimits()


@pytest.fixture(scope="session")
def defaults() -> MediaOptions:
    return MediaOptions()


@pytest.fixture(scope="session")
def tokenizer_folder() -> Path:
    return ROOT / "tests" / "data" / "tokenizer"


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path, config: ModelConfig) -> ChatTokenizer:
    return ChatTokenizer(tokenizer_folder, config)


@pytest.fixture(scope="session")
def published_media() -> Path:
    """The pictures and the video whose numbers the model's description quotes; they stand beside some checkouts."""
    folder = ROOT.parent / "shared" / "media"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: examples_image1.jpg and red-panda.mp4 of PaddleMIX's demo_images")
    return folder


def grey_of(index: int) -> int:
    """The grey level that marks frame `index` of a made video, far enough from its neighbours' to survive a codec."""
    return 20 + index * 37 % 211


@pytest.fixture(scope="session")
def make_video() -> Callable[..., bytes]:
    """make(times in ms, ...) -> an encoded video whose frame i is all `grey_of(i)`."""

    def make(
        times_ms: Sequence[int],
        *,
        size: tuple[int, int] = (64, 48),
        container: str = "mp4",
        codec: str = "mpeg4",
        gop: int = 12,
        b_frames: int = 0,
        rotation: int = 0,
        rate: int = 1000,
        pictures: Sequence[np.ndarray] | None = None,
    ) -> bytes:
        file = io.BytesIO()
        with av.open(file, "w", format=container) as output:
            stream = output.add_stream(codec, rate=rate)
            stream.width, stream.height = size
            stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
            stream.codec_context.time_base = Fraction(1, 1000)
            stream.codec_context.gop_size = gop
            stream.codec_context.max_b_frames = b_frames
            if rotation:
                stream.set_display_rotation(rotation)
            for index, time_ms in enumerate(times_ms):
                picture = (
                    np.full((size[1], size[0], 3), grey_of(index), np.uint8) if pictures is None else pictures[index]
                )
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = time_ms, Fraction(1, 1000)
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
        return file.getvalue()

    return make
