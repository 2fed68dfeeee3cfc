"""A recipe meets a model: which scheme every linear gets and why, what the result will weigh, and what making it takes.

Knows names and shapes; knows no numbers. Everything that can be refused is refused here.
"""

from __future__ import annotations

import fnmatch
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from saccade.base.errors import OptionError
from saccade.base.meter import gigabytes
from saccade.checkpoints.config import ModelConfig
from saccade.checkpoints.formats import HEAD, expected_tensors
from saccade.kernels import reference
from saccade.model.layers import Linear
from saccade.model.qwen2_5_vl import Qwen2_5_VL
from saccade.quantize.best_recipe import BestRecipe, nearest_names
from saccade.schemes.scheme import DENSE, W8A8_DYNAMIC, Scheme, fitting

# Seconds are guessed from these rates of two threads of a server; the progress bar knows better once it moves.
FLOPS_PER_SECOND = 1.5e11
VALUES_PER_SECOND = {"rtn": 4e8, "mse": 2e7, "gptq": 1.2e7}
WORKING_BYTES = 600_000_000  # torch, the tokenizer, pictures, what arithmetic takes on its way

PATCH_EMBEDDING, HEAD_MODULE = "visual.patch_embed.proj", HEAD.removesuffix(".weight")
_REFERENCE_DECODER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")
_REFERENCE_TOWER = ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj")


@dataclass(frozen=True)
class PlannedLayer:
    """One linear as the checkpoint names it; `reason`: why it has not simply the recipe's scheme."""

    module: str
    rows: int
    columns: int
    scheme: Scheme
    reason: str = ""

    @property
    def size_bytes(self) -> int:
        if self.scheme.is_dense:
            return 2 * self.rows * self.columns
        return int(self.rows * self.columns * self.scheme.bytes_per_weight) + 4 * self.rows


@dataclass(frozen=True)
class Plan:
    recipe: BestRecipe
    layers: tuple[PlannedLayer, ...]  # the linears that may be quantized
    others: tuple[str, ...]  # those that stay float whatever the scheme: the patch embedding, the head unless asked for
    source_bytes: int
    output_bytes: int
    peak_memory_bytes: int
    seconds: float
    num_tokens: int  # of calibration, 0 if none is needed

    @cached_property
    def assignment(self) -> dict[str, Scheme]:
        """The scheme of every linear."""
        return {layer.module: layer.scheme for layer in self.layers} | dict.fromkeys(self.others, DENSE)

    def render(self) -> list[str]:
        """Lines of plain text, the result first."""
        recipe = self.recipe
        lines = [
            f"{gigabytes(self.source_bytes)} -> {gigabytes(self.output_bytes)} as {recipe.format}; "
            f"at most {gigabytes(self.peak_memory_bytes)} of memory, about {_duration(self.seconds)} on two threads",
            f"method       smooth {recipe.smoothing}, rounding {recipe.rounded_by}"
            + (", rotated" if recipe.is_rotated else "")
            + (f", ranges {recipe.activation_range}" if recipe.scheme == "w8a8" else "")
            + (", one of visual tokens' own" if recipe.visual_scales else ""),
            f"calibration  {self.num_tokens} tokens" if self.num_tokens else "calibration  none needed",
        ]
        for scheme, count in Counter(layer.scheme.name for layer in self.layers).most_common():
            its = [layer for layer in self.layers if layer.scheme.name == scheme]
            lines.append(f"{scheme:<12} {count} linears, {gigabytes(sum(layer.size_bytes for layer in its))}")
            for reason, layers in _by_reason(its).items():
                lines.append(f"{'':<12}   {len(layers)} x {_pattern(layers)}: {reason}")
        return lines


def needs_samples(recipe: BestRecipe) -> bool:
    """Whether the model has to be run: weights alone do not say where outliers are."""
    return recipe.smoothing != "none" or recipe.rounded_by == "gptq" or recipe.is_static


def make_plan(config: ModelConfig, recipe: BestRecipe, num_tokens: int = 0, num_patches: int = 0) -> Plan:
    """Raises OptionError for a rule that matches nothing, for linears that run as one but would differ, and for nothing to do."""
    with torch.device("meta"):
        model = Qwen2_5_VL(config, reference.kernels())
    linears = [module for module in model.modules() if isinstance(module, Linear) and module.is_quantizable]
    names = [name for linear in linears for name in linear.parts]
    for rule in recipe.rules:
        if not fnmatch.filter(names, rule.match):
            advice = "; that of the head is --head" if rule.match == HEAD_MODULE else nearest_names(rule.match, names)
            raise OptionError(f"the rule {rule.match!r} matches no linear{advice}")
    layers = []
    for linear in linears:
        parts = [_planned(name, rows, linear.in_features, recipe) for name, rows in linear.parts.items()]
        if len({part.scheme for part in parts}) > 1:
            found = ", ".join(f"{part.module} {part.scheme.name}" for part in parts)
            raise OptionError(f"{found}: they read the same input and run as one product; give them one scheme")
        layers += parts
    others = [PATCH_EMBEDDING]
    if recipe.head_scheme.is_dense:
        others.append(HEAD_MODULE)
    else:
        text = config.text
        scheme = fitting(recipe.head_scheme, text.hidden_size)
        layers.append(PlannedLayer(HEAD_MODULE, text.vocab_size, text.hidden_size, scheme, f"--head {recipe.head}"))
    if all(layer.scheme.is_dense for layer in layers):
        raise OptionError("nothing would be quantized: every linear is float by the rules, --layers and --vision")
    shapes = expected_tensors(config)
    itemsize = getattr(torch, config.dtype).itemsize
    source_bytes = sum(math.prod(shape) for shape in shapes.values()) * itemsize
    quantized = [layer for layer in layers if not layer.scheme.is_dense]
    saved = sum(layer.rows * layer.columns * itemsize - layer.size_bytes for layer in quantized)
    untied = shapes["model.embed_tokens.weight"] if recipe.unties_head and config.text.tie_word_embeddings else (0,)
    return Plan(
        recipe,
        tuple(layers),
        tuple(others),
        source_bytes,
        source_bytes - saved + math.prod(untied) * itemsize,
        _peak_bytes(config, linears, recipe, num_tokens, num_patches),
        _seconds(config, layers, recipe, num_tokens, num_patches),
        num_tokens,
    )


def _planned(module: str, rows: int, columns: int, recipe: BestRecipe) -> PlannedLayer:
    scheme, reason = _wanted(module, recipe)
    fit = fitting(scheme, columns)
    if fit != scheme:
        reason = f"groups of {scheme.group_size} do not divide its {columns} columns"
    if not fit.is_dense and fit.weight_bits == 4 and recipe.is_ascend and rows % 2:
        fit, reason = W8A8_DYNAMIC, f"its {rows} rows cannot be packed in pairs"
    return PlannedLayer(module, rows, columns, fit, reason)


def _wanted(module: str, recipe: BestRecipe) -> tuple[Scheme, str]:
    for rule in recipe.rules:
        if fnmatch.fnmatchcase(module, rule.match):
            return recipe.scheme_called(rule.scheme), f"by the rule {rule.match}"
    if module.startswith("visual."):
        if recipe.vision_layers == "float":
            return DENSE, "the vision tower stays float (--vision reference or all)"
        if recipe.vision_layers == "reference" and not module.endswith(_REFERENCE_TOWER):
            return DENSE, "float as in msModelSlim (--vision all)"
    elif recipe.decoder_layers == "reference" and not module.endswith(_REFERENCE_DECODER):
        return DENSE, "float as in msModelSlim (--layers all)"
    if recipe.scheme == "w8a8" and module.endswith("down_proj"):
        return W8A8_DYNAMIC, "its input's outliers suit no fixed range"
    return recipe.main_scheme, ""


# --- what it takes ---------------------------------------------------------------------------------------------------


def _peak_bytes(
    config: ModelConfig, linears: Sequence[Linear], recipe: BestRecipe, num_tokens: int, num_patches: int
) -> int:
    """One block in float32 and in the model's type, its statistics, the hidden rows twice, and what is always there."""
    itemsize = getattr(torch, config.dtype).itemsize
    blocks: Counter[str] = Counter()
    widest: Counter[str] = Counter()
    for linear in linears:
        block = ".".join(next(iter(linear.parts)).split(".")[:3])
        blocks[block] += linear.in_features * linear.out_features
        widest[block] = max(widest[block], linear.in_features)
    largest = max(blocks.values())
    peak = largest * 4
    if num_tokens:
        rows = max(num_tokens * config.text.hidden_size, num_patches * config.vision.hidden_size)
        hidden = 2 * rows * itemsize
        kept = 2 * 512 * sum(linear.in_features for linear in linears[-4:]) * 4
        columns = max(widest.values())
        hessian = 4 * columns * min(columns, MAX_HESSIAN) * 2 if recipe.rounded_by == "gptq" else 0
        peak += largest * itemsize + hidden + kept + hessian
    return peak + WORKING_BYTES


MAX_HESSIAN = 4096  # columns of a Hessian's block: 4096^2 float32 are 67 MB, factorised in seconds


def _seconds(
    config: ModelConfig, layers: Sequence[PlannedLayer], recipe: BestRecipe, num_tokens: int, num_patches: int
) -> float:
    """Two forwards, statistics and rounding. A guess."""
    quantized = sum(layer.rows * layer.columns for layer in layers if not layer.scheme.is_dense)
    seconds = quantized / VALUES_PER_SECOND[recipe.rounded_by]
    if num_tokens:
        for layer in layers:
            tokens = num_patches if layer.module.startswith("visual.") else num_tokens
            passes = 1 if layer.scheme.is_dense else 3
            seconds += passes * 2 * tokens * layer.rows * layer.columns / FLOPS_PER_SECOND
        if recipe.smoothing != "none":
            seconds += quantized / VALUES_PER_SECOND["gptq"]
    return seconds


def _by_reason(layers: Sequence[PlannedLayer]) -> dict[str, list[PlannedLayer]]:
    found: dict[str, list[PlannedLayer]] = {}
    for layer in layers:
        if layer.reason:
            found.setdefault(layer.reason, []).append(layer)
    return found


def _pattern(layers: Sequence[PlannedLayer]) -> str:
    """The modules' names with numbers replaced by stars."""
    patterns = {".".join("*" if part.isdigit() else part for part in layer.module.split(".")) for layer in layers}
    return ", ".join(sorted(patterns))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
