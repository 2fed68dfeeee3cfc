"""Scenes: seeded pictures and clips of shapes, writing, charts, tables and forms, with the facts that they show.

Knows what is drawn where and what it says; knows no questions and no model. Every scene is drawn for a split: what
`is_held_out` names never appears in training scenes, and test scenes are built around it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from saccade.evals.drawing import (
    COLOURS,
    SHAPES,
    Box,
    Canvas,
    Colour,
    Drawn,
    Pixels,
    Rng,
    Sprite,
    TextStyle,
    background,
    compressed,
    contrasting,
    finished,
    free_spot,
    ink,
    jitter,
    mixed,
    paste,
    pick_colour,
    pick_style,
    shape_sprite,
    text_sprite,
)

# Pairs of colour and shape that no training scene shows.
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
CONSONANTS, VOWELS = "CDHKLMPST", "AEIOU"  # of words, in turn
FOUR_LETTERS = 168  # pixels of width from which words have one letter more
HELD_OUT_ONE_IN = 8
LEVELS, FINE_LEVELS = 5, 10  # heights a bar may have, in small and in large charts
FINE_LINE_EVERY = 2  # levels of a large chart that share one line
FINE_CHART = 196  # pixels of height from which a chart has the finer scale
ROW_NAMES, COLUMN_NAMES = "ABC", "XYZ"
CELL = 28  # pixels of a table's cell
LINE = 28  # pixels of a form's line
LARGE_FORM = 224  # pixels of width from which a form is large
FIELDS = ("total", "tax", "tip", "cash", "date", "table", "order", "seats")  # of a form
FIRM = ("CAFE", "HOTEL", "PIZZA", "BAKERY", "MARKET")

# Where to a shape moves: pixels to the right and pixels down.
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up left": (-1, -1),
    "up right": (1, -1),
    "down left": (-1, 1),
    "down right": (1, 1),
}
STRAIGHT = tuple(DIRECTIONS)[:4]
SIDES = ("left", "right", "above", "below")


def is_held_out(*parts: object) -> bool:
    """One combination in eight, by checksum."""
    return zlib.crc32("|".join(map(str, parts)).encode()) % HELD_OUT_ONE_IN == 0


@dataclass(frozen=True)
class Scene:
    """pixels: [H, W, 3]; things do not overlap. facts: names with their values, of charts, tables and forms; `is_new` says
    which of them are combinations no training scene holds."""

    pixels: Pixels
    things: tuple[Drawn, ...]
    facts: tuple[tuple[str, str], ...] = ()
    is_new: tuple[bool, ...] = ()

    @property
    def shapes(self) -> list[Drawn]:
        return [thing for thing in self.things if thing.is_shape]

    @property
    def texts(self) -> list[Drawn]:
        return [thing for thing in self.things if thing.text]


@dataclass(frozen=True)
class Clip:
    """frames: [F, H, W, 3], two a second; things: what is to be seen in each frame.

    cast: the shapes in the order in which they first show; entries: the frames in which they do. direction: of the one shape
    that moves, or None where shapes come one after the other.
    """

    frames: Pixels
    things: tuple[tuple[Drawn, ...], ...]
    cast: tuple[Drawn, ...]
    entries: tuple[int, ...]
    direction: str | None = None


FRAMES_PER_SECOND = 2
SHORT_CLIP, SHORT_MOVE = 6, 4  # frames up to which shapes appear, or move, in the simplest way


# --- shapes ----------------------------------------------------------------------------------------------------------


def pick_pair(rng: Rng, ground: Canvas, *, test: bool) -> tuple[str, str]:
    """A colour and a shape: a pair seen in training, or (in test scenes, two times in three) one that never is."""
    want_held_out = test and rng.random() < 2 / 3
    while True:
        pair = pick_colour(rng, ground), str(rng.choice(SHAPES))
        if (pair in HELD_OUT_PAIRS) == want_held_out:
            return pair


def _shape(rng: Rng, pair: tuple[str, str], side: int, largest: float) -> Sprite:
    colour, kind = pair
    size = int(np.clip(side * rng.uniform(0.26, largest), 24, side - 6))
    return shape_sprite(kind, colour, jitter(rng, COLOURS[colour]), size, rng.uniform(-0.16, 0.16))


def shapes(rng: Rng, height: int, width: int, *, test: bool) -> Scene:
    """One to three shapes; in three pictures of ten some are alike."""
    canvas = background(rng, height, width)
    count = int(rng.choice([1, 2, 3], p=[0.2, 0.4, 0.4]))
    repeat = 0.0 if rng.random() < 0.7 else 0.6
    pairs: list[tuple[str, str]] = []
    while len(pairs) < count:
        again = bool(pairs) and rng.random() < repeat
        pairs.append(pairs[int(rng.integers(len(pairs)))] if again else pick_pair(rng, canvas, test=test))
    things: list[Drawn] = []
    for pair in pairs:
        sprite = _shape(rng, pair, min(height, width), 0.4 if count > 2 else 0.5)
        spot = free_spot(rng, sprite, height, width, [thing.box for thing in things])
        if spot is not None:
            things.append(paste(canvas, sprite, *spot))
    return Scene(finished(rng, canvas), tuple(things))


def couple(rng: Rng, height: int, width: int, *, test: bool) -> Scene:
    """Two shapes of different kinds, one opposite the other: left and right, or above and below."""
    canvas = background(rng, height, width)
    first = pick_pair(rng, canvas, test=test)
    second = first
    while second[1] == first[1]:
        second = pick_pair(rng, canvas, test=test)
    across = rng.random() < 0.5
    things = []
    for number, pair in enumerate((first, second)):
        sprite = _shape(rng, pair, min(height, width), 0.36)
        h, w = sprite.mask.shape
        along, aside = (width - w, height - h) if across else (height - h, width - w)
        # At one end or the other of one axis, near the middle of the other.
        near = rng.uniform(0, 0.12) if number == 0 else rng.uniform(0.88, 1)
        a, b = round(near * along), round(rng.uniform(0.35, 0.65) * aside)
        drawn = paste(canvas, sprite, *((a, b) if across else (b, a)))
        things.append(replace(drawn, meaning=SIDES[number + 2 * (not across)]))
    return Scene(finished(rng, canvas), tuple(things))


def quarters(rng: Rng, height: int, width: int, *, test: bool) -> Scene:
    """One or two large shapes of different kinds, each in a quarter of its own."""
    canvas = background(rng, height, width)
    count = int(rng.integers(1, 3))
    pairs: list[tuple[str, str]] = []
    while len(pairs) < count:
        pair = pick_pair(rng, canvas, test=test)
        pairs += [pair] if pair[1] not in [kind for _, kind in pairs] else []
    things = []
    for (colour, kind), quarter in zip(pairs, rng.permutation(4), strict=False):
        size = int(min(height, width) * rng.uniform(0.36, 0.44))
        sprite = shape_sprite(kind, colour, jitter(rng, COLOURS[colour]), size, rng.uniform(-0.1, 0.1))
        h, w = sprite.mask.shape
        row, column = divmod(int(quarter), 2)
        x = width // 2 * column + int(rng.integers(0, width // 2 - w + 1))
        y = height // 2 * row + int(rng.integers(0, height // 2 - h + 1))
        things.append(paste(canvas, sprite, x, y))
    return Scene(finished(rng, canvas), tuple(things))


# --- writing ---------------------------------------------------------------------------------------------------------


def pick_number(rng: Rng, *, test: bool, lengths: tuple[int, ...] = (2,)) -> str:
    """Digits without a leading zero; held-out strings in test scenes alone."""
    while True:
        length = int(rng.choice(lengths))
        text = str(rng.integers(10 ** (length - 1), 10**length))
        if is_held_out(text) == test:
            return text


def pick_word(rng: Rng, *, test: bool, length: int = 3) -> str:
    """Consonants and vowels in turn."""
    while True:
        text = "".join(str(rng.choice(list((CONSONANTS, VOWELS)[i % 2]))) for i in range(length))
        if is_held_out(text) == test:
            return text


def writing(rng: Rng, height: int, width: int, kind: Literal["number", "word"], *, test: bool) -> Scene:
    """A number or a word, large, in one colour; one in four is pale against its ground. Words have three letters, in pictures
    wide enough four."""
    canvas = background(rng, height, width)
    length = 4 if width >= FOUR_LETTERS else 3
    text = pick_number(rng, test=test) if kind == "number" else pick_word(rng, test=test, length=length)
    colour = pick_colour(rng, canvas)
    rgb = jitter(rng, COLOURS[colour])
    if rng.random() < 0.25:
        red, green, blue = canvas.reshape(-1, 3).mean(0)
        rgb = mixed(rgb, (float(red), float(green), float(blue)), 0.4)
    size = int(rng.uniform(26, 46))
    style = pick_style(rng)
    while True:
        sprite = text_sprite(text, colour, rgb, size, style)
        spot = free_spot(rng, sprite, height, width, [])
        if spot is not None:
            drawn = paste(canvas, sprite, *spot)
            return Scene(finished(rng, canvas), (drawn,))
        size = int(size * 0.9)


def page(rng: Rng, height: int, width: int) -> Scene:
    """A picture filled with lines of numbers and words: many glyphs at once to learn reading from."""
    canvas = background(rng, height, width)
    things: list[Drawn] = []
    top = int(rng.integers(0, 8))
    while True:
        size, style = int(rng.uniform(20, 46)), pick_style(rng)
        colour = pick_colour(rng, canvas)
        if top + size + 4 > height:
            return Scene(finished(rng, canvas), tuple(things))
        left, tallest = int(rng.integers(0, 12)), 0
        while True:
            is_word = rng.random() < 0.4
            text = pick_word(rng, test=False) if is_word else pick_number(rng, test=False, lengths=(1, 2))
            sprite = text_sprite(text, colour, jitter(rng, COLOURS[colour]), size, style)
            h, w = sprite.mask.shape
            if left + w > width or top + h > height:
                break
            things.append(paste(canvas, sprite, left, top))
            left += w + int(size * rng.uniform(0.15, 0.6))
            tallest = max(tallest, h)
        top += (tallest or 4) + int(rng.integers(1, 10))


# --- charts, tables, forms -------------------------------------------------------------------------------------------


def _facts(
    rng: Rng, medium: str, names: Callable[[], Sequence[str]], options: Sequence[int], *, test: bool
) -> tuple[tuple[tuple[str, str], ...], tuple[bool, ...]]:
    """A value for each name, and whether the two are a combination held out: none in training, at least one in tests.

    Names are drawn anew with their values: some have no value that would do.
    """
    while True:
        facts = tuple((name, str(rng.choice(options))) for name in names())
        is_new = tuple(is_held_out(medium, *fact) for fact in facts)
        if any(is_new) == test:
            return facts, is_new


def _line(canvas: Canvas, rgb: Colour, box: Box) -> None:
    canvas[box[1] : box[3], box[0] : box[2]] = np.asarray(rgb, dtype=np.float32)


def chart(rng: Rng, height: int, width: int, *, test: bool) -> Scene:
    """Bars of different colours before lines that are numbered at the left: two to four between 1 and LEVELS high with a line at
    every level, or in large charts four to six between 1 and FINE_LEVELS with a line at every second. A combination is a
    colour, a place and a height."""
    canvas = background(rng, height, width)
    print_rgb = ink(canvas)
    left, bottom = 26, height - 8
    is_fine = height >= FINE_CHART
    levels, line_every = (FINE_LEVELS, FINE_LINE_EVERY) if is_fine else (LEVELS, 1)
    level = (bottom - 10) / levels
    ground: Colour = (float(canvas[..., 0].mean()), float(canvas[..., 1].mean()), float(canvas[..., 2].mean()))
    for number in range(0, levels + 1, line_every):
        y = round(bottom - number * level)
        _line(canvas, mixed(ground, print_rgb, 0.9 if number == 0 else 0.3), (left - 4, y, width - 4, y + 1))
        mark = text_sprite(str(number), "", print_rgb, 14)
        h = len(mark.mask)
        paste(canvas, mark, 2, min(max(y - h // 2, 0), height - h))
    count = int(rng.integers(4, 7)) if is_fine else int(rng.choice([2, 3, 4], p=[0.3, 0.4, 0.3]))
    count = min(count, len(contrasting(canvas)))
    pitch = (width - 6 - left) / count

    def pick_places() -> list[str]:
        colours: list[str] = []
        while len(colours) < count:
            colour = pick_colour(rng, canvas)
            colours += [colour] if colour not in colours else []
        return [f"{colour}|{place}" for place, colour in enumerate(colours)]

    heights, is_new = _facts(rng, "chart", pick_places, range(1, levels + 1), test=test)
    facts = tuple((place.split("|")[0], value) for place, value in heights)
    things: list[Drawn] = []
    for place, (colour, value) in enumerate(facts):
        x = left + pitch * (place + 0.5)
        half = pitch * rng.uniform(0.28, 0.4)
        box = (round(x - half), round(bottom - int(value) * level), round(x + half), bottom)
        _line(canvas, jitter(rng, COLOURS[colour]), box)
        things.append(Drawn("bar", colour, box, meaning=value))
    return Scene(finished(rng, canvas), tuple(things), facts, is_new)


def table(rng: Rng, height: int, width: int, *, test: bool) -> Scene:
    """Rows (A, B, C) by columns (X, Y, Z) of one digit each, headed and ruled; as many as there is room for cells. A combination
    is a row, a column and a digit."""
    canvas = background(rng, height, width)
    rows, columns = height // CELL - 1, width // CELL - 1
    print_rgb = ink(canvas)
    line_rgb = mixed(print_rgb, COLOURS["white" if print_rgb == COLOURS["black"] else "black"], 0.45)
    ys, xs = ([round(size * i / (n + 1)) for i in range(n + 2)] for size, n in ((height, rows), (width, columns)))
    for y in ys[1:-1]:
        _line(canvas, line_rgb, (0, y, width, y + 1))
    for x in xs[1:-1]:
        _line(canvas, line_rgb, (x, 0, x + 1, height))
    size = int(rng.uniform(19, 24))
    head, body = TextStyle(stroke=1), TextStyle(stroke=int(rng.random() < 0.3))
    things: list[Drawn] = []

    def write(text: str, row: int, column: int, colour: str, style: TextStyle, name: str = "") -> None:
        rgb = print_rgb if colour in ("black", "white") else jitter(rng, COLOURS[colour])
        sprite = text_sprite(text, colour, rgb, size, style)
        h, w = sprite.mask.shape
        drawn = paste(canvas, sprite, (xs[column] + xs[column + 1] - w) // 2, (ys[row] + ys[row + 1] - h) // 2)
        things.append(replace(drawn, meaning=name))

    print_name = "black" if print_rgb == COLOURS["black"] else "white"
    head_name = pick_colour(rng, canvas)
    for row in range(rows):
        write(ROW_NAMES[row], row + 1, 0, head_name, head)
    for column in range(columns):
        write(COLUMN_NAMES[column], 0, column + 1, head_name, head)
    names = [row + column for row in ROW_NAMES[:rows] for column in COLUMN_NAMES[:columns]]
    facts, is_new = _facts(rng, "table", lambda: names, range(10), test=test)
    for name, value in facts:
        write(value, ROW_NAMES.index(name[0]) + 1, COLUMN_NAMES.index(name[1]) + 1, print_name, body, name)
    return Scene(finished(rng, canvas), tuple(things), facts, is_new)


def form(rng: Rng, height: int, width: int, *, test: bool) -> Scene:
    """A receipt: a firm's name over lines with a field and a digit each. Small receipts have one or two, at the left edge;
    large ones up to four, anywhere below the name. A combination is a field and its digit."""
    level = float(rng.choice([250, 235]))
    canvas = np.full((height, width, 3), jitter(rng, (level, level, level), 8), dtype=np.float32)
    black = COLOURS["black"]
    is_large = width >= LARGE_FORM
    count = int(rng.integers(1, 5 if is_large else 3))
    right = LINE * int(rng.integers(0, width // LINE - 4)) if is_large else 0
    down = LINE * int(rng.integers(0, height // LINE - 2 - count)) if is_large else 0
    style = TextStyle(stroke=int(rng.random() < 0.3))
    title = text_sprite(str(rng.choice(FIRM)), "black", black, 24, TextStyle(stroke=1))
    things = [paste(canvas, title, (width - title.mask.shape[1]) // 2, 8)]
    _line(canvas, black, (10, 2 * LINE - 8, width - 10, 2 * LINE - 6))
    facts, is_new = _facts(
        rng, "form", lambda: [FIELDS[i] for i in rng.permutation(len(FIELDS))[:count]], range(1, 10), test=test
    )
    size = int(rng.uniform(19, 21))
    for index, (name, value) in enumerate(facts):
        middle = down + LINE * (index + 2.5)
        label = text_sprite(name.upper(), "black", black, size, style)
        number = text_sprite(value, "black", black, size, style)
        for sprite, x in ((label, 8), (number, round(3.5 * LINE - number.mask.shape[1] / 2))):
            drawn = paste(canvas, sprite, right + x, round(middle - sprite.mask.shape[0] / 2))
            things.append(replace(drawn, meaning=name))
    return Scene(finished(rng, canvas), tuple(things), facts, is_new)


# --- clips -----------------------------------------------------------------------------------------------------------


def appearing(rng: Rng, height: int, width: int, num_frames: int, *, test: bool) -> Clip:
    """One shape in every second, each another."""
    ground = background(rng, height, width)
    shown: list[tuple[Sprite, tuple[int, int]]] = []
    while len(shown) < num_frames // FRAMES_PER_SECOND:
        sprite = _shape(rng, pick_pair(rng, ground, test=test), min(height, width), 0.45)
        spot = free_spot(rng, sprite, height, width, [])
        if spot is not None and sprite.drawn.name not in [other.drawn.name for other, _ in shown]:
            shown.append((sprite, spot))
    frames = [[shown[i // FRAMES_PER_SECOND]] for i in range(num_frames)]
    entries = tuple(range(0, num_frames, FRAMES_PER_SECOND))
    return _clip(rng, ground, frames, tuple(sprite.drawn for sprite, _ in shown), entries, None)


def entering(rng: Rng, height: int, width: int, num_frames: int, *, test: bool) -> Clip:
    """One shape that comes at some second, the first included, and stays; in long clips at any half second."""
    ground = background(rng, height, width)
    sprite = _shape(rng, pick_pair(rng, ground, test=test), min(height, width), 0.5)
    spot = free_spot(rng, sprite, height, width, [])
    assert spot is not None  # it is at most half as large as the picture
    step = 1 if num_frames > SHORT_CLIP else FRAMES_PER_SECOND
    entry = int(rng.integers(num_frames // step)) * step
    frames = [[(sprite, spot)] if i >= entry else [] for i in range(num_frames)]
    return _clip(rng, ground, frames, (sprite.drawn,), (entry,), None)


def moving(rng: Rng, height: int, width: int, num_frames: int, *, test: bool) -> Clip:
    """One shape that crosses most of the picture, straight; in long clips it goes aslant too, and may go half the way only."""
    ground = background(rng, height, width)
    is_long = num_frames > SHORT_MOVE
    direction = str(rng.choice(tuple(DIRECTIONS) if is_long else STRAIGHT))
    sprite = _shape(rng, pick_pair(rng, ground, test=test), min(height, width), 0.36)
    sprite = replace(sprite, drawn=replace(sprite.drawn, meaning=direction))
    h, w = sprite.mask.shape
    share = rng.uniform(0.45, 1.0) if is_long else rng.uniform(0.7, 1.0)
    axes = zip((width - w, height - h), DIRECTIONS[direction], strict=True)
    paths = [_path(rng, room, towards, share, num_frames) for room, towards in axes]
    frames = [[(sprite, spot)] for spot in zip(*paths, strict=True)]
    return _clip(rng, ground, frames, (sprite.drawn,), (0,), direction)


def _path(rng: Rng, room: int, towards: int, share: float, num_frames: int) -> list[int]:
    """Places on one axis, of `room` there are: a share of it forwards (1) or backwards (-1), or one place all the time (0)."""
    way = share * room * abs(towards)
    start = rng.uniform(0, room - way)
    along = np.linspace(start, start + way, num_frames).round().astype(int)
    return [int(at) for at in along[:: towards or 1]]


def _clip(
    rng: Rng,
    ground: Canvas,
    shown: list[list[tuple[Sprite, tuple[int, int]]]],
    cast: tuple[Drawn, ...],
    entries: tuple[int, ...],
    direction: str | None,
) -> Clip:
    noise = float(rng.uniform(2, 8)) if rng.random() < 0.3 else 0.0
    is_compressed = rng.random() < 0.5
    frames, things = [], []
    for sprites in shown:
        canvas = ground.copy()
        things.append(tuple(paste(canvas, sprite, *spot) for sprite, spot in sprites))
        if noise:
            canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(noise)
        pixels = canvas.clip(0, 255).round().astype(np.uint8)
        frames.append(compressed(rng, pixels) if is_compressed else pixels)
    return Clip(np.stack(frames), tuple(things), cast, entries, direction)
