"""Conversations with answers, packed into one forward of the whole model; each token's kind, and which rows predict answers.

Knows prompts and positions; knows no weights. Letters: T tokens of all samples, A tokens of all answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.checkpoints.config import ModelConfig
from saccade.geometry import Grid
from saccade.inputs.pixels import patches
from saccade.inputs.prompt import Prompt
from saccade.quantize.report import KINDS, Kind


@dataclass(frozen=True)
class Sample:
    """A prompt and the tokens of its answer, at least one."""

    prompt: Prompt
    answer: tuple[int, ...]

    @property
    def token_ids(self) -> tuple[int, ...]:
        """What the model reads: the answer's last token predicts nothing."""
        return (*self.prompt.token_ids, *self.answer[:-1])

    @property
    def positions(self) -> Tensor:
        """[3, T of this sample]: past the prompt all axes count on together."""
        answered = self.prompt.next_position + torch.arange(len(self.answer) - 1)
        return torch.cat([self.prompt.positions, answered.expand(3, -1)], dim=1)


@dataclass(frozen=True)
class Packed:
    """All samples, one after the other."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [3, T]
    lengths: tuple[int, ...]  # of the samples, in tokens
    kinds: Tensor  # [T] uint8, indices into KINDS
    patches: Tensor | None  # [P, patch_values] float32 of all media
    grids: tuple[Grid, ...]
    media_rows: Tensor  # [M] int64: the tokens that stand for patches
    answer_rows: Tensor  # [A] int64: row i predicts answer_ids[i]
    answer_ids: Tensor  # [A]

    def mask(self, kind: Kind) -> Tensor:
        return self.kinds == KINDS.index(kind)


def pack(samples: Sequence[Sample], config: ModelConfig) -> Packed:
    media = [medium for sample in samples for medium in sample.prompt.media]
    token_ids = torch.tensor([token for sample in samples for token in sample.token_ids])
    lengths = tuple(len(sample.token_ids) for sample in samples)
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    is_media = (token_ids == config.image_token_id) | (token_ids == config.video_token_id)
    kinds = torch.where(is_media, KINDS.index("picture"), KINDS.index("text")).to(torch.uint8)
    kinds[starts] = KINDS.index("first")
    rows = [
        torch.arange(start + len(sample.prompt) - 1, start + length)
        for start, length, sample in zip(starts, lengths, samples, strict=True)
    ]
    return Packed(
        token_ids,
        torch.cat([sample.positions for sample in samples], dim=1),
        lengths,
        kinds,
        torch.cat([patches(medium.frames, config) for medium in media]) if media else None,
        tuple(medium.receipt.grid for medium in media),
        is_media.nonzero().flatten(),
        torch.cat(rows),
        torch.tensor([token for sample in samples for token in sample.answer]),
    )
