"""Rotations that spread outlier channels over all channels and leave the model's function as it is.

R1 turns the residual stream (QuaRot, arXiv:2404.00456; SpinQuant, arXiv:2405.16406): what writes into the stream is multiplied
by it, what reads from it by its transpose, norms' gains going into the readers first. The vision merger writes into the stream
too, so its last linear is turned with the embedding; without that, pictures would arrive in another basis than words. The
head reads what the embedding writes, so tied ones are untied. R2 turns each layer's values between v and o, head by head.
Both are orthogonal: random signs, then a Hadamard transform over the power of two in the width, then an orthogonal matrix over
the odd rest. Random signs keep a mean over channels from ending up in one channel (MQuant, arXiv:2502.00425).
Knows tensors and names; knows no files.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

READERS = {  # linear -> the norm whose output it reads
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
MERGER = "visual.merger.mlp.2"


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix of size P * m, P a power of two: diag(signs) (Hadamard(P) x rest). rest: [m, m]."""

    signs: Tensor
    rest: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """x R over the last dimension, float32."""
        odd = len(self.rest)
        turned = (x * self.signs.to(x.device)).view(*x.shape[:-1], -1, odd)
        turned = hadamard(turned.transpose(-1, -2)).transpose(-1, -2)
        return (turned @ self.rest.to(x.device)).reshape(x.shape)


def rotation(size: int, seed: int, name: str) -> Rotation:
    """The rotation called `name`: equal arguments, equal matrix."""
    generator = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
    power = size & -size
    signs = torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1.0
    rest, upper = torch.linalg.qr(torch.randn(size // power, size // power, generator=generator, dtype=torch.float64))
    return Rotation(signs, (rest * upper.diagonal().sign()).float())


def hadamard(x: Tensor) -> Tensor:
    """The normalized Walsh-Hadamard transform over the last dimension, a power of two."""
    size = x.shape[-1]
    width = 1
    while width < size:
        pairs = x.reshape(*x.shape[:-1], size // (2 * width), 2, width)
        first, second = pairs.unbind(-2)
        x = torch.stack((first + second, first - second), -2).reshape(x.shape)
        width *= 2
    return x / math.sqrt(size)


# --- the model's tensors, turned -------------------------------------------------------------------------------------


def rotate_layer(tensors: dict[str, Tensor], stream: Rotation, values: Rotation, head_dim: int) -> None:
    """One decoder layer in place; `tensors`: float32, by their names within the layer. `values`: R2, of one head's size."""
    for name, norm in READERS.items():
        tensors[f"{name}.weight"] = stream(tensors[f"{name}.weight"] * tensors[f"{norm}.weight"])
    for norm in set(READERS.values()):
        tensors[f"{norm}.weight"] = torch.ones_like(tensors[f"{norm}.weight"])
    v, bias = tensors["self_attn.v_proj.weight"], tensors["self_attn.v_proj.bias"]
    by_head = v.t().reshape(v.shape[1], -1, head_dim)
    tensors["self_attn.v_proj.weight"] = values(by_head).reshape(v.shape[1], -1).t().contiguous()
    tensors["self_attn.v_proj.bias"] = values(bias.view(-1, head_dim)).flatten()
    o = tensors["self_attn.o_proj.weight"]
    tensors["self_attn.o_proj.weight"] = values(o.view(len(o), -1, head_dim)).reshape(o.shape)
    for name in WRITERS:
        tensors[f"{name}.weight"] = rotate_outputs(tensors[f"{name}.weight"], stream)


def rotate_outputs(weight: Tensor, stream: Rotation) -> Tensor:
    """weight: [O, H] of a linear that writes into the stream."""
    return stream(weight.t()).t().contiguous()
