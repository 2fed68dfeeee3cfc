"""How a product is cut into tiles for a card: as measured there, where it was; else by a rule that suits any.

`tuned/CARD.json` holds what `python -m tools.tune_triton` found fastest on a card of that name: cuts by scheme, rows and shape.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import triton

from saccade.kernels.triton_common import IS_INTERPRETED
from saccade.schemes.scheme import W8A16, Weight

FOLDER = Path(__file__).parent / "tuned"
FEW_ROWS = 16  # up to here reading the weight takes all the time
MAX_SPLITS = 16
TUNED_ROWS = (1, 16, 64, 1024)  # a product takes the cut of the next larger of these, beyond the last of the last
ONE_ROW_TILE = (4096, 256) if IS_INTERPRETED else (4, 1024)  # outputs and columns; interpreted, programs are what costs


@dataclass(frozen=True)
class Cut:
    """The tile a program computes, how often the columns are split, and what Triton is told about running it.

    block_t 1: by the kernel for one row, which splits nothing and whose stages are its own.
    """

    block_t: int
    block_o: int
    block_h: int
    splits: int
    num_warps: int
    num_stages: int

    @property
    def is_for_one_row(self) -> bool:
        return self.block_t == 1

    def fits(self, weight: Weight) -> bool:
        """Whether the kernel computes `weight` so: tiles of 4 bits and groups must agree, and splitting pays with few rows alone."""
        scheme, group = weight.scheme, weight.scheme.group_size
        if self.is_for_one_row:
            return has_one_row_kernel(weight)
        if group is None:
            return True
        if scheme.is_two_stage:  # nibbles of a kind lie in half a tile's columns, and int8 is multiplied 32 at a time
            return self.block_h >= 64 and (self.block_h % group == 0 or group % self.block_h == 0)
        return self.block_h <= group and group % self.block_h == 0


def has_one_row_kernel(weight: Weight) -> bool:
    return weight.scheme.is_dense or weight.scheme == W8A16


def cut_for(num_rows: int, weight: Weight, itemsize: int, device: torch.device) -> Cut | None:
    """As measured on this card, else by the rule; None: cuBLAS multiplies, as it does all dense weights but for one row."""
    table = _table(device)
    key = key_of(num_rows, weight)
    if key in table:
        return table[key]
    return None if weight.scheme.is_dense and num_rows != 1 else cut_of(num_rows, weight, itemsize, device)


def cut_of(num_rows: int, weight: Weight, itemsize: int, device: torch.device) -> Cut:
    """For any card: tiles of usual size; few rows are split until the card is busy. `itemsize`: bytes of a value of x."""
    scheme, num_outputs, num_columns = weight.scheme, weight.out_features, weight.in_features
    if num_rows == 1 and has_one_row_kernel(weight):
        outputs, columns = ONE_ROW_TILE
        return Cut(1, outputs, min(columns, max(16, triton.next_power_of_2(num_columns))), 1, num_warps=4, num_stages=1)
    if num_rows <= FEW_ROWS:
        block_t, block_o, block_h, num_warps, num_stages = 16, 64 if scheme.weight_bits == 4 else 32, 256, 4, 4
    elif num_rows <= 64:
        block_t, block_o, block_h, num_warps, num_stages = 64, 64, 128, 4, 3
    else:
        block_t, block_o, block_h, num_warps, num_stages = 128, 128, 128, 8, 3
    if itemsize > 1:
        block_h //= itemsize
    if scheme.group_size is not None:
        block_h = min(block_h, scheme.group_size)
        if scheme.is_two_stage:
            block_h = max(block_h, 64)
    splits = 1
    tiles = triton.cdiv(num_rows, block_t) * triton.cdiv(num_outputs, block_o)
    while num_rows <= FEW_ROWS and tiles * splits < num_programs(device) and 2 * splits <= MAX_SPLITS:
        if num_columns < 4 * splits * block_h:  # every part has two tiles of columns or more
            break
        splits *= 2
    return Cut(block_t, block_o, block_h, splits, num_warps, num_stages)


@lru_cache(maxsize=16)
def num_programs(device: torch.device) -> int:
    """Programs that keep a card busy while it reads: four for each multiprocessor. Interpreted, a few."""
    return 8 if device.type == "cpu" else 4 * int(torch.cuda.get_device_properties(device).multi_processor_count)


# --- as measured -----------------------------------------------------------------------------------------------------


def key_of(num_rows: int, weight: Weight) -> str:
    rows = next((rows for rows in TUNED_ROWS if num_rows <= rows), TUNED_ROWS[-1])
    return f"{weight.scheme.name}, {rows} x {weight.in_features} -> {weight.out_features}"


def path_of(card: str) -> Path:
    return FOLDER / f"{card.replace(' ', '_').replace('/', '_')}.json"


def write(card: str, cuts: Mapping[str, Cut | None]) -> Path:
    """Adds `cuts` to what is known of the card. None: cuBLAS was fastest."""
    path = path_of(card)
    known = json.loads(path.read_text()) if path.exists() else {}
    known |= {key: cut and dataclasses.astuple(cut) for key, cut in cuts.items()}
    path.parent.mkdir(exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(known[key])}" for key in sorted(known))
    path.write_text(f"{{\n{lines}\n}}\n")
    return path


def read(card: str) -> dict[str, Cut | None]:
    path = path_of(card)
    return {key: cut and Cut(*cut) for key, cut in json.loads(path.read_text()).items()} if path.exists() else {}


@lru_cache(maxsize=16)
def _table(device: torch.device) -> dict[str, Cut | None]:
    """What was fastest on this card, by scheme, rows and shape."""
    return {} if device.type == "cpu" else read(torch.cuda.get_device_name(device))
