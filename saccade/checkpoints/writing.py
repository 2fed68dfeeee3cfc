"""The formats a quantized checkpoint is written in: what every writer of one needs, whichever format it is.

A quantizer that streams asks, in this order: `find_problems` before the long work, `tensors_of` for each linear as it is done,
and `side_files` at the end. Formats keep no state: the same assignment gives the same bytes, also after an interruption.
Knows no algorithm and no file system but the small files that come along.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from saccade.base.errors import CheckpointError, OptionError
from saccade.checkpoints import ascend, compressed_tensors
from saccade.checkpoints.shard_writer import FileNames
from saccade.schemes.scheme import Scheme, Weight

Assignment = Mapping[str, Scheme]  # every linear of the model by canonical module name, those that stay dense included


class Format(Protocol):
    """How a quantized checkpoint is written, for a model of one working type."""

    @property
    def name(self) -> str:
        """What the command line calls it."""

    def find_problems(self, assignment: Assignment) -> list[str]:
        """What the format cannot say of this assignment, a line each; empty if it can be written."""

    def file_names(self, assignment: Assignment) -> FileNames:
        """How the weight files are called."""

    def tensors_of(self, module: str, weight: Weight) -> dict[str, Tensor]:
        """The tensors of a quantized linear, in the order of the files; dense ones are written as they are.

        Reading them gives the same weight, bit for bit. Raises OptionError for a weight that the format cannot hold.
        """

    def side_files(self, config: Mapping[str, Any], assignment: Assignment, names: Sequence[str]) -> dict[str, str]:
        """config.json and what else describes the quantization. config: the source's config.json; names: all tensors, as written."""


@dataclass(frozen=True)
class Ascend:
    """vLLM Ascend's and MindIE's files (see `ascend.py`)."""

    dialect: ascend.Dialect
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return {"vllm": "vllm-ascend", "mindie": "mindie"}[self.dialect]

    def find_problems(self, assignment: Assignment) -> list[str]:
        kinds = {scheme for scheme in assignment.values() if not scheme.is_dense}
        known = ", ".join(scheme.name for scheme in ascend.TAGS)
        problems = [
            f"the {self.name} format has no {scheme.name}; it has {known}; choose one of them or compressed-tensors"
            for scheme in sorted(kinds - ascend.TAGS.keys(), key=lambda scheme: scheme.name)
        ]
        sizes = sorted({scheme.group_size for scheme in kinds if scheme.group_size is not None})
        if self.dialect == "vllm" and len(sizes) > 1:
            problems.append(
                f"the {self.name} format has one group size for all layers, not {sizes}; choose one of them"
            )
        if self.dialect == "vllm":
            problems += [
                f"{module} is {scheme.name}, of which the {self.name} format has no scale_bias; keep it dense or 8-bit"
                for module, scheme in assignment.items()
                if scheme.is_two_stage and not ascend.has_scale_bias(module)
            ]
        return problems

    def file_names(self, assignment: Assignment) -> FileNames:
        return FileNames(ascend.weights_stem(ascend.tag_of(_main(assignment))))

    def tensors_of(self, module: str, weight: Weight) -> dict[str, Tensor]:
        return ascend.write(module, weight, self.dialect, self.dtype)

    def side_files(self, config: Mapping[str, Any], assignment: Assignment, names: Sequence[str]) -> dict[str, str]:
        main = _main(assignment)
        tag = ascend.tag_of(main)
        sizes = [scheme.group_size for scheme in assignment.values() if scheme.group_size is not None]
        entries: dict[str, str | int] = ascend.description_head(tag, sizes[0] if sizes else None, self.dialect)
        for name in names:
            scheme = assignment.get(name.rpartition(".")[0])
            entries |= ascend.description_entries([name], ascend.FLOAT if scheme is None else ascend.tag_of(scheme))
        settings = without_quantization(config)
        if self.dialect == "mindie":
            settings["quantize"] = tag.lower()
            if isinstance(vision := settings.get("vision_config"), dict):
                settings["vision_config"] = vision | {"quantize": tag.lower()}
        return {
            "config.json": json.dumps(settings, indent=2) + "\n",
            ascend.description_name(tag, self.dialect): json.dumps(entries, indent=2) + "\n",
        }


@dataclass(frozen=True)
class CompressedTensors:
    """The files of the compressed-tensors library (see `compressed_tensors.py`)."""

    dtype: torch.dtype
    has_int8_cache: bool = False
    has_visual_scales: bool = False
    name: str = compressed_tensors.METHOD

    def find_problems(self, assignment: Assignment) -> list[str]:
        return []

    def file_names(self, assignment: Assignment) -> FileNames:
        return FileNames()

    def tensors_of(self, module: str, weight: Weight) -> dict[str, Tensor]:
        return compressed_tensors.write(module, weight, self.dtype)

    def side_files(self, config: Mapping[str, Any], assignment: Assignment, names: Sequence[str]) -> dict[str, str]:
        entry = compressed_tensors.config_entry(assignment, self.has_int8_cache, self.has_visual_scales)
        settings = without_quantization(config) | {"quantization_config": entry}
        return {"config.json": json.dumps(settings, indent=2) + "\n"}


FORMATS = ("compressed-tensors", "vllm-ascend", "mindie")


def format_named(
    name: str, dtype: torch.dtype, has_int8_cache: bool = False, has_visual_scales: bool = False
) -> Format:
    """The format the command line calls `name`; dtype: the model's. Raises OptionError for an unknown name, and for a cache of
    int8 or input scales of visual tokens in a format that says nothing of them."""
    if has_int8_cache and name != compressed_tensors.METHOD:
        raise OptionError(f"{name} files say nothing of the cache; leave kv_cache out and choose it when serving")
    if has_visual_scales and name != compressed_tensors.METHOD:
        raise OptionError(
            f"{name} files have one input scale for all tokens; leave visual_scales out, or use --format compressed-tensors"
        )
    if name in ("vllm-ascend", "mindie"):
        return Ascend("vllm" if name == "vllm-ascend" else "mindie", dtype)
    if name == compressed_tensors.METHOD:
        return CompressedTensors(dtype, has_int8_cache, has_visual_scales)
    raise OptionError(f"format {name!r} is unknown; choose one of {', '.join(FORMATS)}")


# Linears of one input, which every engine, this one too, runs as one product.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def require_writable(format_: Format, assignment: Assignment) -> None:
    """Raises OptionError naming what no engine could run of the assignment, and what the format cannot say of it."""
    problems = []
    for module, scheme in assignment.items():
        for first, *others in _FUSED:
            for other in others:
                twin = module.removesuffix(first) + other
                if module.endswith(first) and (its := assignment.get(twin, scheme)) != scheme:
                    problems.append(
                        f"{module} is {scheme.name} and {twin} {its.name}; engines run them as one, so give both one scheme"
                    )
    problems += format_.find_problems(assignment)
    if problems:
        raise OptionError("; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if problems[3:] else ""))


def require_apart(source: Path, out: Path) -> None:
    """Raises OptionError for an `out` whose replacement would take `source` away."""
    place = out.resolve()
    if place in (source.resolve(), *source.resolve().parents):
        raise OptionError(f"{out} is or holds the checkpoint that is to be read, {source}; choose another folder")


def companions(source: Path) -> Iterator[tuple[str, bytes]]:
    """The small files of a checkpoint folder that go along unchanged: tokenizer, templates, generation and preprocessor settings.

    Raises CheckpointError for one that cannot be read.
    """
    for path in sorted(source.iterdir()):
        if path.suffix in (".json", ".txt", ".jinja", ".py", ".model") and not _is_rewritten(path.name):
            try:
                yield path.name, path.read_bytes()
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json's settings without what another quantization left in it."""
    return {key: value for key, value in config.items() if key not in ("quantization_config", "quantize")}


def _is_rewritten(name: str) -> bool:
    return name == "config.json" or name.endswith(".safetensors.index.json") or name.startswith("quant_model_")


def _main(assignment: Assignment) -> Scheme:
    """The scheme of most quantized linears; among equals the one met first."""
    return _most(scheme for scheme in assignment.values() if not scheme.is_dense)


def _most(schemes: Iterable[Scheme]) -> Scheme:
    counts: dict[Scheme, int] = {}
    for scheme in schemes:
        counts[scheme] = counts.get(scheme, 0) + 1
    assert counts, "no linear is quantized"
    return max(counts, key=lambda scheme: counts[scheme])
