"""What is quantized while a model is loaded, part by part."""

from __future__ import annotations

from dataclasses import dataclass

from saccade.schemes.affine import loading_scheme
from saccade.schemes.scheme import DENSE, W8A8_DYNAMIC, W8A16, Scheme


@dataclass(frozen=True)
class Loading:
    """What linears that come dense are quantized to: the decoder's, the vision tower's, the output head."""

    decoder: Scheme = DENSE
    tower: Scheme = DENSE
    head: Scheme = DENSE

    @property
    def is_dense(self) -> bool:
        return all(scheme.is_dense for scheme in (self.decoder, self.tower, self.head))

    def of(self, name: str) -> Scheme:
        """Of the linear, or of the tensor, called `name`."""
        if name.startswith("visual."):
            return self.tower
        return self.head if name.startswith("lm_head") else self.decoder


NOTHING = Loading()


def loading(quantization: str | None, vision: str | None = None, head: str | None = None) -> Loading:
    """As options name them. Raises OptionError for unknown names and for schemes that need calibration."""
    decoder = loading_scheme(quantization)
    tower = tower_scheme(decoder) if vision is None else loading_scheme(vision)
    return Loading(decoder, tower, loading_scheme(head))


def tower_scheme(decoder: Scheme) -> Scheme:
    """What goes with the decoder's: 8 bits where that takes 4, with which the tower, rounded without calibration, loses more than the
    decoder does (docs/quantization.md)."""
    if decoder.weight_bits != 4:
        return decoder
    return W8A16 if decoder.activation == "none" else W8A8_DYNAMIC
