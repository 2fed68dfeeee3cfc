"""Grows a trained run into a wider decoder that says exactly the same: python -m tools.train_demo.widen --old FILE --run runs/nano

Knows two configurations that differ in the decoder's width, number of query heads and MLP width; knows nothing of training.
After Net2Net (Chen et al., 2016, https://arxiv.org/abs/1511.05641): every residual channel stands twice, [x, x], and so does
every query head inside its group. What reads both copies gets W/2 + N and W/2 - N with random N of W's own size, which leaves the
sum, and so the model's function, as it was, and lets the copies learn apart. New MLP neurons read at random and write nothing.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from tools.train_demo.train import Training, demo_config


def read_twice(weight: Tensor) -> Tensor:
    """[O, H] -> [O, 2H]: the same of [x, x] as before of x."""
    noise = torch.randn_like(weight) * weight.std() * 0.5
    return torch.cat([weight / 2 + noise, weight / 2 - noise], dim=1)


def write_twice(weight: Tensor) -> Tensor:
    """[H, ...] -> [2H, ...]."""
    return torch.cat([weight, weight])


def heads_twice(weight: Tensor, head_dim: int) -> Tensor:
    """[heads * d, ...] -> each head followed by its copy, so that both stay in one key-value group."""
    heads = weight.unflatten(0, (-1, head_dim))
    return heads.repeat_interleave(2, dim=0).flatten(0, 1)


def heads_read_twice(weight: Tensor, head_dim: int) -> Tensor:
    """[O, heads * d] -> [O, 2 * heads * d]: of every head and its copy."""
    heads = weight.unflatten(1, (-1, head_dim))
    noise = torch.randn_like(heads) * weight.std() * 0.5
    return torch.stack([heads / 2 + noise, heads / 2 - noise], dim=2).flatten(1)


def more_neurons(weight: Tensor, count: int) -> Tensor:
    """[I, H] -> [count, H], the new ones at random."""
    new = torch.randn(count - len(weight), weight.shape[1]) * weight.std()
    return torch.cat([weight, new])


def widened(name: str, weight: Tensor, head_dim: int, inner: int) -> Tensor:
    """A parameter of the old decoder or merger as it stands in the new one."""
    part = name.split(".")[-2]
    if name.startswith("visual."):
        return write_twice(weight) if name.startswith("visual.merger.mlp.2") else weight
    if part == "norm":
        return write_twice(weight) / 2  # the tied head reads [x, x]
    if part in ("input_layernorm", "post_attention_layernorm"):
        return write_twice(weight)
    if part == "embed_tokens":
        return torch.cat([weight, weight], dim=1)
    if part == "q_proj":
        return heads_twice(read_twice(weight) if weight.ndim == 2 else weight, head_dim)
    if part in ("k_proj", "v_proj"):
        return read_twice(weight) if weight.ndim == 2 else weight
    if part == "o_proj":
        return write_twice(heads_read_twice(weight, head_dim))
    if part in ("gate_proj", "up_proj"):
        return more_neurons(read_twice(weight), inner)
    if part == "down_proj":
        silent = torch.zeros(weight.shape[0], inner - weight.shape[1])
        return write_twice(torch.cat([weight, silent], dim=1))
    raise KeyError(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--old", type=Path, required=True, help="checkpoint.pt of the narrower run, its tokenizer beside it"
    )
    parser.add_argument("--run", type=Path, default=Path("runs/nano"))
    arguments = parser.parse_args()
    arguments.run.mkdir(parents=True, exist_ok=True)
    shutil.copy(arguments.old.parent / "tokenizer.json", arguments.run / "tokenizer.json")
    training = Training(demo_config(Tokenizer.from_file(str(arguments.run / "tokenizer.json"))))
    text = training.network.config.text
    old = torch.load(arguments.old, weights_only=True)
    training.network.load_state_dict(
        {name: widened(name, weight, text.head_dim, text.intermediate_size) for name, weight in old["network"].items()}
    )
    head = old["head"]
    training.head.load_state_dict({n: read_twice(w) if w.ndim == 2 else w for n, w in head.items()})
    training.save(arguments.run / "checkpoint.pt")


if __name__ == "__main__":
    main()
