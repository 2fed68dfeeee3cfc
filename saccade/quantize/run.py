"""The blocks of a float checkpoint become quantized ones as well as we know how, one at a time.

For each block: read it, run all samples through it to see its linears' inputs, smooth, round, see how wrong each linear
became, run the samples through the rounded block so that the next one is calibrated on what it will get, write, forget.
Peak memory is one block, its statistics and the hidden rows. What is finished lies on disk (`state.py`).
Knows the order of things; every calculation is elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from saccade.base.meter import progress
from saccade.checkpoints.formats import EMBEDDING, HEAD
from saccade.kernels.choose import choose
from saccade.model.language import DecoderLayer
from saccade.model.layers import Filling, Linear, fill
from saccade.model.qwen2_5_vl import Qwen2_5_VL
from saccade.model.vision import VisionBlock
from saccade.quantize.job import Job
from saccade.quantize.kept import Kept, tensors_of
from saccade.quantize.pairs import pairs
from saccade.quantize.plan import HEAD_MODULE, MAX_HESSIAN
from saccade.quantize.report import LayerMeasure
from saccade.quantize.round_linear import Rounder
from saccade.quantize.smoothing import best_scale, rounded_gain, trial
from saccade.quantize.source import Block, Source
from saccade.quantize.state import State
from saccade.quantize.statistics import Seen, Tokens, Watcher, hessian_block, tokens_of
from saccade.quantize.stream import (
    Watched,
    decoder_pieces,
    embedded_patches,
    release,
    run,
    token_kinds,
    tower_kinds,
    tower_pieces,
)
from saccade.schemes.scheme import Scheme

ROWS_KEPT = 512  # tokens of each kind that searches and measures see
ROWS_AT_ONCE = 4096  # of the embedding or the head


class Run:
    """One quantization under way."""

    def __init__(self, job: Job, state: State, kept: Kept | None = None) -> None:
        """`kept`: the float model's statistics; then nothing runs through the model."""
        self.job, self.state, self.recipe = job, state, job.recipe
        self.source = Source(job.checkpoint, job.recipe, job.device)
        self.config = self.source.config
        self.dtype: torch.dtype = getattr(torch, self.config.dtype)
        self.watched = Watched(choose(job.device))
        self.model = Qwen2_5_VL(self.config, self.watched.kernels)
        self.rounder = Rounder(self.recipe, self.dtype, self.watched.kernels)
        self.kept = kept
        self.prompts = job.samples.prompts if job.samples and kept is None else ()
        self.media = [medium for prompt in self.prompts for medium in prompt.media]
        self.hidden: Tensor | None = None

    @property
    def label(self) -> str:
        return f"quantizing to {self.recipe.scheme}"

    def all_blocks(self) -> None:
        stages = list(self._stages())
        self.hidden = self.state.hidden()
        with progress(len(stages), self.label) as advance:
            advance(self.state.done)
            for stage in stages[self.state.done :]:
                stage()
                advance(1)

    def _stages(self) -> Iterator[Callable[[], None]]:
        """What is done and finished one by one; the next sees only what the one before left in the state."""
        for name, block in self.model.blocks():
            if name == "visual.patch_embed":
                yield lambda: self.patch_embedding()
            elif name == "visual.merger":
                yield lambda: self.merger()
            elif name == "model.embed_tokens":
                yield lambda: self.embedding()
            elif isinstance(block, VisionBlock | DecoderLayer):
                yield lambda name=name, block=block: self.block(name, block)  # type: ignore[misc]
            elif name != "lm_head":
                yield lambda name=name: self.finish(self.dense_tensors(self.source.block(name)))  # type: ignore[misc]
        if not self.config.text.tie_word_embeddings:
            yield lambda: self.head()

    def finish(self, tensors: Iterable[tuple[str, Tensor]], measures: Sequence[LayerMeasure] = ()) -> None:
        self.state.finish(tensors, self.hidden, [asdict(measure) for measure in measures])

    # --- what is not a block ---

    def patch_embedding(self) -> None:
        source = self.source.block("visual.patch_embed")
        if self.media:
            fill(self.model.visual.patch_embed, self.filling(source))
            self.hidden = self.state.room_for(
                (len(tower_kinds(self.media)), self.config.vision.hidden_size), self.dtype
            )
            embedded_patches(self.model.visual, self.media, self.config, self.hidden)
            release(self.model.visual.patch_embed)
        self.finish(self.dense_tensors(source))

    def merger(self) -> None:
        rows_out = sum(medium.receipt.num_tokens for medium in self.media)
        self.through("visual.merger", self.model.visual.merger, (rows_out, self.config.vision.out_hidden_size))

    def embedding(self) -> None:
        """The tower's rows take the placeholders' places."""
        features, self.hidden = self.hidden, None
        if self.prompts:
            ids = torch.tensor([token for prompt in self.prompts for token in prompt.token_ids])
            self.hidden = self.state.room_for((len(ids), self.config.text.hidden_size), self.dtype)
            for token in sorted(set(ids.tolist())):
                self.hidden[ids == token] = self.source.table_rows(EMBEDDING, slice(token, token + 1)).to(self.dtype)
            if features is not None:
                is_medium = (ids == self.config.image_token_id) | (ids == self.config.video_token_id)
                self.hidden[is_medium] = features
        self.finish([(EMBEDDING, self.table(EMBEDDING))])

    def head(self) -> None:
        scheme = self.job.plan.assignment[HEAD_MODULE]
        if scheme.is_dense:
            self.finish([(HEAD, self.table(HEAD))])
            return
        pieces = (rows.to(self.job.device) for _, rows in self.table_rows(HEAD))
        weight, measure = self.rounder.round_rows(HEAD_MODULE, pieces, scheme)
        self.finish(self.job.format.tensors_of(HEAD_MODULE, weight).items(), [measure])

    def table(self, name: str) -> Tensor:
        """The embedding or the head, in the model's type."""
        out = torch.empty(self.source.shapes[name], dtype=self.dtype)
        for which, rows in self.table_rows(name):
            out[which] = rows.to(self.dtype)
        return out

    def table_rows(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """The embedding or the head in float32, some rows at a time, and which they are."""
        num_rows = self.source.shapes[name][0]
        for first in range(0, num_rows, ROWS_AT_ONCE):
            which = slice(first, min(first + ROWS_AT_ONCE, num_rows))
            yield which, self.source.table_rows(name, which)

    # --- a block ---

    def block(self, name: str, module: VisionBlock | DecoderLayer) -> None:
        self.through(name, module, None if self.hidden is None else tuple(self.hidden.shape))

    def through(self, name: str, module: nn.Module, shape_out: tuple[int, ...] | None) -> None:
        """One block from file to part; the hidden rows pass it if there are any."""
        source = self.source.block(name)
        linears = [layer for layer in module.modules() if isinstance(layer, Linear)]
        wanted = [layer for layer in linears if not self.scheme(layer).is_dense]
        is_tower = name.startswith("visual.")
        rows = self.hidden if not is_tower or self.media else None
        seen: dict[Linear, Seen] = {}
        measures: list[LayerMeasure] = []
        if rows is not None:
            seen = self.watch(module, source, wanted) if wanted else {}
        elif self.kept is not None:
            seen = {layer: self.kept.seen(next(iter(layer.parts)), self.job.device) for layer in wanted}
        before = {layer: its.largest for layer, its in seen.items()}
        if seen and self.recipe.smoothing != "none":
            self.smooth(name, module, source, seen)
        for layer in wanted:
            measures += self.rounder.round(layer, self.scheme(layer), source, seen.get(layer), before.get(layer))
        if rows is not None:
            self.pass_on(name, module, source, shape_out)
        self.finish(self.tensors(source), measures)

    def pass_on(self, name: str, module: nn.Module, source: Block, shape_out: tuple[int, ...] | None) -> None:
        """The hidden rows through the block as `source` now has it."""
        rows, is_tower = self.hidden, name.startswith("visual.")
        assert rows is not None and shape_out is not None, "there are rows"  # noqa: PT018
        fill(module, self.filling(source))
        self.hidden = self.state.room_for(shape_out, self.dtype)
        if name == "visual.merger":
            self.merge(rows)
        else:
            run(self.pieces(is_tower), module, rows, self.hidden, self.watched, self.tokens(is_tower))
        release(module)

    def merge(self, rows: Tensor) -> None:
        assert self.hidden is not None, "the merger has rows"
        first = 0
        for piece, medium in zip(self.pieces(True), self.media, strict=True):
            last = first + medium.receipt.num_tokens
            self.hidden[first:last] = piece.apply(self.model.visual.merger, rows[piece.rows].to(self.job.device))
            first = last

    def watch(self, module: nn.Module, source: Block, wanted: Sequence[Linear]) -> dict[Linear, Seen]:
        """The inputs of the `wanted` linears in the float block."""
        assert self.hidden is not None, "there are rows"
        is_tower = module is self.model.visual.merger or isinstance(module, VisionBlock)
        fill(module, self.filling(source))
        needs_hessian = self.recipe.rounded_by == "gptq"
        watchers = {
            layer: Watcher(
                layer.in_features,
                self.job.device,
                hessian_block(layer.in_features, MAX_HESSIAN) if needs_hessian else None,
            )
            for layer in wanted
        }
        *_, last = (layer for layer in module.modules() if isinstance(layer, Linear))
        self.watched.watch(watchers, unread=last)
        tokens = self.tokens(is_tower)
        for piece in self.pieces(is_tower):
            its = tokens[piece.rows]
            if module is self.model.visual.merger:
                its = tokens[slice(piece.rows.start // self.unit, piece.rows.stop // self.unit)]
            self.watched.now(its)
            piece.apply(module, self.hidden[piece.rows].to(self.job.device))
        self.watched.watch({})
        release(module)
        return {layer: watcher.seen() for layer, watcher in watchers.items()}

    @property
    def unit(self) -> int:
        return self.config.vision.merge_unit

    def smooth(self, name: str, module: nn.Module, source: Block, seen: dict[Linear, Seen]) -> None:
        for pair in pairs(name, module, self.config):
            if pair.reader not in seen:
                continue
            weights = [source.tensors[f"{part}.weight"] for part in pair.reader.parts]
            scheme = self.scheme(pair.reader)
            columns = None if pair.columns is None else pair.columns.to(self.job.device)
            attempt = trial(
                weights,
                seen[pair.reader],
                scheme,
                columns,
                self.rounder.scale_dtype(scheme),
                self.recipe.visual_scales,
            )
            scale = best_scale(attempt, self.recipe.smoothing)
            if pair.norm is not None:
                gain = f"{pair.norm}.weight"
                source.tensors[gain], scale = rounded_gain(source.tensors[gain], scale, self.dtype)
            else:
                assert pair.writer is not None, "a pair has a norm or a writer"
                weight, bias = source.tensors[f"{pair.writer}.weight"], source.tensors.get(f"{pair.writer}.bias")
                weight[pair.first_row :] /= scale[:, None]
                if bias is not None:
                    bias[pair.first_row :] /= scale
            wide = scale if columns is None else scale[columns]
            for weight in weights:
                weight *= wide
            seen[pair.reader] = seen[pair.reader].divided(wide)

    # --- what a block is made of ---

    def scheme(self, layer: Linear) -> Scheme:
        return self.job.plan.assignment[next(iter(layer.parts))]

    def filling(self, source: Block) -> Filling:
        return Filling(source, self.dtype, self.job.device)

    def tokens(self, is_tower: bool) -> Tokens:
        kinds = tower_kinds(self.media) if is_tower else self.text_kinds()
        tokens = tokens_of(kinds, ROWS_KEPT, self.recipe.seed, self.recipe.balance)
        return Tokens(*(getattr(tokens, name).to(self.job.device) for name in ("kinds", "weights", "sampled")))

    def text_kinds(self) -> Tensor:
        assert self.job.samples is not None, "there are prompts"
        return token_kinds(self.prompts, self.job.samples.num_answered, self.config)

    def pieces(self, is_tower: bool) -> list[Any]:
        if is_tower:
            return tower_pieces(self.model.visual, self.media, self.job.device)
        return decoder_pieces(self.prompts, self.config, self.watched.kernels, self.job.device)

    def dense_tensors(self, source: Block) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in source.tensors.items():
            yield name, tensor.to(self.dtype)

    def tensors(self, source: Block) -> Iterator[tuple[str, Tensor]]:
        """The block as the format names it, in the checkpoint's order."""
        for name, tensor in source.tensors.items():
            module, _, kind = name.rpartition(".")
            if module not in source.weights:
                yield name, tensor.to(self.dtype)
            elif kind == "weight":
                yield from self.job.format.tensors_of(module, source.weights[module]).items()


class Gathering(Run):
    """The float model's forward, a block at a time, of which only what its linears saw stays."""

    @property
    def label(self) -> str:
        return "gathering statistics"

    def finish(self, tensors: Iterable[tuple[str, Tensor]], measures: Sequence[LayerMeasure] = ()) -> None:
        self.state.finish((), self.hidden, [])

    def head(self) -> None:
        self.finish(())

    def table(self, name: str) -> Tensor:
        return torch.empty(0)

    def through(self, name: str, module: nn.Module, shape_out: tuple[int, ...] | None) -> None:
        source, is_tower = self.source.block(name), name.startswith("visual.")
        if is_tower and not self.media:
            self.finish(())
            return
        wanted = [layer for layer in module.modules() if isinstance(layer, Linear)]
        has_tower = any(
            part.startswith("visual.") and not scheme.is_dense for part, scheme in self.job.plan.assignment.items()
        )
        seen = self.watch(module, source, wanted) if has_tower or not is_tower else {}
        self.pass_on(name, module, source, shape_out)
        kept = [pair for layer, its in seen.items() for pair in tensors_of(next(iter(layer.parts)), its, self.dtype)]
        self.state.finish(kept, self.hidden, [])
