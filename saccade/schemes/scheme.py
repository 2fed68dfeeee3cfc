"""What a weight is: dense or quantized, its numbers and the scheme that gives them meaning.

The only form of a weight that the model, the kernels and the algorithms know; file formats are translated at the door.
Letters: O outputs, H inputs, G columns in a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from saccade.base.errors import CheckpointError, OptionError

GROUP_SIZES = (32, 64, 128, 256)


@dataclass(frozen=True)
class Scheme:
    """How a linear layer's numbers are stored and multiplied.

    Weights are whole numbers of 8 or 4 bits, or e4m3 floating-point numbers of 8 (`is_float`). `activation` says what the
    input becomes before the product: nothing ("none"), 8 bits of the weight's kind by each token's own scale ("dynamic"), or
    int8 by a scale and zero point fixed in calibration ("static").
    Groups of columns have scales of their own: whole numbers times the row's scale (`is_two_stage`, QServe, arXiv
    2405.04532: the product of a whole row stays in whole numbers), or floating point. `is_asymmetric`: and zero points.
    """

    name: str
    weight_bits: int
    activation: Literal["none", "static", "dynamic"] = "none"
    group_size: int | None = None
    is_two_stage: bool = False
    is_float: bool = False
    is_asymmetric: bool = False

    @property
    def is_dense(self) -> bool:
        return self.weight_bits == 16

    @property
    def has_float_groups(self) -> bool:
        """Whether scales are [O, H/G] float32 rather than [O]."""
        return self.group_size is not None and not self.is_two_stage

    @property
    def bytes_per_weight(self) -> float:
        """Of a quantized weight, what belongs to its groups included, the scales of its rows not."""
        bytes_per_group = (1 if self.is_two_stage else 4) + self.is_asymmetric
        return self.weight_bits / 8 + (0 if self.group_size is None else bytes_per_group / self.group_size)


DENSE = Scheme("dense", 16)
W8A16 = Scheme("w8a16", 8)  # weight-only int8, one scale per output row
W8A8 = Scheme("w8a8", 8, "static")
W8A8_DYNAMIC = Scheme("w8a8-dynamic", 8, "dynamic")
FP8 = Scheme("fp8", 8, "dynamic", is_float=True)  # e4m3, one scale per output row
# By group size: weight-only int4, the same with zero points; int4 with int8 activations, preferred; the same as other tools write it.
W4A16 = {size: Scheme(f"w4a16-g{size}", 4, "none", size) for size in GROUP_SIZES}
W4A16_ASYM = {size: Scheme(f"w4a16-asym-g{size}", 4, "none", size, is_asymmetric=True) for size in GROUP_SIZES}
W4A8 = {size: Scheme(f"w4a8-g{size}", 4, "dynamic", size, is_two_stage=True) for size in GROUP_SIZES}
W4A8_FLOAT = {size: Scheme(f"w4a8-float-g{size}", 4, "dynamic", size) for size in GROUP_SIZES}

_FAMILIES = (W4A16, W4A16_ASYM, W4A8, W4A8_FLOAT)
_ALL = (DENSE, W8A16, W8A8, W8A8_DYNAMIC, FP8, *(scheme for family in _FAMILIES for scheme in family.values()))
SCHEMES = {scheme.name: scheme for scheme in _ALL}


def fitting(scheme: Scheme, num_columns: int) -> Scheme:
    """What a layer of this many columns takes where `scheme` is asked for: the scheme itself unless its groups do not divide them.

    Then it is the same with the largest smaller groups that do (128 for the 29,568 columns of 72B's down_proj, asked for
    256), and 8 bits by rows where none do (the 3,420 columns of the vision tower's down_proj).
    """
    if scheme.group_size is None or num_columns % scheme.group_size == 0:
        return scheme
    family = next(family for family in _FAMILIES if scheme in family.values())
    sizes = [size for size in family if size < scheme.group_size and num_columns % size == 0]
    if sizes:
        return family[max(sizes)]
    return W8A16 if scheme.activation == "none" else W8A8_DYNAMIC


def scheme_of(name: str | None) -> Scheme:
    """The scheme called `name`, dense for None and `float`; `weight_only_int8` is w8a16. Raises OptionError."""
    name = {None: "dense", "float": "dense", "weight_only_int8": "w8a16"}.get(name, name)
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

    values: dense, floating point [O, H]; of 8 bits, int8 or float8_e4m3fn [O, H]; of 4 bits, uint8 [O, H/2] as
        `packing.pack` lays out whole numbers from -8 to 7.
    scale: float32, quantized only. By rows [O]: row o stands for q[o] * scale[o], where q are the values, times their group's
        group_scale if the scheme is of two stages. With floating-point groups [O, H/G]: a value stands for
        (q - zero) * scale of its row and group.
    bias: [O] in the working type, or None. With static activations it is already in quant_bias: kept, not added.
    group_scale: [O, H/G] int8, two stages only; 1 or more, and small enough that value times group scale fits int8.
    static: with static activations only.
    zero: [O, H/G] int8 from -8 to 7, of asymmetric schemes only.
    visual_static: `static` of the tokens that stand for pictures and videos, where these have a range of their own (modality-specific
        static quantization of MQuant, arXiv:2502.00425); `static` is then of all other tokens.
    """

    values: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None
    scheme: Scheme = DENSE
    group_scale: Tensor | None = None
    static: Static | None = None
    zero: Tensor | None = None
    visual_static: Static | None = None

    def __post_init__(self) -> None:
        scheme = self.scheme
        dtype = torch.float8_e4m3fn if scheme.is_float else {4: torch.uint8, 8: torch.int8}.get(scheme.weight_bits)
        assert dtype is None or self.values.dtype == dtype, f"values of {scheme.name} are {self.values.dtype}"
        assert (self.scale is None) == scheme.is_dense, f"scales of {scheme.name}"
        assert (self.static is None) == (scheme.activation != "static"), f"calibrated numbers of {scheme.name}"
        assert self.visual_static is None or self.static is not None, f"two ranges of {scheme.name}"
        assert (self.group_scale is None) == (not scheme.is_two_stage), f"group scales of {scheme.name}"
        assert (self.zero is None) == (not scheme.is_asymmetric), f"zero points of {scheme.name}"
        by_group = (self.out_features, self.in_features // (scheme.group_size or self.in_features or 1))
        by_row = by_group[:1]
        for name, tensor, shape, dtype in (
            ("scale", self.scale, by_group if scheme.has_float_groups else by_row, torch.float32),
            ("group_scale", self.group_scale, by_group, torch.int8),
            ("zero", self.zero, by_group, torch.int8),
        ):
            if tensor is not None:
                assert tensor.dtype == dtype, f"{name} is {tensor.dtype}"
                assert tensor.shape == shape, f"{name} has shape {tuple(tensor.shape)}, not {shape}"

    @property
    def out_features(self) -> int:
        return self.values.shape[0]

    @property
    def in_features(self) -> int:
        return self.values.shape[1] * (2 if self.scheme.weight_bits == 4 else 1)

    @cached_property
    def for_visual(self) -> Weight:
        """The same numbers as visual tokens meet them."""
        return replace(self, static=self.visual_static, visual_static=None) if self.visual_static else self

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor it consists of."""
        static = [
            getattr(each, field.name) for each in (self.static, self.visual_static) if each for field in fields(each)
        ]
        for tensor in (self.values, self.scale, self.bias, self.group_scale, self.zero, *static):
            if tensor is not None:
                yield tensor

    @property
    def size_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def to(self, device: torch.device, dtype: torch.dtype) -> Weight:
        """The same on `device`; what is in the working type (the bias, and dense values) becomes `dtype`."""

        def moved(static: Static | None) -> Static | None:
            return static and Static(*(getattr(static, field.name).to(device) for field in fields(static)))

        values = self.values.to(device, dtype) if self.scheme.is_dense else self.values.to(device)
        return replace(
            self,
            values=values,
            scale=_maybe(self.scale, lambda scale: scale.to(device)),
            bias=_maybe(self.bias, lambda bias: bias.to(device, dtype)),
            group_scale=_maybe(self.group_scale, lambda scale: scale.to(device)),
            static=moved(self.static),
            zero=_maybe(self.zero, lambda zero: zero.to(device)),
            visual_static=moved(self.visual_static),
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
        if (weight.visual_static is None) != (first.visual_static is None):
            has = ("has one input scale", "has another of visual tokens")
            raise _unlike(first_name, name, has[first.visual_static is not None], has[weight.visual_static is not None])
        for one, other in ((first.static, weight.static), (first.visual_static, weight.visual_static)):
            if one is None or other is None:
                continue
            for what in ("scale", "zero"):
                ours, theirs = getattr(one, what), getattr(other, what)
                if not torch.equal(ours, theirs):
                    raise _unlike(first_name, name, f"has the input {what} {float(ours):g}", f"{float(theirs):g}")
    weights = list(parts.values())
    return Weight(
        side_by_side([weight.values for weight in weights]),
        _joined([weight.scale for weight in weights]),
        _joined([weight.bias for weight in weights]),
        first.scheme,
        _joined([weight.group_scale for weight in weights]),
        _joined_static([weight.static for weight in weights]),
        _joined([weight.zero for weight in weights]),
        _joined_static([weight.visual_static for weight in weights]),
    )


def side_by_side(pieces: Sequence[Tensor]) -> Tensor:
    """[..., H] each: one after the other; a view where they lie so in memory."""
    first, end = pieces[0], pieces[0].data_ptr()
    storage = first.untyped_storage().data_ptr()
    for piece in pieces:
        if not piece.is_contiguous() or piece.untyped_storage().data_ptr() != storage or piece.data_ptr() != end:
            return torch.cat(list(pieces))
        end += piece.nbytes
    return first.as_strided((sum(len(piece) for piece in pieces), *first.shape[1:]), first.stride())


def _joined(pieces: list[Tensor | None]) -> Tensor | None:
    present = [piece for piece in pieces if piece is not None]
    return torch.cat(present) if present else None


def _joined_static(parts: list[Static | None]) -> Static | None:
    present = [part for part in parts if part is not None]
    if not present:
        return None
    quant_bias, deq_scale = (
        torch.cat([getattr(part, name) for part in present]) for name in ("quant_bias", "deq_scale")
    )
    return replace(present[0], quant_bias=quant_bias, deq_scale=deq_scale)


def _maybe(tensor: Tensor | None, change: Callable[[Tensor], Tensor]) -> Tensor | None:
    return None if tensor is None else change(tensor)


def _unlike(first: str, second: str, fact: str, other: str) -> CheckpointError:
    return CheckpointError(
        f"{first} {fact} and {second} {other}; both multiply the same input and run as one product, "
        "so they must be quantized alike"
    )
