"""What a model and a conversation take, known before any weight is loaded.

Knows configs, headers and options; runs nothing.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from saccade.base.errors import OptionError
from saccade.base.options import from_mapping, suggestion
from saccade.checkpoints.config import ModelConfig
from saccade.checkpoints.formats import EMBEDDING, HEAD, Checkpoint, expected_tensors, linears, open_checkpoint
from saccade.checkpoints.hub import resolve
from saccade.engine.options import EngineOptions, SamplingParams
from saccade.inputs.chat import ChatTokenizer
from saccade.inputs.options import MediaLimits, MediaOptions
from saccade.inputs.prompt import MediaReceipt, Prompt
from saccade.kernels.record import KV_SCALE_BYTES
from saccade.schemes.loading import NOTHING, Loading, loading
from saccade.schemes.scheme import DENSE, Scheme, fitting

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_SPELLINGS = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}


@dataclass(frozen=True)
class Plan:
    """What a conversation would take, without running it. Bytes are of one request at its longest."""

    prompt: Prompt
    max_tokens: int
    weight_bytes: int
    kv_cache_bytes: int
    media_bytes: int  # prepared frames, patch rows and features
    activation_bytes: int  # of the widest layer for one step
    notes: tuple[str, ...] = ()  # layers that are stored otherwise than asked for, and why

    @property
    def media(self) -> list[MediaReceipt]:
        return [medium.receipt for medium in self.prompt.media]

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_cache_bytes + self.media_bytes + self.activation_bytes


def plan(
    model: str | os.PathLike[str],
    messages: Sequence[Mapping[str, Any]],
    sampling_params: SamplingParams | None = None,
    *,
    media: MediaOptions | None = None,
    limits: MediaLimits | None = None,
    **options: Any,
) -> Plan:
    """What a conversation would take: opens the checkpoint's headers and the media, loads no weight, runs nothing."""
    chosen = from_mapping(EngineOptions, options)
    folder: Path = resolve(model, source=chosen.source, revision=chosen.revision)
    checkpoint = open_checkpoint(folder)
    config = checkpoint.config
    prompt = ChatTokenizer(folder, config).build(
        messages, defaults=media or MediaOptions(), limits=limits or MediaLimits()
    )
    max_tokens = (sampling_params or SamplingParams()).max_tokens
    wanted = loading_of(chosen)
    weights = weight_bytes(checkpoint, torch_dtype(chosen.dtype, config), wanted)
    return replace(plan_for(config, prompt, max_tokens, chosen, weights), notes=tuple(stand_ins(config, wanted)))


def stand_ins(config: ModelConfig, wanted: Loading) -> Iterator[str]:
    """The layers that cannot be quantized as asked for while loading, and what they are quantized to: a line for each width."""
    counts: Counter[tuple[int, Scheme]] = Counter()
    for module, (_, num_columns) in linears(config).items():
        scheme = wanted.of(module)
        if fitting(scheme, num_columns) != scheme:
            counts[num_columns, scheme] += 1
    for (num_columns, scheme), count in counts.items():
        yield (
            f"{count} layers of {num_columns} columns become {fitting(scheme, num_columns).name}: groups of "
            f"{scheme.group_size} do not divide them"
        )


def plan_for(config: ModelConfig, prompt: Prompt, max_tokens: int, options: EngineOptions, weights: int) -> Plan:
    dtype = torch_dtype(options.dtype, config)
    num_patches = sum(medium.receipt.grid.num_patches for medium in prompt.media)
    num_media_tokens = sum(medium.receipt.num_tokens for medium in prompt.media)
    features = num_media_tokens * config.text.hidden_size * dtype.itemsize
    rows = num_patches * config.vision.patch_values * (4 + dtype.itemsize)
    frames = sum(medium.frames.nbytes for medium in prompt.media)
    step = min(len(prompt), options.max_tokens_per_step)
    widest_text = 2 * config.text.intermediate_size + 3 * config.text.hidden_size
    widest_vision = 2 * config.vision.intermediate_size + 4 * config.vision.hidden_size
    activations = max(step * widest_text, num_patches * widest_vision) * dtype.itemsize + 4 * config.text.vocab_size
    return Plan(
        prompt=prompt,
        max_tokens=max_tokens,
        weight_bytes=weights,
        kv_cache_bytes=(len(prompt) + max_tokens) * kv_bytes_per_token(config, dtype, options),
        media_bytes=frames + rows + features,
        activation_bytes=activations,
    )


def torch_dtype(name: str, config: ModelConfig) -> torch.dtype:
    """The working type called `name`; auto is the checkpoint's own."""
    full = config.dtype if name == "auto" else DTYPE_SPELLINGS.get(name, name)
    if full not in DTYPES:
        raise OptionError(f"dtype {name!r} is unknown{suggestion(name, ['auto', *DTYPES])}")
    return DTYPES[full]


def loading_of(options: EngineOptions) -> Loading:
    return loading(options.quantization, options.vision_quantization, options.head_quantization)


def weight_bytes(model: ModelConfig | Checkpoint, dtype: torch.dtype, wanted: Loading = NOTHING) -> int:
    """Bytes of all weights in memory, some of them quantized while loading. A tied head that is quantized is one of its own.

    Raises OptionError when what is to be quantized is so already.
    """
    checkpoint = model if isinstance(model, Checkpoint) else None
    config = model if isinstance(model, ModelConfig) else model.config
    if checkpoint is not None:
        _require_dense(checkpoint, wanted)
    shapes = expected_tensors(config)
    if HEAD not in shapes and not wanted.head.is_dense:
        shapes = {**shapes, HEAD: shapes[EMBEDDING]}
    total = 0
    for name, shape in shapes.items():
        scheme = DENSE
        if len(shape) == 2 and name != EMBEDDING:
            module = name.removesuffix(".weight")
            scheme = DENSE if checkpoint is None else checkpoint.scheme(module)
            scheme = fitting(wanted.of(name), shape[1]) if scheme.is_dense else scheme
        size = math.prod(shape)
        total += size * dtype.itemsize if scheme.is_dense else int(size * scheme.bytes_per_weight) + 4 * shape[0]
    return total


def _require_dense(checkpoint: Checkpoint, wanted: Loading) -> None:
    """What is to be quantized has not been. Raises OptionError."""
    if not wanted.decoder.is_dense and checkpoint.quantization is not None:
        raise OptionError(
            f"quantization {wanted.decoder.name!r} is for checkpoints that are not quantized, and {checkpoint.folder} is: "
            f"{checkpoint.quantization}; leave the option out"
        )
    for option, scheme, modules in (
        (
            "vision_quantization",
            wanted.tower,
            [name for name in linears(checkpoint.config) if name.startswith("visual.")],
        ),
        ("head_quantization", wanted.head, [HEAD.removesuffix(".weight")]),
    ):
        found = next((module for module in modules if checkpoint.is_quantized(module)), None)
        if found is not None and not scheme.is_dense:
            raise OptionError(
                f"{option} {scheme.name!r}: {found} of {checkpoint.folder} is {checkpoint.scheme(found).name} already; "
                "leave the option out"
            )


def keeps_int8_cache(config: ModelConfig, options: EngineOptions) -> bool:
    """As the option says, or else the checkpoint."""
    return options.kv_cache_dtype == "int8" or (options.kv_cache_dtype == "auto" and config.has_int8_cache)


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype, options: EngineOptions) -> int:
    text = config.text
    row = text.head_dim + KV_SCALE_BYTES if keeps_int8_cache(config, options) else text.head_dim * dtype.itemsize
    return 2 * text.num_layers * text.num_kv_heads * row
