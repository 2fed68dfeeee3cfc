"""The float checkpoint a block at a time, in float32, rotated and its keys folded if the recipe says so.

Knows files and rotations; knows nothing of rounding.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from saccade.checkpoints.config import ModelConfig
from saccade.checkpoints.formats import EMBEDDING, HEAD, Checkpoint, expected_tensors
from saccade.model.key_fold import fold_keys
from saccade.quantize import rotation as turning
from saccade.quantize.best_recipe import BestRecipe
from saccade.schemes.scheme import Weight


class Block:
    """One block's tensors in float32 by their full names, and the weights that have been rounded; layers are filled from it."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.weights: dict[str, Weight] = {}

    def read_into(self, name: str, out: Tensor) -> None:
        out.copy_(self.tensors[name])

    def weight(self, module: str) -> Weight | None:
        return self.weights.get(module)


class Source:
    """The checkpoint's tensors in float32, rotated and folded if the recipe says so. `config` is that of the result."""

    def __init__(self, checkpoint: Checkpoint, recipe: BestRecipe, device: torch.device) -> None:
        self._checkpoint, self._device, self._seed = checkpoint, device, recipe.seed
        self._folds_keys = recipe.fold_keys
        self.config: ModelConfig = checkpoint.config
        self._stream = None
        if recipe.is_rotated:
            self._stream = turning.rotation(self.config.text.hidden_size, recipe.seed, "stream")
        if recipe.unties_head:
            self.config = replace(self.config, text=replace(self.config.text, tie_word_embeddings=False))
        self.shapes = expected_tensors(self.config)

    def block(self, prefix: str) -> Block:
        names = [name for name in self.shapes if name.startswith(f"{prefix}.")]
        tensors = {name.removeprefix(f"{prefix}."): self._read(name) for name in names}
        if self._stream is not None and prefix.startswith("model.layers."):
            values = turning.rotation(self.config.text.head_dim, self._seed, prefix)
            turning.rotate_layer(tensors, self._stream, values, self.config.text.head_dim)
        if self._folds_keys and prefix.startswith("model.layers."):
            self._fold_keys(tensors)
        if self._stream is not None and prefix == "visual.merger":
            tensors["mlp.2.weight"] = turning.rotate_outputs(tensors["mlp.2.weight"], self._stream)
            tensors["mlp.2.bias"] = self._stream(tensors["mlp.2.bias"])
        if self._stream is not None and prefix == "model.norm":
            tensors["weight"] = torch.ones_like(tensors["weight"])
        return Block({f"{prefix}.{name}": tensor for name, tensor in tensors.items()})

    def _fold_keys(self, tensors: dict[str, Tensor]) -> None:
        """Of one decoder layer, in place. Factors are powers of two, so that the file's type holds the same digits."""
        text = self.config.text
        names = [f"self_attn.{part}_proj" for part in "qkv"]
        weight, bias = (torch.cat([tensors[f"{name}.{kind}"] for name in names]) for kind in ("weight", "bias"))
        folded = fold_keys(
            Weight(weight, bias=bias), tensors["input_layernorm.weight"], text.num_heads, text.num_kv_heads
        )
        assert folded.bias is not None, "it had one"
        sizes = [len(tensors[f"{name}.bias"]) for name in names]
        for name, rows, its in zip(
            names, torch.split(folded.values, sizes), torch.split(folded.bias, sizes), strict=True
        ):
            tensors[f"{name}.weight"], tensors[f"{name}.bias"] = rows.clone(), its.clone()

    def table_rows(self, name: str, rows: slice) -> Tensor:
        """Some rows of the embedding or of the head: [rows, H] float32."""
        stored = name if name in self._checkpoint else EMBEDDING  # a head that was tied
        num_rows = len(range(*rows.indices(self.shapes[name][0])))
        out = torch.empty(num_rows, self.shapes[name][1])
        self._checkpoint.read_into(stored, out, rows)
        if self._stream is None:
            return out
        if name == HEAD:
            out *= self._read("model.norm.weight").cpu()
        return self._stream(out)

    def _read(self, name: str) -> Tensor:
        out = torch.empty(self.shapes[name])
        self._checkpoint.read_into(name, out)
        if not bool(torch.isfinite(out.sum())):
            self._checkpoint.check_finite([name])  # says where
        return out.to(self._device)
