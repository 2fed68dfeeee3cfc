"""Quantized checkpoints of every scheme and format, made by rounding to nearest: for tests of whoever reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from saccade.checkpoints.formats import EMBEDDING, expected_tensors, open_checkpoint
from saccade.checkpoints.shard_writer import ShardWriter
from saccade.checkpoints.writing import Format, companions, format_named, require_writable
from saccade.schemes.affine import quantize_rows_int8, quantize_weight, static_weight
from saccade.schemes.scheme import DENSE, W8A8, Scheme, Weight, fitting


def is_decoder_linear(module: str) -> bool:
    return module.startswith("model.layers.")


def write_quantized(
    source: Path,
    out: Path,
    format_name: str,
    scheme: Scheme,
    is_chosen: Callable[[str], bool] = is_decoder_linear,
    scheme_of_module: Callable[[str], Scheme] | None = None,
) -> dict[str, Weight]:
    """Rounds the chosen linears of a float checkpoint to the nearest, each as its columns allow. Returns what was written.

    Static activations get one range for all: a scale of 0.05 and a zero point of 3. `scheme_of_module` mixes schemes.
    """
    checkpoint = open_checkpoint(source)
    dtype: torch.dtype = getattr(torch, checkpoint.config.dtype)
    shapes = {
        name.removesuffix(".weight"): shape
        for name, shape in expected_tensors(checkpoint.config).items()
        if len(shape) == 2 and name != EMBEDDING
    }
    pick = scheme_of_module or (lambda module: scheme)
    assignment = {
        module: fitting(pick(module), shape[1]) if is_chosen(module) else DENSE for module, shape in shapes.items()
    }
    form: Format = format_named(format_name, dtype)
    require_writable(form, assignment)
    weights: dict[str, Weight] = {}
    names: list[str] = []
    with ShardWriter(out, names=form.file_names(assignment)) as writer:
        for name in expected_tensors(checkpoint.config):
            module = name.rpartition(".")[0]
            its_scheme = assignment.get(module, DENSE)
            if its_scheme.is_dense:
                writer.add(name, checkpoint.tensor(name))
                names.append(name)
            elif name.endswith(".weight"):
                bias = checkpoint.tensor(f"{module}.bias") if f"{module}.bias" in checkpoint else None
                weights[module] = rounded(Weight(checkpoint.tensor(name), bias=bias), its_scheme)
                for its_name, tensor in form.tensors_of(module, weights[module]).items():
                    writer.add(its_name, tensor)
                    names.append(its_name)
        settings = json.loads((source / "config.json").read_text())
        for name, content in form.side_files(settings, assignment, names).items():
            writer.add_file(name, content)
        for name, content in companions(source):
            writer.add_file(name, content)
    return weights


def rounded(weight: Weight, scheme: Scheme) -> Weight:
    if scheme != W8A8:
        return quantize_weight(weight, scheme)
    values, scale = quantize_rows_int8(weight.values)
    return static_weight(values, scale, weight.bias, (torch.tensor([0.05]), torch.tensor([3])))
