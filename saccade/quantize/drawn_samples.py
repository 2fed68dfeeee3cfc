"""Pictures with questions and answers, drawn from a seed: what calibration is shown where no data is at hand.

Answers matter: most of what a served model computes for itself are the tokens it wrote. So everything drawn here is known, and asked
about in the ways vision-language models are used: reading text, counting, colours, boxes, charts, tables, forms, descriptions.
Knows pens and seeds; knows no model and no tokens.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

UNIT = 28  # pixels of a side are multiples of it: what a merged patch covers
COLOURS = {
    "red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220), "yellow": (240, 210, 50), "orange": (240, 140, 40),
    "purple": (140, 60, 180), "black": (20, 20, 20), "white": (250, 250, 250), "pink": (240, 150, 190), "brown": (130, 85, 50),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "rectangle", "ellipse")
WORDS = (
    "OPEN",
    "SALE",
    "EXIT",
    "total",
    "Hotel",
    "Park",
    "COFFEE",
    "Monday",
    "north",
    "Please wait",
    "MENU",
    "Platform 4",
)
KEYS = ("name", "date", "total", "city", "item", "price", "tax", "code")
VALUES = ("Ada", "Oslo", "bread", "12.50", "2024-05-17", "A-17", "3", "48", "Lima", "tea")


@dataclass(frozen=True)
class Drawn:
    picture: Image.Image
    question: str
    answer: str


def drawn(seed: int) -> Drawn:
    """One picture with a question about it; the kinds take turns with the seed."""
    dice = random.Random(seed)
    return _KINDS[seed % len(_KINDS)](dice)


def _canvas(dice: random.Random, least: int = 2, most: int = 12) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A background of one colour, or a gradient between four, with a little noise on half of them."""
    size = dice.randint(least, most) * UNIT, dice.randint(least, most) * UNIT
    if dice.random() < 0.5:
        picture = Image.new("RGB", size, tuple(dice.randint(190, 255) for _ in range(3)))
    else:
        corners = np.array([[[dice.randint(90, 255) for _ in range(3)] for _ in range(2)] for _ in range(2)], np.uint8)
        picture = Image.fromarray(corners).resize(size, Image.Resampling.BILINEAR)
        noise = np.random.default_rng(dice.getrandbits(32)).normal(0, dice.uniform(0, 12), (size[1], size[0], 3))
        picture = Image.fromarray((np.asarray(picture) + noise).clip(0, 255).astype(np.uint8))
    return picture, ImageDraw.Draw(picture)


def _shape(pen: ImageDraw.ImageDraw, shape: str, box: tuple[int, int, int, int], colour: str) -> None:
    left, top, right, bottom = box
    ink = COLOURS[colour]
    if shape in ("circle", "ellipse"):
        pen.ellipse(box, fill=ink)
    elif shape == "triangle":
        pen.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=ink)
    else:
        pen.rectangle(box, fill=ink)


def _place(dice: random.Random, size: tuple[int, int], shape: str) -> tuple[int, int, int, int]:
    width = dice.randint(10, max(11, min(size) // 2))
    height = width if shape in ("circle", "square") else dice.randint(10, max(11, min(size) // 2))
    left, top = dice.randint(0, size[0] - width - 1), dice.randint(0, size[1] - height - 1)
    return left, top, left + width, top + height


def _some_shapes(dice: random.Random) -> tuple[Image.Image, list[tuple[str, str, tuple[int, int, int, int]]]]:
    picture, pen = _canvas(dice)
    found = []
    for shape, colour in zip(
        dice.sample(SHAPES, dice.randint(1, 4)), dice.sample(list(COLOURS), len(SHAPES)), strict=False
    ):
        box = _place(dice, picture.size, shape)
        _shape(pen, shape, box, colour)
        found.append((shape, colour, box))
    return picture, found


# --- the kinds -------------------------------------------------------------------------------------------------------


def _text(dice: random.Random) -> Drawn:
    picture, pen = _canvas(dice, 2, 8)
    text = dice.choice(
        [dice.choice(WORDS), str(dice.randint(0, 9999)), f"{dice.randint(1, 99)}.{dice.randint(10, 99)}"]
    )
    ink = COLOURS[dice.choice(("black", "blue", "red", "purple"))]
    place = dice.randint(2, picture.width // 3), dice.randint(2, picture.height // 2)
    pen.text(place, text, fill=ink, font_size=dice.randint(12, 28))
    return Drawn(picture, dice.choice(("What is written here?", "Read the text in the picture.")), text)


def _count(dice: random.Random) -> Drawn:
    picture, pen = _canvas(dice, 2, 8)
    shape, colour, number = dice.choice(SHAPES), dice.choice(list(COLOURS)), dice.randint(1, 6)
    for _ in range(number):
        _shape(pen, shape, _place(dice, (picture.width, picture.height), shape), colour)
    plural = shape if number == 1 else f"{shape}s"
    return Drawn(picture, f"How many {shape}s are there?", f"There {'is' if number == 1 else 'are'} {number} {plural}.")


def _colour(dice: random.Random) -> Drawn:
    picture, found = _some_shapes(dice)
    shape, colour, _ = found[-1]
    if dice.random() < 0.5:
        return Drawn(picture, f"What colour is the {shape}?", colour)
    return Drawn(picture, f"Which shape is {colour}?", shape)


def _box(dice: random.Random) -> Drawn:
    picture, found = _some_shapes(dice)
    lines = [json.dumps({"bbox_2d": list(box), "label": f"{colour} {shape}"}) for shape, colour, box in found]
    answer = "```json\n[\n\t" + ",\n\t".join(lines) + "\n]\n```"
    return Drawn(picture, "Locate every shape and give the boxes in JSON.", answer)


def _bars(dice: random.Random) -> Drawn:
    picture, pen = _canvas(dice, 4, 8)
    names = dice.sample(list(COLOURS), dice.randint(2, 4))
    heights = [dice.randint(1, 9) for _ in names]
    width = picture.width // (len(names) + 1)
    for number, (name, height) in enumerate(zip(names, heights, strict=True)):
        left, top = (2 * number + 1) * width // 2, picture.height - 12 - height * (picture.height - 24) // 9
        pen.rectangle((left, top, left + width * 2 // 3, picture.height - 12), fill=COLOURS[name], outline=(0, 0, 0))
        pen.text((left, top - 11), str(height), fill=(0, 0, 0), font_size=10)
    at = dice.randrange(len(names))
    if dice.random() < 0.5:
        return Drawn(picture, f"What is the value of the {names[at]} bar?", str(heights[at]))
    return Drawn(picture, "Which bar is the highest?", names[heights.index(max(heights))])


def _table(dice: random.Random) -> Drawn:
    picture, pen = _canvas(dice, 4, 7)
    rows, columns = dice.randint(2, 3), dice.randint(2, 3)
    cells = [[dice.randint(0, 99) for _ in range(columns)] for _ in range(rows)]
    for row in range(rows + 1):
        for column in range(columns + 1):
            text = (
                ("" if column == 0 else "XYZ"[column - 1])
                if row == 0
                else "ABC"[row - 1]
                if column == 0
                else str(cells[row - 1][column - 1])
            )
            place = column * picture.width // (columns + 1) + 4, row * picture.height // (rows + 1) + 4
            pen.text(place, text, fill=(0, 0, 0), font_size=14)
    row, column = dice.randrange(rows), dice.randrange(columns)
    return Drawn(picture, f"What stands in row {'ABC'[row]}, column {'XYZ'[column]}?", str(cells[row][column]))


def _form(dice: random.Random) -> Drawn:
    picture, pen = _canvas(dice, 5, 9)
    fields = dict(zip(dice.sample(KEYS, dice.randint(2, 4)), dice.sample(VALUES, 4), strict=False))
    for number, (key, value) in enumerate(fields.items()):
        pen.text((6, 6 + number * picture.height // 5), f"{key}: {value}", fill=(0, 0, 0), font_size=14)
    if dice.random() < 0.5:
        return Drawn(picture, "Return all fields as JSON.", json.dumps(fields))
    key = dice.choice(list(fields))
    return Drawn(picture, f"What is the {key}? Answer in JSON.", json.dumps({key: fields[key]}))


def _description(dice: random.Random) -> Drawn:
    picture, found = _some_shapes(dice)
    things = [f"a {colour} {shape}" for shape, colour, _ in found]
    listed = things[0] if len(things) == 1 else f"{', '.join(things[:-1])} and {things[-1]}"
    return Drawn(picture, "Please describe this picture.", f"The picture shows {listed}.")


_KINDS: tuple[Callable[[random.Random], Drawn], ...] = (
    _text, _count, _colour, _box, _bars, _table, _form, _description,
)  # fmt: skip
