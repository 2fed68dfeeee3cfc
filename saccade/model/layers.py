"""The parts the model is built of, over a Weight and the Kernels. Built without storage; `fill` gives them their numbers.

Knows checkpoint tensors by their canonical (hub) names; knows no file formats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from saccade.base.errors import CheckpointError
from saccade.base.ranks import ALONE, Ranks
from saccade.kernels.record import Kernels
from saccade.model.sharding import cut_width, length, scaled
from saccade.schemes.affine import quantize_weight
from saccade.schemes.loading import NOTHING, Loading
from saccade.schemes.parts import pad_columns, pad_rows, take_columns, take_rows
from saccade.schemes.scheme import Weight, fitting, stack


class TensorSource(Protocol):
    """Where numbers come from: a checkpoint on disk, or a generator of random ones."""

    def read_into(self, name: str, out: Tensor) -> None:
        """Fills `out` (CPU, any floating type) with the tensor called `name`; `out` has its shape."""

    def weight(self, module: str) -> Weight | None:
        """The weight of the linear called `module` if the source holds it quantized, its bias included; else None."""


class InPlace(Protocol):
    """Numbers to be used where they lie in memory already (checkpoints.formats.MappedCheckpoint)."""

    def rows(self, names: Sequence[str], dtype: torch.dtype) -> Tensor | None:
        """The rows of these tensors one after the other, if they lie so and in this type."""

    def weights(self, modules: Sequence[str]) -> dict[str, Weight] | None:
        """The quantized weights of these linears, if their values lie so."""


@dataclass(frozen=True)
class Filling:
    """How layers are filled: from where, in which type, onto which device, and how linears are stored that come dense.

    A layer whose columns a scheme's groups do not divide takes the one that `fitting` names. `folds_keys`: scales are moved
    from keys to queries (see key_fold.py). What is `in_place` is not copied from `source`.
    """

    source: TensorSource
    dtype: torch.dtype
    device: torch.device
    loading: Loading = NOTHING
    folds_keys: bool = False
    in_place: InPlace | None = None

    def tensor(self, *row: int, parts: Mapping[str, int]) -> Tensor:
        """The tensors named in `parts` (name -> rows) one after the other; `row` is the shape of a row."""
        if self.in_place is not None and (lying := self.in_place.rows(list(parts), self.dtype)) is not None:
            return lying.to(self.device)
        out = torch.empty(sum(parts.values()), *row, dtype=self.dtype)
        start = 0
        for name, rows in parts.items():
            self.source.read_into(name, out[start : start + rows])
            start += rows
        return out.to(self.device)


class Linear(nn.Module):
    """x W^T + b. `parts` names the checkpoint modules stacked into it (q, k, v) with the rows each gives.

    `row` is the shape of a weight's row in the checkpoint where it is not flat: a convolution's kernel.
    Of ranks, each holds `rows` of the parts laid one after the other, or `columns`, and then the products of all are added.
    Either is cut from the whole weight after it was quantized: how many ranks there are changes no number in it.
    """

    weight: Weight

    def __init__(
        self,
        kernels: Kernels,
        in_features: int,
        parts: Mapping[str, int],
        bias: bool,
        quantizable: bool = True,
        row: tuple[int, ...] | None = None,
        *,
        ranks: Ranks = ALONE,
        rows: Sequence[slice] | None = None,
        columns: slice | None = None,
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.parts = dict(parts)
        self.ranks, self.rows, self.columns = ranks, rows, columns
        self.in_features = in_features if columns is None else length(columns)
        self.out_features = sum(parts.values()) if rows is None else sum(map(length, rows))
        self.has_bias = bias
        self.is_quantizable = quantizable
        self.row = row or (in_features,)

    def fill(self, filling: Filling) -> None:
        self.weight = self._stored(filling) or self._dense(filling)
        scheme = filling.loading.of(next(iter(self.parts)))
        if self.weight.scheme.is_dense and self.is_quantizable and not scheme.is_dense:
            self.weight = quantize_weight(self.weight, fitting(scheme, self.weight.in_features))
        if not self.ranks.is_alone:
            self.weight = self.share_of(self.weight)

    def share_of(self, weight: Weight) -> Weight:
        """This rank's share of the whole weight."""
        if self.rows is not None:
            return take_rows(weight, self.rows)
        if self.columns is not None:
            return take_columns(weight, self.columns, next(iter(self.parts)), keep_bias=self.ranks.leads)
        return weight

    def _stored(self, filling: Filling) -> Weight | None:
        """The weight as the source holds it quantized, None if it does not. Parts are joined, one linear twice in memory."""
        if filling.in_place is not None and (lying := filling.in_place.weights(list(self.parts))) is not None:
            return stack(lying).to(filling.device, filling.dtype)
        found = {name: filling.source.weight(name) for name in self.parts}
        stored = {name: weight for name, weight in found.items() if weight is not None}
        if not stored:
            return None
        if dense := [name for name in self.parts if name not in stored]:
            name, weight = next(iter(stored.items()))
            raise CheckpointError(
                f"{dense[0]} is dense and {name} is {weight.scheme.name}; both multiply the same input and run as one "
                "product, so they must be quantized alike"
            )
        return stack(stored).to(filling.device, filling.dtype)

    def _dense(self, filling: Filling) -> Weight:
        weights = {f"{name}.weight": rows for name, rows in self.parts.items()}
        biases = {f"{name}.bias": rows for name, rows in self.parts.items()}
        return Weight(
            filling.tensor(*self.row, parts=weights).flatten(1),
            bias=filling.tensor(parts=biases) if self.has_bias else None,
        )

    @property
    def bytes_per_value(self) -> float:
        """Of the weight."""
        scheme = self.weight.scheme
        return self.weight.values.element_size() if scheme.is_dense else scheme.bytes_per_weight

    def forward(self, x: Tensor, is_visual: Tensor | None = None) -> Tensor:
        """x: [T, H]; is_visual: [T] bool, which rows stand for pictures and videos; None if none does. Returns [T, O]."""
        y = self._product(x, is_visual)
        return y if self.columns is None else self.ranks.add(y)

    def _product(self, x: Tensor, is_visual: Tensor | None) -> Tensor:
        if is_visual is None or self.weight.visual_static is None:
            return self.kernels.linear(x, self.weight)
        y = x.new_empty(len(x), self.weight.out_features)
        for rows, weight in ((~is_visual, self.weight), (is_visual, self.weight.for_visual)):
            y[rows] = self.kernels.linear(x[rows], weight)
        return y


class Norm(nn.Module):
    """RMS norm over the last dimension, with the residual stream carried along: see Kernels.rms_norm."""

    gain: Tensor

    def __init__(self, kernels: Kernels, name: str, size: int, eps: float) -> None:
        super().__init__()
        self.kernels = kernels
        self.name = name
        self.size = size
        self.eps = eps

    def fill(self, filling: Filling) -> None:
        self.gain = filling.tensor(parts={f"{self.name}.weight": self.size})

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.kernels.rms_norm(x, self.gain, self.eps, residual)


class Embedding(nn.Module):
    """Rows of a table by token id."""

    weight: Weight

    def __init__(self, name: str, num_rows: int, size: int) -> None:
        super().__init__()
        self.name = name
        self.num_rows = num_rows
        self.size = size

    def fill(self, filling: Filling) -> None:
        self.weight = Weight(filling.tensor(self.size, parts={f"{self.name}.weight": self.num_rows}))

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids: [T] int64. Returns [T, H]."""
        return torch.nn.functional.embedding(token_ids, self.weight.values)


class GatedMlp(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(
        self, kernels: Kernels, prefix: str, size: int, intermediate_size: int, bias: bool, ranks: Ranks = ALONE
    ) -> None:
        super().__init__()
        self.kernels = kernels
        gate_up = {f"{prefix}.gate_proj": intermediate_size, f"{prefix}.up_proj": intermediate_size}
        own = cut_width(intermediate_size, ranks, f"columns of {prefix}.down_proj")
        rows = (own, scaled(own, 1, first=intermediate_size))
        self.gate_up = Linear(kernels, size, gate_up, bias=bias, ranks=ranks, rows=rows)
        down = {f"{prefix}.down_proj": size}
        self.down = Linear(kernels, intermediate_size, down, bias=bias, ranks=ranks, columns=own)

    def forward(self, x: Tensor, is_visual: Tensor | None = None) -> Tensor:
        down: Tensor = self.down(self.kernels.silu_mul(self.gate_up(x, is_visual)), is_visual)
        return down

    def pad(self, unit: int) -> None:
        """Fills the inner width up to a multiple of `unit`, with zeros, which change no output. Where groups divide it, it stays."""
        missing = -self.down.weight.in_features % unit
        if missing and self.down.weight.scheme.group_size is None:
            self.gate_up.weight = pad_rows(self.gate_up.weight, 2, missing)
            self.down.weight = pad_columns(self.down.weight, missing)


Filled = (Linear, Norm, Embedding)  # the modules that have a fill()


def fill(module: nn.Module, filling: Filling) -> None:
    """Gives every layer below `module` its numbers."""
    for layer in module.modules():
        if isinstance(layer, Filled):
            layer.fill(filling)


def bytes_per_linear_value(module: nn.Module) -> float:
    """The mean over the weights of all linears below `module` that may be quantized; 0 if there are none."""
    num_values, total = 0, 0.0
    for layer in module.modules():
        if isinstance(layer, Linear) and layer.is_quantizable:
            count = layer.in_features * layer.out_features
            num_values += count
            total += count * layer.bytes_per_value
    return total / max(num_values, 1)


def size_bytes(module: nn.Module) -> int:
    """Bytes of all filled weights below `module`; a tensor shared by two layers counts once."""
    tensors: dict[int, int] = {}
    for layer in module.modules():
        if isinstance(layer, Linear | Embedding):
            tensors[layer.weight.values.data_ptr()] = layer.weight.size_bytes
        elif isinstance(layer, Norm):
            tensors[layer.gain.data_ptr()] = layer.gain.numel() * layer.gain.element_size()
    return sum(tensors.values())
