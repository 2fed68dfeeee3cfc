"""Which linears the answers feel most, and which of them to store better to stay below a distance from the float model.

One model is in memory, each of its quantized products (q, k and v are one) with the float weight it stands for, in its own basis
beside it; a trial swaps weights and measures the mean KL of the answers' tokens. Ranking takes a forward for each product.
Mixed precision raises the first n products of the ranking, by KL per byte it costs, to the next scheme of their ladder (4 bits,
8 bits, float); n is found by bisection, and what is returned was measured.
Knows weights and logits; knows no files but the two checkpoints.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.base.meter import progress
from saccade.checkpoints.formats import Checkpoint
from saccade.kernels.choose import choose
from saccade.model.language import WholeSequences
from saccade.model.layers import Filling, Linear
from saccade.model.qwen2_5_vl import Qwen2_5_VL
from saccade.quantize.best_recipe import options_of_report
from saccade.quantize.report import MixedPrecision, Sensitivity
from saccade.schemes.affine import quantize_weight
from saccade.schemes.scheme import DENSE, SCHEMES, W8A8_DYNAMIC, W8A16, Scheme, Weight
from saccade.scoring import token_divergence
from saccade.verify.basis import find_rotation
from saccade.verify.samples import Sample, pack
from saccade.verify.weights import fit_basis

FLOAT = "float"  # a recipe's word for it


@dataclass(frozen=True)
class Product:
    """A linear of the model whose weight is quantized, and the float weight that it stands for."""

    linear: Linear
    quantized: Weight
    exact: Weight

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(self.linear.parts)

    def ladder(self) -> list[Scheme]:
        """As it is, then better and better."""
        scheme = self.quantized.scheme
        if scheme.weight_bits == 4:
            return [scheme, W8A16 if scheme.activation == "none" else W8A8_DYNAMIC, DENSE]
        return [scheme, W8A8_DYNAMIC, DENSE] if scheme.activation == "static" else [scheme, DENSE]

    def rung(self, level: int) -> Scheme:
        return self.ladder()[min(level, len(self.ladder()) - 1)]

    def at(self, scheme: Scheme) -> Weight:
        if scheme == self.quantized.scheme:
            return self.quantized
        return self.exact if scheme.is_dense else quantize_weight(self.exact, scheme)

    def set(self, level: int) -> None:
        self.linear.weight = self.at(self.rung(level))

    def extra_bytes(self, level: int) -> int:
        """More than it takes as it is."""
        scheme = self.rung(level)
        if scheme == self.quantized.scheme:
            return 0
        if scheme.is_dense:
            return self.exact.size_bytes - self.quantized.size_bytes
        values, rows = self.linear.in_features * self.linear.out_features, self.linear.out_features
        return int(values * scheme.bytes_per_weight) + 4 * rows - self.quantized.size_bytes


class Trials:
    """The quantized model in memory, products to swap weights of, and the float model's logits to compare with."""

    def __init__(
        self, source: Checkpoint, quantized: Checkpoint, samples: Sequence[Sample], device: torch.device
    ) -> None:
        self.packed = pack(samples, source.config)
        self.dtype: torch.dtype = getattr(torch, source.config.dtype)
        self._features: tuple[tuple[int, ...], Tensor] | None = None
        self.exact = self._logits(self._load(source, device))
        self._features = None
        self.model = self._load(quantized, device)
        rotation = find_rotation(source, quantized)
        self.products: list[Product] = []
        self.unknown: list[str] = []  # products whose float weight is not known in their basis
        for linear in self.model.modules():
            if isinstance(linear, Linear) and not linear.weight.scheme.is_dense:
                fits = [fit_basis(source, quantized, module, rotation).rows for module in linear.parts]
                rows = [fit(slice(None)) for fit in fits if fit is not None]
                if len(rows) < len(fits):
                    self.unknown += linear.parts
                    continue
                exact = Weight(torch.cat(rows).to(self.dtype).to(device), bias=linear.weight.bias)
                self.products.append(Product(linear, linear.weight, exact))

    def _load(self, checkpoint: Checkpoint, device: torch.device) -> Qwen2_5_VL:
        model = Qwen2_5_VL(checkpoint.config, choose(device))
        with progress(sum(1 for _ in model.blocks()), "loading") as advance:
            for _ in model.load(Filling(checkpoint, self.dtype, device)):
                advance(1)
        return model

    def kl(self) -> float:
        """Mean over all answers' tokens, of the model as it now is."""
        return float(token_divergence(self.exact, self._logits(self.model)).kl.mean())

    @torch.inference_mode()
    def _logits(self, model: Qwen2_5_VL) -> Tensor:
        packed, device = self.packed, model.device
        features = None if packed.patches is None else self._encoded(model, packed.patches)
        rows = None if features is None else packed.media_rows.to(device)
        x = model.embed(packed.token_ids.to(device), rows, features)
        attend = WholeSequences(model.kernels, packed.lengths)
        hidden = model(x, packed.positions.to(device), attend, rows)
        return model.head(hidden[packed.answer_rows.to(device)]).float().cpu()

    def _encoded(self, model: Qwen2_5_VL, patches: Tensor) -> Tensor:
        """Through the tower, unless its weights are those of the last time."""
        weights = tuple(id(layer.weight) for layer in model.visual.modules() if isinstance(layer, Linear))
        if self._features is None or self._features[0] != weights:
            self._features = weights, model.encode(patches, self.packed.grids)
        return self._features[1]


def rank(trials: Trials) -> list[Sensitivity]:
    """Every product quantized alone, the most sensitive first; the model is left as it came."""
    products = trials.products
    for product in products:
        product.linear.weight = product.exact
    found = []
    with progress(len(products), "ranking") as advance:
        for product in products:
            product.set(0)
            scheme, saved = product.quantized.scheme, product.exact.size_bytes - product.quantized.size_bytes
            found.append(Sensitivity(product.modules, scheme.name, trials.kl(), saved))
            product.linear.weight = product.exact
            advance(1)
    for product in products:
        product.set(0)
    return sorted(found, key=lambda sensitivity: -sensitivity.kl)


def mix(trials: Trials, ranking: Sequence[Sensitivity], target_kl: float) -> MixedPrecision:
    """The fewest products of the ranking that have to be stored better for a mean KL of at most `target_kl`."""
    by_modules = {product.modules: product for product in trials.products}
    gain = {by_modules[entry.modules]: entry.kl / max(by_modules[entry.modules].extra_bytes(1), 1) for entry in ranking}
    ordered = sorted(gain, key=lambda product: -gain[product])
    levels = dict.fromkeys(ordered, 0)

    def raised(count: int, level: int) -> float:
        """The KL with the first `count` at `level`, the others one below."""
        for number, product in enumerate(ordered):
            wanted = level if number < count else level - 1
            if levels[product] != wanted:
                product.set(wanted)
                levels[product] = wanted
        return trials.kl()

    before = kl = raised(0, 1)
    highest = max((len(product.ladder()) - 1 for product in ordered), default=0)
    level = 0
    while kl > target_kl and level < highest:
        level += 1
        kl = raised(len(ordered), level)
    if level and kl <= target_kl:
        count = bisect(0, len(ordered), lambda number: raised(number, level) <= target_kl)
        kl = raised(count, level)
    rules = tuple(
        _rules(product, levels[product]) for product in ordered if product.rung(levels[product]) != product.rung(0)
    )
    extra = sum(product.extra_bytes(levels[product]) for product in ordered)
    for product in ordered:
        product.set(0)
    return MixedPrecision(target_kl, before, kl, extra, tuple(rule for several in rules for rule in several))


def bisect(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """A number in (low, high] that `holds`, the one below it not; it does not hold at `low`, and does at `high`."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _rules(product: Product, level: int) -> list[Mapping[str, str]]:
    scheme = product.rung(level)
    name = FLOAT if scheme.is_dense else scheme.name
    return [{"match": module, "scheme": name} for module in product.modules]


def recipe_text(mixed: MixedPrecision, recipe: Mapping[str, Any], ranking: Sequence[Sensitivity] = ()) -> str:
    """YAML for `saccade quantize --recipe`: the rules, and before them the recipe they amend.

    recipe: the report's, empty for another tool's checkpoint; then the scheme of most products of the `ranking` stands for it.
    """
    options = options_of_report(recipe) if recipe else _main_scheme(ranking)
    lines = [
        f"# mean KL {mixed.kl_before:.4g} -> {mixed.kl:.4g} (target {mixed.target_kl:g}) for {mixed.extra_bytes / 1e6:.3g} MB more"
    ]
    lines += [f"{name}: {json.dumps(value)}" for name, value in options.items() if name != "rules"]
    rules = [*mixed.rules, *options.get("rules", ())]
    lines.append("rules:" if rules else "rules: []")
    lines += [f"  - {json.dumps(dict(rule))}" for rule in rules]
    return "\n".join(lines) + "\n"


def _main_scheme(ranking: Sequence[Sensitivity]) -> dict[str, Any]:
    """As a recipe spells it: w4a16 and a group size for w4a16-asym-g128."""
    if not ranking:
        return {}
    scheme = SCHEMES[Counter(entry.scheme for entry in ranking).most_common(1)[0][0]]
    if scheme.group_size is None:
        return {"scheme": scheme.name}
    return {"scheme": scheme.name.partition("-")[0], "group_size": scheme.group_size}
