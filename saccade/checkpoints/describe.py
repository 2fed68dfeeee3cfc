"""What `saccade inspect` says of a checkpoint, from config and headers alone.

Knows sizes, layouts and problems as data, and their plain-text rendering; prints nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from saccade.base.errors import CheckpointError
from saccade.checkpoints.config import ARCHITECTURE, ModelConfig, read_config
from saccade.checkpoints.formats import (
    EMBEDDING,
    HEAD,
    expected_tensors,
    find_problems,
    find_strangers,
    foreign_quantization,
    linears,
    open_unverified,
    require_tokenizer,
)
from saccade.checkpoints.shards import TensorInfo

_CACHE_TOKENS = 8192  # the context the memory estimate allows for


@dataclass(frozen=True)
class Part:
    """A share of the model: parameters as the config implies them, bytes as the files hold them."""

    name: str
    parameters: int
    size_bytes: int


@dataclass(frozen=True)
class Description:
    folder: Path
    architecture: str
    config: ModelConfig
    parts: tuple[Part, ...]
    dtypes: tuple[str, ...]  # of the tensors, the most bytes first
    num_tensors: int
    num_shards: int
    layout: str
    quantization: str | None
    schemes: Mapping[str, int]  # of a quantized checkpoint: number of linears by the scheme's name
    problems: tuple[str, ...]  # each keeps the checkpoint from being run
    notes: tuple[str, ...]  # harmless

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def size_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts)

    @property
    def cache_bytes_per_token(self) -> int:
        """Keys and values of one token in the config's type (spec, section 2)."""
        text = self.config.text
        itemsize = int(getattr(torch, self.config.dtype).itemsize)
        return 2 * text.num_layers * text.num_kv_heads * text.head_dim * itemsize

    @property
    def memory_bytes(self) -> int:
        """Weights and the cache of 8192 tokens: what running takes, without working memory."""
        return self.size_bytes + _CACHE_TOKENS * self.cache_bytes_per_token

    def render(self) -> list[str]:
        """Lines of plain text, the result first."""
        text, vision, generation = self.config.text, self.config.vision, self.config.generation
        limits = self.config.preprocessing
        verdict = (
            "ready to run" if not self.problems else f"{len(self.problems)} problem{'s'[: len(self.problems) > 1]}"
        )
        lines = [
            f"{self.folder}: Qwen2.5-VL, {_scaled(self.parameters)} parameters, {_gigabytes(self.size_bytes)}, {verdict}",
            *(f"problem         {problem}" for problem in self.problems),
            *(f"note            {note}" for note in self.notes),
            f"architecture    {self.architecture}",
            f"weights         {', '.join(self.dtypes) or 'unread'} in {self.num_tensors} tensors, "
            f"{_counted(self.num_shards, 'file')}, {self.layout} layout"
            + (", head tied to the embedding" if text.tie_word_embeddings else ""),
            f"quantization    {self.quantization or 'none'}",
        ]
        if self.schemes:
            counts = ", ".join(f"{count} {name}" for name, count in self.schemes.items())
            lines.append(f"linear layers   {counts}")
        for part in self.parts:
            lines.append(f"  {part.name:<18}{part.parameters:>16,} parameters  {_gigabytes(part.size_bytes):>10}")
        eos = ", ".join(map(str, generation.eos_token_ids))
        lines += [
            f"language model  {text.num_layers} layers of width {text.hidden_size}, {text.num_heads} heads, "
            f"{text.num_kv_heads} key heads of {text.head_dim}, vocabulary {text.vocab_size}",
            f"vision tower    {vision.depth} blocks of width {vision.hidden_size}, {vision.num_heads} heads, "
            f"patches of {vision.patch_size}, windows of {vision.window_size} pixels",
            f"pictures        {limits.min_pixels} to {limits.max_pixels} pixels, "
            f"{limits.max_pixels // vision.factor**2} tokens at most",
            f"generation      {'sampling' if generation.do_sample else 'greedy'}, temperature {generation.temperature:g}, "
            f"top_k {generation.top_k}, top_p {generation.top_p:g}, repetition penalty {generation.repetition_penalty:g}, "
            f"ends at {eos}",
            f"context         {text.max_position_embeddings} tokens, {self.cache_bytes_per_token:,} bytes of cache each",
            f"memory to run   {_gigabytes(self.memory_bytes)} (weights and the cache of {_CACHE_TOKENS} tokens)",
        ]
        return lines


def describe(folder: Path) -> Description:
    """Describes a checkpoint, whole or damaged. Raises CheckpointError only when its config.json cannot be used."""
    config = read_config(folder)
    quantization: str | None = None
    problems: list[str] = []
    notes: list[str] = []
    schemes: dict[str, int] = {}
    checkpoint = None
    try:
        checkpoint = open_unverified(folder)
        quantization = checkpoint.quantization
        problems += find_problems(checkpoint)
        if checkpoint.stored is not None and not problems:
            notes += checkpoint.stored.notes
            for module in linears(config):
                name = checkpoint.scheme(module).name
                schemes[name] = schemes.get(name, 0) + 1
        if strangers := find_strangers(checkpoint):
            notes.append(f"{len(strangers)} tensors are not part of the model and ignored, {strangers[0]} for one")
    except CheckpointError as error:
        problems.append(str(error))
    try:
        require_tokenizer(folder)
    except CheckpointError as error:
        problems.append(str(error))
    infos = {} if checkpoint is None else {name: checkpoint.info(name) for name in checkpoint.names()}
    bytes_of: dict[str, int] = {}
    for info in infos.values():
        bytes_of[str(info.dtype)] = bytes_of.get(str(info.dtype), 0) + info.nbytes
    return Description(
        folder=folder,
        architecture=ARCHITECTURE,
        config=config,
        parts=_parts(config, infos),
        dtypes=tuple(name.removeprefix("torch.") for name in sorted(bytes_of, key=lambda name: -bytes_of[name])),
        num_tensors=len(infos),
        num_shards=0 if checkpoint is None else len(checkpoint.shards.files),
        layout="unread" if checkpoint is None else checkpoint.layout,
        quantization=quantization or foreign_quantization(config),
        schemes=schemes,
        problems=tuple(problems),
        notes=tuple(notes),
    )


def _parts(config: ModelConfig, infos: Mapping[str, TensorInfo]) -> tuple[Part, ...]:
    parameters: dict[str, int] = {}
    for name, shape in expected_tensors(config).items():
        parameters[_part_of(name)] = parameters.get(_part_of(name), 0) + math.prod(shape)
    sizes = dict.fromkeys(parameters, 0)
    for name, info in infos.items():
        if _part_of(name) in sizes:  # a tied model has no head of its own, even if the file has
            sizes[_part_of(name)] += info.nbytes
    return tuple(Part(part, count, sizes[part]) for part, count in parameters.items())


def _part_of(name: str) -> str:
    if name.startswith("visual."):
        return "vision tower"
    if name == EMBEDDING:
        return "token embedding"
    return "output head" if name == HEAD else "decoder layers" if name.startswith("model.layers.") else "final norm"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _scaled(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e8 else f"{parameters / 1e6:.2f} M"


def _gigabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:.2f} MB"
