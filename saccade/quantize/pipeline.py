"""A float checkpoint becomes the one msModelSlim would write, a block at a time: read, smooth, observe, round, write, forget.

The reference sends one sample after the other through the whole model. What a block does to sample i depends on that block and on
samples up to i alone, so all samples may pass block after block instead, and only one block's weights are held.
Knows the order of things; every calculation is elsewhere.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from saccade.base.errors import CheckpointError
from saccade.base.meter import peak_memory_bytes, progress
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
from saccade.checkpoints.shard_writer import FileNames, ShardWriter
from saccade.checkpoints.writing import require_apart
from saccade.geometry import token_positions
from saccade.inputs.chat import ChatTokenizer
from saccade.inputs.pixels import patches
from saccade.kernels import ordered
from saccade.kernels.library import Library, load
from saccade.quantize import exact_format as layout
from saccade.quantize.calibration import Order, Sample, list_pictures, load_sample
from saccade.quantize.fold import fold_linear, fold_norm
from saccade.quantize.forward import (
    Apply,
    Block,
    Intercept,
    TowerPlaces,
    decoder_layer,
    embed_patches,
    float_linears,
    let_pass,
    merge,
    rotary_tables,
    tower_block,
    tower_places,
)
from saccade.quantize.iterative_smooth import grouped_scales, smooth_scale
from saccade.quantize.objectives import DecoderAttention, GateUp, Objective, TowerAttention
from saccade.quantize.observers import Histogram, MeanMinMax, Observer, Spread
from saccade.quantize.outlier_suppression import search
from saccade.quantize.recipe import ExactRecipe
from saccade.quantize.report import FILE_NAME, Cost, QuantizationReport, Verify, merged, to_json
from saccade.quantize.report_page import PAGE_NAME, page
from saccade.quantize.rounding import activation_parameters, fake_activation, fake_weight, row_scale

SPREAD_SAMPLES = 5  # that act_method 3 decides by
GIB = 1 << 30

# Linears of one norm see one tensor: its first one observes for all.
LEADERS = {
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "mlp.up_proj": "mlp.gate_proj",
}
TARGETS = {
    "norm1": ("attn.qkv",),
    "norm2": ("mlp.gate_proj", "mlp.up_proj"),
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
SMOOTHED_INPUTS = ("self_attn.q_proj", "mlp.gate_proj", "self_attn.o_proj", "mlp.down_proj")  # whose maxima m4 needs


@dataclass
class Report:
    """What a run did. `scales`: m2's, by the norm's name; `activation_maxima`: m4's, by the linear's."""

    folder: Path
    scheme: str
    num_samples: int = 0
    num_tensors: int = 0
    source_bytes: int = 0
    output_bytes: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    verified: QuantizationReport | None = None
    scales: dict[str, Tensor] = field(default_factory=dict)
    activation_maxima: dict[str, Tensor] = field(default_factory=dict)


@torch.inference_mode()
def quantize_exact(
    source: Path,
    out: Path,
    recipe: ExactRecipe,
    pictures: Path,
    *,
    order: Order = "name",
    force: bool = False,
    threads: int | None = None,
    verify: Verify | None = None,
) -> Report:
    """Quantizes the checkpoint in `source` with the pictures in a folder; `out` appears whole or not at all.

    `order`: pictures by name, or as the file system lists them, which is what the reference does; results depend on it, and
    on torch's threads, which split sums: one, unless `threads` says otherwise. Products in the fixed order split none and take as
    many as that, or all processors. `verify` looks at the folder before it appears; what it finds
    goes into report.json and report.html there, which the reference does not write.
    Raises OptionError, CheckpointError or MediaError before any weight is read.
    """
    start = time.perf_counter()
    checkpoint = open_checkpoint(source)
    if checkpoint.quantization is not None:
        raise CheckpointError(
            f"{source} is quantized already ({checkpoint.quantization}); quantize the one it was made from"
        )
    require_apart(source, out)
    recipe.check_model(checkpoint.config)
    require_tokenizer(source)
    paths = list_pictures(pictures, order)
    writer = ShardWriter(
        out,
        GIB << 40 if recipe.part_file_size is None else recipe.part_file_size * GIB - 1,
        force=force,
        names=FileNames(
            f"quant_model_weight_{recipe.scheme.lower()}",
            is_always_indexed=recipe.part_file_size is not None,
            has_metadata=False,
        ),
    )
    with writer, _threads(threads):
        tokenizer = ChatTokenizer(source, checkpoint.config)
        samples = [load_sample(path, tokenizer, checkpoint.config) for path in paths]
        run = Run(checkpoint, recipe, samples, writer, Report(out, recipe.scheme, len(samples)))
        run.all_blocks()
        for name, content in side_files(source, recipe, checkpoint.config, run.description):
            writer.add_file(name, content)
        run.report.seconds = time.perf_counter() - start
        if verify is not None:
            run.report.verified = _verified(verify(writer.complete()), run.report, source, recipe)
            writer.add_file(PAGE_NAME, page(run.report.verified))
            writer.add_file(FILE_NAME, to_json(run.report.verified))
    run.report.peak_memory_bytes = peak_memory_bytes()
    return run.report


def _verified(found: QuantizationReport, report: Report, source: Path, recipe: ExactRecipe) -> QuantizationReport:
    """What a verification found, with what is known of the making."""
    cost = Cost(report.source_bytes, report.output_bytes, seconds={"quantize": report.seconds})
    known = QuantizationReport(report.folder.name, str(source), {"mode": "exact", **asdict(recipe)}, cost=cost)
    return replace(merged(known, found), name=report.folder.name)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    library, before = load(), torch.get_num_threads()
    workers = library.num_threads if isinstance(library, Library) else 0
    torch.set_num_threads(count or 1)
    if isinstance(library, Library):
        library.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if isinstance(library, Library):
            library.set_num_threads(workers)


class Run:
    """One quantization under way."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: ExactRecipe,
        samples: Sequence[Sample],
        writer: ShardWriter,
        report: Report,
    ) -> None:
        self.checkpoint, self.recipe, self.config = checkpoint, recipe, checkpoint.config
        self.writer, self.report = writer, report
        self.dtype: torch.dtype = getattr(torch, self.config.dtype)
        self.description = layout.description_head(recipe.scheme, recipe.group_size, recipe.mindie_format)
        self.shapes = expected_tensors(self.config)
        report.source_bytes = sum(math.prod(shape) for shape in self.shapes.values()) * self.dtype.itemsize
        self.samples = samples
        # Who passes the blocks: m2's one float sample, act_method 3's float samples, and all samples, fake-quantized.
        self.searched = Stream(self.config, samples[:1] if recipe.anti_method == "m2" else ())
        judges = recipe.is_static and recipe.act_method == 3
        self.judged = Stream(self.config, samples[:SPREAD_SAMPLES] if judges else ())
        self.calibrated = Stream(self.config, samples if recipe.is_static else ())
        self.streams = (self.searched, self.judged, self.calibrated)

    def all_blocks(self) -> None:
        vision, text = self.config.vision, self.config.text
        num_blocks = vision.depth + text.num_layers
        if self.recipe.anti_method == "m4":
            with progress(text.num_layers, "measuring activations") as advance:
                self.measure(advance)
        with progress(num_blocks, f"quantizing to {self.recipe.scheme}") as advance:
            block = self.read("visual.patch_embed")
            self.write_float("visual.patch_embed", block)
            for stream in self.streams:
                stream.embed_patches(block)
            for index in range(vision.depth):
                self.block(f"visual.blocks.{index}", layout.TOWER_BLOCK)
                advance(1)
            block = self.read("visual.merger")
            self.write_float("visual.merger", block)
            for stream in self.streams:
                stream.merge(block)
            block = self.read("model.embed_tokens")
            self.write_float("model.embed_tokens", block)
            for stream in self.streams:
                stream.embed_tokens(block["weight"])
            for index in range(text.num_layers):
                self.block(f"model.layers.{index}", layout.DECODER_LAYER)
                advance(1)
            for name in (EMBEDDING.replace("embed_tokens", "norm"), HEAD):
                if name in self.shapes:
                    self.write_float(name.removesuffix(".weight"), {"weight": self.read_tensor(name)})

    def block(self, prefix: str, modules: Sequence[str]) -> None:
        """One block from file to file."""
        block = self.read(prefix)
        if self.recipe.anti_method == "m2":
            self.searched.pass_block(
                prefix, block, float_linears(block), lambda *seen: self.migrate(prefix, block, *seen)
            )
        elif prefix.startswith("model."):
            self.smooth(prefix, block)
        activations: dict[str, tuple[Tensor, Tensor]] = {}
        if self.recipe.is_static:
            linears = StaticLinears(block, self.observer_maker(prefix, block), modules, self.recipe.is_lowbit)
            self.calibrated.pass_block(prefix, block, linears)
            activations = linears.parameters
        for module in modules:
            name, weight, bias = f"{prefix}.{module}", block[f"{module}.weight"], block.get(f"{module}.bias")
            if layout.is_quantized(module):
                self.write_linear(name, weight, bias, activations.get(LEADERS.get(module, module)))
            else:
                self.write_float_module(name, weight, bias)

    # --- smoothing ---

    def migrate(self, prefix: str, block: Block, norm: str, h: Tensor) -> Tensor:
        """m2 at one norm of sample 0: searches the scale, folds it, and hands on the scaled h."""
        targets = TARGETS[norm]
        weight = torch.cat([block[f"{name}.weight"] for name in targets])
        scale = search(h, weight, self.objective(prefix, norm, block))
        fold_norm(block[f"{norm}.weight"], [block[f"{name}.weight"] for name in targets], scale)
        self.report.scales[f"{prefix}.{norm}"] = scale
        return h / scale

    def objective(self, prefix: str, norm: str, block: Block) -> Objective:
        vision, text, stream = self.config.vision, self.config.text, self.searched
        if norm == "norm1":
            places = stream.places[0]
            is_full = int(prefix.rpartition(".")[2]) in vision.fullatt_block_indexes
            scaling = vision.out_hidden_size // vision.num_heads
            return TowerAttention(vision.num_heads, scaling, places.cos, places.sin, places.bounds(is_full))
        if norm == "norm2":
            return GateUp(torch.cat([block["mlp.gate_proj.bias"], block["mlp.up_proj.bias"]]))
        if norm == "input_layernorm":
            positions = self.samples[0].positions[0]
            return DecoderAttention(text.num_heads, text.num_kv_heads, text.head_dim, text.rope_theta, positions)
        return GateUp()

    def measure(self, advance: Callable[[int], None]) -> None:
        """m4's statistics: the decoder's float forward over every sample's ids alone, without pixels, mask or three axes."""
        texts = [
            Sample(sample.source, sample.token_ids, self.plain_positions(len(sample.token_ids)), sample.frames[:0], ())
            for sample in self.samples
        ]
        stream = Stream(self.config, texts)
        stream.embed_tokens(self.read("model.embed_tokens")["weight"])
        for index in range(self.config.text.num_layers):
            prefix = f"model.layers.{index}"
            block = self.read(prefix)
            linears = float_linears(block)

            def observed(name: str, x: Tensor, prefix: str = prefix, linears: Apply = linears) -> Tensor:
                if name in SMOOTHED_INPUTS:
                    maxima, key = x.abs().amax(0), f"{prefix}.{name}"
                    before = self.report.activation_maxima.get(key)
                    self.report.activation_maxima[key] = maxima if before is None else torch.maximum(before, maxima)
                return linears(name, x)

            stream.pass_block(prefix, block, observed)
            advance(1)

    def plain_positions(self, num_tokens: int) -> Tensor:
        vision = self.config.vision
        return token_positions(num_tokens, (), vision.spatial_merge_size, vision.tokens_per_second)[0]

    def smooth(self, prefix: str, block: Block) -> None:
        """m4 on one decoder layer: its two norm pairs first, then its two linear pairs."""
        text, maxima = self.config.text, self.report.activation_maxima
        for norm in ("input_layernorm", "post_attention_layernorm"):
            targets = [block[f"{name}.weight"] for name in TARGETS[norm]]
            fold_norm(block[f"{norm}.weight"], targets, smooth_scale(maxima[f"{prefix}.{TARGETS[norm][0]}"], targets))
        up, down = block["mlp.up_proj.weight"], block["mlp.down_proj.weight"]
        v, o = block["self_attn.v_proj.weight"], block["self_attn.o_proj.weight"]
        scale = smooth_scale(maxima[f"{prefix}.self_attn.o_proj"], [o])
        rows, columns = grouped_scales(scale, text.num_heads, text.num_kv_heads)
        fold_linear(v, block["self_attn.v_proj.bias"], o, rows, columns)
        scale = smooth_scale(maxima[f"{prefix}.mlp.down_proj"], [down])
        fold_linear(up, block.get("mlp.up_proj.bias"), down, scale, scale)

    # --- static ranges ---

    def observer_maker(self, prefix: str, block: Block) -> Callable[[str], Observer]:
        """Which observer a linear gets; for act_method 3 after a float pass of its own over the smoothed block."""
        if self.recipe.act_method == 1:
            return lambda name: MeanMinMax()
        if self.recipe.act_method == 2:
            return lambda name: Histogram()
        spreads: dict[str, Spread] = {}
        linears = float_linears(block)

        def judged(name: str, x: Tensor) -> Tensor:
            if name not in LEADERS:
                spreads.setdefault(name, Spread()).update(x)
            return linears(name, x)

        self.judged.pass_block(prefix, block, judged)
        return lambda name: spreads[name].observer()

    # --- reading and writing ---

    def read(self, prefix: str) -> Block:
        """The tensors below `prefix`, in T, by their name below it."""
        names = [name for name in self.shapes if name.startswith(f"{prefix}.")]
        return {name.removeprefix(f"{prefix}."): self.read_tensor(name) for name in names}

    def read_tensor(self, name: str) -> Tensor:
        out = torch.empty(self.shapes[name], dtype=self.dtype)
        self.checkpoint.read_into(name, out)
        return out

    def write_float(self, prefix: str, block: Block) -> None:
        """A part without quantized linears. `prefix` is the module itself where its tensors are plain weight and bias."""
        for name in block:
            module, _, kind = f"{prefix}.{name}".rpartition(".")
            if kind == "weight":
                self.write_float_module(module, block[name], block.get(f"{name.removesuffix('weight')}bias"))

    def write_float_module(self, name: str, weight: Tensor, bias: Tensor | None) -> None:
        if layout.is_norm(name) and self.recipe.anti_method == "m4":
            self.write(layout.norm_with_bias(name, weight, self.recipe.scheme, self.recipe.mindie_format))
        else:
            self.write(layout.float_module(name, weight, bias))

    def write_linear(
        self, name: str, weight: Tensor, bias: Tensor | None, activation: tuple[Tensor, Tensor] | None
    ) -> None:
        recipe = self.recipe
        if recipe.w_bit == 4:
            self.write(layout.int4_linear(name, weight, bias, recipe.group_size, recipe.scheme, recipe.mindie_format))
        else:
            self.write(layout.int8_linear(name, weight, bias, activation, recipe.scheme, recipe.is_lowbit))

    def write(self, tensors: Iterator[layout.Stored]) -> None:
        for stored in tensors:
            self.writer.add(stored.name, stored.tensor)
            self.description[stored.name] = stored.tag
            self.report.num_tensors += 1
            self.report.output_bytes += stored.tensor.numel() * stored.tensor.element_size()


class Stream:
    """Samples on their way through the model: each one's hidden rows, and where they stand."""

    def __init__(self, config: ModelConfig, samples: Sequence[Sample]) -> None:
        self.config, self.samples = config, samples
        self.places: list[TowerPlaces] = [tower_places(config.vision, s.grids) for s in samples if s.grids]
        self.rows: list[Tensor] = []
        self._tables: list[tuple[Tensor, Tensor]] = []

    def embed_patches(self, block: Block) -> None:
        vision = self.config.vision
        pairs = zip(self.samples, self.places, strict=True)
        self.rows = [embed_patches(block, patches(s.frames, self.config), places, vision) for s, places in pairs]

    def merge(self, block: Block) -> None:
        pairs = zip(self.rows, self.places, strict=True)
        self.rows = [merge(block, rows, places, self.config.vision) for rows, places in pairs]

    def embed_tokens(self, table: Tensor) -> None:
        """table: [vocab, H]. Placeholders take the tower's rows, if the samples went through it."""
        pictures, self.rows = self.rows, []
        for i, sample in enumerate(self.samples):
            x = torch.nn.functional.embedding(sample.token_ids, table)
            if pictures:
                x[sample.token_ids == self.config.image_token_id] = pictures[i]
            self.rows.append(x)
        text = self.config.text
        self._tables = [rotary_tables(text, sample.positions, table.dtype) for sample in self.samples]

    def pass_block(self, prefix: str, block: Block, apply: Apply, intercept: Intercept = let_pass) -> None:
        """All samples, in order, through the tower's or the decoder's block `prefix`."""
        vision, text = self.config.vision, self.config.text
        if prefix.startswith("visual."):
            is_full = int(prefix.rpartition(".")[2]) in vision.fullatt_block_indexes
            for i, places in enumerate(self.places):
                self.rows[i] = tower_block(self.rows[i], block, places, is_full, vision.num_heads, apply, intercept)
        else:
            for i, tables in enumerate(self._tables):
                self.rows[i] = decoder_layer(self.rows[i], block, tables, text, apply, intercept)


class StaticLinears:
    """A block's linears in static calibration (section 4.4): each input is observed, the range so far rounds it, then it is used.

    `is_wide`: scales are in float32 and stay in it (section 4.6).
    """

    def __init__(self, block: Block, make: Callable[[str], Observer], modules: Sequence[str], is_wide: bool) -> None:
        self._float = float_linears(block)
        self._biases = block
        names = [name for name in modules if layout.is_quantized(name)]
        self._is_wide = is_wide
        self._weights = {name: self._rounded_weight(block[f"{name}.weight"]) for name in names}
        self._observers = {name: make(name) for name in names if name not in LEADERS}
        self._rounded: dict[str, Tensor] = {}
        self.parameters: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, name: str, x: Tensor) -> Tensor:
        if name not in self._weights:
            return self._float(name, x)
        if name not in LEADERS:
            observer = self._observers[name]
            observer.update(x)
            dtype = torch.float32 if self._is_wide else x.dtype
            self.parameters[name] = activation_parameters(*observer.range(), dtype)
            self._rounded[name] = fake_activation(x, *self.parameters[name])
        rounded = self._rounded[LEADERS.get(name, name)]
        return ordered.linear(rounded, self._weights[name], self._biases.get(f"{name}.bias"))

    def _rounded_weight(self, weight: Tensor) -> Tensor:
        wide = weight.float() if self._is_wide else weight
        return fake_weight(wide, row_scale(wide.abs().amax(1))).to(weight.dtype)


def side_files(
    source: Path, recipe: ExactRecipe, config: ModelConfig, description: dict[str, object]
) -> Iterator[tuple[str, str | bytes]]:
    """config.json, the description, and the source's other *.json and *.py (section 8.1)."""
    kind = recipe.scheme.lower()
    settings = read_json(source / "config.json")
    settings["torch_dtype"] = config.dtype
    if recipe.mindie_format:
        settings["quantize"] = kind
        settings["vision_config"]["quantize"] = kind
        settings["quantization_config"] = recipe.mindie_config()
    yield "config.json", json.dumps(settings, indent=4)
    suffix = f"_{kind}" if recipe.mindie_format else ""
    yield f"quant_model_description{suffix}.json", json.dumps(description, indent=2)
    for path in sorted([*source.glob("*.json"), *source.glob("*.py")]):
        if path.name not in ("config.json", "model.safetensors.index.json"):
            try:
                yield path.name, path.read_bytes()
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
