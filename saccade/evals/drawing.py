"""Drawing: shapes and written text as sprites, grounds to paste them on, and exactly where everything lies.

Knows colours, outlines, glyphs and noise; knows no scenes and no questions. Everything follows from the numpy Generator passed
in. The only typeface is the one inside Pillow, so that every machine draws the same pictures; boldness, slant, width and turn
are made from it. Boxes are (x1, y1, x2, y2) in pixels, right and bottom exclusive. Letters: H x W picture, h x w sprite.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Rng = np.random.Generator
Box = tuple[int, int, int, int]
Colour = tuple[float, float, float]
Pixels = npt.NDArray[np.uint8]
Canvas = npt.NDArray[np.float32]

COLOURS: dict[str, Colour] = {
    "red": (218, 32, 38),
    "green": (38, 158, 62),
    "blue": (38, 82, 218),
    "yellow": (246, 222, 38),
    "orange": (246, 134, 24),
    "purple": (136, 46, 168),
    "white": (246, 246, 246),
    "black": (16, 16, 18),
}
DRAWN_COLOURS = tuple(COLOURS)[:6]  # white and black are for grounds, lines and print
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"

SOLID = 128  # a pixel belongs to an object when at least half of it is covered
GAP = 4  # pixels kept free between objects


@dataclass(frozen=True)
class Glyph:
    """A character and the columns it occupies."""

    character: str
    left: float
    right: float


@dataclass(frozen=True)
class Drawn:
    """Something drawn: a shape by its name, a "bar", or a "number" or "word" with its text and glyphs. meaning: what it stands
    for: a bar's height, a number's field or cell, on which side of the other a shape lies, where it moves."""

    kind: str
    colour: str
    box: Box
    text: str = ""
    glyphs: tuple[Glyph, ...] = ()
    meaning: str = ""

    @property
    def is_shape(self) -> bool:
        return self.kind in SHAPES

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Sprite:
    """An object ready to be pasted. mask: [h, w] coverage 0..255; `drawn.box` and glyphs are relative to the mask's corner."""

    mask: Pixels
    rgb: Colour
    drawn: Drawn

    def at(self, x: int, y: int) -> Drawn:
        x1, y1, x2, y2 = self.drawn.box
        glyphs = tuple(Glyph(g.character, g.left + x, g.right + x) for g in self.drawn.glyphs)
        return replace(self.drawn, box=(x1 + x, y1 + y, x2 + x, y2 + y), glyphs=glyphs)


@dataclass(frozen=True)
class TextStyle:
    """What is made of the one typeface. stroke: extra pixels around every line; slant: x per y; stretch: of the width;
    angle: radians, clockwise."""

    stroke: int = 0
    slant: float = 0.0
    stretch: float = 1.0
    angle: float = 0.0

    @property
    def matrix(self) -> npt.NDArray[np.float64]:
        """[2, 2] from upright to styled coordinates, y downwards."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        upright = np.array([[self.stretch, -self.slant], [0.0, 1.0]])
        return np.asarray(np.array([[cos, -sin], [sin, cos]]) @ upright)


# --- sprites ---------------------------------------------------------------------------------------------------------


def outline(kind: str, size: float) -> list[tuple[float, float]]:
    """Corners of a polygon shape inside a circle of diameter `size` around the origin, y downwards."""
    r = size / 2
    if kind == "square":
        s = r * 0.78
        return [(-s, -s), (s, -s), (s, s), (-s, s)]
    if kind == "triangle":
        return [(0, -r * 0.85), (r * 0.95, r * 0.72), (-r * 0.95, r * 0.72)]
    if kind == "diamond":
        return [(0, -r), (r * 0.7, 0), (0, r), (-r * 0.7, 0)]
    if kind == "star":
        turns = [i * math.pi / 5 for i in range(10)]
        radii = [r if i % 2 == 0 else r * 0.42 for i in range(10)]
        return [(radius * math.sin(turn), -radius * math.cos(turn)) for radius, turn in zip(radii, turns, strict=True)]
    if kind == "cross":
        a, b = r * 0.92, r * 0.3
        quarter = ((-b, -a), (b, -a), (b, -b))  # the others follow by turning it
        return [_turned(corner, turns) for turns in range(4) for corner in quarter]
    raise KeyError(kind)


def _turned(point: tuple[float, float], turns: int) -> tuple[float, float]:
    """By so many quarter turns around the origin."""
    for _ in range(turns):
        point = -point[1], point[0]
    return point


def shape_sprite(kind: str, colour: str, rgb: Colour, size: int, angle: float) -> Sprite:
    """A shape of diameter `size` pixels turned by `angle` radians, antialiased by drawing at four times the size."""
    scale, side = 4, size + 4
    canvas = Image.new("L", (side * scale, side * scale))
    pen = ImageDraw.Draw(canvas)
    middle = side * scale / 2
    if kind == "circle":
        r = size * scale * 0.45
        pen.ellipse((middle - r, middle - r, middle + r, middle + r), fill=255)
    else:
        cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
        corners = [(middle + x * cos - y * sin, middle + x * sin + y * cos) for x, y in outline(kind, size)]
        pen.polygon(corners, fill=255)
    mask = np.asarray(canvas.reduce(scale))
    return Sprite(mask, rgb, Drawn(kind, colour, solid_box(mask)))


@lru_cache(maxsize=128)
def font(size: int) -> ImageFont.FreeTypeFont:
    face = ImageFont.load_default(size)
    assert isinstance(face, ImageFont.FreeTypeFont)
    return face


def text_sprite(text: str, colour: str, rgb: Colour, size: int, style: TextStyle = TextStyle()) -> Sprite:
    """`text` at `size` pixels, upright first and then brought into its style by one affine map."""
    face, margin = font(size), 2 + style.stroke
    left, top, right, bottom = face.getbbox(text)
    origin = (margin - left, margin - top)
    canvas = Image.new("L", (math.ceil(right - left) + 2 * margin, math.ceil(bottom - top) + 2 * margin))
    ImageDraw.Draw(canvas).text(origin, text, fill=255, font=face, stroke_width=style.stroke)
    edges = [origin[0] + face.getlength(text[:i]) for i in range(len(text) + 1)]
    matrix = style.matrix
    width, height = canvas.size
    corners = matrix @ np.array([[0, width, 0, width], [0, 0, height, height]], dtype=np.float64)
    low = corners.min(1)
    size_after = np.ceil(corners.max(1) - low).astype(int)
    back = np.linalg.inv(matrix)
    (a, b), (d, e) = back
    c, f = back @ low
    styled = canvas.transform(
        (int(size_after[0]), int(size_after[1])), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BICUBIC
    )
    middles = matrix @ np.array([edges, [height / 2] * len(edges)]) - low[:, None]
    glyphs = tuple(Glyph(c, float(middles[0, i]), float(middles[0, i + 1])) for i, c in enumerate(text))
    mask = np.asarray(styled)
    return Sprite(mask, rgb, Drawn("number" if text.isdigit() else "word", colour, solid_box(mask), text, glyphs))


def solid_box(mask: Pixels) -> Box:
    solid = mask >= min(SOLID, int(mask.max()))
    rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def paste(canvas: Canvas, sprite: Sprite, x: int, y: int) -> Drawn:
    """Blend a sprite into canvas [H, W, 3] with its corner at (x, y); it must lie inside. Returns it where it is now."""
    h, w = sprite.mask.shape
    alpha = sprite.mask[:, :, None].astype(np.float32) / 255
    area = canvas[y : y + h, x : x + w]
    area += (np.asarray(sprite.rgb, dtype=np.float32) - area) * alpha
    return sprite.at(x, y)


# --- choosing --------------------------------------------------------------------------------------------------------


def jitter(rng: Rng, rgb: Colour, amount: float = 16) -> Colour:
    r, g, b = np.clip(np.asarray(rgb) + rng.uniform(-amount, amount, 3), 0, 255)
    return float(r), float(g), float(b)


def background(rng: Rng, height: int, width: int) -> Canvas:
    """[H, W, 3]: a pale, grey or dark ground, plain or with a gradient."""
    level = float(rng.choice([245, 215, 30], p=[0.5, 0.3, 0.2]))
    base = np.asarray(jitter(rng, (level, level, level), 14), dtype=np.float32)
    canvas = np.broadcast_to(base, (height, width, 3)).astype(np.float32)
    if rng.random() < 0.35:
        slope = rng.uniform(-28, 28, 3).astype(np.float32)
        angle = rng.uniform(0, 2 * math.pi)
        ys, xs = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
        canvas = canvas + (xs * math.cos(angle) + ys * math.sin(angle))[:, :, None].astype(np.float32) * slope
    return canvas


def finished(rng: Rng, canvas: Canvas) -> Pixels:
    """The canvas as pixels; one in three with noise, one in four with the marks of a JPEG with halved chroma."""
    if rng.random() < 0.35:
        canvas = canvas + rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(rng.uniform(2, 12))
    pixels = canvas.clip(0, 255).round().astype(np.uint8)
    return compressed(rng, pixels) if rng.random() < 0.25 else pixels


def compressed(rng: Rng, pixels: Pixels) -> Pixels:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=int(rng.integers(55, 96)), subsampling=2)
    return np.asarray(Image.open(buffer).convert("RGB"))


def ink(ground: Canvas) -> Colour:
    """Black or white, whichever shows on the ground."""
    return COLOURS["black"] if float(ground.mean()) > SOLID else COLOURS["white"]


def mixed(a: Colour, b: Colour, share: float) -> Colour:
    """`share` of b in a."""
    red, green, blue = (x + (y - x) * share for x, y in zip(a, b, strict=True))
    return red, green, blue


def contrasting(ground: Canvas) -> list[str]:
    """The drawn colours that stand out from the ground."""
    mean = ground.reshape(-1, 3).mean(0)
    return [name for name in DRAWN_COLOURS if float(np.abs(np.asarray(COLOURS[name]) - mean).sum()) > 170]


def pick_colour(rng: Rng, ground: Canvas) -> str:
    return str(rng.choice(contrasting(ground)))


def pick_style(rng: Rng) -> TextStyle:
    """Half of all text is upright and plain."""
    if rng.random() < 0.5:
        return TextStyle(stroke=int(rng.random() < 0.3))
    return TextStyle(
        stroke=int(rng.random() < 0.4),
        slant=float(rng.choice([0.0, 0.0, 0.18])),
        stretch=float(rng.uniform(0.9, 1.15)),
        angle=float(rng.uniform(-0.06, 0.06)),
    )


def free_spot(
    rng: Rng, sprite: Sprite, height: int, width: int, taken: list[Box], tries: int = 30
) -> tuple[int, int] | None:
    """A corner for the sprite's mask inside the picture, at least GAP away from everything taken."""
    h, w = sprite.mask.shape
    if h > height or w > width:
        return None
    for _ in range(tries):
        x, y = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
        x1, y1, x2, y2 = sprite.at(x, y).box
        if all(x1 >= b[2] + GAP or b[0] >= x2 + GAP or y1 >= b[3] + GAP or b[1] >= y2 + GAP for b in taken):
            return x, y
    return None
