"""Where a scale can leave a linear's input: what comes before it that can be divided. Knows layers; knows no numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saccade.checkpoints.config import ModelConfig
from saccade.model.language import DecoderLayer
from saccade.model.layers import Linear
from saccade.model.vision import VisionBlock


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
