"""What a checkpoint says about itself, as frozen values.

Knows config.json (flat and nested), preprocessor_config.json and generation_config.json and the defaults of absent fields;
knows no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VisionConfig:
    """The tower. Defaults are those of the published class, which the 3B and 72B files leave out."""

    hidden_size: int
    out_hidden_size: int
    depth: int = 32
    num_heads: int = 16
    intermediate_size: int = 3420
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112  # pixels
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    tokens_per_second: float = 4.0
    in_channels: int = 3

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def merge_unit(self) -> int:
        """Patches per language-model token (4)."""
        return self.spatial_merge_size**2

    @property
    def patch_values(self) -> int:
        """Values in one patch row (1176)."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def factor(self) -> int:
        """Pixels per merged unit side (28); picture sides are multiples of it."""
        return self.patch_size * self.spatial_merge_size


@dataclass(frozen=True)
class TextConfig:
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    max_position_embeddings: int
    tie_word_embeddings: bool


@dataclass(frozen=True)
class PreprocessingConfig:
    """Limits are areas in pixels; mean and std are per RGB channel of values in 0..1."""

    min_pixels: int = 3136
    max_pixels: int = 12_845_056
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class GenerationConfig:
    """Defaults of generation as transformers would apply them (absent top_k with sampling is 50)."""

    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    vision: VisionConfig
    text: TextConfig
    preprocessing: PreprocessingConfig
    generation: GenerationConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    dtype: str  # "bfloat16" | "float16" | "float32": what the file declares
