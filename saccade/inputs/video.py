"""Which frames of a video are looked at, and how they are decoded without keeping the others.

Knows containers, timestamps and the frame rules of section 6; knows no model sizes and no prompts. Files are hostile: only
listed containers are opened, always through a Python file object, so that no file can make the demuxer open another.
"""

from __future__ import annotations

import hashlib
import math
import struct
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, BinaryIO, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from saccade.base.errors import MediaError
from saccade.geometry import num_frames_to_sample, spread_frames
from saccade.inputs.media import Pixels, open_encoded, upright
from saccade.inputs.options import MediaLimits, MediaOptions

if TYPE_CHECKING:
    import av
    import av.container

T = TypeVar("T")

# Self-contained formats only: playlists (HLS, DASH, concat) would have the demuxer open what they name.
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,ogg,gif,asf"
_SEEKABLE = ("mov", "matroska")  # their indices name key frames exactly
_WORTH_A_SEEK = 16  # frames skipped
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"sidx", b"styp", b"uuid", b"mfra")
_MOST_BOXES = 100_000  # looked at; fragmented files have two per fragment
# The upper left of a display matrix (a, b, c, d) by sign -> the EXIF orientation that says the same.
_ORIENTATIONS = {
    (1, 0, 0, 1): 1,
    (-1, 0, 0, 1): 2,
    (-1, 0, 0, -1): 3,
    (1, 0, 0, -1): 4,
    (0, 1, 1, 0): 5,
    (0, 1, -1, 0): 6,
    (0, -1, -1, 0): 7,
    (0, -1, 1, 0): 8,
}


@dataclass(frozen=True)
class Timeline:
    """When the frames of a video are shown. `times_s`: [N] float64, ascending from 0; `frame_rate`: N / duration."""

    times_s: NDArray[np.float64]
    frame_rate: float

    @property
    def is_constant(self) -> bool:
        """Whether no frame is half an interval or more away from where a constant rate would put it."""
        regular = np.linspace(0, self.times_s[-1], len(self.times_s))
        interval = self.times_s[-1] / max(len(self.times_s) - 1, 1)
        return bool(np.abs(self.times_s - regular).max() < interval / 2)


def timeline_of(times_s: NDArray[np.float64], declared_rate: float | None) -> Timeline:
    """The timeline of N >= 1 timestamps in any order.

    The container's average rate counts, as it does in the reference, unless the timestamps contradict it by more than one
    frame and one per cent of the duration; then theirs does.
    """
    times_s = np.sort(times_s)
    times_s = times_s - times_s[0]
    count, span = len(times_s), float(times_s[-1])
    if span <= 0:
        return Timeline(times_s, declared_rate or 1.0)
    measured = (count - 1) / span
    if declared_rate and abs(count / declared_rate - count / measured) <= max(1 / measured, 0.01 * span):
        return Timeline(times_s, declared_rate)
    return Timeline(times_s, measured)


@dataclass(frozen=True)
class Clip:
    """The frames to look at. `size`: stored (width, height), before rotation."""

    indices: tuple[int, ...]
    times_s: tuple[float, ...]  # in the whole video
    second_per_grid: float
    size: tuple[int, int]


def choose_frames(timeline: Timeline, options: MediaOptions, size: tuple[int, int], limits: MediaLimits) -> Clip:
    """The frames of section 6, between `start_s` and `end_s`.

    At a constant rate their indices are spread evenly, as in the reference; else their times are, and the frame nearest to
    each of those times is taken (once more if nothing else was shown meanwhile). Raises MediaError when the clip is empty
    or more frames are asked for than it has or the limits allow.
    """
    times_s, rate = timeline.times_s, timeline.frame_rate
    is_constant = timeline.is_constant
    first, last = 0, len(times_s) - 1
    if options.start_s is not None:
        if options.start_s > times_s[-1]:
            raise MediaError(f"start_s {options.start_s:g} is past the last frame of the video, at {times_s[-1]:.2f} s")
        first = math.ceil(options.start_s * rate) if is_constant else int(np.searchsorted(times_s, options.start_s))
    if options.end_s is not None:
        last = (
            math.floor(options.end_s * rate)
            if is_constant
            else int(np.searchsorted(times_s, options.end_s, "right")) - 1
        )
    last = min(last, len(times_s) - 1)
    count = last - first + 1
    if count < 2:
        held = "the video has a single frame; pass it as a picture" if len(times_s) < 2 else "give the clip more room"
        raise MediaError(f"{max(count, 0)} frames in the clip, at least 2 are needed: {held}")
    if not is_constant and count < len(times_s) and times_s[last] > times_s[first]:
        rate = float((count - 1) / (times_s[last] - times_s[first]))
    num_frames = num_frames_to_sample(
        count,
        rate,
        fps=options.fps,
        nframes=options.num_frames,
        min_frames=options.min_frames,
        max_frames=options.max_frames,
        round_to_even=options.frame_rounding == "nearest",
    )
    if num_frames > limits.max_sampled_frames:
        raise MediaError(
            f"{num_frames} frames asked for, the limit is {limits.max_sampled_frames}; lower fps or num_frames"
        )
    if is_constant:
        indices = [first + index for index in spread_frames(count, num_frames)]
    else:
        targets = np.linspace(times_s[first], times_s[last], num_frames)
        after = np.clip(np.searchsorted(times_s, targets), first + 1, last)
        is_nearer_before = targets - times_s[after - 1] <= times_s[after] - targets
        indices = np.where(is_nearer_before, after - 1, after).tolist()
    sample_fps = num_frames / count * rate
    return Clip(tuple(indices), tuple(times_s[indices].tolist()), 2 / sample_fps, size)


@dataclass(frozen=True)
class Sampled(Generic[T]):
    """What was kept of a video's frames, and where they come from."""

    clip: Clip
    frames: tuple[T, ...]
    orientation: int
    label: str
    sha256: str


def sample_frames(
    source: object, options: MediaOptions, limits: MediaLimits, prepare: Callable[[Clip], Callable[[Pixels], T]]
) -> Sampled[T]:
    """Decodes a video (path, file or data URI, bytes, binary stream) and keeps what the caller makes of the chosen frames.

    `prepare` sees the clip before anything is decoded, may refuse it, and returns the function that is applied to each
    chosen frame (upright RGB [H, W, 3] uint8) as it passes by. Raises MediaError.
    """
    encoded = open_encoded(source, limits.max_video_bytes, limits)
    _pyav()
    with encoded.stream, _reading(encoded.label):
        _check_whole(encoded.stream, encoded.num_bytes, encoded.label)
        encoded.stream.seek(0)
        sha256 = hashlib.file_digest(encoded.stream, "sha256").hexdigest()  # type: ignore[arg-type]
        with _Video(encoded.stream, encoded.label, limits) as video:
            clip = choose_frames(video.timeline, options, video.size, limits)
            frames = _keep(video, clip, prepare(clip))
            if frames is None:
                # The decoder gave fewer frames than the container has packets for (hidden frames, a damaged start).
                # It is now known which: choose again among those.
                clip = choose_frames(video.timeline, options, video.size, limits)
                frames = _keep(video, clip, prepare(clip))
            if frames is None:
                raise MediaError(f"{encoded.label}: the video is damaged: its frames decode differently each time")
            return Sampled(clip, tuple(frames), video.orientation, encoded.label, sha256)


def _keep(video: _Video, clip: Clip, keep: Callable[[Pixels], T]) -> list[T] | None:
    """What `keep` makes of the clip's frames; None when the video ends before the last of them."""
    frames: list[T] = []
    for times, pixels in video.frames(clip.indices):
        frames.extend([keep(pixels)] * times)
    return frames if len(frames) == len(clip.indices) else None


def _check_whole(file: BinaryIO, num_bytes: int, label: str) -> None:
    """Refuses a file that ends before it says it does: demuxers take what is left for the whole. Raises MediaError.

    MP4 boxes, a Matroska segment and a RIFF chunk tell their sizes; recordings cut off by a crash usually tell none.
    """
    end = 0
    head = file.read(64)
    if head[4:8] in _MP4_BOXES:
        for _ in range(_MOST_BOXES):
            if end >= num_bytes or head[4:8] not in _MP4_BOXES:
                break
            size = int.from_bytes(head[:4], "big")
            size = int.from_bytes(head[8:16], "big") if size == 1 else size
            if size < 8:  # 0: up to the end of the file
                break
            end += size
            file.seek(min(end, num_bytes))
            head = file.read(16)
    elif head[:4] == b"\x1aE\xdf\xa3":
        start, size = _ebml_size(head, 4)
        if head[start + size : start + size + 4] == b"\x18S\x80g":
            start, size = _ebml_size(head, start + size + 4)
            end = start + size
    elif head[:4] == b"RIFF":
        end = 8 + int.from_bytes(head[4:8], "little")
    if end > num_bytes:
        raise MediaError(f"{label}: the video is cut short: {num_bytes} of {end} bytes are there; fetch it again")


def _ebml_size(data: bytes, at: int) -> tuple[int, int]:
    """(where the content starts, its size) of a Matroska element whose size is at `at`; an unknown size counts as 0."""
    first = data[at] if at < len(data) else 0
    length = 9 - first.bit_length()
    value = int.from_bytes(data[at : at + length], "big") & (1 << 7 * length) - 1
    return at + length, 0 if value == (1 << 7 * length) - 1 else value


@cache
def _pyav() -> Any:
    """PyAV, imported when it is needed: pictures, and videos given as frames, are served without it. Raises MediaError."""
    try:
        import av
        import av.error
    except ImportError as error:
        raise MediaError(f"videos are decoded by PyAV, which cannot be imported ({error}); pip install av") from error
    return av


class _reading:
    """Turns what the demuxer and decoders raise on a damaged file into a MediaError, without their words."""

    def __init__(self, label: str) -> None:
        self.label = label

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(
            error, (_pyav().error.FFmpegError, ValueError, OSError, ArithmeticError, MemoryError, struct.error)
        ):
            raise MediaError(
                f"{self.label}: the video is damaged, truncated or of an unsupported kind; use MP4, MOV, MKV, WebM, AVI or GIF"
            ) from error


class _Video:
    """An open video: its timeline, and its frames by index."""

    def __init__(self, stream: BinaryIO, label: str, limits: MediaLimits) -> None:
        """Opens the file and reads all its packets' timestamps, decoding nothing. Raises MediaError beyond a limit."""
        self.label, self.limits, self._file = label, limits, stream
        self.orientation = 1
        self._pts: list[int] = []  # of all frames, ascending, where they identify a frame; else frames are counted
        self._keys: list[int] = []  # of the key frames that can be jumped to
        self._open()
        try:
            self.size = (self._stream.codec_context.width, self._stream.codec_context.height)
            self._check_header()
            self._read_packets()
        except BaseException:
            self._container.close()
            raise

    def _open(self) -> None:
        """Opens the container at its start. Raises MediaError if no video is in it."""
        max_pixels = {"max_pixels": str(self.limits.max_pixels_per_frame)}  # decoders themselves refuse larger frames
        self._file.seek(0)
        pyav = _pyav()
        # How text that is no UTF-8 is passed over; PyAV 19 needs not be told, and takes no such word.
        lenient = {"metadata_errors": "ignore"} if int(pyav.__version__.split(".")[0]) < 19 else {}
        self._container: av.container.InputContainer = pyav.open(
            self._file,
            mode="r",
            options={"format_whitelist": CONTAINERS, "protocol_whitelist": "none", **max_pixels},
            **lenient,
        )
        for stream in self._container.streams.video:
            is_cover_art = stream.disposition & pyav.stream.Disposition.attached_pic
            if not is_cover_art and stream.codec_context is not None:  # None: a codec unknown here
                stream.thread_type = "AUTO"
                stream.codec_context.options = max_pixels
                self._stream = stream
                return
        self._container.close()
        raise MediaError(f"{self.label}: no video in the file, or of an unknown codec")

    def __enter__(self) -> _Video:
        return self

    def __exit__(self, *error: object) -> None:
        self._container.close()

    def _check_header(self) -> None:
        width, height = self.size
        if width < 1 or height < 1:
            raise MediaError(
                f"{self.label}: the video's size cannot be told, or exceeds the limit of {self.limits.max_pixels_per_frame}"
                " pixels a frame; use MP4, MOV, MKV, WebM, AVI or GIF, scaled down if need be"
            )
        if width * height > self.limits.max_pixels_per_frame:
            raise MediaError(
                f"{self.label}: video of {width} x {height} pixels exceeds the limit of {self.limits.max_pixels_per_frame};"
                " scale it down first"
            )
        stream = self._stream
        if stream.duration is not None and stream.time_base is not None:
            self._check_duration(float(stream.duration * stream.time_base))
        elif self._container.duration is not None:
            self._check_duration(self._container.duration / _pyav().time_base)
        self._check_count(stream.frames)

    def _check_duration(self, duration_s: float) -> None:
        if duration_s > self.limits.max_video_duration_s:
            raise MediaError(
                f"{self.label}: video of {duration_s:.0f} s exceeds the limit of {self.limits.max_video_duration_s:.0f} s; cut it"
            )

    def _check_count(self, num_frames: int) -> None:
        area = self.size[0] * self.size[1]
        if num_frames > self.limits.max_video_frames or num_frames * area > self.limits.max_video_pixels:
            raise MediaError(
                f"{self.label}: video of {num_frames} frames of {self.size[0]} x {self.size[1]} pixels exceeds the limits of"
                f" {self.limits.max_video_frames} frames and {self.limits.max_video_pixels} pixels in all; cut or scale it down"
            )

    def _read_packets(self) -> None:
        """Counts frames and collects their times from the packets, which is cheap, and right where headers are not."""
        stream = self._stream
        shown: list[int | None] = []
        decoded: list[int | None] = []
        keys: list[int] = []
        for packet in self._container.demux(stream):
            if packet.size == 0 or packet.is_discard:
                continue
            shown.append(packet.pts)
            decoded.append(packet.dts)
            if packet.is_keyframe and packet.pts is not None:
                keys.append(packet.pts)
            if len(shown) % 4096 == 0:
                self._check_count(len(shown))
        self._check_count(len(shown))
        if not shown:
            raise MediaError(f"{self.label}: no frames in the video")
        if None not in shown and len(set(shown)) == len(shown):
            self._set_timeline(shown)
            self._pts = sorted(stamp for stamp in shown if stamp is not None)
            if self._container.format.name.split(",")[0] in _SEEKABLE:
                self._keys = sorted(keys)
        else:
            # AVI knows decoding times only, from which times of display are guessed; as a set they are the same, shifted.
            self._set_timeline(decoded if None not in decoded else shown)

    def _set_timeline(self, stamps: Sequence[int | None]) -> None:
        """Timestamps in units of the stream's time base; where some lack, the declared rate stands in."""
        stream = self._stream
        declared = float(stream.average_rate) if stream.average_rate else None
        if stream.time_base is not None and all(stamp is not None for stamp in stamps):
            times_s = np.array(stamps, dtype=np.float64) * float(stream.time_base)
        elif declared:
            times_s = np.arange(len(stamps)) / declared
        else:
            raise MediaError(f"{self.label}: neither timestamps nor a frame rate in the video")
        self.timeline = timeline_of(times_s, declared)
        self._check_duration(float(self.timeline.times_s[-1]))

    def frames(self, indices: Sequence[int]) -> Iterator[tuple[int, Pixels]]:
        """(how often it was asked for, upright RGB frame) for each distinct index, ascending.

        Ends early, with the timeline corrected, if the decoder does not give the frames that the packets promise.
        """
        wanted = Counter(indices)
        if self._keys:
            yield from self._frames_by_jumps(wanted)
        if not wanted:
            return
        # From the start to the last frame. This is also how a jump that missed is made good.
        self._container.close()
        self._open()
        stamps: list[int | None] = []
        last = max(wanted)
        for index, frame in self._indexed(self._decoded(), 0):
            stamps.append(frame.pts)
            if index in wanted:
                yield wanted.pop(index), self._upright_rgb(frame)
            if index == last and not wanted:
                return
        if not stamps:
            raise MediaError(
                f"{self.label}: no frame of the video can be decoded; it is damaged or its codec is unknown"
            )
        self._pts = self._keys = []
        self._set_timeline(stamps)

    def _frames_by_jumps(self, wanted: Counter[int]) -> Iterator[tuple[int, Pixels]]:
        """As `frames`, skipping what lies before a key frame we can jump to; stops, leaving the rest in `wanted`, when a
        frame is not found where its timestamp says."""
        self._container.close()
        self._open()
        position = 0
        frames = self._indexed(self._decoded(), 0)
        for target in sorted(wanted):
            key_position = bisect_right(self._keys, self._pts[target]) - 1
            key = self._keys[max(key_position, 0)]
            start = bisect_left(self._pts, key)
            try:
                if start > position + _WORTH_A_SEEK:
                    self._container.seek(key, stream=self._stream)
                    frames = self._indexed(self._decoded(), start)
                found = next((frame for index, frame in frames if index >= target), None)
            except _pyav().error.FFmpegError:
                return
            if found is None or found.pts != self._pts[target]:
                return
            position = target + 1
            yield wanted.pop(target), self._upright_rgb(found)

    def _indexed(self, frames: Iterator[av.VideoFrame], start: int) -> Iterator[tuple[int, av.VideoFrame]]:
        """Frames with their indices: by timestamp where that identifies them, else counted from `start`."""
        for position, frame in enumerate(frames, start):
            if not self._pts:
                yield position, frame
                continue
            index = bisect_left(self._pts, frame.pts) if frame.pts is not None else len(self._pts)
            yield (index if index < len(self._pts) and self._pts[index] == frame.pts else -1), frame

    def _decoded(self) -> Iterator[av.VideoFrame]:
        """Decoded frames in order of display. Packets that fail before the first frame are skipped: a recording may begin
        in the middle of a group of pictures."""
        has_begun = False
        for packet in self._container.demux(self._stream):
            try:
                decoded = packet.decode()
            except _pyav().error.InvalidDataError:
                if has_begun:
                    raise
                continue
            for frame in decoded:
                has_begun = True
                yield frame

    def _upright_rgb(self, frame: av.VideoFrame) -> Pixels:
        self.orientation = _orientation(frame)
        if any(component.is_alpha for component in frame.format.components):
            rgba = frame.to_ndarray(format="rgba").astype(np.uint16)
            alpha = rgba[:, :, 3:]
            pixels = ((rgba[:, :, :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)  # on white
        else:
            pixels = np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)
        return upright(pixels, self.orientation)


def _orientation(frame: av.VideoFrame) -> int:
    """The EXIF orientation equal to the frame's display matrix; 1 without one, or when it is no multiple of 90 degrees."""
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    if data is None or data.buffer_size != 36:
        return 1
    matrix = struct.unpack("9i", bytes(data))
    signs = tuple((value > 0) - (value < 0) for value in (matrix[0], matrix[1], matrix[3], matrix[4]))
    return _ORIENTATIONS.get(signs, 1)
