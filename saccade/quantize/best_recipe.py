"""What best mode is asked for: a scheme, a format, and how weights are found; from flags, keywords or a YAML file.

Knows options and which go together; knows no model and no tensors. What is left None is chosen by the scheme (`DEFAULTS`,
by measurement: docs/quantization.md) or by the format.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from saccade.base.errors import OptionError
from saccade.base.options import check_values, from_mapping, option
from saccade.quantize.ranges import Method
from saccade.quantize.recipe import ExactRecipe
from saccade.quantize.samples import BUILTIN
from saccade.quantize.smoothing import Smoothing
from saccade.schemes.scheme import DENSE, GROUP_SIZES, SCHEMES, W4A8, W4A16, Scheme, scheme_of

Format = Literal["compressed-tensors", "vllm-ascend", "mindie"]
Rounding = Literal["rtn", "mse", "gptq"]
Layers = Literal["reference", "all"]
Vision = Literal["float", "reference", "all"]
Head = Literal["float", "w8a16", "w8a8-dynamic", "w4a16", "w4a8", "fp8"]

FORMATS = ("compressed-tensors", "vllm-ascend", "mindie")
SCHEME_NAMES = ("w8a8", "w8a8-dynamic", "w4a8", "w8a16", "w4a16", "fp8")
HEADS = ("float", "w8a16", "w8a8-dynamic", "w4a16", "w4a8", "fp8")
FLOAT = "float"
MAX_RECIPE_BYTES = 1 << 20
DEFAULT_PERCENTILE = 99.99


@dataclass(frozen=True)
class Defaults:
    """How weights are found where the recipe does not say."""

    smooth: Smoothing
    rounding: Rounding
    rotate: bool = False
    group_size: int | None = None


DEFAULTS = {
    "w8a8": Defaults("search", "gptq"),
    "w8a8-dynamic": Defaults("learned", "gptq"),
    "w4a8": Defaults("learned", "gptq", group_size=128),
    "w8a16": Defaults("learned", "gptq"),
    "w4a16": Defaults("learned", "gptq", group_size=128),
    "fp8": Defaults("none", "gptq"),
}


@dataclass(frozen=True)
class Rule:
    """What the linears that `match` names get: a scheme, or "float". `*` stands for anything, as in model.layers.*.down_proj."""

    match: str
    scheme: str


@dataclass(frozen=True)
class BestRecipe:
    """All that decides the result. Raises OptionError for what cannot be."""

    scheme: Literal["w8a8", "w8a8-dynamic", "w4a8", "w8a16", "w4a16", "fp8"] = option(
        "w8a8-dynamic", "bits of weights and activations; w8a8 has static, -dynamic per-token activation scales"
    )
    group_size: int | None = option(None, "columns that share a 4-bit scale: 32, 64, 128 or 256 (128)")
    format: Literal["compressed-tensors", "vllm-ascend", "mindie"] = option("compressed-tensors", "of the files")
    smooth: Literal["none", "m2", "m4", "awq", "learned", "search"] | None = option(
        None,
        "outlier channels: m2 (Outlier Suppression+), m4 (iterative smooth), awq, learned by channel, or search among all",
    )
    rounding: Literal["rtn", "mse", "gptq"] | None = option(
        None, "to nearest, to nearest with searched clipping, or GPTQ"
    )
    rotate: bool | None = option(None, "rotate the residual stream (and untie the head)")
    fold_keys: bool = option(True, "move scales from keys to queries, so that int8 caches of any engine serve them")
    activation_range: Literal["mse", "minmax", "histogram", "percentile", "auto"] = option(
        "mse", "how static activation ranges are found"
    )
    percentile: float = option(DEFAULT_PERCENTILE, "of --activation-range percentile", low=50, high=100)
    layers: Literal["reference", "all"] | None = option(
        None, "decoder linears: as msModelSlim, which leaves down_proj float, or all"
    )
    vision: Literal["float", "reference", "all"] | None = option(
        None, "vision tower: float, the layers msModelSlim quantizes, or all"
    )
    head: Literal["float", "w8a16", "w8a8-dynamic", "w4a16", "w4a8", "fp8"] = option(
        "float",
        "output head, all of which a token reads: float, or a scheme (w8a16); one tied to the embedding is untied",
    )
    calibration: str = option(BUILTIN, "folder of pictures, .jsonl of conversations, or builtin")
    samples: int | None = option(None, "take only so many of them, drawn by the seed", low=1, high=100_000)
    kv_cache: Literal["model", "int8"] = option(
        "model", "what the files ask engines to keep keys and values as: the model's type, or int8 by token and head"
    )
    seed: int = option(0, "of every draw", low=0, high=2**31)
    max_pixels: int = option(1280 * 28 * 28, "largest area of a calibration picture, in pixels", low=28 * 28)
    balance: bool = option(True, "let pictures and text weigh the same in all statistics")
    visual_scales: bool = option(
        False, "w8a8: visual tokens have a static scale of their own (MQuant); only Saccade reads such files"
    )
    rules: tuple[Rule, ...] = option((), "layer overrides; the first that matches counts")

    def __post_init__(self) -> None:
        object.__setattr__(self, "calibration", _plain(self.calibration))
        check_values(self)
        if self.group_size not in (None, *GROUP_SIZES):
            raise OptionError(f"group_size is {self.group_size!r}; use one of {', '.join(map(str, GROUP_SIZES))}")
        if self.group_size is not None and not self.scheme.startswith("w4"):
            raise OptionError(
                f"group_size {self.group_size} needs a 4-bit scheme; {self.scheme} has a scale for each row"
            )
        if self.visual_scales and not self.is_static:
            raise OptionError(
                f"visual_scales are static ones; {self.scheme} has none: use --scheme w8a8, or leave it out"
            )
        if self.is_ascend and self.head != FLOAT:
            raise OptionError(
                f"head is {self.head}; {self.format} has float heads alone: use --format compressed-tensors"
            )
        if self.activation_range != "mse" and not self.is_static:
            raise OptionError(
                f"activation_range {self.activation_range} is of static ranges; {self.scheme} has none: use --scheme w8a8, "
                "or leave it out"
            )
        if self.percentile != DEFAULT_PERCENTILE and self.activation_range != "percentile":
            raise OptionError(
                f"percentile {self.percentile:g} is of --activation-range percentile, and that is {self.activation_range}; "
                "give both, or leave it out"
            )
        if self.is_ascend and self.scheme in ("w4a16", "fp8"):
            raise OptionError(
                f"{self.format} has no {self.scheme}; use --format compressed-tensors, or w8a8, w8a8-dynamic, w4a8 or w8a16"
            )
        for rule in self.rules:
            self.scheme_called(rule.scheme)

    # --- what None stands for ---

    @property
    def is_ascend(self) -> bool:
        return self.format != "compressed-tensors"

    @property
    def is_static(self) -> bool:
        """Whether some linear may get a fixed range for its inputs."""
        return "w8a8" in (self.scheme, *(rule.scheme for rule in self.rules))

    @property
    def defaults(self) -> Defaults:
        return DEFAULTS[self.scheme]

    @property
    def smoothing(self) -> Smoothing:
        return self.smooth or self.defaults.smooth

    @property
    def rounded_by(self) -> Rounding:
        return self.rounding or self.defaults.rounding

    @property
    def is_rotated(self) -> bool:
        return self.defaults.rotate if self.rotate is None else self.rotate

    @property
    def range_method(self) -> Method:
        return self.activation_range

    @property
    def decoder_layers(self) -> Layers:
        return self.layers or ("reference" if self.is_ascend else "all")

    @property
    def vision_layers(self) -> Vision:
        return self.vision or ("reference" if self.is_ascend else "float")

    @property
    def head_scheme(self) -> Scheme:
        return self.scheme_called(self.head)

    @property
    def unties_head(self) -> bool:
        """Whether a head that was the embedding becomes a tensor of its own."""
        return self.is_rotated or self.head != FLOAT

    @property
    def main_scheme(self) -> Scheme:
        return self.scheme_called(self.scheme)

    def scheme_called(self, name: str) -> Scheme:
        """The scheme of a name as recipes spell it: 4-bit ones without their group."""
        if name in (FLOAT, "dense"):
            return DENSE
        size = self.group_size or self.defaults.group_size or 128
        if name in ("w4a8", "w4a16"):
            return (W4A8 if name == "w4a8" else W4A16)[size]
        scheme = scheme_of(name)
        if scheme.is_asymmetric:
            raise OptionError(f"{name} is read, and made while loading, but not by quantize; use w4a16 or {FLOAT}")
        if self.is_ascend and (scheme.has_float_groups or scheme.is_float):
            raise OptionError(f"{self.format} has no {name}; use w8a8, w8a8-dynamic, w4a8, w8a16 or {FLOAT}")
        return scheme

    def as_json(self) -> dict[str, Any]:
        """Everything, None replaced by what it stands for."""
        resolved = {
            "smooth": self.smoothing,
            "rounding": self.rounded_by,
            "rotate": self.is_rotated,
            "layers": self.decoder_layers,
            "vision": self.vision_layers,
            "group_size": self.main_scheme.group_size,
        }
        return {**dataclasses.asdict(self), **resolved}

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()


def _plain(path: Any) -> Any:
    """A path as text, which recipes are kept as."""
    return os.fspath(path) if isinstance(path, os.PathLike) else path


def read_recipe(path: Path, changes: Mapping[str, Any]) -> BestRecipe:
    """The recipe of a YAML file, flags that were given taking the place of its entries. Raises OptionError."""
    try:
        with path.open("rb") as file:
            entries = yaml.safe_load(file.read(MAX_RECIPE_BYTES))
    except (OSError, yaml.YAMLError) as error:
        raise OptionError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries):
        raise OptionError(f"{path} holds no mapping of option names to values")
    entries = {name.replace("-", "_"): value for name, value in entries.items()}
    rules = entries.get("rules") or ()
    if not isinstance(rules, list | tuple):
        raise OptionError(f"{path}: rules is {rules!r}; a list of {{match: ..., scheme: ...}} is expected")
    for rule in rules:
        if not isinstance(rule, dict) or set(rule) != {"match", "scheme"}:
            raise OptionError(f"{path}: the rule {rule!r} needs match and scheme, and nothing else")
    entries["rules"] = tuple(Rule(str(rule["match"]), str(rule["scheme"])) for rule in rules)
    return from_mapping(BestRecipe, {**entries, **changes})


def best_options(exact: ExactRecipe, has_group: bool) -> dict[str, Any]:
    """msModelSlim's options in best mode's words. `has_group`: whether the group size was asked for."""
    scheme = "w4a8" if exact.w_bit == 4 else "w8a8-dynamic" if exact.is_dynamic else "w8a8"
    options: dict[str, Any] = {
        "scheme": scheme,
        "format": "mindie" if exact.mindie_format else "vllm-ascend",
        "smooth": exact.anti_method,
    }
    if scheme == "w8a8":
        options["activation_range"] = {1: "minmax", 2: "histogram", 3: "auto"}[exact.act_method]
    return options | ({"group_size": exact.group_size} if has_group and exact.w_bit == 4 else {})


def options_of_report(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What a report's `recipe` says, as options that make a BestRecipe: exact mode's translated, digests left out."""
    if recipe.get("mode") == "exact":
        names = {field.name for field in dataclasses.fields(ExactRecipe)}
        exact = ExactRecipe(**{name: value for name, value in recipe.items() if name in names})
        return best_options(exact, has_group=True)
    names = {field.name for field in dataclasses.fields(BestRecipe)}
    return {name: value for name, value in recipe.items() if name in names and value is not None}


def parse_rule(text: str) -> Rule:
    """PATTERN=SCHEME. Raises OptionError."""
    match, equals, scheme = text.rpartition("=")
    if not equals or not match:
        raise OptionError(f"layer rule {text!r} is not PATTERN=SCHEME, as in 'model.layers.0.*=float'")
    return Rule(match, scheme)


def nearest_names(pattern: str, names: list[str]) -> str:
    """For an error about a pattern that matches nothing."""
    close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
    return f"; the nearest names are {', '.join(close)}"


assert set(DEFAULTS) == set(SCHEME_NAMES), "every scheme has defaults"
assert all(name in SCHEMES or name.startswith("w4") for name in SCHEME_NAMES), "every name is a scheme's"
