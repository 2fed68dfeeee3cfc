"""One product from float32 to its rounded weights, and how far they are from what they were.

Knows one linear and what was seen of its inputs; knows no block and no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.kernels.record import Kernels
from saccade.model.layers import Linear
from saccade.quantize.best_recipe import BestRecipe
from saccade.quantize.clip import search_steps
from saccade.quantize.gptq import Correction, corrections, gptq
from saccade.quantize.ranges import static_parameters
from saccade.quantize.report import QUANTILES, InputRange, Kind, LayerMeasure, sqnr_db
from saccade.quantize.source import Block
from saccade.quantize.statistics import ANSWER, FIRST, PICTURE, TEXT, Seen
from saccade.quantize.steps import Steps, as_weight, dequantized, max_steps, round_to_nearest, static_part
from saccade.schemes.affine import Levels
from saccade.schemes.scheme import Scheme, Weight, stack

ROWS_MEASURED = 256  # tokens of each kind
KINDS_MEASURED: dict[Kind, tuple[int, ...]] = {"text": (TEXT, ANSWER), "picture": (PICTURE,), "first": (FIRST,)}


@dataclass(frozen=True)
class Rounder:
    """Rounds linears as the recipe says. `dtype`: the model's; `kernels` compute what the rounded weights give."""

    recipe: BestRecipe
    dtype: torch.dtype
    kernels: Kernels

    def scale_dtype(self, scheme: Scheme) -> torch.dtype:
        """What files keep scales in: where engines load them as the model's type, that; float32 where they do not."""
        return self.dtype if scheme.has_float_groups or self.recipe.is_ascend else torch.float32

    def round(
        self, layer: Linear, scheme: Scheme, source: Block, seen: Seen | None, before: Tensor | None
    ) -> Iterator[LayerMeasure]:
        """The parts of one product: they share the input's statistics. `before`: [kinds, H], the largest inputs unsmoothed.

        The weights appear in `source`.
        """
        weights = {part: source.tensors[f"{part}.weight"] for part in layer.parts}
        levels, blocks = list[Levels](), None
        if scheme.activation == "static":
            assert seen is not None, f"{scheme.name} has samples"
            energy = torch.stack([weight.square().sum(0) for weight in weights.values()]).sum(0)
            levels = self.levels(seen, energy, self.scale_dtype(scheme))
        if self.recipe.rounded_by == "gptq" and seen is not None and seen.hessian is not None:
            blocks = corrections(seen.hessian)
        for part, weight in weights.items():
            multiples, steps = self.multiples(weight, scheme, seen, blocks)
            rounded = self.as_weight(part, multiples, steps, source, levels)
            source.weights[part] = rounded
            yield self.measure(part, rounded, weight, multiples, steps, seen, before)

    def round_rows(self, module: str, pieces: Iterable[Tensor], scheme: Scheme) -> tuple[Weight, LayerMeasure]:
        """A weight that is not to lie in memory whole: [n, H] float32 at a time, of whose inputs nothing is known."""
        rounded, signal, noise = list[Weight](), 0.0, 0.0
        for piece in pieces:
            multiples, steps = self.multiples(piece, scheme, None, None)
            rounded.append(as_weight(multiples.contiguous(), steps, None))
            signal += float(piece.square().sum())
            noise += float(dequantized(multiples, steps).sub_(piece).square_().sum())
        whole = stack({f"piece {number} of {module}": weight for number, weight in enumerate(rounded)})
        measure = LayerMeasure(module, scheme.name, weight_db=sqnr_db(signal, noise), size_bytes=whole.size_bytes)
        return whole, measure

    def multiples(
        self, weight: Tensor, scheme: Scheme, seen: Seen | None, blocks: Sequence[Correction] | None
    ) -> tuple[Tensor, Steps]:
        """[O, H] int8, or float8, and what they are multiples of. `blocks`: what corrects the rounding of columns; None for nothing."""
        dtype = self.scale_dtype(scheme)
        if self.recipe.rounded_by == "rtn":
            steps = max_steps(weight, scheme, dtype)
        else:
            steps = search_steps(weight, scheme, dtype, None if seen is None else seen.mean_square)
        return (round_to_nearest(weight, steps) if blocks is None else gptq(weight, blocks, steps)), steps

    def levels(self, seen: Seen, importance: Tensor, dtype: torch.dtype) -> list[Levels]:
        """Of all tokens, or of text first and then of pictures."""
        recipe = self.recipe
        return [
            static_parameters(
                seen.rows[its], low, high, recipe.range_method, importance, dtype, percentile=recipe.percentile
            )
            for its, low, high in (seen.modalities() if recipe.visual_scales else seen.whole())
        ]

    def as_weight(self, part: str, multiples: Tensor, steps: Steps, source: Block, levels: Sequence[Levels]) -> Weight:
        bias = source.tensors.get(f"{part}.bias")
        static = [
            static_part(multiples, steps, scale.to(multiples.device), zero.to(multiples.device), bias)
            for scale, zero in levels
        ]
        return as_weight(multiples.contiguous(), steps, None if bias is None else bias.to(self.dtype), *static)

    def measure(
        self,
        part: str,
        rounded: Weight,
        weight: Tensor,
        multiples: Tensor,
        steps: Steps,
        seen: Seen | None,
        before: Tensor | None,
    ) -> LayerMeasure:
        """How far the linear's output, and its weight, are from the float ones on the kept rows."""
        wrong = dequantized(multiples, steps).sub_(weight)
        weight_db = sqnr_db(float(weight.square().sum()), float(wrong.square_().sum()))
        ranges, output_db = None, dict[str, float]()
        if seen is not None and before is not None:
            ranges = InputRange(_quantiles(before.amax(0)), _quantiles(seen.largest.amax(0)))
            for name, kinds in KINDS_MEASURED.items():
                x = seen.rows[torch.isin(seen.kinds, torch.tensor(kinds, device=seen.kinds.device))][:ROWS_MEASURED]
                if len(x):
                    exact = x @ weight.t()
                    bias = 0 if rounded.bias is None else rounded.bias.float()
                    met = rounded.for_visual if name == "picture" else rounded
                    noise = self.kernels.linear(x.to(self.dtype), met).float() - bias - exact
                    output_db[name] = sqnr_db(float(exact.square().sum()), float(noise.square().sum()))
        return LayerMeasure(
            part, rounded.scheme.name, output_db, weight_db, ranges=ranges, size_bytes=rounded.size_bytes
        )


def _quantiles(values: Tensor) -> tuple[float, ...]:
    points = torch.tensor(QUANTILES, device=values.device)
    return tuple(float(value) for value in torch.quantile(values.float(), points))
