"""What a weight is: dense or quantized, its numbers and the scheme that gives them meaning.

The only form of a weight that the model, the kernels and the algorithms know; file formats are translated at the door.
Letters: O outputs, H inputs, G columns in a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from saccade.base.errors import CheckpointError, OptionError

GROUP_SIZES = (32, 64, 128, 256)


@dataclass(frozen=True)
class Scheme:
    """How a linear layer's numbers are stored and multiplied.

    Weights are symmetric. `activation` says what its input becomes before the product: nothing ("none"), int8 by a scale
    and zero point fixed in calibration ("static"), or int8 by each token's own scale ("dynamic").
    """

    name: str
    weight_bits: int
    activation: Literal["none", "static", "dynamic"] = "none"
    group_size: int | None = None

    @property
    def is_dense(self) -> bool:
        return self.weight_bits == 16

    @property
    def bytes_per_weight(self) -> float:
        """Of a quantized weight, the scales of its groups included, those of its rows not."""
        return self.weight_bits / 8 + (1 / self.group_size if self.group_size else 0)


DENSE = Scheme("dense", 16)
W8A16 = Scheme("w8a16", 8)  # weight-only int8, one scale per output row
W8A8 = Scheme("w8a8", 8, "static")
W8A8_DYNAMIC = Scheme("w8a8-dynamic", 8, "dynamic")
W4A8 = {size: Scheme(f"w4a8-g{size}", 4, "dynamic", size) for size in GROUP_SIZES}  # by group size

SCHEMES = {scheme.name: scheme for scheme in (DENSE, W8A16, W8A8, W8A8_DYNAMIC, *W4A8.values())}


def scheme_of(name: str | None) -> Scheme:
    """The scheme called `name`, dense for None; `weight_only_int8` is another spelling of w8a16. Raises OptionError."""
    name = {None: "dense", "weight_only_int8": "w8a16"}.get(name, name)
    if name not in SCHEMES:
        raise OptionError(f"quantization {name!r} is unknown; choose one of {', '.join(SCHEMES)}")
    return SCHEMES[name]


@dataclass(frozen=True, eq=False)
class Static:
    """What calibration fixed of a linear with static activations: x becomes x_q = clamp(round(x / scale + zero), -128, 127),
    and the output is (x_q values^T + quant_bias) * deq_scale.

    quant_bias holds both the layer's bias and the zero point's share; deq_scale is scale times the weight's scale as rounded
    by whoever calibrated.
    """

    scale: Tensor  # [1] float32
    zero: Tensor  # [1] float32, a whole number
    quant_bias: Tensor  # [O] int32
    deq_scale: Tensor  # [O] float32

    def __post_init__(self) -> None:
        assert self.scale.shape == self.zero.shape == (1,), "static scale and zero point are one number each"
        assert self.scale.dtype == self.zero.dtype == self.deq_scale.dtype == torch.float32, "static scales are float32"
        assert self.quant_bias.dtype == torch.int32, f"quant_bias is {self.quant_bias.dtype}"


@dataclass(frozen=True, eq=False)
class Weight:
    """The weight of a linear layer with O outputs and H inputs.

    values: dense, floating point [O, H]; of 8 bits, int8 [O, H]; of 4 bits, uint8 [O, H/2] as `packing.pack` lays them out.
    scale: [O] float32, quantized only: row o stands for q[o] * scale[o], where q are the values, times their group's scale.
    bias: [O] in the working type, or None. With static activations it is already in quant_bias: kept, not added.
    group_scale: [O, H/G] int8, 4 bits only; 1 or more, and small enough that value times group scale fits int8.
    static: with static activations only.
    """

    values: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None
    scheme: Scheme = DENSE
    group_scale: Tensor | None = None
    static: Static | None = None

    def __post_init__(self) -> None:
        scheme, size = self.scheme, self.scheme.group_size
        dtype = {4: torch.uint8, 8: torch.int8}.get(scheme.weight_bits)
        assert dtype is None or self.values.dtype == dtype, f"values of {scheme.name} are {self.values.dtype}"
        assert (self.scale is None) == scheme.is_dense, f"scales of {scheme.name}"
        assert (self.static is None) == (scheme.activation != "static"), f"calibrated numbers of {scheme.name}"
        assert (self.group_scale is None) == (size is None), f"group scales of {scheme.name}"
        if self.scale is not None:
            assert self.scale.dtype == torch.float32, f"scale is {self.scale.dtype}"
            assert self.scale.shape == self.values.shape[:1], f"scale has shape {tuple(self.scale.shape)}"
        if self.group_scale is not None and size is not None:
            shape = (self.out_features, self.in_features // size)
            assert self.group_scale.dtype == torch.int8, f"group_scale is {self.group_scale.dtype}"
            assert self.group_scale.shape == shape, (
                f"group_scale has shape {tuple(self.group_scale.shape)}, not {shape}"
            )

    @property
    def out_features(self) -> int:
        return self.values.shape[0]

    @property
    def in_features(self) -> int:
        return self.values.shape[1] * (2 if self.scheme.weight_bits == 4 else 1)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor it consists of."""
        static = () if self.static is None else (getattr(self.static, field.name) for field in fields(self.static))
        for tensor in (self.values, self.scale, self.bias, self.group_scale, *static):
            if tensor is not None:
                yield tensor

    @property
    def size_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def to(self, device: torch.device, dtype: torch.dtype) -> Weight:
        """The same on `device`; what is in the working type (the bias, and dense values) becomes `dtype`."""
        static = self.static and Static(*(getattr(self.static, f.name).to(device) for f in fields(self.static)))
        values = self.values.to(device, dtype) if self.scheme.is_dense else self.values.to(device)
        return replace(
            self,
            values=values,
            scale=_maybe(self.scale, lambda scale: scale.to(device)),
            bias=_maybe(self.bias, lambda bias: bias.to(device, dtype)),
            group_scale=_maybe(self.group_scale, lambda scale: scale.to(device)),
            static=static,
        )


def stack(parts: Mapping[str, Weight]) -> Weight:
    """The weights of modules that see the same input, by name, as one weight: their rows one after the other.

    Raises CheckpointError when they differ in scheme, in having a bias, or in the static scale or zero point of that input.
    """
    (first_name, first), *rest = parts.items()
    if not rest:
        return first
    for name, weight in rest:
        if weight.scheme != first.scheme:
            raise _unlike(first_name, name, f"is {first.scheme.name}", f"is {weight.scheme.name}")
        if (weight.bias is None) != (first.bias is None):
            has = ("has no bias", "has a bias")
            raise _unlike(first_name, name, has[first.bias is not None], has[weight.bias is not None])
        if first.static is not None and weight.static is not None:
            for what in ("scale", "zero"):
                ours, theirs = getattr(first.static, what), getattr(weight.static, what)
                if not torch.equal(ours, theirs):
                    raise _unlike(first_name, name, f"has the input {what} {float(ours):g}", f"{float(theirs):g}")
    weights = list(parts.values())
    static = None
    if first.static is not None:
        statics = [weight.static for weight in weights if weight.static is not None]
        static = replace(
            first.static,
            quant_bias=torch.cat([static.quant_bias for static in statics]),
            deq_scale=torch.cat([static.deq_scale for static in statics]),
        )
    return Weight(
        torch.cat([weight.values for weight in weights]),
        _joined([weight.scale for weight in weights]),
        _joined([weight.bias for weight in weights]),
        first.scheme,
        _joined([weight.group_scale for weight in weights]),
        static,
    )


def _joined(pieces: list[Tensor | None]) -> Tensor | None:
    present = [piece for piece in pieces if piece is not None]
    return torch.cat(present) if present else None


def _maybe(tensor: Tensor | None, change: Callable[[Tensor], Tensor]) -> Tensor | None:
    return None if tensor is None else change(tensor)


def _unlike(first: str, second: str, fact: str, other: str) -> CheckpointError:
    return CheckpointError(
        f"{first} {fact} and {second} {other}; both multiply the same input and run as one product, "
        "so they must be quantized alike"
    )
