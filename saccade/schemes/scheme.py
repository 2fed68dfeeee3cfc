"""What a weight is: dense or quantized, its numbers and the scheme that gives them meaning.

The only form of a weight that the model, the kernels and the algorithms know; file formats are translated at the door.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from saccade.base.errors import OptionError


@dataclass(frozen=True)
class Scheme:
    """How a linear layer's weight is stored. Activations are not quantized by any scheme yet."""

    name: str
    weight_bits: int

    @property
    def is_dense(self) -> bool:
        return self.weight_bits == 16


DENSE = Scheme("dense", 16)
W8A16 = Scheme("w8a16", 8)  # weight-only int8, symmetric, one scale per output row

SCHEMES = {scheme.name: scheme for scheme in (DENSE, W8A16)}


def scheme_of(name: str | None) -> Scheme:
    """The scheme called `name`, dense for None; `weight_only_int8` is another spelling of w8a16. Raises OptionError."""
    name = {None: "dense", "weight_only_int8": "w8a16"}.get(name, name)
    if name not in SCHEMES:
        raise OptionError(f"quantization {name!r} is unknown; choose one of {', '.join(SCHEMES)}")
    return SCHEMES[name]


@dataclass
class Weight:
    """The weight of a linear layer with O outputs and H inputs.

    values: [O, H]; floating point when dense, int8 when quantized.
    scale: [O] float32, quantized only: row o stands for values[o] * scale[o].
    bias: [O] in the working type, or None.
    """

    values: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None
    scheme: Scheme = DENSE

    @property
    def size_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.values, self.scale, self.bias) if t is not None)
