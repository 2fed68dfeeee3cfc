"""Calibration samples on their way through the model, a block at a time: hidden rows of all of them, in pieces that fit.

Knows how rows are laid out and which are what; knows no files and nothing of rounding.
Letters: P patches of all media, T tokens of all prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from saccade.checkpoints.config import ModelConfig
from saccade.geometry import Grid
from saccade.inputs.pixels import patches
from saccade.inputs.prompt import Medium, Prompt
from saccade.kernels.record import Kernels
from saccade.model.language import DecoderLayer, WholeSequences, rotary_angles
from saccade.model.layers import Filled, Linear
from saccade.model.vision import VisionBlock, VisionTower
from saccade.quantize.statistics import ANSWER, FIRST, PICTURE, TEXT, Tokens, Watcher
from saccade.schemes.scheme import Weight

TOKENS_AT_ONCE = 2048  # of several short prompts; a longer one is a piece of its own


class Watched:
    """A back end whose linears show their inputs to watchers first."""

    def __init__(self, kernels: Kernels) -> None:
        self._linear = kernels.linear
        self.kernels = replace(kernels, linear=self._watched)
        self._watchers: dict[int, Watcher] = {}
        self._unread: int | None = None
        self._tokens: Tokens | None = None

    def watch(self, linears: dict[Linear, Watcher], unread: Linear | None = None) -> None:
        """From now on, the inputs of these; filled linears. `unread`: one whose output nobody reads: zeros, not computed."""
        self._watchers = {id(linear.weight): watcher for linear, watcher in linears.items()}
        self._unread = None if unread is None else id(unread.weight)

    def now(self, tokens: Tokens) -> None:
        """What the rows of the next forward are."""
        self._tokens = tokens

    def _watched(self, x: Tensor, weight: Weight) -> Tensor:
        watcher = self._watchers.get(id(weight))
        if watcher is not None and self._tokens is not None:
            watcher.see(x, self._tokens)
        if id(weight) == self._unread:
            return x.new_zeros(len(x), weight.out_features)
        return self._linear(x, weight)


@dataclass(frozen=True)
class Piece:
    """Some rows, and how a block is applied to them."""

    rows: slice
    apply: Callable[[nn.Module, Tensor], Tensor]


def run(
    pieces: Sequence[Piece], block: nn.Module, rows: Tensor, out: Tensor | None, watched: Watched, tokens: Tokens
) -> None:
    """All rows through a filled block; `out` [rows, H] takes the results, None drops them."""
    device = next(layer.weight.values.device for layer in block.modules() if isinstance(layer, Linear))
    for piece in pieces:
        watched.now(tokens[piece.rows])
        result = piece.apply(block, rows[piece.rows].to(device))
        if out is not None:
            out[piece.rows] = result


# --- the tower -------------------------------------------------------------------------------------------------------


def tower_kinds(media: Sequence[Medium]) -> Tensor:
    """[P] int8: all patches are picture."""
    return torch.full((sum(medium.receipt.grid.num_patches for medium in media),), PICTURE, dtype=torch.int8)


def tower_pieces(tower: VisionTower, media: Sequence[Medium], device: torch.device) -> list[Piece]:
    """One medium after the other, as its grid alone decides what attends to what."""

    def piece(rows: slice, grid: Grid) -> Piece:
        places = tower.places([grid], device)

        def apply(block: nn.Module, x: Tensor) -> Tensor:
            if isinstance(block, VisionBlock):
                y, residual = block(x, None, places.cos, places.sin, places.segments(block.is_full))
                return y + residual  # type: ignore[no-any-return]
            return tower.merge(x, None, places)

        return Piece(rows, apply)

    return [piece(rows, medium.receipt.grid) for rows, medium in _consecutive(media, _num_patches)]


def embedded_patches(tower: VisionTower, media: Sequence[Medium], config: ModelConfig, out: Tensor) -> None:
    """Every medium's patches through the first layer, into `out` [P, H], in window order."""
    weight = tower.patch_embed.weight.values
    for rows, medium in _consecutive(media, _num_patches):
        places = tower.places([medium.receipt.grid], weight.device)
        values = patches(medium.frames, config).to(weight.device, weight.dtype)
        out[rows] = tower.embed(values, places)


def _num_patches(medium: Medium) -> int:
    return medium.receipt.grid.num_patches


# --- the decoder -----------------------------------------------------------------------------------------------------


def token_kinds(prompts: Sequence[Prompt], num_answered: Sequence[int], config: ModelConfig) -> Tensor:
    """[T] int8. num_answered: how many tokens at each prompt's end are the assistant's."""
    kinds = []
    for prompt, answered in zip(prompts, num_answered, strict=True):
        ids = torch.tensor(prompt.token_ids)
        is_picture = (ids == config.image_token_id) | (ids == config.video_token_id)
        its = torch.where(is_picture, PICTURE, TEXT).to(torch.int8)
        its[len(ids) - answered :] = ANSWER
        its[0] = FIRST
        kinds.append(its)
    return torch.cat(kinds)


def decoder_pieces(
    prompts: Sequence[Prompt], config: ModelConfig, kernels: Kernels, device: torch.device
) -> list[Piece]:
    def piece(rows: slice, some: Sequence[Prompt]) -> Piece:
        positions = torch.cat([prompt.positions for prompt in some], dim=1).to(device)
        attend = WholeSequences(kernels, tuple(len(prompt) for prompt in some))
        is_visual = torch.cat([prompt.is_visual() for prompt in some]).to(device)

        def apply(block: nn.Module, x: Tensor) -> Tensor:
            assert isinstance(block, DecoderLayer), f"{type(block).__name__} is no decoder layer"
            cos, sin = rotary_angles(config.text, positions)
            y, residual = block(x, None, cos, sin, attend, is_visual)
            return y + residual  # type: ignore[no-any-return]

        return Piece(rows, apply)

    pieces: list[Piece] = []
    some: list[Prompt] = []
    first = 0
    for prompt in [*prompts, None]:
        length = sum(map(len, some))
        if some and (prompt is None or length + len(prompt) > TOKENS_AT_ONCE):
            pieces.append(piece(slice(first, first + length), some))
            first, some = first + length, []
        if prompt is not None:
            some.append(prompt)
    return pieces


def _consecutive(media: Sequence[Medium], size: Callable[[Medium], int]) -> Iterator[tuple[slice, Medium]]:
    first = 0
    for medium in media:
        last = first + size(medium)
        yield slice(first, last), medium
        first = last


def release(module: nn.Module) -> None:
    """Forgets the numbers of every layer below `module`."""
    for layer in module.modules():
        if isinstance(layer, Filled):
            for name in ("weight", "gain"):
                if hasattr(layer, name):
                    delattr(layer, name)
