"""The two Ascend layouts as msModelSlim writes them: names, order, tags and types (section 8).

Knows names and tensors; knows no files and no arithmetic beyond what a layout asks for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from saccade.checkpoints import ascend
from saccade.quantize.rounding import (
    dequantization,
    integer_bias,
    round_weight,
    round_weight_4bit,
    row_scale,
)

TOWER_BLOCK = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
DECODER_LAYER = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    "input_layernorm",
    "post_attention_layernorm",
)
_QUANTIZED = re.compile(r"(attn\.(qkv|proj)|self_attn\.[qkvo]_proj|mlp\.(gate|up)_proj)$")
_IS_NORM = re.compile(r"(norm1|norm2|ln_q|layernorm|model\.norm)$")


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
    return dict(ascend.description_head(scheme, group_size if scheme.startswith("W4") else None, _dialect(is_mindie)))


def float_module(module: str, weight: Tensor, bias: Tensor | None) -> Iterator[Stored]:
    yield Stored(f"{module}.weight", weight, ascend.FLOAT)
    if bias is not None:
        yield Stored(f"{module}.bias", bias, ascend.FLOAT)


def norm_with_bias(module: str, gain: Tensor, scheme: str, is_mindie: bool) -> Iterator[Stored]:
    """A norm under m4: it gains a float32 bias of zeros, and for MindIE both once more under another name (section 6.3)."""
    tensors, entries = ascend.quantized_norm(module, gain, scheme, _dialect(is_mindie))
    yield from (Stored(name, tensor, entries[name]) for name, tensor in tensors.items())


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
    calibrated = None
    if activation is not None:
        input_scale, zero = activation
        deq_scale = dequantization(input_scale, scale)
        calibrated = (input_scale, zero, integer_bias(bias, deq_scale, zero, values), deq_scale)
    yield from _tagged(ascend.int8_tensors(module, values, bias, scale, calibrated, weight.dtype), scheme)


def int4_linear(
    module: str, weight: Tensor, bias: Tensor | None, group_size: int, scheme: str, is_mindie: bool
) -> Iterator[Stored]:
    """weight: [O, H] in T. The tower's attention keeps its scale_bias unsummed: a fault of the reference."""
    values, first, second = round_weight_4bit(weight, group_size)
    dialect = _dialect(is_mindie)
    yield from _tagged(ascend.int4_tensors(module, values, bias, first, second, dialect, as_the_original=True), scheme)


def _tagged(tensors: Mapping[str, Tensor], scheme: str) -> Iterator[Stored]:
    entries = ascend.description_entries(tensors, scheme)
    yield from (Stored(name, tensor, entries[name]) for name, tensor in tensors.items())


def _dialect(is_mindie: bool) -> ascend.Dialect:
    return "mindie" if is_mindie else "vllm"
