"""The four published sizes, a small and a tiny one, as values; and a config as the published files spell it.

Knows numbers (spec, section 1). An engine takes its numbers from the checkpoint; these are for making checkpoints and for
reckoning about sizes that are not at hand.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from saccade.checkpoints.config import (
    ARCHITECTURE,
    MODEL_TYPE,
    GenerationConfig,
    ModelConfig,
    PreprocessingConfig,
    TextConfig,
    VisionConfig,
)

NUM_ORDINARY_TOKENS = 151_643  # published; the added tokens come after them


def _model(text: TextConfig, vision: VisionConfig, end: int = NUM_ORDINARY_TOKENS) -> ModelConfig:
    """`end`: the id of the first added token."""
    # Published values from mid-2025 on; earlier files say temperature 0.1, top_k 1, top_p 0.001 (spec, section 12).
    generation = GenerationConfig(
        eos_token_ids=(end + 2, end), pad_token_id=end, do_sample=True, temperature=1e-6, repetition_penalty=1.05
    )
    return ModelConfig(
        vision=vision,
        text=text,
        preprocessing=PreprocessingConfig(),
        generation=generation,
        image_token_id=end + 12,
        video_token_id=end + 13,
        vision_start_token_id=end + 9,
        vision_end_token_id=end + 10,
        dtype="bfloat16",
    )


def _published(
    *, hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, vocabulary: int, tied: bool, vision_mlp: int
) -> ModelConfig:
    text = TextConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        intermediate_size=mlp,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        mrope_section=(16, 24, 24),
        max_position_embeddings=128_000,
        tie_word_embeddings=tied,
    )
    vision = VisionConfig(hidden_size=1280, out_hidden_size=hidden, intermediate_size=vision_mlp, tokens_per_second=2.0)
    return _model(text, vision)


PRESETS: dict[str, ModelConfig] = {
    "3b": _published(
        hidden=2048, layers=36, heads=16, kv_heads=2, mlp=11_008, vocabulary=151_936, tied=True, vision_mlp=3420
    ),
    "7b": _published(
        hidden=3584, layers=28, heads=28, kv_heads=4, mlp=18_944, vocabulary=152_064, tied=False, vision_mlp=3420
    ),
    "32b": _published(
        hidden=5120, layers=64, heads=40, kv_heads=8, mlp=27_648, vocabulary=152_064, tied=False, vision_mlp=3456
    ),
    "72b": _published(
        hidden=8192, layers=80, heads=64, kv_heads=8, mlp=29_568, vocabulary=152_064, tied=False, vision_mlp=3456
    ),
    "small": _model(  # 257 MB
        TextConfig(
            vocab_size=8192,
            hidden_size=1024,
            num_layers=8,
            num_heads=8,
            num_kv_heads=8,
            head_dim=128,
            intermediate_size=2048,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            mrope_section=(16, 24, 24),
            max_position_embeddings=128_000,
            tie_word_embeddings=False,
        ),
        VisionConfig(
            hidden_size=512,
            out_hidden_size=1024,
            depth=8,
            num_heads=8,
            intermediate_size=1024,
            fullatt_block_indexes=(7,),  # one in eight, as published
            tokens_per_second=2.0,
        ),
        end=8170,
    ),
    "tiny": _model(
        TextConfig(
            vocab_size=151_936,
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            intermediate_size=128,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            mrope_section=(2, 3, 3),
            max_position_embeddings=128_000,
            tie_word_embeddings=True,
        ),
        VisionConfig(
            hidden_size=64,
            out_hidden_size=64,
            depth=2,
            num_heads=4,
            intermediate_size=96,
            fullatt_block_indexes=(1,),
            tokens_per_second=2.0,
        ),
    ),
}


def shortened(config: ModelConfig, layers: int | None = None, vision_depth: int | None = None) -> ModelConfig:
    """The same model with fewer decoder layers or tower blocks (None keeps them): its widths are real, its depth is not."""
    text, vision = config.text, config.vision
    if layers is not None:
        text = replace(text, num_layers=layers)
    if vision_depth is not None:
        full = tuple(index for index in vision.fullatt_block_indexes if index < vision_depth)
        vision = replace(vision, depth=vision_depth, fullatt_block_indexes=full)
    return replace(config, text=text, vision=vision)


def config_json(config: ModelConfig) -> dict[str, Any]:
    """config.json in the published, flat spelling."""
    text, vision = config.text, config.vision
    pad = config.generation.pad_token_id
    bos = {} if pad is None else {"bos_token_id": pad}  # one token is both
    head_dim = {} if text.head_dim * text.num_heads == text.hidden_size else {"head_dim": text.head_dim}
    return {
        "architectures": [ARCHITECTURE],
        "attention_dropout": 0.0,
        **bos,
        "eos_token_id": config.generation.eos_token_ids[0],
        "vision_start_token_id": config.vision_start_token_id,
        "vision_end_token_id": config.vision_end_token_id,
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "hidden_act": "silu",
        "hidden_size": text.hidden_size,
        **head_dim,
        "initializer_range": 0.02,
        "intermediate_size": text.intermediate_size,
        "max_position_embeddings": text.max_position_embeddings,
        "max_window_layers": text.num_layers,
        "model_type": MODEL_TYPE,
        "num_attention_heads": text.num_heads,
        "num_hidden_layers": text.num_layers,
        "num_key_value_heads": text.num_kv_heads,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "sliding_window": 32_768,
        "tie_word_embeddings": text.tie_word_embeddings,
        "torch_dtype": config.dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": vision.depth,
            "hidden_act": "silu",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_heads": vision.num_heads,
            "in_chans": vision.in_channels,
            "out_hidden_size": vision.out_hidden_size,
            "patch_size": vision.patch_size,
            "spatial_merge_size": vision.spatial_merge_size,
            "spatial_patch_size": vision.patch_size,
            "window_size": vision.window_size,
            "fullatt_block_indexes": list(vision.fullatt_block_indexes),
            "tokens_per_second": _whole(vision.tokens_per_second),
            "temporal_patch_size": vision.temporal_patch_size,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": list(text.mrope_section)},
        "vocab_size": text.vocab_size,
    }


def generation_config_json(config: ModelConfig) -> dict[str, Any]:
    """generation_config.json; fields at their default are left out, as in the published ones."""
    generation, default = config.generation, GenerationConfig(eos_token_ids=())
    fields: dict[str, Any] = {"eos_token_id": list(generation.eos_token_ids)}
    if generation.pad_token_id is not None:
        fields |= {"bos_token_id": generation.pad_token_id, "pad_token_id": generation.pad_token_id}
    for name in ("do_sample", "repetition_penalty", "temperature", "top_k", "top_p", "min_p"):
        if getattr(generation, name) != getattr(default, name):
            fields[name] = getattr(generation, name)
    return fields


def preprocessor_config_json(config: ModelConfig) -> dict[str, Any]:
    """preprocessor_config.json in the published spelling; limits of videos, which the published ones lack, where there are any."""
    limits = {
        "video_min_pixels": config.preprocessing.video_min_pixels,
        "video_max_pixels": config.preprocessing.video_max_pixels,
    }
    return {
        "min_pixels": config.preprocessing.min_pixels,
        "max_pixels": config.preprocessing.max_pixels,
        **{name: limit for name, limit in limits.items() if limit is not None},
        "patch_size": config.vision.patch_size,
        "temporal_patch_size": config.vision.temporal_patch_size,
        "merge_size": config.vision.spatial_merge_size,
        "image_mean": list(config.preprocessing.image_mean),
        "image_std": list(config.preprocessing.image_std),
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }


def _whole(value: float) -> float | int:
    """A whole number without its point: transformers 5 wants tokens_per_second to be an integer."""
    return int(value) if value.is_integer() else value
