"""An answer's boxes and points, drawn on the picture it speaks of."""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageDraw, ImageFont

from saccade.inputs.media import open_picture
from saccade.inputs.options import MediaLimits
from saccade.outputs import CompletionOutput

COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#46f0f0", "#f032e6", "#9a6324")


def draw_answer(
    source: Any, answer: CompletionOutput, picture: int = 0, limits: MediaLimits | None = None
) -> Image.Image:
    """The upright picture `source` (anything a message part takes) with the boxes and points of `answer` that are on it."""
    canvas = Image.fromarray(open_picture(source, limits or MediaLimits()).pixels).convert("RGB")
    pen = ImageDraw.Draw(canvas)
    width = max(2, round(min(canvas.size) / 200))
    font = ImageFont.load_default(size=max(10, round(min(canvas.size) / 30)))
    boxes = [box for box in answer.boxes if box.picture == picture]
    for index, box in enumerate(boxes):
        colour = COLOURS[index % len(COLOURS)]
        pen.rectangle(box.xyxy, outline=colour, width=width)
        _label(pen, (box.xyxy[0], box.xyxy[1]), box.label, colour, font)
    for index, point in enumerate(p for p in answer.points if p.picture == picture):
        colour = COLOURS[(len(boxes) + index) % len(COLOURS)]
        x, y = point.xy
        pen.ellipse((x - 2 * width, y - 2 * width, x + 2 * width, y + 2 * width), fill=colour, outline="white")
        _label(pen, (x + 3 * width, y), point.label, colour, font)
    return canvas


def _label(pen: ImageDraw.ImageDraw, corner: tuple[float, float], text: str, colour: str, font: Any) -> None:
    """White text on the box's colour, above its corner, or inside where there is no room above."""
    if not text:
        return
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    x, y = corner[0], corner[1] - (bottom - top) - 4
    y = y if y >= 0 else corner[1]
    pen.rectangle((x, y, x + right - left + 4, y + bottom - top + 4), fill=colour)
    pen.text((x + 2 - left, y + 2 - top), text, fill="white", font=font)
