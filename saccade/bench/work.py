"""How many operations each stage of an answer needs and how many bytes must move, whatever the program (spec, section 14).

Knows shapes and lengths; knows no tensors and no machine. A multiply-add is 2 operations. Letters: P patches; S prompt tokens;
H tower width; L decoder layers; D weights of a layer's linears; q = query heads x head size; V vocabulary; h decoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from saccade.checkpoints.config import ModelConfig
from saccade.geometry import Grid, slice_lengths, window_order


@dataclass(frozen=True)
class Work:
    """Operations, and bytes read or written at least once."""

    operations: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.operations + other.operations, self.bytes + other.bytes)


@dataclass(frozen=True)
class Storage:
    """Bytes of a value: of a linear layer's weights and of the output head's (quantized perhaps), and of all else, the cache
    included."""

    linear: float = 2.0
    other: float = 2.0
    head: float = 2.0


# --- the tower -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VisionWork:
    """Operations of the tower by part, and the bytes of its weights."""

    ends: float  # patch embedding and merger
    linears: float  # of the blocks
    full_attention: float
    window_attention: float
    weight_bytes: float

    @property
    def total(self) -> Work:
        return Work(self.ends + self.linears + self.full_attention + self.window_attention, self.weight_bytes)


def vision_work(config: ModelConfig, grids: Sequence[Grid], storage: Storage) -> VisionWork:
    """The tower over all media at once, its weights read once."""
    vision = config.vision
    num_patches = sum(grid.num_patches for grid in grids)
    merged = vision.hidden_size * vision.merge_unit
    block = 4 * vision.hidden_size**2 + 3 * vision.hidden_size * vision.intermediate_size
    merger = merged * (merged + vision.out_hidden_size)
    patch_embedding = vision.patch_values * vision.hidden_size
    biases_and_gains = vision.depth * (7 * vision.hidden_size + 2 * vision.intermediate_size) + (
        vision.hidden_size + merged + vision.out_hidden_size
    )
    _, windows = window_order(grids, vision.spatial_merge_size, vision.window_size // vision.factor)
    num_full = sum(index < vision.depth for index in vision.fullatt_block_indexes)
    return VisionWork(
        ends=2 * num_patches * patch_embedding + 2 * num_patches // vision.merge_unit * merger,
        linears=2 * num_patches * vision.depth * block,
        full_attention=num_full * 4 * vision.hidden_size * sum(length**2 for length in slice_lengths(grids)),
        window_attention=(vision.depth - num_full) * 4 * vision.hidden_size * sum(length**2 for length in windows),
        weight_bytes=(vision.depth * block + merger) * storage.linear
        + (patch_embedding + biases_and_gains) * storage.other,
    )


# --- the decoder -----------------------------------------------------------------------------------------------------


def layer_weights(config: ModelConfig) -> int:
    """D: weights of one decoder layer's linears."""
    text = config.text
    q_size, kv_size = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    return 2 * text.hidden_size * (q_size + kv_size) + 3 * text.hidden_size * text.intermediate_size


def weights_per_token(config: ModelConfig) -> int:
    """L D + V h: every weight a decoded token is multiplied with."""
    return config.text.num_layers * layer_weights(config) + config.text.vocab_size * config.text.hidden_size


def cache_bytes_per_token(config: ModelConfig, storage: Storage) -> float:
    text = config.text
    return 2 * text.num_layers * text.num_kv_heads * text.head_dim * storage.other


def decoder_weight_bytes(config: ModelConfig, storage: Storage) -> float:
    """Of the layers' linears and the head, read once."""
    layers = config.text.num_layers * layer_weights(config) * storage.linear
    return layers + config.text.vocab_size * config.text.hidden_size * storage.head


def prefill_attention_operations(config: ModelConfig, num_tokens: int) -> float:
    text = config.text
    return 2 * text.num_heads * text.head_dim * text.num_layers * num_tokens * (num_tokens + 1)


def prefill_work(config: ModelConfig, num_tokens: int, storage: Storage) -> Work:
    """A prompt of S tokens in one piece; the head on its last token only."""
    text = config.text
    linears = 2 * num_tokens * text.num_layers * layer_weights(config) + 2 * text.vocab_size * text.hidden_size
    return Work(
        linears + prefill_attention_operations(config, num_tokens),
        decoder_weight_bytes(config, storage) + num_tokens * cache_bytes_per_token(config, storage),
    )


def decode_work(config: ModelConfig, context: float, storage: Storage) -> Work:
    """One token that looks at `context` tokens, itself included."""
    text = config.text
    attention = 4 * text.num_heads * text.head_dim * text.num_layers * context
    return Work(
        2 * weights_per_token(config) + attention,
        decoder_weight_bytes(config, storage) + context * cache_bytes_per_token(config, storage),
    )


def decode_all_work(config: ModelConfig, num_prompt: int, num_output: int, storage: Storage) -> Work:
    """All steps after the prefill, which gives the first token: num_output - 1 of them."""
    steps = num_output - 1
    one = decode_work(config, num_prompt + num_output / 2, storage)  # of the mean context: work is linear in it
    return Work(steps * one.operations, steps * one.bytes)
