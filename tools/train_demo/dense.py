"""What every merged unit of a slice shows, as targets for throw-away heads on the tower: they teach it to see early on.

Knows what is drawn and the unit grid; knows no words. Letters: N slices, R x C units of a slice, U = R * C.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.evals.drawing import COLOURS, DIGITS, LETTERS, SHAPES, Drawn
from saccade.evals.scenes import COLUMN_NAMES, DIRECTIONS, FIELDS, FINE_LEVELS, ROW_NAMES, SIDES

UNIT = 28  # pixels per merged unit's side
EDGE_BINS, EDGE_STEP = 112, 4  # where a box's edges lie in the picture, in steps of so many pixels
COLUMNS = 3  # strips of a unit that each name the character they show
KINDS = (*SHAPES, "number", "word")
SEEN_AS = {"bar": "square"}  # what looks alike shares a kind
CHARACTERS = DIGITS + LETTERS
MEANINGS = (
    *FIELDS,
    *(str(level) for level in range(1, FINE_LEVELS + 1)),
    *(row + column for row in ROW_NAMES for column in COLUMN_NAMES),
    *dict.fromkeys((*SIDES, *DIRECTIONS)),
)
_COLOUR_NAMES = tuple(COLOURS)


@dataclass(frozen=True)
class DenseTargets:
    """kind, colour, meaning: [N, U] int64, 0 where nothing is; box: [N, U, 4] edges from the unit's centre in units;
    characters: [N, U, COLUMNS] int64, 0 for none; place: [U, 2] the unit's own column and row."""

    kind: Tensor
    colour: Tensor
    box: Tensor
    characters: Tensor
    meaning: Tensor
    place: Tensor

    @property
    def edges(self) -> Tensor:
        """[N, U, 4] int64: the box's edges from the picture's corner, in bins."""
        pixels = (self.box + (self.place + 0.5).repeat(1, 2)) * UNIT
        return (pixels / EDGE_STEP).long().clamp(0, EDGE_BINS - 1)


def dense_targets(slices: Sequence[Sequence[Drawn]], height: int, width: int) -> DenseTargets:
    """Targets for slices of height x width pixels, each with the things it shows."""
    rows, columns = height // UNIT, width // UNIT
    shape = (len(slices), rows, columns)
    kind, colour, meaning = (np.zeros(shape, np.int64) for _ in range(3))
    box, characters = np.zeros((*shape, 4), np.float32), np.zeros((*shape, COLUMNS), np.int64)
    for n, things in enumerate(slices):
        for thing in things:
            x1, y1, x2, y2 = thing.box
            # Units whose centre lies in the box, and in any case the one that holds the box's centre.
            row_span = _span(y1, y2, rows)
            column_span = _span(x1, x2, columns)
            kind[n, row_span, column_span] = KINDS.index(SEEN_AS.get(thing.kind, thing.kind)) + 1
            colour[n, row_span, column_span] = _COLOUR_NAMES.index(thing.colour) + 1
            if thing.meaning:
                meaning[n, row_span, column_span] = MEANINGS.index(thing.meaning) + 1
            ys = (np.arange(rows)[row_span] + 0.5) * UNIT
            xs = (np.arange(columns)[column_span] + 0.5) * UNIT
            area = box[n, row_span, column_span]
            area[..., 0], area[..., 2] = (x1 - xs) / UNIT, (x2 - xs) / UNIT
            area[..., 1], area[..., 3] = ((y1 - ys) / UNIT)[:, None], ((y2 - ys) / UNIT)[:, None]
            if thing.text:
                strips = characters[n].reshape(rows, -1)  # a view: strips run on through the row
                width_of_strip = UNIT / COLUMNS
                for glyph in thing.glyphs:
                    first = round(glyph.left / width_of_strip)
                    last = max(round(glyph.right / width_of_strip), first + 1)
                    strips[row_span, max(first, 0) : last] = CHARACTERS.index(glyph.character) + 1
    flat = [
        torch.from_numpy(a.reshape(len(slices), rows * columns, *a.shape[3:]))
        for a in (kind, colour, box, characters, meaning)
    ]
    place = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1).reshape(-1, 2).astype(np.float32)
    return DenseTargets(*flat, place=torch.from_numpy(place))


def _span(low: float, high: float, count: int) -> slice:
    first, last = round(low / UNIT), round(high / UNIT)
    if last <= first:
        first = min(int((low + high) / 2 / UNIT), count - 1)
        last = first + 1
    return slice(first, last)


class DenseHead(nn.Module):
    """Linear read-outs of the tower's features; only used while training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = (len(KINDS) + 1, len(COLOURS) + 1, 4, COLUMNS * (len(CHARACTERS) + 1), 2)
        self.read = nn.Linear(width, sum(self.sizes))
        self.read_edges = nn.Linear(width, 4 * EDGE_BINS)
        self.read_meaning = nn.Linear(width, len(MEANINGS) + 1)

    def losses(self, units: Tensor, targets: DenseTargets) -> dict[str, Tensor]:
        """units: [N, U, H]. Mean losses by name."""
        kind, colour, box, characters, place = self.read(units.float()).split(self.sizes, dim=-1)
        present = targets.kind > 0
        texts = targets.kind > len(SHAPES)
        letters = characters.unflatten(-1, (COLUMNS, -1))
        meant = targets.meaning > 0
        meaning = self.read_meaning(units[meant].float())
        edges = self.read_edges(units[present].float()).view(-1, EDGE_BINS)
        return {
            "kind": F.cross_entropy(kind.flatten(0, 1), targets.kind.flatten()),
            "colour": F.cross_entropy(colour.flatten(0, 1), targets.colour.flatten()),
            "meaning": F.cross_entropy(meaning, targets.meaning[meant]) if meant.any() else meaning.sum(),
            "place": F.l1_loss(place, targets.place.expand_as(place)),
            "edges": F.cross_entropy(edges, targets.edges[present].flatten()) if present.any() else edges.sum(),
            "box": F.l1_loss(box[present], targets.box[present]) if present.any() else box.sum() * 0,
            "characters": F.cross_entropy(letters[texts].flatten(0, 1), targets.characters[texts].flatten())
            if texts.any()
            else letters.sum() * 0,
        }
