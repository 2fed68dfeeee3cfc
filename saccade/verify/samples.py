"""Conversations with answers, as tokens, packed into one forward of the whole model; each token's kind, and which rows predict answers.

Knows prompts and positions; knows no weights. Letters: T tokens of all samples, A tokens of all answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.checkpoints.config import ModelConfig
from saccade.geometry import Grid
from saccade.inputs.chat import ChatTokenizer, parse_content
from saccade.inputs.options import MediaOptions
from saccade.inputs.pixels import patches
from saccade.inputs.prompt import Prompt
from saccade.quantize.report import KINDS, Kind

Conversation = Sequence[Mapping[str, Any]]
END_OF_TURN = "<|im_end|>"
OPENING = "The picture shows"  # of an answer, where none is given and no model is there to write one


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
    def is_visual(self) -> Tensor:
        """[T of this sample] bool. What a model answers may hold a placeholder, which stands for nothing."""
        return torch.nn.functional.pad(self.prompt.is_visual(), (0, len(self.answer) - 1))

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


def without_answer(conversation: Conversation) -> tuple[Conversation, str | None]:
    """The conversation up to the answer it ends with, and that answer's text; None where it ends with a question.

    Raises PromptError for an answer that is none.
    """
    last = conversation[-1]
    if last.get("role") != "assistant" or len(conversation) == 1:
        return conversation, None
    parts = parse_content(last.get("content"), f"message {len(conversation) - 1} (assistant)")
    return conversation[:-1], "".join(part for part in parts if isinstance(part, str))


def given_sample(
    tokenizer: ChatTokenizer, conversation: Conversation, media: MediaOptions, max_answer_tokens: int
) -> Sample:
    """The conversation with the answer it ends with, or with the opening of one. Raises what preparing it raises."""
    question, answer = without_answer(conversation)
    tokens = tokenizer.encode(OPENING if answer is None else answer)
    ended = tokens if answer is None else [*tokens, tokenizer.added_tokens[END_OF_TURN]]
    return Sample(tokenizer.build(question, defaults=media), tuple(ended[:max_answer_tokens]))


def pack(samples: Sequence[Sample], config: ModelConfig) -> Packed:
    media = [medium for sample in samples for medium in sample.prompt.media]
    token_ids = torch.tensor([token for sample in samples for token in sample.token_ids])
    lengths = tuple(len(sample.token_ids) for sample in samples)
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    is_media = torch.cat([sample.is_visual for sample in samples])
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
