"""Videos: which frames, at what size and time, from which containers, and what is refused."""

from __future__ import annotations

import base64
import io
import math
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from conftest import grey_of

from saccade.base.errors import MediaError
from saccade.checkpoints.config import ModelConfig
from saccade.geometry import Grid, num_frames_to_sample, spread_frames
from saccade.inputs import video
from saccade.inputs.media import MediaLimits, MediaOptions
from saccade.inputs.pixels import prepare_video
from saccade.inputs.video import choose_frames, timeline_of

Make = Callable[..., bytes]
LIMITS = MediaLimits()


def shown(frames: torch.Tensor) -> list[float]:
    """The mean level of each frame."""
    return [float(frame.float().mean()) for frame in frames]


def assert_frames_are(medium: Any, indices: list[int]) -> None:
    for level, index in zip(shown(medium.frames), indices, strict=True):
        assert level == pytest.approx(grey_of(index), abs=8), f"not frame {index}"


# --- the published video ---------------------------------------------------------------------------------------------

RED_PANDA_TIMES = np.arange(895) / (895000 / 29833)


@pytest.mark.parametrize(
    ("options", "num_frames", "second_per_grid"),
    [
        ({}, 58, 1.02872),
        ({"fps": 1}, 28, 2.13093),
        ({"fps": 1, "frame_rounding": "nearest"}, 30, 1.98887),
        ({"fps": 4}, 118, 0.50564),
        ({"num_frames": 16}, 16, 3.72913),
    ],
)
def test_the_published_frame_counts(options: dict[str, Any], num_frames: int, second_per_grid: float) -> None:
    timeline = timeline_of(RED_PANDA_TIMES, 895000 / 29833)
    clip = choose_frames(timeline, MediaOptions(**options), (360, 640), LIMITS)
    assert len(clip.indices) == num_frames
    assert clip.second_per_grid == pytest.approx(second_per_grid, abs=5e-6)
    assert list(clip.indices) == spread_frames(895, num_frames)


def test_28_and_30_frames_of_the_published_video_are_these() -> None:
    timeline = timeline_of(RED_PANDA_TIMES, 895000 / 29833)
    today = choose_frames(timeline, MediaOptions(fps=1), (360, 640), LIMITS).indices
    older = choose_frames(timeline, MediaOptions(fps=1, frame_rounding="nearest"), (360, 640), LIMITS).indices
    assert (today[:4], today[-2:]) == ((0, 33, 66, 99), (861, 894))
    assert (older[:4], older[-2:]) == ((0, 31, 62, 92), (863, 894))


@pytest.mark.parametrize(
    ("options", "grid", "num_tokens"),
    [
        ({"fps": 1, "max_pixels": 360 * 420}, Grid(14, 36, 20), 2520),
        ({"fps": 1, "max_pixels": 360 * 420, "frame_rounding": "nearest"}, Grid(15, 36, 20), 2700),
        ({"num_frames": 16}, Grid(8, 46, 26), 2392),
    ],
)
def test_the_published_video_has_the_published_tokens(
    options: dict[str, Any], grid: Grid, num_tokens: int, published_media: Path, config: ModelConfig
) -> None:
    receipt = prepare_video(published_media / "red-panda.mp4", MediaOptions(**options), config, LIMITS, 0).receipt
    assert (receipt.grid, receipt.num_tokens, receipt.original_size) == (grid, num_tokens, (360, 640))


def test_frames_equal_a_plain_decode_resized_as_the_reference_does(published_media: Path, config: ModelConfig) -> None:
    options = MediaOptions(num_frames=4, max_pixels=100_352)
    medium = prepare_video(published_media / "red-panda.mp4", options, config, LIMITS, 0)
    width, height = medium.receipt.model_size
    with av.open(str(published_media / "red-panda.mp4")) as container:
        decoded = [
            frame.to_ndarray(format="rgb24")
            for index, frame in enumerate(container.decode(video=0))
            if index in medium.receipt.frame_indices
        ]
    clip = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).float()
    resized = torch.nn.functional.interpolate(clip, (height, width), mode="bicubic", antialias=True)
    assert torch.equal(medium.frames, resized.clamp(0, 255).round().to(torch.uint8))


# --- which frames ----------------------------------------------------------------------------------------------------


def test_constant_rates_follow_the_index_rule_whatever_the_clock() -> None:
    for rate, count in ((24000 / 1001, 500), (29.97, 301), (12.5, 77), (60, 1000)):
        for tick in (1e-3, 1 / 90000, 1 / 600):  # timestamps are whole ticks
            times = np.round(np.arange(count) / rate / tick) * tick
            timeline = timeline_of(times + 1.4, rate)
            assert timeline.is_constant
            for fps in (0.7, 1, 2, 5):
                clip = choose_frames(timeline, MediaOptions(fps=fps), (8, 8), LIMITS)
                num_frames = num_frames_to_sample(count, rate, fps=fps)
                assert list(clip.indices) == spread_frames(count, num_frames)
                assert clip.second_per_grid == pytest.approx(2 * count / (num_frames * rate), rel=1e-12)


def test_variable_rates_are_sampled_evenly_in_time() -> None:
    generator = np.random.default_rng(1)
    times = np.sort(np.concatenate([generator.uniform(0, 4, 200), generator.uniform(4, 60, 40), [0.0, 60.0]]))
    clip = choose_frames(timeline_of(times, None), MediaOptions(num_frames=24), (8, 8), LIMITS)
    for target, time_s in zip(np.linspace(0, 60, 24), clip.times_s, strict=True):
        assert abs(time_s - target) == pytest.approx(np.abs(times - target).min())
    assert clip.second_per_grid == pytest.approx(2 * 60 * 242 / 241 / 24)


def test_the_rate_of_the_timestamps_wins_over_a_header_that_contradicts_them() -> None:
    assert timeline_of(np.arange(100) / 25, 1000.0).frame_rate == pytest.approx(25)
    assert timeline_of(np.arange(100) / 25, 25.01).frame_rate == 25.01


def test_a_clip_is_cut_by_time_and_its_times_are_the_videos() -> None:
    timeline = timeline_of(np.arange(300) / 30, 30.0)
    clip = choose_frames(timeline, MediaOptions(start_s=2, end_s=5, num_frames=4), (8, 8), LIMITS)
    assert (clip.indices[0], clip.indices[-1]) == (60, 150)
    assert clip.times_s[0] == pytest.approx(2)
    assert clip.second_per_grid == pytest.approx(2 * 91 / 30 / 4)
    uneven = timeline_of(np.arange(300) ** 2 / 9000, None)
    clip = choose_frames(uneven, MediaOptions(start_s=2, end_s=5, num_frames=4), (8, 8), LIMITS)
    assert all(2 <= time_s <= 5 for time_s in clip.times_s)


@pytest.mark.parametrize(
    "options",
    [{"start_s": 100}, {"start_s": 9.99}, {"end_s": 0.01}, {"num_frames": 302}, {"fps": 60, "max_frames": 2000}],
)
def test_clips_without_frames_and_too_many_frames_are_refused(options: dict[str, Any]) -> None:
    timeline = timeline_of(np.arange(300) / 30, 30.0)
    with pytest.raises(MediaError):
        choose_frames(timeline, MediaOptions(**options), (8, 8), MediaLimits(max_sampled_frames=200))


# --- containers ------------------------------------------------------------------------------------------------------

FILES: dict[str, dict[str, Any]] = {
    "mp4": {},
    "mp4 with B-frames": {"codec": "libx264", "b_frames": 3},
    "matroska": {"container": "matroska", "codec": "libx264", "b_frames": 2},
    "webm, VP8": {"container": "webm", "codec": "libvpx"},
    "webm, VP9": {"container": "webm", "codec": "libvpx-vp9"},
    "avi": {"container": "avi"},
    "avi with B-frames": {"container": "avi", "b_frames": 2},
    "transport stream": {"container": "mpegts", "codec": "libx264", "b_frames": 2},
    "gif": {"container": "gif", "codec": "gif"},
}


@pytest.mark.parametrize("name", FILES)
def test_the_right_frames_come_out_of_every_container(name: str, make_video: Make, config: ModelConfig) -> None:
    data = make_video([40 * index for index in range(100)], **FILES[name])
    medium = prepare_video(data, MediaOptions(num_frames=8), config, LIMITS, 0)
    indices = spread_frames(100, 8)
    assert list(medium.receipt.frame_indices) == indices
    assert medium.receipt.frame_times_s == pytest.approx([0.04 * index for index in indices], abs=0.006)
    assert_frames_are(medium, indices)


def test_bytes_paths_streams_and_data_uris_are_one_video(make_video: Make, config: ModelConfig, tmp_path: Path) -> None:
    data = make_video([40 * index for index in range(20)])
    path = tmp_path / "concat:a.mp4"  # no protocol, however it is spelled
    path.write_bytes(data)
    uri = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
    media = [
        prepare_video(source, MediaOptions(), config, LIMITS, 0)
        for source in (data, path, str(path), io.BytesIO(data), uri)
    ]
    assert len({medium.key for medium in media}) == 1
    assert len({medium.receipt.sha256 for medium in media}) == 1


def test_sparse_frames_of_a_long_video_are_reached_by_jumps(
    make_video: Make, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_video([40 * index for index in range(600)], codec="libx264", b_frames=2, gop=25)
    num_decoded = 0
    decoded = video._Video._decoded

    def counted(self: video._Video) -> Iterator[av.VideoFrame]:
        nonlocal num_decoded
        for frame in decoded(self):
            num_decoded += 1
            yield frame

    monkeypatch.setattr(video._Video, "_decoded", counted)
    medium = prepare_video(data, MediaOptions(num_frames=4, start_s=12), config, LIMITS, 0)
    assert num_decoded < 150  # of 600
    indices = list(medium.receipt.frame_indices)
    assert indices[0] >= 299
    monkeypatch.setattr(video, "_SEEKABLE", ())
    assert prepare_video(data, MediaOptions(num_frames=4, start_s=12), config, LIMITS, 0).key == medium.key
    assert_frames_are(medium, indices)


def test_a_variable_rate_file_is_sampled_by_its_timestamps(make_video: Make, config: ModelConfig) -> None:
    times_ms = [40 * index for index in range(50)] + [2000 + 500 * index for index in range(10)]
    medium = prepare_video(make_video(times_ms), MediaOptions(num_frames=10), config, LIMITS, 0)
    targets = np.linspace(0, times_ms[-1] / 1000, 10)
    times_s = np.array(times_ms) / 1000
    expected = [int(np.abs(times_s - target).argmin()) for target in targets]
    assert list(medium.receipt.frame_indices) == expected
    assert medium.receipt.frame_times_s == pytest.approx(times_s[expected], abs=0.001)
    assert_frames_are(medium, expected)


@pytest.mark.skipif(not hasattr(av.VideoStream, "set_display_rotation"), reason="this PyAV cannot write rotations")
@pytest.mark.parametrize(("rotation", "orientation"), [(0, 1), (-90, 6), (180, 3), (90, 8)])
def test_phone_videos_are_turned_upright(
    rotation: int, orientation: int, make_video: Make, config: ModelConfig
) -> None:
    stored = np.zeros((64, 96, 3), np.uint8)
    stored[:32, :48] = 255  # white in the stored top left
    data = make_video([40 * index for index in range(8)], size=(96, 64), rotation=rotation, pictures=[stored] * 8)
    medium = prepare_video(data, MediaOptions(num_frames=2), config, LIMITS, 0)
    receipt = medium.receipt
    assert receipt.orientation == orientation
    assert receipt.original_size == ((64, 96) if orientation in (6, 8) else (96, 64))
    frame = medium.frames[0].float().mean(0)
    height, width = frame.shape
    corners = [
        frame[: height // 3, : width // 3],
        frame[: height // 3, -width // 3 :],
        frame[-height // 3 :, -width // 3 :],
    ]
    white = {1: 0, 6: 1, 3: 2}.get(orientation)
    if white is not None:
        assert corners[white].mean() > 200
    else:
        assert frame[-height // 3 :, : width // 3].mean() > 200


def test_a_transparent_animation_is_shown_on_white(config: ModelConfig) -> None:
    from PIL import Image

    frames = [Image.new("RGBA", (64, 64), (200, 0, 0, 0)) for _ in range(4)]
    for index, frame in enumerate(frames):
        frame.paste((0, 0, 255, 255), (0, 0, 8 + index, 8))
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=100, disposal=2)
    medium = prepare_video(file.getvalue(), MediaOptions(num_frames=2), config, LIMITS, 0)
    assert (medium.frames[:, :, -8:, -8:] == 255).all()


# --- limits and damage -----------------------------------------------------------------------------------------------


def test_each_limit_is_checked_before_decoding(
    make_video: Make, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_video([40 * index for index in range(50)])

    def no_decoding(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(video._Video, "_decoded", no_decoding)
    for limits in (
        MediaLimits(max_video_bytes=len(data) - 1),
        MediaLimits(max_pixels_per_frame=64 * 48 - 1),
        MediaLimits(max_video_duration_s=1.5),
        MediaLimits(max_video_frames=49),
        MediaLimits(max_video_pixels=64 * 48 * 49),
        MediaLimits(max_sampled_frames=2),
    ):
        with pytest.raises(MediaError, match="limit"):
            prepare_video(data, MediaOptions(), config, limits, 0)
    with pytest.raises(MediaError, match="tokens"):
        prepare_video(data, MediaOptions(min_pixels=10**9, max_pixels=10**9 + 1), config, MediaLimits(), 0)


def test_memory_holds_the_sampled_frames_only(make_video: Make, config: ModelConfig) -> None:
    data = make_video([40 * index for index in range(300)], size=(320, 240))
    prepare_video(data, MediaOptions(num_frames=2), config, LIMITS, 0)
    tracemalloc.start()
    try:
        medium = prepare_video(data, MediaOptions(num_frames=4), config, LIMITS, 0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * 320 * 240 * 3 + medium.frames.numel() + len(data) * 3 + (2 << 20)


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile /etc/hostname\n",
        "<MPD xmlns='urn:mpeg:dash:schema:mpd:2011'></MPD>",
        "RIFF",
        "not a video",
    ],
)
def test_playlists_and_scripts_are_no_videos(text: str, config: ModelConfig, tmp_path: Path) -> None:
    path = tmp_path / "clip.m3u8"
    path.write_text(text)
    for source in (path, text.encode()):
        with pytest.raises(MediaError):
            prepare_video(source, MediaOptions(), config, LIMITS, 0)


@pytest.mark.parametrize("name", ["mp4", "matroska", "webm, VP9", "avi"])
def test_a_truncated_video_is_refused(name: str, make_video: Make, config: ModelConfig) -> None:
    data = make_video([40 * index for index in range(50)], **FILES[name])
    for share in (0.01, 0.3, 0.7, 0.95):
        with pytest.raises(MediaError):
            prepare_video(data[: int(len(data) * share)], MediaOptions(), config, LIMITS, 0)


def test_a_truncated_video_with_its_index_in_front_is_refused(published_media: Path, config: ModelConfig) -> None:
    data = (published_media / "red-panda.mp4").read_bytes()
    with pytest.raises(MediaError, match="cut short: 1800000 of 1867237 bytes"):
        prepare_video(data[:1_800_000], MediaOptions(), config, LIMITS, 0)


def test_a_single_frame_is_pointed_to_pictures(make_video: Make, config: ModelConfig) -> None:
    with pytest.raises(MediaError, match="picture"):
        prepare_video(make_video([0]), MediaOptions(), config, LIMITS, 0)


def test_sound_alone_is_no_video(config: ModelConfig) -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 44100, 0, Fraction(1, 44100)
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    with pytest.raises(MediaError, match="no video"):
        prepare_video(file.getvalue(), MediaOptions(), config, LIMITS, 0)


def test_seconds_reach_the_receipt_as_floats(make_video: Make, config: ModelConfig) -> None:
    receipt = prepare_video(
        make_video([100 * index for index in range(33)]), MediaOptions(fps=3), config, LIMITS, 0
    ).receipt
    assert receipt.second_per_grid == pytest.approx(2 * 3.3 / len(receipt.frame_indices), rel=0.04)
    assert not math.isclose(receipt.second_per_grid, round(receipt.second_per_grid))


def test_without_pyav_pictures_and_frames_are_served_and_a_video_says_what_is_missing() -> None:
    """And without psutil: a machine that was lent with a card has what the card needs, and little else."""
    program = """
import sys
sys.modules["av"] = sys.modules["psutil"] = None
import numpy as np
import saccade, saccade.bench.measure
from saccade.inputs.media import MediaLimits, MediaOptions
from saccade.inputs.video import sample_frames
try:
    sample_frames(bytes(64), MediaOptions(), MediaLimits(), None)
except saccade.SaccadeError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert "pip install av" in done.stdout, done.stderr
