"""A model of a published size with random weights, made in memory: real shapes and costs, without a file."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saccade.api import LLM
from saccade.base.errors import OptionError
from saccade.base.options import suggestion
from saccade.checkpoints.config import ModelConfig
from saccade.checkpoints.noise import RandomWeights
from saccade.checkpoints.presets import PRESETS, shortened
from saccade.checkpoints.stand_in import tokenizer_files
from saccade.inputs.chat import ChatTokenizer
from saccade.inputs.options import MediaLimits, MediaOptions


def random_llm(
    preset: str,
    layers: int | None = None,
    vision_depth: int | None = None,
    *,
    seed: int = 0,
    media: MediaOptions | None = None,
    limits: MediaLimits | None = None,
    kernels: Mapping[str, str] | None = None,
    **options: Any,
) -> LLM:
    """An LLM of size `preset` (3b, 7b, 32b, 72b, tiny), shortened if asked for. Keywords are the fields of EngineOptions."""
    if preset not in PRESETS:
        raise OptionError(f"random model {preset!r} is unknown{suggestion(preset, PRESETS)}")
    config = shortened(PRESETS[preset], layers, vision_depth)
    weights, tokenizer = RandomWeights(seed), stand_in_tokenizer(config)
    return LLM.from_source(config, weights, tokenizer, media=media, limits=limits, kernels=kernels, **options)


def stand_in_tokenizer(config: ModelConfig) -> ChatTokenizer:
    """A tokenizer with the published ids, made without a download."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in tokenizer_files(config).items():
            Path(folder, name).write_text(text, encoding="utf-8")
        return ChatTokenizer(folder, config)
