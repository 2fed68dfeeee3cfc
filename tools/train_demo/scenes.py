"""Drawing: seeded pictures and short clips of coloured shapes, numbers and words, with what is in them and exactly where.

Knows colours, shapes, glyphs and noise; knows no questions and no model. Everything follows from the numpy Generator passed in.
Boxes are (x1, y1, x2, y2) in pixels, right and bottom exclusive. Letters: F frames, H x W picture.
"""

from __future__ import annotations

import io
import math
import zlib
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Box = tuple[int, int, int, int]
Colour = tuple[float, float, float]

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
DRAWN_COLOURS = tuple(COLOURS)[:6]  # white and black are for grounds
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"

# Never drawn for training: these colour and shape pairs, and every number that `is_held_out_text`.
HELD_OUT_PAIRS = frozenset(
    {
        ("red", "star"),
        ("green", "diamond"),
        ("blue", "triangle"),
        ("yellow", "cross"),
        ("orange", "square"),
        ("purple", "circle"),
    }
)
WORDS = ("CAT", "DOG", "SUN", "BUS", "CUP", "HAT", "KEY", "MAP", "FISH", "STAR", "TREE", "SHIP")

FONT_FOLDER = Path("/usr/share/fonts/truetype/dejavu")  # Debian's fonts-dejavu-core
FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf")
SOLID = 128  # a pixel belongs to an object when at least half of it is covered
GAP = 4  # pixels kept free between objects


def is_held_out_text(text: str) -> bool:
    """One in eight numbers of two digits, by checksum."""
    return len(text) > 1 and text.isdigit() and zlib.crc32(text.encode()) % 8 == 0


@dataclass(frozen=True)
class Glyph:
    """A character and the columns it occupies."""

    character: str
    left: float
    right: float


@dataclass(frozen=True)
class Item:
    """Something drawn: a shape by its name, or a "number" or "word" with its text and glyphs."""

    kind: str
    colour: str
    box: Box
    text: str = ""
    glyphs: tuple[Glyph, ...] = ()

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
class Scene:
    """pixels: [H, W, 3] uint8; items do not overlap."""

    pixels: np.ndarray
    items: tuple[Item, ...]

    @property
    def shapes(self) -> list[Item]:
        return [item for item in self.items if item.is_shape]


Story = Literal["appear", "replace", "move"]
Direction = Literal["left", "right", "up", "down"]


@dataclass(frozen=True)
class Clip:
    """frames: [F, H, W, 3] uint8, sampled every `second_per_grid` / 2 seconds; items: what is to be seen in each frame.

    `cast`: the shapes in the order in which they first show. `entries`: the frames they first show in.
    """

    frames: np.ndarray
    items: tuple[tuple[Item, ...], ...]
    second_per_grid: float
    story: Story
    cast: tuple[Item, ...]
    entries: tuple[int, ...]
    direction: Direction | None = None


# --- sprites ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sprite:
    """An object ready to be pasted. mask: [h, w] coverage 0..255; `item.box` and glyphs are relative to the mask's corner."""

    mask: np.ndarray
    rgb: Colour
    item: Item

    def at(self, x: int, y: int) -> Item:
        x1, y1, x2, y2 = self.item.box
        glyphs = tuple(Glyph(g.character, g.left + x, g.right + x) for g in self.item.glyphs)
        return replace(self.item, box=(x1 + x, y1 + y, x2 + x, y2 + y), glyphs=glyphs)


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
        radii = (r, r * 0.42)
        return [
            (radii[i % 2] * math.sin(i * math.pi / 5), -radii[i % 2] * math.cos(i * math.pi / 5)) for i in range(10)
        ]
    if kind == "cross":
        a, b = r * 0.92, r * 0.3
        return [
            (-b, -a),
            (b, -a),
            (b, -b),
            (a, -b),
            (a, b),
            (b, b),
            (b, a),
            (-b, a),
            (-b, b),
            (-a, b),
            (-a, -b),
            (-b, -b),
        ]
    raise KeyError(kind)


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
        pen.polygon(
            [(middle + x * cos - y * sin, middle + x * sin + y * cos) for x, y in outline(kind, size)], fill=255
        )
    mask = np.asarray(canvas.reduce(scale))
    return Sprite(mask, rgb, Item(kind, colour, solid_box(mask)))


@lru_cache(maxsize=256)
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(FONT_FOLDER / name, size)


def text_sprite(text: str, colour: str, rgb: Colour, font_name: str, size: int) -> Sprite:
    face = font(font_name, size)
    left, top, right, bottom = face.getbbox(text)
    origin = (2 - left, 2 - top)
    canvas = Image.new("L", (math.ceil(right - left) + 4, math.ceil(bottom - top) + 4))
    ImageDraw.Draw(canvas).text(origin, text, fill=255, font=face)
    edges = [origin[0] + face.getlength(text[:i]) for i in range(len(text) + 1)]
    glyphs = tuple(Glyph(c, edges[i], edges[i + 1]) for i, c in enumerate(text))
    mask = np.asarray(canvas)
    kind = "number" if text.isdigit() else "word"
    return Sprite(mask, rgb, Item(kind, colour, solid_box(mask), text, glyphs))


def solid_box(mask: np.ndarray) -> Box:
    rows, columns = np.flatnonzero((mask >= SOLID).any(1)), np.flatnonzero((mask >= SOLID).any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def paste(canvas: np.ndarray, sprite: Sprite, x: int, y: int) -> None:
    """Blend a sprite into canvas [H, W, 3] float32 with its corner at (x, y); it must lie inside."""
    h, w = sprite.mask.shape
    alpha = sprite.mask[:, :, None].astype(np.float32) / 255
    area = canvas[y : y + h, x : x + w]
    area += (np.asarray(sprite.rgb, dtype=np.float32) - area) * alpha


# --- choosing --------------------------------------------------------------------------------------------------------


def jitter(rng: np.random.Generator, rgb: Colour, amount: float = 16) -> Colour:
    r, g, b = np.clip(np.asarray(rgb) + rng.uniform(-amount, amount, 3), 0, 255)
    return float(r), float(g), float(b)


def background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """[H, W, 3] float32: a pale, grey or dark ground, plain, with a gradient, or with noise on top."""
    level = rng.choice([245, 215, 30], p=[0.5, 0.3, 0.2])
    base = np.asarray(jitter(rng, (level, level, level), 14), dtype=np.float32)
    canvas = np.broadcast_to(base, (height, width, 3)).astype(np.float32)
    if rng.random() < 0.35:
        slope = rng.uniform(-28, 28, 3).astype(np.float32)
        angle = rng.uniform(0, 2 * math.pi)
        ys, xs = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
        canvas = canvas + (xs * math.cos(angle) + ys * math.sin(angle))[:, :, None].astype(np.float32) * slope
    return canvas


def far_enough(rgb: Colour, ground: np.ndarray) -> bool:
    return float(np.abs(np.asarray(rgb) - ground.reshape(-1, 3).mean(0)).sum()) > 170


def pick_colour(rng: np.random.Generator, ground: np.ndarray) -> str:
    names = [name for name in DRAWN_COLOURS if far_enough(COLOURS[name], ground)]
    return str(rng.choice(names))


def pick_pair(rng: np.random.Generator, ground: np.ndarray, *, held_out: bool) -> tuple[str, str]:
    """A colour and a shape: a pair seen in training, or (in held-out scenes, two times in three) one that never is."""
    want_held_out = held_out and rng.random() < 2 / 3
    while True:
        pair = pick_colour(rng, ground), str(rng.choice(SHAPES))
        if (pair in HELD_OUT_PAIRS) == want_held_out:
            return pair


def pick_text(rng: np.random.Generator, kind: str, *, held_out: bool) -> str:
    """A word of the list, or a number of one or two digits; in held-out scenes numbers are the held-out ones."""
    if kind == "word":
        return str(rng.choice(WORDS))
    while True:
        text = str(rng.integers(0, 10) if rng.random() < 0.3 and not held_out else rng.integers(10, 100))
        if is_held_out_text(text) == held_out:
            return text


def free_spot(
    rng: np.random.Generator, sprite: Sprite, height: int, width: int, taken: list[Box], tries: int = 30
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


# --- pictures --------------------------------------------------------------------------------------------------------


def random_shape(rng: np.random.Generator, pair: tuple[str, str], side: int, *, crowded: bool) -> Sprite:
    colour, kind = pair
    largest = 0.4 if crowded else 0.55
    size = int(np.clip(side * rng.uniform(0.26, largest), 24, side - 6))
    return shape_sprite(kind, colour, jitter(rng, COLOURS[colour]), size, rng.uniform(-0.16, 0.16))


def random_text(
    rng: np.random.Generator, ground: np.ndarray, kind: str, height: int, width: int, *, held_out: bool
) -> Sprite:
    text = pick_text(rng, kind, held_out=held_out)
    colour = pick_colour(rng, ground)
    widest = min(height * 0.6, 1.45 * width / len(text), 72)
    size = int(rng.uniform(30, max(widest, 31)))
    while True:
        sprite = text_sprite(text, colour, jitter(rng, COLOURS[colour]), str(rng.choice(FONTS)), size)
        if sprite.mask.shape[1] <= width and sprite.mask.shape[0] <= height:
            return sprite
        size = int(size * 0.9)


def picture(
    rng: np.random.Generator, height: int, width: int, *, text_share: float = 0.5, held_out: bool = False
) -> Scene:
    """A scene of up to three shapes, or of a number or a word with up to one, at exactly height x width.

    One picture in three is drawn at another size first and brought to this one by PIL's bicubic filter, as users' pictures are.
    """
    if rng.random() < 0.33:
        zoom = rng.uniform(0.9, 2.2)
        drawn_height = round(height * zoom * rng.uniform(0.93, 1.07))
        drawn_width = round(width * zoom * rng.uniform(0.93, 1.07))
        scene = draw_picture(rng, drawn_height, drawn_width, text_share=text_share, held_out=held_out)
        scene = resized(scene, height, width)
    else:
        scene = draw_picture(rng, height, width, text_share=text_share, held_out=held_out)
    return replace(scene, pixels=compressed(rng, scene.pixels, 0.3))


def draw_picture(
    rng: np.random.Generator, height: int, width: int, *, text_share: float = 0.5, held_out: bool = False
) -> Scene:
    """The same as drawn: before any resizing and compression."""
    ground = background(rng, height, width)
    sprites: list[Sprite] = []
    with_text = rng.random() < text_share
    if with_text:
        kind = str(rng.choice(["number", "word"], p=[0.65, 0.35]))
        sprites.append(random_text(rng, ground, kind, height, width, held_out=held_out))
        count = int(rng.random() < 0.25)
    else:
        count = int(rng.choice([1, 2, 3], p=[0.3, 0.4, 0.3]))
    pairs: list[tuple[str, str]] = []
    repeat = 0.0 if rng.random() < 0.7 else 0.6
    while len(pairs) < count:
        pair = pick_pair(rng, ground, held_out=held_out)
        if pairs and rng.random() < repeat:
            pair = pairs[int(rng.integers(len(pairs)))]
        pairs.append(pair)
    sprites += [random_shape(rng, pair, min(height, width), crowded=count > 2 or with_text) for pair in pairs]
    items: list[Item] = []
    for sprite in sprites:
        spot = free_spot(rng, sprite, height, width, [item.box for item in items])
        if spot is not None:
            paste(ground, sprite, *spot)
            items.append(sprite.at(*spot))
    if rng.random() < 0.35:
        ground += rng.standard_normal(ground.shape, dtype=np.float32) * np.float32(rng.uniform(2, 14))
    return Scene(ground.clip(0, 255).round().astype(np.uint8), tuple(items))


def page(rng: np.random.Generator, height: int, width: int) -> Scene:
    """A picture filled with lines of numbers and words: many glyphs at once to learn reading from."""
    ground = background(rng, height, width)
    items: list[Item] = []
    top = int(rng.integers(0, 8))
    while True:
        size, face = int(rng.uniform(20, 22 + 30 * rng.random())), str(rng.choice(FONTS))
        colour = pick_colour(rng, ground)
        if top + size + 4 > height:
            break
        left, tallest = int(rng.integers(0, 12)), 0
        while True:
            text = pick_text(rng, str(rng.choice(["number", "number", "word"])), held_out=False)
            sprite = text_sprite(text, colour, jitter(rng, COLOURS[colour]), face, size)
            h, w = sprite.mask.shape
            if left + w > width or top + h > height:
                break
            paste(ground, sprite, left, top)
            items.append(sprite.at(left, top))
            left += w + int(size * rng.uniform(0.15, 0.6))
            tallest = max(tallest, h)
        top += (tallest or 4) + int(rng.integers(1, 10))
    if rng.random() < 0.35:
        ground += rng.standard_normal(ground.shape, dtype=np.float32) * np.float32(rng.uniform(2, 14))
    return Scene(compressed(rng, ground.clip(0, 255).round().astype(np.uint8), 0.3), tuple(items))


def resized(scene: Scene, height: int, width: int) -> Scene:
    """The scene at another size; boxes follow."""
    sy, sx = height / scene.pixels.shape[0], width / scene.pixels.shape[1]
    image = Image.fromarray(scene.pixels).resize((width, height), Image.Resampling.BICUBIC)
    return Scene(np.asarray(image), tuple(scaled(item, sx, sy) for item in scene.items))


def scaled(item: Item, sx: float, sy: float) -> Item:
    x1, y1, x2, y2 = item.box
    glyphs = tuple(Glyph(g.character, g.left * sx, g.right * sx) for g in item.glyphs)
    return replace(item, box=(round(x1 * sx), round(y1 * sy), round(x2 * sx), round(y2 * sy)), glyphs=glyphs)


def compressed(rng: np.random.Generator, pixels: np.ndarray, share: float) -> np.ndarray:
    """With probability `share`, the pixels after JPEG with halved chroma: what files (and H.264) do to them."""
    if rng.random() >= share:
        return pixels
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=int(rng.integers(55, 96)), subsampling=2)
    return np.asarray(Image.open(buffer).convert("RGB"))


# --- clips -----------------------------------------------------------------------------------------------------------


def clip(rng: np.random.Generator, height: int, width: int, num_frames: int, *, held_out: bool = False) -> Clip:
    """A short clip telling one of three stories, often with the marks of compression."""
    return _compressed_clip(rng, draw_clip(rng, height, width, num_frames, held_out=held_out))


def _compressed_clip(rng: np.random.Generator, drawn: Clip) -> Clip:
    share = float(rng.random() < 0.6)
    return replace(drawn, frames=np.stack([compressed(rng, frame, share) for frame in drawn.frames]))


def draw_clip(rng: np.random.Generator, height: int, width: int, num_frames: int, *, held_out: bool = False) -> Clip:
    """The same as drawn: before any compression."""
    story: Story = rng.choice(["appear", "replace", "move"], p=[0.4, 0.3, 0.3])
    ground = background(rng, height, width)
    side = min(height, width)
    paths: list[tuple[Sprite, list[tuple[int, int] | None]]] = []  # each sprite's corner in every frame, or absence
    entries: list[int] = []
    direction: Direction | None = None
    if story == "move":
        direction = rng.choice(["left", "right", "up", "down"])
        sprite = random_shape(rng, pick_pair(rng, ground, held_out=held_out), side, crowded=True)
        paths.append((sprite, _glide(rng, sprite, height, width, num_frames, direction)))
        entries.append(0)
    else:
        count = 2
        starts = sorted(rng.choice(num_frames // 2, count, replace=False) * 2)
        if story == "replace" or rng.random() < 0.5:
            starts[0] = 0
        starts = [int(s + (rng.random() < 0.3 and s > 0)) for s in starts]
        taken: list[Box] = []
        names: set[tuple[str, str]] = set()
        for index in range(count):
            pair = pick_pair(rng, ground, held_out=held_out)
            while pair in names:
                pair = pick_pair(rng, ground, held_out=held_out)
            names.add(pair)
            sprite = random_shape(rng, pair, side, crowded=story == "appear")
            spot = free_spot(rng, sprite, height, width, taken)
            if spot is None:
                continue
            end = starts[index + 1] if story == "replace" and index + 1 < count else num_frames
            if story == "appear":
                taken.append(sprite.at(*spot).box)
            paths.append((sprite, [spot if starts[index] <= i < end else None for i in range(num_frames)]))
            entries.append(starts[index])
    frames, items = [], []
    noise = rng.uniform(2, 8) if rng.random() < 0.3 else 0.0
    for i in range(num_frames):
        canvas = ground.copy()
        seen = [(sprite, corner) for sprite, path in paths if (corner := path[i]) is not None]
        for sprite, corner in seen:
            paste(canvas, sprite, *corner)
        if noise:
            canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(noise)
        frames.append(canvas.clip(0, 255).round().astype(np.uint8))
        items.append(tuple(sprite.at(*corner) for sprite, corner in seen))
    second_per_grid = float(rng.choice([0.5, 0.8, 1.0, 1.0, 1.0, 1.25, 1.5, 2.0]) * rng.uniform(0.95, 1.1))
    cast = tuple(sprite.item for sprite, _ in paths)
    return Clip(np.stack(frames), tuple(items), second_per_grid, story, cast, tuple(entries), direction)


def _glide(
    rng: np.random.Generator, sprite: Sprite, height: int, width: int, num_frames: int, direction: Direction
) -> list[tuple[int, int] | None]:
    """Corners along a straight way over at least half of the room there is."""
    h, w = sprite.mask.shape
    room = (width - w) if direction in ("left", "right") else (height - h)
    start, end = rng.uniform(0, 0.25) * room, rng.uniform(0.75, 1) * room
    along = np.linspace(start, end, num_frames).round().astype(int)
    if direction in ("left", "up"):
        along = along[::-1]
    if direction in ("left", "right"):
        y = int(rng.integers(0, height - h + 1))
        return [(int(x), y) for x in along]
    x = int(rng.integers(0, width - w + 1))
    return [(x, int(y)) for y in along]
