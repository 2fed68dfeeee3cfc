"""A folder of pictures becomes calibration samples, exactly as section 3.2 says.

Knows files, the fixed question and the reference's two resizes; knows no weights.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from saccade.base.errors import MediaError, OptionError
from saccade.checkpoints.config import ModelConfig
from saccade.geometry import Grid, fit_size
from saccade.inputs.chat import ChatTokenizer

QUESTION = "Please describe this picture in detail."
UNIT = 28  # of the first resize, whatever the checkpoint's own patches are
MIN_PIXELS, MAX_PIXELS = 4 * UNIT**2, 16384 * UNIT**2

Order = Literal["name", "listing"]


@dataclass(frozen=True)
class Sample:
    """One picture and the question. token_ids: [N] int64; positions: [3, N]; frames: [1, 3, height, width] uint8, resized."""

    source: str
    token_ids: Tensor
    positions: Tensor
    frames: Tensor
    grids: tuple[Grid, ...]


def list_pictures(folder: Path, order: Order) -> list[Path]:
    """Every entry of the folder; none is filtered. `listing` is the file system's own order, which the reference uses."""
    if not folder.is_dir():
        raise OptionError(f"{folder} is not a folder of calibration pictures")
    names = os.listdir(folder)
    if not names:
        raise OptionError(f"{folder} is empty; put calibration pictures into it (about 30 are advised)")
    if order == "name":
        names.sort()
    return [folder / name for name in names]


def load_sample(path: Path, tokenizer: ChatTokenizer, config: ModelConfig) -> Sample:
    """Raises MediaError for anything but a picture."""
    picture = open_rgb(path)
    sizes, what = (picture.height, picture.width, MIN_PIXELS, MAX_PIXELS, UNIT), f"{path}: picture"
    height, width = fit_size(*sizes, lift_sides=True, what=what)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
    prompt = tokenizer.build([{"role": "user", "content": content}])
    medium = prompt.media[0]
    return Sample(
        str(path),
        torch.tensor(prompt.token_ids),
        prompt.positions,
        medium.frames,
        (medium.receipt.grid,),
    )


def open_rgb(path: Path) -> Image.Image:
    """The picture as it lies in the file: an EXIF orientation is not applied; only RGBA is blended, on white."""
    try:
        with Image.open(path) as opened:
            if opened.mode != "RGBA":
                return opened.convert("RGB")
            ground = Image.new("RGB", opened.size, (255, 255, 255))
            ground.paste(opened, mask=opened.getchannel("A"))
            return ground
    except Exception as error:  # decoders raise many types on a damaged file
        raise MediaError(
            f"{path} is not a picture that can be read; remove it, every entry of the folder is used"
        ) from error
