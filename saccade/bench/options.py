"""What a benchmark measures, and how often. Imports nothing heavy, so that help is instant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from saccade.base.errors import OptionError
from saccade.base.options import check_values, option


@dataclass(frozen=True)
class BenchOptions:
    warmup: int = option(3, "answers that are not counted, before the measurement", low=0, high=10_000)
    repeat: int = option(10, "answers measured", low=1, high=100_000)
    json: str | None = option(None, "file for every measured time, the machine and the command")
    random: Literal["3b", "7b", "32b", "72b", "tiny"] | None = option(
        None, "a model of this published size with random weights made in memory, in place of a checkpoint"
    )
    layers: int | None = option(None, "decoder layers of the random model, in place of the published number", low=1)
    vision_depth: int | None = option(None, "tower blocks of the random model, in place of 32", low=1)
    against: Literal["transformers"] | None = option(
        None, "answers the same question with this library too, in the same run; needs a checkpoint folder"
    )

    def __post_init__(self) -> None:
        check_values(self)
        if self.random is None and (self.layers is not None or self.vision_depth is not None):
            raise OptionError("layers and vision_depth shorten a random model; add --random 3b, or leave them out")
        if self.random is not None and self.against is not None:
            raise OptionError(
                f"--against {self.against} needs a checkpoint folder, which --random {self.random} does not make; "
                f"write one: python tools/random_checkpoint.py {self.random} FOLDER"
            )
