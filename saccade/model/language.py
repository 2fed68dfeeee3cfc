"""The decoder over a cache it is given (section 10 of the model description).

Letters: T tokens of all sequences, packed; H width; N query heads, K key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Protocol

import torch
from torch import Tensor, nn

from saccade.base.ranks import ALONE, Ranks
from saccade.checkpoints.config import TextConfig
from saccade.kernels.record import DecoderLayerWeights, DecoderWeights, Kernels, Segments
from saccade.model.key_fold import fold_keys
from saccade.model.layers import Embedding, GatedMlp, Linear, Norm
from saccade.model.sharding import cut_heads, scaled


class Attend(Protocol):
    """Attention of one layer over whatever the caller keeps: a paged cache when serving, the sequences themselves when training."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [T, N, D]; k, v: [T, K, D], rotated. Returns [T, N, D]."""


class WholeSequences:
    """Attend for sequences that are given whole, without a cache: calibration, training, tests."""

    def __init__(self, kernels: Kernels, lengths: tuple[int, ...]) -> None:
        self.kernels = kernels
        self.segments = Segments(lengths)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.kernels.attention_varlen(q, k, v, self.segments, q.shape[-1] ** -0.5, causal=True)


class Attention(nn.Module):
    def __init__(self, config: TextConfig, kernels: Kernels, prefix: str, index: int, ranks: Ranks) -> None:
        super().__init__()
        self.kernels, self.index = kernels, index
        self.head_dim = D = config.head_dim
        heads = cut_heads(config.num_heads, config.num_kv_heads, ranks)
        q_size, kv_size = config.num_heads * D, config.num_kv_heads * D
        parts = {f"{prefix}.q_proj": q_size, f"{prefix}.k_proj": kv_size, f"{prefix}.v_proj": kv_size}
        q, k, v = scaled(heads.q, D), scaled(heads.kv, D, first=q_size), scaled(heads.kv, D, first=q_size + kv_size)
        output = {f"{prefix}.o_proj": config.hidden_size}
        self.q_size, self.kv_size = heads.num_q * D, heads.num_kv * D  # of this rank
        self.qkv = Linear(kernels, config.hidden_size, parts, bias=True, ranks=ranks, rows=(q, k, v))
        self.output = Linear(kernels, q_size, output, bias=False, ranks=ranks, columns=q)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, is_visual: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x, is_visual).split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        heads = (x.shape[0], -1, self.head_dim)
        q, k = self.kernels.rope(q.view(heads), k.view(heads), cos, sin)
        out: Tensor = self.output(attend(self.index, q, k, v.view(heads)).reshape(-1, self.q_size), is_visual)
        return out


class DecoderLayer(nn.Module):
    def __init__(self, config: TextConfig, kernels: Kernels, index: int, ranks: Ranks) -> None:
        super().__init__()
        prefix = f"model.layers.{index}"
        self.input_norm = Norm(kernels, f"{prefix}.input_layernorm", config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, kernels, f"{prefix}.self_attn", index, ranks)
        self.post_norm = Norm(kernels, f"{prefix}.post_attention_layernorm", config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMlp(
            kernels, f"{prefix}.mlp", config.hidden_size, config.intermediate_size, bias=False, ranks=ranks
        )

    def fold_keys(self) -> None:
        """See key_fold.py."""
        attention = self.attention
        num_heads, num_kv_heads = attention.q_size // attention.head_dim, attention.kv_size // attention.head_dim
        attention.qkv.weight = fold_keys(attention.qkv.weight, self.input_norm.gain, num_heads, num_kv_heads)

    def weights(self) -> DecoderLayerWeights:
        return DecoderLayerWeights(
            input_gain=self.input_norm.gain,
            qkv=self.attention.qkv.weight,
            output=self.attention.output.weight,
            post_gain=self.post_norm.gain,
            gate_up=self.mlp.gate_up.weight,
            down=self.mlp.down.weight,
        )

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        attend: Attend,
        is_visual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x: [T, H], what the layer before added; residual: [T, H], the stream up to there; is_visual: [T], see Linear.

        Returns the same for the next.
        """
        x, residual = self.input_norm(x, residual)
        x, residual = self.post_norm(self.attention(x, cos, sin, attend, is_visual), residual)
        return self.mlp(x, is_visual), residual


class LanguageModel(nn.Module):
    def __init__(self, config: TextConfig, kernels: Kernels, ranks: Ranks = ALONE) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding("model.embed_tokens", config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, kernels, index, ranks) for index in range(config.num_layers))
        self.norm = Norm(kernels, "model.norm", config.hidden_size, config.rms_norm_eps)

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        yield "model.embed_tokens", self.embed_tokens
        for index, layer in enumerate(self.layers):
            yield f"model.layers.{index}", layer
        yield "model.norm", self.norm

    def weights(self) -> DecoderWeights:
        """The filled layers' numbers, for a back end that runs them as one call."""
        layers = [layer.weights() for layer in self.layers if isinstance(layer, DecoderLayer)]
        return DecoderWeights(tuple(layers), self.norm.gain, self.norm.eps, self.config.num_heads)

    @property
    def tells_visual(self) -> bool:
        """Whether some layer has a static range of visual tokens' own."""
        return any(isinstance(layer, Linear) and layer.weight.visual_static is not None for layer in self.modules())

    def forward(self, x: Tensor, positions: Tensor, attend: Attend, is_visual: Tensor | None = None) -> Tensor:
        """x: [T, H] embedded tokens; positions: [3, T] int64; is_visual: [T], see Linear. Returns the normed last hidden rows
        [T, H]."""
        cos, sin = rotary_angles(self.config, positions)
        residual: Tensor | None = None
        for layer in self.layers:
            x, residual = layer(x, residual, cos, sin, attend, is_visual)
        hidden, _ = self.norm(x, residual)
        return hidden  # type: ignore[no-any-return]


def rotary_angles(config: TextConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """positions: [3, T] (time, height, width). Returns cos and sin [T, D/2] float32.

    Frequency i takes its position from the axis whose mrope_section it falls in (consecutive sections, not interleaved).
    """
    frequencies, axes = _frequencies(config, positions.device)
    angles = positions[axes].T.float() * frequencies
    return angles.cos(), angles.sin()


@cache
def _frequencies(config: TextConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """[D/2] float32 and the axis of each [D/2] int64, made once."""
    with torch.inference_mode(False):  # training may come after serving, and takes no tensor of that mode
        half = config.head_dim // 2
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
        axes = torch.repeat_interleave(torch.arange(3), torch.tensor(config.mrope_section)).to(device)
        assert axes.numel() == half, f"mrope_section {config.mrope_section} does not cover {half} frequencies"
        return 1.0 / config.rope_theta**exponents, axes
