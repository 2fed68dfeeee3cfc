"""A float checkpoint becomes a quantized one as well as we know how, a block at a time.

For each block: read it, run all samples through it to see its linears' inputs, smooth, round, see how wrong each linear
became, run the samples through the rounded block so that the next one is calibrated on what it will get, write, forget.
Peak memory is one block, its statistics and the hidden rows. What is finished lies on disk (`state.py`).
Knows the order of things; every calculation is elsewhere.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saccade.base.errors import CheckpointError
from saccade.base.meter import gigabytes, peak_memory_bytes, progress
from saccade.checkpoints.config import ModelConfig
from saccade.checkpoints.formats import (
    EMBEDDING,
    HEAD,
    Checkpoint,
    expected_tensors,
    open_checkpoint,
    require_tokenizer,
)
from saccade.checkpoints.json_file import read_json
from saccade.checkpoints.shard_writer import ShardWriter
from saccade.checkpoints.writing import Format, companions, format_named, require_writable
from saccade.inputs.chat import ChatTokenizer
from saccade.kernels.choose import choose
from saccade.model.language import DecoderLayer
from saccade.model.layers import Filling, Linear, fill
from saccade.model.qwen2_5_vl import Qwen2_5_VL
from saccade.model.vision import VisionBlock
from saccade.quantize import rotation as turning
from saccade.quantize.best_recipe import BestRecipe
from saccade.quantize.clip import search_steps
from saccade.quantize.gptq import gptq
from saccade.quantize.plan import MAX_HESSIAN, Plan, make_plan, needs_samples
from saccade.quantize.ranges import static_parameters
from saccade.quantize.report import FILE_NAME, Cost, InputRange, LayerMeasure, QuantizationReport, sqnr_db, to_json
from saccade.quantize.samples import Samples, check_source, load_samples
from saccade.quantize.smoothing import best_scale, rounded_gain, trial
from saccade.quantize.state import State, is_complete
from saccade.quantize.statistics import KINDS, Seen, Tokens, Watcher, hessian_block, tokens_of
from saccade.quantize.steps import Steps, as_weight, dequantized, max_steps, round_to_nearest, static_part
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
from saccade.schemes.scheme import Scheme, Weight

ROWS_KEPT = 512  # tokens of each kind that searches and measures see
ROWS_AT_ONCE = 4096  # of the embedding or the head
KIND_NAMES = {0: "text", 1: "picture", 2: "first"}


@dataclass(frozen=True)
class BestReport:
    """What a run did. `seconds` are those of all processes that took part, `peak_memory_bytes` of the one that finished."""

    folder: Path
    plan: Plan
    samples: Samples | None
    layers: tuple[LayerMeasure, ...]
    output_bytes: int
    seconds: float
    peak_memory_bytes: int

    @property
    def worst(self) -> LayerMeasure | None:
        """The linear whose output suffers most."""
        return min((layer for layer in self.layers if layer.worst_db is not None), key=_worst_db, default=None)


def _worst_db(layer: LayerMeasure) -> float:
    assert layer.worst_db is not None, f"{layer.module} was not measured"
    return layer.worst_db


@dataclass(frozen=True)
class Job:
    """A quantization that has passed every check and not begun."""

    checkpoint: Checkpoint
    out: Path
    recipe: BestRecipe
    plan: Plan
    format: Format
    samples: Samples | None
    device: torch.device
    threads: int


def prepare(source: Path, out: Path, recipe: BestRecipe, *, device: str = "cpu", threads: int = 2) -> Job:
    """Opens the checkpoint, reads the samples and makes the plan; no weight is read.

    Raises OptionError, CheckpointError, MediaError or PromptError.
    """
    checkpoint = open_checkpoint(source)
    if checkpoint.quantization is not None:
        raise CheckpointError(
            f"{source} is quantized already ({checkpoint.quantization}); quantize the one it was made from"
        )
    plan = make_plan(checkpoint.config, recipe)
    format_ = format_named(recipe.format, getattr(torch, checkpoint.config.dtype))
    require_writable(format_, plan.assignment)
    require_tokenizer(source)
    samples = None
    if needs_samples(recipe):
        check_source(recipe.calibration)
        tokenizer = ChatTokenizer(source, checkpoint.config)
        samples = load_samples(recipe.calibration, tokenizer, recipe.samples, recipe.seed, recipe.max_pixels)
        num_patches = sum(medium.receipt.grid.num_patches for prompt in samples.prompts for medium in prompt.media)
        plan = make_plan(checkpoint.config, recipe, samples.num_tokens, num_patches)
    return Job(checkpoint, out, recipe, plan, format_, samples, torch.device(device), threads)


@torch.inference_mode()
def quantize_best(job: Job, *, force: bool = False) -> BestReport:
    """Does the job; `out` appears whole or not at all, and a job that was killed goes on where it was."""
    file_names = job.format.file_names(job.plan.assignment)
    partial, key = job.out.with_name(job.out.name + ".partial"), _key(job)
    is_published = job.out.exists() and any(job.out.iterdir()) and is_complete(partial, key)  # killed right at the end
    if not is_published:
        ShardWriter(job.out, force=force, names=file_names).discard()  # refuses at once what it would refuse at the end
        _require_room(job)
    state = State(partial, key)
    with _threads(job.threads):
        run = Run(job, state)
        run.all_blocks()
    state.complete()
    layers = tuple(_measure(layer) for record in state.records for layer in record)
    output_bytes, names = 0, []
    with ShardWriter(job.out, force=force or is_published, names=file_names) as writer:
        for name, part in state.tensors():
            output_bytes += part.info(name).nbytes
            names.append(name)
            writer.add(name, part.read(name))
        settings = _settings(job.checkpoint, run.config)
        files = job.format.side_files(settings, job.plan.assignment, names)
        for file, text in files.items():
            writer.add_file(file, text)
        for file, content in companions(job.checkpoint.folder):
            if file != FILE_NAME:
                writer.add_file(file, content)
        seconds = state.seconds
        report = BestReport(job.out, job.plan, job.samples, layers, output_bytes, seconds, peak_memory_bytes())
        writer.add_file(FILE_NAME, to_json(_for_json(job, report)))
    state.remove()
    return report


def _for_json(job: Job, report: BestReport) -> QuantizationReport:
    """What a later verification adds its measurements to."""
    cost = Cost(job.plan.source_bytes, report.output_bytes, report.peak_memory_bytes, {"quantize": report.seconds})
    recipe = job.recipe.as_json() | ({"samples_sha256": job.samples.digest} if job.samples else {})
    return QuantizationReport(job.out.name, str(job.checkpoint.folder), recipe, cost=cost, layers=report.layers)


def _settings(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, Any]:
    """The source's config.json, changed where the result differs."""
    settings = read_json(checkpoint.folder / "config.json")
    if config.text.tie_word_embeddings != checkpoint.config.text.tie_word_embeddings:
        settings["tie_word_embeddings"] = config.text.tie_word_embeddings
        if isinstance(text := settings.get("text_config"), dict) and "tie_word_embeddings" in text:
            settings["text_config"] = text | {"tie_word_embeddings": config.text.tie_word_embeddings}
    return settings


def _measure(entry: dict[str, Any]) -> LayerMeasure:
    """What `dataclasses.asdict` and JSON took apart."""
    ranges = entry["ranges"] and InputRange(*(tuple(entry["ranges"][name]) for name in ("before", "after")))
    return LayerMeasure(**{**entry, "ranges": ranges})


def _key(job: Job) -> str:
    """Of all that the result's bytes depend on."""
    config = job.checkpoint.folder / "config.json"
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in job.checkpoint.shards.files]
    samples = job.samples.digest if job.samples else ""
    what = (job.recipe.digest(), config.read_text(), files, samples, str(job.device), job.threads, torch.__version__)
    return hashlib.sha256(repr(what).encode()).hexdigest()


def _require_room(job: Job) -> None:
    """The finished parts and the folder made of them lie on the disk together for a while."""
    needed = int(2.05 * job.plan.output_bytes)
    folder = job.out.resolve().parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder} has {gigabytes(free)} free; quantizing takes {gigabytes(needed)} there for a while: make room, or "
            "choose another place"
        )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- the source ------------------------------------------------------------------------------------------------------


class Block:
    """One block's tensors in float32 by their full names, and the weights that have been rounded; layers are filled from it."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.weights: dict[str, Weight] = {}

    def read_into(self, name: str, out: Tensor) -> None:
        out.copy_(self.tensors[name])

    def weight(self, module: str) -> Weight | None:
        return self.weights.get(module)


class Source:
    """The checkpoint's tensors in float32, rotated if the recipe says so. `config` is that of the result."""

    def __init__(self, checkpoint: Checkpoint, recipe: BestRecipe, device: torch.device) -> None:
        self._checkpoint, self._device, self._seed = checkpoint, device, recipe.seed
        self.config: ModelConfig = checkpoint.config
        self._stream = None
        if recipe.is_rotated:
            self._stream = turning.rotation(self.config.text.hidden_size, recipe.seed, "stream")
            self.config = replace(self.config, text=replace(self.config.text, tie_word_embeddings=False))
        self.shapes = expected_tensors(self.config)

    def block(self, prefix: str) -> Block:
        names = [name for name in self.shapes if name.startswith(f"{prefix}.")]
        tensors = {name.removeprefix(f"{prefix}."): self._read(name) for name in names}
        if self._stream is not None and prefix.startswith("model.layers."):
            values = turning.rotation(self.config.text.head_dim, self._seed, prefix)
            turning.rotate_layer(tensors, self._stream, values, self.config.text.head_dim)
        if self._stream is not None and prefix == "visual.merger":
            tensors["mlp.2.weight"] = turning.rotate_outputs(tensors["mlp.2.weight"], self._stream)
            tensors["mlp.2.bias"] = self._stream(tensors["mlp.2.bias"])
        if self._stream is not None and prefix == "model.norm":
            tensors["weight"] = torch.ones_like(tensors["weight"])
        return Block({f"{prefix}.{name}": tensor for name, tensor in tensors.items()})

    def table_rows(self, name: str, rows: slice) -> Tensor:
        """Some rows of the embedding or of the head: [rows, H] float32."""
        stored = name if name in self._checkpoint else EMBEDDING  # a head that was tied
        num_rows = len(range(*rows.indices(self.shapes[name][0])))
        out = torch.empty(num_rows, self.shapes[name][1])
        self._checkpoint.read_into(stored, out, rows)
        if self._stream is None:
            return out
        if name == HEAD:
            out *= self._read("model.norm.weight").cpu()
        return self._stream(out)

    def _read(self, name: str) -> Tensor:
        out = torch.empty(self.shapes[name])
        self._checkpoint.read_into(name, out)
        return out.to(self._device)


# --- the run ---------------------------------------------------------------------------------------------------------


class Run:
    """One quantization under way."""

    def __init__(self, job: Job, state: State) -> None:
        self.job, self.state, self.recipe = job, state, job.recipe
        self.source = Source(job.checkpoint, job.recipe, job.device)
        self.config = self.source.config
        self.dtype: torch.dtype = getattr(torch, self.config.dtype)
        self.watched = Watched(choose(job.device))
        self.model = Qwen2_5_VL(self.config, self.watched.kernels)
        self.prompts = job.samples.prompts if job.samples else ()
        self.media = [medium for prompt in self.prompts for medium in prompt.media]
        self.hidden: Tensor | None = None

    def all_blocks(self) -> None:
        stages = list(self._stages())
        self.hidden = self.state.hidden()
        label = f"quantizing to {self.recipe.scheme}"
        with progress(len(stages), label) as advance:
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
            yield lambda: self.finish([(HEAD, self.table(HEAD))])

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

    def table(self, name: str) -> Tensor:
        """The embedding or the head, in the model's type."""
        shape = self.source.shapes[name]
        out = torch.empty(shape, dtype=self.dtype)
        for first in range(0, shape[0], ROWS_AT_ONCE):
            rows = slice(first, min(first + ROWS_AT_ONCE, shape[0]))
            out[rows] = self.source.table_rows(name, rows).to(self.dtype)
        return out

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
            tokens, pieces = self.tokens(is_tower), self.pieces(is_tower)
            if wanted:
                seen = self.watch(module, source, wanted)
        if seen and self.recipe.smoothing != "none":
            before = {layer: its.largest for layer, its in seen.items()}
            self.smooth(name, module, source, seen)
        else:
            before = {layer: its.largest for layer, its in seen.items()}
        for layer in wanted:
            measures += self.round(layer, source, seen.get(layer), before.get(layer))
        if rows is not None and shape_out is not None:
            fill(module, self.filling(source))
            self.hidden = self.state.room_for(shape_out, self.dtype)
            if name == "visual.merger":
                self.merge(rows)
            else:
                run(pieces, module, rows, self.hidden, self.watched, tokens)
            release(module)
        self.finish(self.tensors(source), measures)

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
        self.watched.watch(watchers)
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
            attempt = trial(weights, seen[pair.reader], scheme, columns, self.scale_dtype(scheme))
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

    def round(self, layer: Linear, source: Block, seen: Seen | None, before: Tensor | None) -> Iterator[LayerMeasure]:
        """All parts of one product at once: they share the input's statistics."""
        scheme = self.scheme(layer)
        weight = torch.cat([source.tensors[f"{part}.weight"] for part in layer.parts])
        dtype = self.scale_dtype(scheme)
        importance = None if seen is None else seen.mean_square
        if self.recipe.rounded_by == "rtn":
            steps = max_steps(weight, scheme, dtype)
        else:
            steps = search_steps(weight, scheme, dtype, importance)
        if self.recipe.rounded_by == "gptq" and seen is not None and seen.hessian is not None:
            multiples = gptq(weight, seen.hessian, steps)
            multiples = multiples.to(torch.float8_e4m3fn if scheme.is_float else torch.int8)
        else:
            multiples = round_to_nearest(weight, steps)
        activation = None
        if scheme.activation == "static":
            assert seen is not None, f"{scheme.name} has samples"
            low, high = float(seen.low.min()), float(seen.high.max())
            activation = static_parameters(
                seen.rows, low, high, self.recipe.range_method, weight.square().sum(0), dtype, self.recipe.percentile
            )
        first = 0
        for part, count in layer.parts.items():
            rows = slice(first, first + count)
            first += count
            rounded = self.as_weight(part, multiples[rows], steps.rows(rows), source, activation)
            source.weights[part] = rounded
            yield self.measure(part, rounded, weight[rows], multiples[rows], steps.rows(rows), seen, before)

    def as_weight(
        self, part: str, multiples: Tensor, steps: Steps, source: Block, activation: tuple[Tensor, Tensor] | None
    ) -> Weight:
        bias = source.tensors.get(f"{part}.bias")
        static = None
        if activation is not None:
            scale, zero = (value.to(multiples.device) for value in activation)
            static = static_part(multiples, steps, scale, zero, bias)
        return as_weight(multiples.contiguous(), steps, None if bias is None else bias.to(self.dtype), static)

    def measure(
        self,
        part: str,
        rounded: Weight,
        weight: Tensor,
        multiples: Tensor,
        steps: Steps,
        seen: Seen | None,
        before: Tensor | None,
    ) -> LayerMeasure:
        """How far the linear's output, and its weight, are from the float ones on the kept rows."""
        wrong = dequantized(multiples, steps).sub_(weight)
        weight_db = sqnr_db(float(weight.square().sum()), float(wrong.square_().sum()))
        ranges, output_db = None, {}
        if seen is not None and before is not None:
            ranges = InputRange(_quantiles(before.amax(0)), _quantiles(seen.largest.amax(0)))
            for kind in KINDS:
                x = seen.rows[seen.kinds == kind][: ROWS_KEPT // 2]
                if len(x):
                    exact = x @ weight.t()
                    bias = 0 if rounded.bias is None else rounded.bias.float()
                    noise = self.watched.kernels.linear(x.to(self.dtype), rounded).float() - bias - exact
                    output_db[KIND_NAMES[kind]] = sqnr_db(float(exact.square().sum()), float(noise.square().sum()))
        return LayerMeasure(
            part, rounded.scheme.name, output_db, weight_db, ranges=ranges, size_bytes=rounded.size_bytes
        )

    # --- what a block is made of ---

    def scheme(self, layer: Linear) -> Scheme:
        return self.job.plan.assignment[next(iter(layer.parts))]

    def scale_dtype(self, scheme: Scheme) -> torch.dtype:
        """What files keep scales in: where engines load them as the model's type, that; float32 where they do not."""
        return self.dtype if scheme.has_float_groups or self.recipe.is_ascend else torch.float32

    def filling(self, source: Block) -> Filling:
        return Filling(source, self.dtype, self.job.device)

    def tokens(self, is_tower: bool) -> Tokens:
        kinds = tower_kinds(self.media) if is_tower else token_kinds(self.prompts, self.config)
        tokens = tokens_of(kinds, ROWS_KEPT, self.recipe.seed, self.recipe.balance)
        return Tokens(*(getattr(tokens, name).to(self.job.device) for name in ("kinds", "weights", "sampled")))

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


def _quantiles(values: Tensor) -> tuple[float, ...]:
    points = torch.tensor([0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0], device=values.device)
    return tuple(float(value) for value in torch.quantile(values.float(), points))


@dataclass(frozen=True)
class Pair:
    """What a linear reads can be divided where it is made: by a norm's gain, or by rows of the linear before.

    columns: [H] int64, which row of the writer each input column comes from; None: its own.
    """

    reader: Linear
    norm: str | None = None
    writer: str | None = None
    first_row: int = 0  # of the writer's, down to its last
    columns: Tensor | None = None


def pairs(name: str, module: nn.Module, config: ModelConfig) -> Iterator[Pair]:
    """In the order data flows."""
    if isinstance(module, DecoderLayer):
        text = config.text
        heads = torch.arange(text.num_heads) // (text.num_heads // text.num_kv_heads)
        columns = (heads[:, None] * text.head_dim + torch.arange(text.head_dim)).flatten()
        yield Pair(module.attention.qkv, norm=f"{name}.input_layernorm")
        yield Pair(module.attention.output, writer=f"{name}.self_attn.v_proj", columns=columns)
        yield Pair(module.mlp.gate_up, norm=f"{name}.post_attention_layernorm")
        yield Pair(module.mlp.down, writer=f"{name}.mlp.up_proj")
    elif isinstance(module, VisionBlock):
        values = 2 * config.vision.hidden_size  # q, k, v
        yield Pair(module.attention.qkv, norm=f"{name}.norm1")
        yield Pair(module.attention.proj, writer=f"{name}.attn.qkv", first_row=values)
        yield Pair(module.mlp.gate_up, norm=f"{name}.norm2")
        yield Pair(module.mlp.down, writer=f"{name}.mlp.up_proj")
