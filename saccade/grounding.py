"""Boxes, points and events in an answer, and where they are in the original pictures and videos.

Qwen2.5-VL speaks in absolute pixels of the resized picture, as JSON, fenced or bare, alone or within prose; an answer cut off by
the length limit ends inside an object, and the complete ones before it count. Knows receipts and text; knows no engine.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from saccade.inputs.prompt import MediaReceipt

LABEL_KEYS = ("label", "text_content", "text", "name", "class")


@dataclass(frozen=True)
class Box:
    """left, top, right, bottom in pixels of the original (upright) picture; `stored` the same in the raster as it lies in the file.

    `picture` is the picture's index in the conversation.
    """

    xyxy: tuple[float, float, float, float]
    label: str
    picture: int
    stored: tuple[float, float, float, float]


@dataclass(frozen=True)
class Point:
    """x, y in pixels of the original (upright) picture; `stored` the same in the raster as it lies in the file."""

    xy: tuple[float, float]
    label: str
    picture: int
    stored: tuple[float, float]


@dataclass(frozen=True)
class Event:
    """Something that happens in a video, from start_s to end_s in seconds of the original file."""

    start_s: float
    end_s: float
    description: str
    video: int


def find_boxes(text: str, media: Sequence[MediaReceipt]) -> list[Box]:
    """Every {"bbox_2d": [x1, y1, x2, y2], ...} of the answer, corners in order, clipped. Without a picture there are none."""
    boxes = []
    for found in _objects(text):
        values = _numbers(found.get("bbox_2d", found.get("bbox")), 4)
        picture = _picture_of(found, media)
        if values is None or picture is None:
            continue
        x1, y1, x2, y2 = values
        pixels = picture.pixel_map
        corners = (*pixels.to_original(min(x1, x2), min(y1, y2)), *pixels.to_original(max(x1, x2), max(y1, y2)))
        a, b = pixels.to_stored(*corners[:2]), pixels.to_stored(*corners[2:])
        stored = (min(a[0], b[0]), min(a[1], b[1]), max(a[0], b[0]), max(a[1], b[1]))
        boxes.append(Box(corners, _label(found), picture.index, stored))
    return boxes


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes of one picture, from 0 to 1."""
    width = min(a.xyxy[2], b.xyxy[2]) - max(a.xyxy[0], b.xyxy[0])
    height = min(a.xyxy[3], b.xyxy[3]) - max(a.xyxy[1], b.xyxy[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = [(box.xyxy[2] - box.xyxy[0]) * (box.xyxy[3] - box.xyxy[1]) for box in (a, b)]
    return shared / (sum(areas) - shared) if shared else 0.0


def find_points(text: str, media: Sequence[MediaReceipt]) -> list[Point]:
    """Every {"point_2d": [x, y], ...} of the answer, clipped to the picture."""
    points = []
    for found in _objects(text):
        values = _numbers(found.get("point_2d", found.get("point")), 2)
        picture = _picture_of(found, media)
        if values is None or picture is None:
            continue
        xy = picture.pixel_map.to_original(*values)
        points.append(Point(xy, _label(found), picture.index, picture.pixel_map.to_stored(*xy)))
    return points


def find_events(text: str, media: Sequence[MediaReceipt]) -> list[Event]:
    """Every {"start_time", "end_time", "description"} of the answer; times count from the first sampled frame, as the model does."""
    videos = [receipt for receipt in media if receipt.kind == "video"]
    if not videos:
        return []
    events = []
    for found in _objects(text):
        start, end = _seconds(found.get("start_time")), _seconds(found.get("end_time"))
        index = found.get("video", 0)
        if start is None or end is None or not isinstance(index, int) or not 0 <= index < len(videos):
            continue
        times = videos[index].frame_times_s
        origin = times[0] if times else 0.0
        description = found.get("description", _label(found))
        events.append(Event(origin + start, origin + end, str(description), index))
    return events


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The outermost JSON objects in `text`, and those inside lists; what is incomplete or broken is passed over."""
    decoder = json.JSONDecoder()
    at = text.find("{")
    while at >= 0:
        try:
            found, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            yield found
            inner = [value for value in found.values() if isinstance(value, list)]
            yield from (item for items in inner for item in items if isinstance(item, dict))
        at = text.find("{", end)


def _picture_of(found: dict[str, Any], media: Sequence[MediaReceipt]) -> MediaReceipt | None:
    """The picture an object speaks of: the one it names (`image`, counted from 1 as in "Picture 1"), else the only or first one.

    Boxes in an answer about a video alone refer to its frames.
    """
    pictures = [receipt for receipt in media if receipt.kind == "image"] or list(media)
    named = found.get("image", found.get("picture", found.get("image_index")))
    if isinstance(named, str) and (digits := re.search(r"\d+", named)):
        named = int(digits.group())
    if isinstance(named, int) and not isinstance(named, bool) and 1 <= named <= len(pictures):
        return pictures[named - 1]
    return pictures[0] if pictures else None


def _numbers(values: Any, count: int) -> list[float] | None:
    if not isinstance(values, list) or len(values) != count:
        return None
    if any(isinstance(v, bool) or not isinstance(v, int | float) or not math.isfinite(v) for v in values):
        return None
    return [float(v) for v in values]


def _label(found: dict[str, Any]) -> str:
    return next((str(found[key]) for key in LABEL_KEYS if key in found), "")


def _seconds(value: Any) -> float | None:
    """Seconds, or [hh:]mm:ss[.ff] where minutes may exceed 59."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if math.isfinite(value) else None
    if not isinstance(value, str) or not re.fullmatch(r"\s*(\d{1,6}:){0,2}\d{1,9}(\.\d+)?\s*s?\s*", value):
        return None
    seconds = 0.0
    for part in value.strip().rstrip("s ").split(":"):
        seconds = seconds * 60 + float(part)
    return seconds
