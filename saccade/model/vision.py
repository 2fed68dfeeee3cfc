"""The vision tower: patch rows in, one row per language-model token out (section 8 of the model description).

Letters: P patches of all media, packed; U = P / 4 merged units; H tower width; D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.base.ranks import ALONE, Ranks
from saccade.checkpoints.config import VisionConfig
from saccade.geometry import Grid, patch_coordinates, slice_lengths, window_order
from saccade.kernels.record import Kernels, Segments
from saccade.model.layers import GatedMlp, Linear, Norm
from saccade.model.sharding import cut, length, scaled

NORM_EPS = 1e-6  # fixed in the published code, whatever rms_norm_eps says
ROPE_BASE = 10_000.0


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig, kernels: Kernels, prefix: str, ranks: Ranks) -> None:
        super().__init__()
        self.kernels = kernels
        H, D = config.hidden_size, config.head_dim
        heads = cut(config.num_heads, ranks, "heads of the vision tower")
        self.num_heads, self.head_dim = length(heads), D
        rows = [scaled(heads, D, first=part * H) for part in range(3)]
        self.qkv = Linear(kernels, H, {f"{prefix}.qkv": 3 * H}, bias=True, ranks=ranks, rows=rows)
        self.proj = Linear(kernels, H, {f"{prefix}.proj": H}, bias=True, ranks=ranks, columns=scaled(heads, D))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: Segments) -> Tensor:
        qkv = self.qkv(x).view(-1, 3, self.num_heads, self.head_dim)
        q, k = self.kernels.rope(qkv[:, 0], qkv[:, 1], cos, sin)
        out = self.kernels.attention_varlen(q, k, qkv[:, 2], segments, self.head_dim**-0.5)
        y: Tensor = self.proj(out.flatten(1))
        return y


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig, kernels: Kernels, index: int, ranks: Ranks) -> None:
        super().__init__()
        prefix = f"visual.blocks.{index}"
        self.is_full = index in config.fullatt_block_indexes
        self.norm1 = Norm(kernels, f"{prefix}.norm1", config.hidden_size, NORM_EPS)
        self.attention = VisionAttention(config, kernels, f"{prefix}.attn", ranks)
        self.norm2 = Norm(kernels, f"{prefix}.norm2", config.hidden_size, NORM_EPS)
        self.mlp = GatedMlp(kernels, f"{prefix}.mlp", config.hidden_size, config.intermediate_size, True, ranks)

    def forward(
        self, x: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, segments: Segments
    ) -> tuple[Tensor, Tensor]:
        """x: [P, H], what the block before added; residual: [P, H], the stream up to there. Returns the same for the next."""
        x, residual = self.norm1(x, residual)
        x, residual = self.norm2(self.attention(x, cos, sin, segments), residual)
        return self.mlp(x), residual


class Merger(nn.Module):
    """Four neighbouring patches become one token of the language model's width."""

    def __init__(self, config: VisionConfig, kernels: Kernels) -> None:
        super().__init__()
        self.size = config.hidden_size * config.merge_unit
        self.norm = Norm(kernels, "visual.merger.ln_q", config.hidden_size, NORM_EPS)
        self.up = Linear(kernels, self.size, {"visual.merger.mlp.0": self.size}, bias=True)
        self.down = Linear(kernels, self.size, {"visual.merger.mlp.2": config.out_hidden_size}, bias=True)

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        x, _ = self.norm(x, residual)
        y: Tensor = self.down(F.gelu(self.up(x.view(-1, self.size))))
        return y


@dataclass(frozen=True)
class Places:
    """Where the patches of some media stand. order: [U], the units in window order; cos, sin: [P, D/2] float32, in that order."""

    order: Tensor
    cos: Tensor
    sin: Tensor
    windows: Segments
    slices: Segments

    def segments(self, is_full: bool) -> Segments:
        return self.slices if is_full else self.windows


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig, kernels: Kernels, ranks: Ranks = ALONE) -> None:
        super().__init__()
        self.config = config
        kernel = (config.in_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
        parts = {"visual.patch_embed.proj": config.hidden_size}
        self.patch_embed = Linear(kernels, config.patch_values, parts, bias=False, quantizable=False, row=kernel)
        self.layers = nn.ModuleList(VisionBlock(config, kernels, index, ranks) for index in range(config.depth))
        self.merger = Merger(config, kernels)

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        yield "visual.patch_embed", self.patch_embed
        for index, block in enumerate(self.layers):
            yield f"visual.blocks.{index}", block
        yield "visual.merger", self.merger

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """patches: [P, patch_values] in the tower's type, all media one after the other. Returns [U, out_hidden_size]."""
        places = self.places(grids, patches.device)
        x = self.embed(patches, places)
        residual: Tensor | None = None
        for block in self.layers:
            x, residual = block(x, residual, places.cos, places.sin, places.segments(bool(block.is_full)))
        return self.merge(x, residual, places)

    def places(self, grids: Sequence[Grid], device: torch.device) -> Places:
        config = self.config
        merge = config.spatial_merge_size
        order, window_lengths = window_order(grids, merge, config.window_size // config.factor)
        order = order.to(device)
        coordinates = torch.cat([patch_coordinates(grid, merge) for grid in grids]).to(device)
        coordinates = coordinates.view(-1, config.merge_unit, 2)[order].view(-1, 2)
        windows, slices = Segments(tuple(window_lengths)), Segments(tuple(slice_lengths(grids)))
        return Places(order, *self._angles(coordinates), windows, slices)

    def embed(self, patches: Tensor, places: Places) -> Tensor:
        """[P, patch_values] in picture order -> [P, H] in window order."""
        x: Tensor = self.patch_embed(patches)
        return x.view(-1, self.config.merge_unit, self.config.hidden_size)[places.order].view(
            -1, self.config.hidden_size
        )

    def merge(self, x: Tensor, residual: Tensor | None, places: Places) -> Tensor:
        """[P, H] in window order -> [U, out_hidden_size] in picture order."""
        merged: Tensor = self.merger(x, residual)
        out = torch.empty_like(merged)
        out[places.order] = merged
        return out

    def _angles(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """coordinates: [P, 2] row and column. Returns cos and sin [P, D/2] float32: the row's angles, then the column's."""
        quarter = self.config.head_dim // 4
        frequencies = 1.0 / ROPE_BASE ** (
            torch.arange(quarter, dtype=torch.float32, device=coordinates.device) / quarter
        )
        angles = (coordinates.float()[:, :, None] * frequencies).flatten(1)
        return angles.cos(), angles.sin()
