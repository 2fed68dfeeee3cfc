"""The two Ascend layouts as msModelSlim writes them: names, order, tags and types (section 8).

Knows names and tensors; knows no files and no arithmetic beyond what a layout asks for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.quantize.rounding import (
    dequantization,
    integer_bias,
    round_weight,
    round_weight_4bit,
    row_scale,
    scaled_values,
)
from saccade.schemes.packing import pack_row_pairs

FLOAT = "FLOAT"
NIBBLE_BIAS = 8  # what splitting an int8 activation in two nibbles has to add back, per row sum

TOWER_BLOCK = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
DECODER_LAYER = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    "input_layernorm",
    "post_attention_layernorm",
)
_QUANTIZED = re.compile(r"(attn\.(qkv|proj)|self_attn\.[qkvo]_proj|mlp\.(gate|up)_proj)$")
_IS_NORM = re.compile(r"(norm1|norm2|ln_q|layernorm|model\.norm)$")
_SUMMED = re.compile("q_proj|k_proj|v_proj|gate_proj|up_proj")
_SUMMED_IN_PARTS = re.compile("o_proj|down_proj")


@dataclass(frozen=True)
class Stored:
    """One tensor of the output with its entry in the description."""

    name: str
    tensor: Tensor
    tag: str


def is_quantized(module: str) -> bool:
    """All linears of the blocks but down_proj (section 3.1)."""
    return _QUANTIZED.search(module) is not None


def is_norm(module: str) -> bool:
    return _IS_NORM.search(module) is not None


def description_head(scheme: str, group_size: int, is_mindie: bool) -> dict[str, object]:
    head: dict[str, object] = {} if is_mindie else {"version": "1.0.0"}
    head["model_quant_type"] = scheme
    if scheme.startswith("W4") and not is_mindie:
        head["group_size"] = group_size
    return head


def float_module(module: str, weight: Tensor, bias: Tensor | None) -> Iterator[Stored]:
    yield Stored(f"{module}.weight", weight, FLOAT)
    if bias is not None:
        yield Stored(f"{module}.bias", bias, FLOAT)


def norm_with_bias(module: str, gain: Tensor, scheme: str, is_mindie: bool) -> Iterator[Stored]:
    """A norm under m4: it gains a float32 bias of zeros, and for MindIE both once more under another name (section 6.3)."""
    zeros = torch.zeros(gain.shape, dtype=torch.float32)
    yield from float_module(module, gain, zeros)
    if is_mindie:
        yield Stored(f"{module}.module.weight", gain, scheme)
        yield Stored(f"{module}.module.bias", zeros, scheme)


def int8_linear(
    module: str,
    weight: Tensor,
    bias: Tensor | None,
    activation: tuple[Tensor, Tensor] | None,
    scheme: str,
    is_wide: bool = False,
) -> Iterator[Stored]:
    """weight: [O, H] in T; `activation`: static (scale, zero point), None for dynamic ones; `is_wide`: scales in float32."""
    wide = weight.float() if is_wide else weight
    scale = row_scale(wide.abs().amax(1))
    values = round_weight(wide, scale)
    yield Stored(f"{module}.weight", values, scheme)
    if bias is not None:
        yield Stored(f"{module}.bias", bias, FLOAT)
    yield Stored(f"{module}.weight_scale", scale, scheme)
    yield Stored(f"{module}.weight_offset", torch.zeros_like(scale), scheme)
    if activation is None:
        return
    input_scale, zero = activation
    deq_scale = dequantization(input_scale, scale)
    yield Stored(f"{module}.input_scale", input_scale, scheme)
    yield Stored(f"{module}.input_offset", zero, scheme)
    yield Stored(f"{module}.quant_bias", integer_bias(bias, deq_scale, zero, values), scheme)
    if weight.dtype != torch.bfloat16:
        deq_scale = deq_scale.view(torch.int32).to(torch.int64)  # float32 bits in the low half
    yield Stored(f"{module}.deq_scale", deq_scale, scheme)


def int4_linear(
    module: str, weight: Tensor, bias: Tensor | None, group_size: int, scheme: str, is_mindie: bool
) -> Iterator[Stored]:
    """weight: [O, H] in T."""
    values, first, second = round_weight_4bit(weight, group_size)
    yield Stored(f"{module}.weight", values if is_mindie else pack_row_pairs(values), scheme)
    if bias is not None:
        yield Stored(f"{module}.bias", bias, FLOAT)
    yield Stored(f"{module}.weight_scale", first, scheme)
    yield Stored(f"{module}.weight_offset", torch.zeros_like(first), scheme)
    yield Stored(f"{module}.weight_scale_second", second, scheme)
    yield Stored(f"{module}.weight_offset_second", torch.zeros(second.shape, dtype=torch.int64), scheme)
    if not is_mindie:
        yield Stored(f"{module}.scale_bias", scale_bias(module, scaled_values(values, first, second)), scheme)


def scale_bias(module: str, scaled: Tensor, parts: int = 16) -> Tensor:
    """scaled: [O, H] float32. Row sums, sums of 16 column blocks, or, for the tower's attention, nothing summed: a fault kept."""
    if _SUMMED.search(module):
        return NIBBLE_BIAS * scaled.sum(1, keepdim=True)
    if _SUMMED_IN_PARTS.search(module):
        blocks = scaled.reshape(-1, scaled.shape[1] // parts).sum(1, keepdim=True)
        return (NIBBLE_BIAS * blocks).reshape(len(scaled), parts)
    return scaled
