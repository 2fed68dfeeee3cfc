"""The float model one block at a time, operation by operation as transformers 4.49 computes it in the checkpoint's type T.

Sums are taken in the order of kernels/ordered.py, so that in bfloat16 the bits are the same on every processor.

Not `model/`: serving keeps rotary angles in float32 and stacks q, k and v; here the roundings themselves are the subject, because
calibrated ranges and the m2 search inherit them. Knows blocks as dicts of tensors by their name within the block; knows no files.
Letters: P patches, N tokens, H width, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.checkpoints.config import TextConfig, VisionConfig
from saccade.geometry import Grid, patch_coordinates, slice_lengths, window_order
from saccade.kernels import ordered

Block = dict[str, Tensor]
Apply = Callable[[str, Tensor], Tensor]  # (a linear's name within the block, its input) -> its output
Intercept = Callable[[str, Tensor], Tensor]  # (a norm's name within the block, its output) -> what goes on

VISION_EPS = 1e-6  # fixed in the published code
ROPE_BASE = 10_000.0
ROWS_AT_ONCE = 1024  # queries whose logits over all keys are in memory


def float_linears(block: Block) -> Apply:
    """The block's linears as they stand in `block` at the time of the call."""

    def apply(name: str, x: Tensor) -> Tensor:
        return ordered.linear(x, block[f"{name}.weight"], block.get(f"{name}.bias"))

    return apply


def let_pass(name: str, x: Tensor) -> Tensor:
    return x


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(ordered.row_means(wide.pow(2))[..., None] + eps)
    return gain * wide.to(x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((-high, low), dim=-1)


# --- the tower -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TowerPlaces:
    """Where one sample's patches stand: window order of the units, rotary tables [P, D] float32, segment bounds."""

    order: Tensor
    cos: Tensor
    sin: Tensor
    windows: tuple[int, ...]  # cumulative, from 0 to P
    slices: tuple[int, ...]

    def bounds(self, is_full: bool) -> tuple[int, ...]:
        return self.slices if is_full else self.windows


def tower_places(config: VisionConfig, grids: Sequence[Grid]) -> TowerPlaces:
    order, lengths = window_order(grids, config.spatial_merge_size, config.window_size // config.factor)
    quarter = config.head_dim // 4
    exponents = torch.arange(0, 2 * quarter, 2, dtype=torch.float32) / (2 * quarter)
    frequencies = 1.0 / ROPE_BASE**exponents
    coordinates = torch.cat([patch_coordinates(grid, config.spatial_merge_size) for grid in grids])
    angles = (coordinates.float()[:, :, None] * frequencies).flatten(1)
    angles = angles.view(-1, config.merge_unit, angles.shape[-1])[order].flatten(0, 1)
    angles = torch.cat((angles, angles), dim=-1)
    return TowerPlaces(order, angles.cos(), angles.sin(), _cumulative(lengths), _cumulative(slice_lengths(grids)))


def _cumulative(lengths: Sequence[int]) -> tuple[int, ...]:
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    return tuple(bounds)


def embed_patches(block: Block, patches: Tensor, places: TowerPlaces, config: VisionConfig) -> Tensor:
    """patches: [P, patch_values] float32. Returns [P, H] in T, in window order. A convolution, as published: it rounds as one."""
    weight = block["proj.weight"]
    x = ordered.patch_convolution(patches.to(weight.dtype).view(-1, *weight.shape[1:]), weight)
    return x.view(-1, config.merge_unit, config.hidden_size)[places.order].view(-1, config.hidden_size)


def rotate_patches(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [P, heads, D]. Rotation in float32, result in T."""
    wide = x.float()
    return (wide * cos[:, None] + rotate_half(wide) * sin[:, None]).to(x.dtype)


def tower_block(
    x: Tensor,
    block: Block,
    places: TowerPlaces,
    is_full: bool,
    num_heads: int,
    apply: Apply,
    intercept: Intercept = let_pass,
) -> Tensor:
    """x: [P, H]. Returns the next block's x."""
    h = intercept("norm1", rms_norm(x, block["norm1.weight"], VISION_EPS))
    q, k, v = apply("attn.qkv", h).view(len(x), 3, num_heads, -1).unbind(1)
    q, k = rotate_patches(q, places.cos, places.sin), rotate_patches(k, places.cos, places.sin)
    attended = attend_segments(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), places.bounds(is_full))
    x = x + apply("attn.proj", attended.transpose(0, 1).reshape(len(x), -1))
    h = intercept("norm2", rms_norm(x, block["norm2.weight"], VISION_EPS))
    return x + apply("mlp.down_proj", F.silu(apply("mlp.gate_proj", h)) * apply("mlp.up_proj", h))


def attend_segments(q: Tensor, k: Tensor, v: Tensor, bounds: Sequence[int]) -> Tensor:
    """Attention within segments over all keys, masked, as published. q, k, v: [heads, P, D]. Returns [heads, P, D].

    Without a batch dimension torch takes its plain path: in float32, q and k scaled by the root of the scale each. A head and
    ROWS_AT_ONCE queries at a time, which changes no bit and bounds the memory.
    """
    segments = torch.repeat_interleave(torch.tensor([end - start for start, end in pairwise(bounds)]))
    root = math.sqrt(1 / math.sqrt(q.shape[-1]))
    out = torch.empty_like(q)
    for h in range(len(q)):
        queries, keys, values = q[h].float() * root, k[h].float().T * root, v[h].float()
        for start in range(0, q.shape[1], ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            logits = (queries[rows] @ keys).masked_fill_(segments[rows, None] != segments, float("-inf"))
            out[h, rows] = (ordered.softmax(logits) @ values).to(q.dtype)
    return out


def merge(block: Block, x: Tensor, places: TowerPlaces, config: VisionConfig) -> Tensor:
    """x: [P, H]. Returns the picture's rows [units, out_hidden_size] in picture order."""
    x = rms_norm(x, block["ln_q.weight"], VISION_EPS).view(-1, config.hidden_size * config.merge_unit)
    x = ordered.gelu(ordered.linear(x, block["mlp.0.weight"], block["mlp.0.bias"]))
    x = ordered.linear(x, block["mlp.2.weight"], block["mlp.2.bias"])
    return x[torch.argsort(places.order)]


# --- the decoder -----------------------------------------------------------------------------------------------------


def rotary_tables(config: TextConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """positions: [3, N]. Returns cos and sin [N, D] rounded to T, each frequency's from the axis of its mrope section."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    angles = positions.float()[:, :, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)  # [3, N, D]
    axes = torch.repeat_interleave(torch.arange(6) % 3, torch.tensor(config.mrope_section * 2))  # [D]: t, h, w, t, h, w
    places = torch.arange(config.head_dim)
    cos, sin = (table.to(dtype)[axes, :, places].T.contiguous() for table in (angles.cos(), angles.sin()))
    return cos, sin


def decoder_layer(
    x: Tensor,
    block: Block,
    tables: tuple[Tensor, Tensor],
    config: TextConfig,
    apply: Apply,
    intercept: Intercept = let_pass,
) -> Tensor:
    """x: [N, H], one sequence. Returns the next layer's x."""
    num_tokens = len(x)
    h = intercept("input_layernorm", rms_norm(x, block["input_layernorm.weight"], config.rms_norm_eps))
    q, k, v = (
        apply(f"self_attn.{name}_proj", h).view(1, num_tokens, -1, config.head_dim).transpose(1, 2) for name in "qkv"
    )
    cos, sin = tables
    q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin  # in T, rounding after each operation
    groups = config.num_heads // config.num_kv_heads
    attended = ordered.causal_attention(q, repeat_heads(k, groups), repeat_heads(v, groups))
    x = x + apply("self_attn.o_proj", attended.transpose(1, 2).reshape(num_tokens, -1))
    name = "post_attention_layernorm"
    h = intercept(name, rms_norm(x, block[f"{name}.weight"], config.rms_norm_eps))
    return x + apply("mlp.down_proj", F.silu(apply("mlp.gate_proj", h)) * apply("mlp.up_proj", h))


def repeat_heads(x: Tensor, groups: int) -> Tensor:
    """[..., K, N, D] -> [..., K * groups, N, D]."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=-3).contiguous()
