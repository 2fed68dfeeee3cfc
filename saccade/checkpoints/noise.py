"""Random weights of real shapes, without end and without a download.

What a random model says is noise; what it costs is real. Knows tensors by their names and shapes; knows no model.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

from saccade.schemes.scheme import Weight

WEIGHT_STD = 0.02  # the published initializer_range: keeps activations of any depth finite
NUM_VALUES = 33_554_393  # 64 MiB of bfloat16; a prime, so that a long tensor repeats the values but never the rows


class RandomWeights:
    """Every tensor of a checkpoint by name: normal values with WEIGHT_STD; norms' gains are 1. Equal seeds give equal numbers.

    All tensors are cut from one block of noise, each from a place of its own and round and round, which is as good as fresh
    noise for every purpose but statistics and many times faster.
    """

    def __init__(self, seed: int = 0, num_values: int = NUM_VALUES) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._block = torch.empty(num_values, dtype=torch.bfloat16)
        for first in range(0, num_values, 1 << 22):  # in float32 pieces, so that the block is never in memory twice
            piece = self._block[first : first + (1 << 22)]
            piece.copy_(torch.randn(len(piece), generator=generator) * WEIGHT_STD)

    def read_into(self, name: str, out: Tensor) -> None:
        """Fills `out` (CPU, contiguous, any floating type) with the tensor called `name`."""
        flat, start = out.view(-1), 0
        for piece in self.pieces(name, out.shape):
            flat[start : start + len(piece)].copy_(piece)
            start += len(piece)

    def weight(self, module: str) -> Weight | None:
        """None of them is quantized."""
        return None

    def pieces(self, name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
        """The values of the tensor called `name`, flat, bfloat16, in pieces: for a writer that never holds it whole."""
        missing = int(torch.Size(shape).numel())
        if len(shape) == 1 and name.endswith(".weight"):
            yield torch.ones(missing, dtype=torch.bfloat16)
            return
        start = zlib.crc32(name.encode()) % len(self._block)
        while missing > 0:
            piece = self._block[start : start + missing]
            yield piece
            missing -= len(piece)
            start = 0
