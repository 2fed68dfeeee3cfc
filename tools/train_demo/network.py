"""The plain Qwen2.5-VL architecture as a training forward: dense batches of equal pictures, right-padded conversations.

Knows tensors and a ModelConfig; knows no files, scenes or words. Parameter names are those of published checkpoints, so
`state_dict()` is what goes into model.safetensors. Every group of slices has one size, so windows become reshapes.
Weights are float32 and follow the activations' dtype where they are used; rotary angles and norms are float32.
Letters: N time slices, P patches of a slice, U = P/4 merged units, D tower width, B rows, L tokens, H text width, d head size.
"""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.checkpoints.config import ModelConfig, TextConfig, VisionConfig
from saccade.geometry import Grid, patch_coordinates

VISION_ROPE_THETA = 10_000.0
VISION_EPS = 1e-6


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [.., d]; cos and sin broadcast to it."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention over [.., heads, length, d]. Spelled out: on CPU its backward pass beats the fused kernel's at these lengths."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(dim=-1) @ v


# --- the two halves of a block around attention: functions of tensors, so that one compilation serves every block ---------


def vision_enter(
    x: Tensor, norm: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x: [N, P, D]; cos, sin: [P, 1, d]. Returns q, k, v [N, heads, P, d]."""
    qkv = linear(rms_norm(x, norm, VISION_EPS), weight, bias).unflatten(-1, (3, num_heads, -1))
    q, k, v = qkv.unbind(2)
    return rotate(q, cos, sin).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2), v.transpose(1, 2)


def vision_leave(
    x: Tensor, mixed: Tensor, proj: tuple[Tensor, Tensor], norm: Tensor,
    gate: tuple[Tensor, Tensor], up: tuple[Tensor, Tensor], down: tuple[Tensor, Tensor],
) -> Tensor:  # fmt: skip
    """x, mixed: [N, P, D]. Returns the block's output."""
    x = x + linear(mixed, *proj)
    y = rms_norm(x, norm, VISION_EPS)
    return x + linear(F.silu(linear(y, *gate)) * linear(y, *up), *down)


def text_enter(
    x: Tensor, norm: Tensor, eps: float, q: tuple[Tensor, Tensor], k: tuple[Tensor, Tensor], v: tuple[Tensor, Tensor],
    cos: Tensor, sin: Tensor, head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x: [B, L, H]; cos, sin: [B, L, 1, d]. Returns q, k, v [B, heads, L, d]; keys and values repeated per query head."""
    y = rms_norm(x, norm, eps)
    queries, keys, values = (linear(y, *w).unflatten(-1, (-1, head_dim)) for w in (q, k, v))
    repeats = queries.shape[2] // keys.shape[2]
    keys, values = rotate(keys, cos, sin).repeat_interleave(repeats, 2), values.repeat_interleave(repeats, 2)
    return rotate(queries, cos, sin).transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)


def text_leave(
    x: Tensor, mixed: Tensor, o: Tensor, norm: Tensor, eps: float, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    x = x + linear(mixed, o)
    y = rms_norm(x, norm, eps)
    return x + linear(F.silu(linear(y, gate)) * linear(y, up), down)


def compile_halves() -> None:
    """Compile the functions above for any size: 1.6 times the speed of a tower step, for a minute at the start."""
    for function in (vision_enter, vision_leave, text_enter, text_leave):
        globals()[function.__name__] = torch.compile(function, dynamic=True)


def pair(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    return layer.weight, layer.bias


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class GatedMLP(nn.Module):
    def __init__(self, width: int, inner: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)


# --- the vision tower ------------------------------------------------------------------------------------------------


class SliceLayout:
    """How the patches of one h x w slice stand in the tower: windows of equal length side by side.

    order [P]: patch (in block order) that stands at each place. groups: (first place, windows, patches per window).
    unit_inverse [U]: place of every merged unit. cos, sin [P, 1, d]: rotary angles of the places.
    """

    def __init__(self, h: int, w: int, config: VisionConfig) -> None:
        merge = config.spatial_merge_size
        side = config.window_size // config.factor
        units = torch.arange((h // merge) * (w // merge)).view(h // merge, w // merge)
        by_length: dict[int, list[Tensor]] = defaultdict(list)
        for band in units.split(side, dim=0):
            for window in band.split(side, dim=1):
                by_length[window.numel() * config.merge_unit].append(window.reshape(-1))
        self.groups: list[tuple[int, int, int]] = []
        pieces: list[Tensor] = []
        start = 0
        for length, windows in by_length.items():
            self.groups.append((start, len(windows), length))
            pieces += windows
            start += length * len(windows)
        unit_order = torch.cat(pieces)
        self.unit_inverse = torch.argsort(unit_order)
        self.order = (unit_order[:, None] * config.merge_unit + torch.arange(config.merge_unit)).reshape(-1)
        axis_dim = config.head_dim // 2
        frequencies = VISION_ROPE_THETA ** (-torch.arange(0, axis_dim, 2, dtype=torch.float32) / axis_dim)
        coordinates = patch_coordinates(Grid(1, h, w), merge)[self.order].float()
        angles = (coordinates[:, :, None] * frequencies).reshape(len(self.order), 1, -1).repeat(1, 1, 2)
        self.cos, self.sin = angles.cos(), angles.sin()


@lru_cache(maxsize=256)
def slice_layout(h: int, w: int, config: VisionConfig) -> SliceLayout:
    return SliceLayout(h, w, config)


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size)
        self.norm2 = RMSNorm(config.hidden_size)
        self.attn = VisionAttention(config)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=True)

    def forward(self, x: Tensor, layout: SliceLayout, *, windowed: bool) -> Tensor:
        """x: [N, P, D] in the layout's order. Returns the same shape."""
        qkv = vision_enter(x, self.norm1.weight, *pair(self.attn.qkv), layout.cos, layout.sin, self.attn.num_heads)
        num_slices, num_heads, num_patches, d = qkv[0].shape
        groups = layout.groups if windowed else [(0, 1, num_patches)]
        outputs = []
        for start, count, length in groups:
            parts = (y[:, :, start : start + count * length].reshape(num_slices, -1, length, d) for y in qkv)
            outputs.append(attend(*parts).view(num_slices, num_heads, count * length, d))
        mixed = torch.cat(outputs, dim=2).transpose(1, 2).flatten(2)
        mlp = (pair(layer) for layer in (self.mlp.gate_proj, self.mlp.up_proj, self.mlp.down_proj))
        return vision_leave(x, mixed, pair(self.attn.proj), self.norm2.weight, *mlp)


class PatchEmbed(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel, stride=kernel, bias=False)


class Merger(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size * config.merge_unit
        self.ln_q = RMSNorm(config.hidden_size)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, config.out_hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, P, D], the four patches of a unit in a row. Returns [N, U, H]."""
        units = rms_norm(x, self.ln_q.weight, VISION_EPS).unflatten(1, (-1, 4)).flatten(2)
        return linear(F.gelu(linear(units, *pair(self.mlp[0]))), *pair(self.mlp[2]))


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = Merger(config)

    def forward(self, rows: Tensor, h: int, w: int) -> Tensor:
        """rows: [N, P, 1176] normalised patches in block order, all slices h x w patches. Returns [N, U, H] in rows.dtype."""
        layout = slice_layout(h, w, self.config)
        x = linear(rows[:, layout.order], self.patch_embed.proj.weight.flatten(1))
        for index, block in enumerate(self.blocks):
            x = block(x, layout, windowed=index not in self.config.fullatt_block_indexes)
        return self.merger(x)[:, layout.unit_inverse]


# --- the language model ----------------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.q_proj = nn.Linear(config.hidden_size, config.num_heads * config.head_dim)
        self.k_proj = nn.Linear(config.hidden_size, config.num_kv_heads * config.head_dim)
        self.v_proj = nn.Linear(config.hidden_size, config.num_kv_heads * config.head_dim)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)


class DecoderLayer(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.eps, self.head_dim = config.rms_norm_eps, config.head_dim
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)
        self.self_attn = SelfAttention(config)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        """x: [B, L, H]; cos, sin: [B, L, 1, d]; bias: [B, 1, L, L], 0 where attention is allowed, else -inf."""
        a, m = self.self_attn, self.mlp
        projections = (pair(layer) for layer in (a.q_proj, a.k_proj, a.v_proj))
        qkv = text_enter(x, self.input_layernorm.weight, self.eps, *projections, cos, sin, self.head_dim)
        mixed = attend(*qkv, bias).transpose(1, 2).flatten(2)
        weights = (m.gate_proj.weight, m.up_proj.weight, m.down_proj.weight)
        return text_leave(x, mixed, a.o_proj.weight, self.post_attention_layernorm.weight, self.eps, *weights)


class Decoder(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size)

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions: [3, B, L]. Returns cos and sin [B, L, 1, d], each frequency driven by its axis of mrope_section."""
        half = self.config.head_dim // 2
        frequencies = self.config.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
        axis = torch.repeat_interleave(torch.arange(3), torch.tensor(self.config.mrope_section))
        angles = positions.float()[axis].permute(1, 2, 0) * frequencies  # [B, L, d/2]
        angles = angles.repeat(1, 1, 2).unsqueeze(2)
        return angles.cos(), angles.sin()

    def forward(self, x: Tensor, positions: Tensor, bias: Tensor) -> Tensor:
        """x: [B, L, H] embedded tokens with media rows in place. Returns the normed states [B, L, H]."""
        cos, sin = self.rotary(positions)
        for layer in self.layers:
            x = layer(x, cos, sin, bias.to(x.dtype))
        return rms_norm(x, self.norm.weight, self.config.rms_norm_eps)


class Network(nn.Module):
    """Tower and decoder with a tied head; parameter names as in published checkpoints."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = VisionTower(config.vision)
        self.model = Decoder(config.text)
        self.apply(_initialise)

    def states(self, token_ids: Tensor, is_media: Tensor, units: Tensor, positions: Tensor, bias: Tensor) -> Tensor:
        """token_ids, is_media: [B, L]; units: [M, H] tower output in order of appearance. Returns [B, L, H] in units.dtype."""
        x = self.model.embed_tokens(token_ids).to(units.dtype)
        return self.model(x.masked_scatter(is_media[..., None], units), positions, bias)

    def logits(self, states: Tensor) -> Tensor:
        return linear(states, self.model.embed_tokens.weight)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv3d):
        nn.init.normal_(module.weight, std=0.5 * module.weight[0].numel() ** -0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.05)
