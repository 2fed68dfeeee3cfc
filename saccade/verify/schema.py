"""What a quantized folder can be told to lack or to contradict by itself: files, tensors, numbers, and the choice of layers.

Each check is one line of the report: a verdict, the facts, and every offender by name. Needs no source and runs no model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from saccade.base.errors import CheckpointError
from saccade.base.meter import progress
from saccade.checkpoints import ascend
from saccade.checkpoints.formats import EMBEDDING, HEAD, Checkpoint, expected_tensors, find_problems, find_strangers
from saccade.quantize.report import Check
from saccade.schemes.affine import integer_values
from saccade.schemes.packing import unpack
from saccade.schemes.scheme import Static, Weight

SIDE_FILES = ("preprocessor_config.json", "generation_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.json")
TEMPLATE_FILES = ("chat_template.json", "chat_template.jinja")
USUALLY_FLOAT = {
    "lm_head": "logits feel every error of it, and not every engine reads it",
    "model.embed_tokens": "it is looked up, not multiplied",
    "visual.patch_embed.proj": "a convolution over raw pixels, small",
    "visual.merger.mlp.0": "every picture token passes it, and it is small",
    "visual.merger.mlp.2": "every picture token passes it, and it is small",
}
DEQUANTIZATION_TOLERANCE = (
    0.01  # deq_scale is scale times scale, formed in bfloat16 by some tools: 0.4 % for each rounding
)
MIN_TOP_INTEGER = {
    8: 64,
    4: 4,
}  # of a row's largest magnitude: a scale twice too large leaves half of the integers unused


def check_files(folder: Path, source: Path | None) -> Check:
    """Everything but weights that engines look for: absent files, and with a source what is not its copy."""
    absent = [name for name in SIDE_FILES if not (folder / name).is_file()]
    has_tokenizer = (folder / "tokenizer.json").is_file() or all(
        (folder / name).is_file() for name in ("vocab.json", "merges.txt")
    )
    if not has_tokenizer:
        absent.append("tokenizer.json (or vocab.json and merges.txt)")
    if not any((folder / name).is_file() for name in TEMPLATE_FILES) and not _has_template(folder):
        absent.append("chat_template.json")
    warnings = []
    if source is not None:
        for name in (*TOKENIZER_FILES, *SIDE_FILES, *TEMPLATE_FILES[1:]):
            if (source / name).is_file() and not (folder / name).is_file() and name not in absent:
                warnings.append(f"{name} is in {source} and not here; some engines look for it")
        for name in TOKENIZER_FILES[:1]:
            if _differs(folder / name, source / name):
                absent.append(f"{name}, for this is another than {source / name}")
    if absent:
        return Check("files", "fail", f"{len(absent)} missing", tuple(f"{name} is missing" for name in absent))
    if warnings:
        return Check("files", "warn", f"{len(warnings)} of the source's files did not come along", tuple(warnings))
    return Check("files", "pass", "tokenizer, template, preprocessor and generation settings are there")


def _has_template(folder: Path) -> bool:
    """Older checkpoints keep the template among the tokenizer's settings."""
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and b'"chat_template"' in settings.read_bytes()


def _differs(one: Path, other: Path) -> bool:
    return one.is_file() and other.is_file() and one.read_bytes() != other.read_bytes()


def check_tensors(checkpoint: Checkpoint) -> Check:
    """Names, shapes and types, from the headers."""
    problems, strangers = find_problems(checkpoint), find_strangers(checkpoint)
    if problems:
        return Check("tensors", "fail", f"{len(problems)} missing, misshaped or mistyped", tuple(problems))
    if strangers:
        details = tuple(f"{name} is no tensor of this model" for name in strangers)
        return Check("tensors", "warn", f"all there, and {len(strangers)} that do not belong", details)
    return Check("tensors", "pass", f"{len(checkpoint.names())} tensors, every shape and type as config.json implies")


def check_numbers(checkpoint: Checkpoint) -> Check:
    """Every number: finite; scales positive; integers that use their range; static constants that agree with each other."""
    faults: list[str] = []
    warnings: list[str] = []
    modules = quantized_modules(checkpoint)
    with progress(len(modules), "reading") as advance:
        for module in modules:
            try:
                weight = checkpoint.weight(module)
            except CheckpointError as error:
                faults.append(str(error))
                continue
            assert weight is not None, f"{module} is quantized"
            faults += (f"{module}: {fault}" for fault in find_faults(weight))
            warnings += (f"{module}: {fact}" for fact in find_oddities(checkpoint, module, weight))
            advance(1)
    for name in checkpoint.names():
        try:
            checkpoint.check_finite([name])
        except CheckpointError as error:
            faults.append(str(error))
    if faults:
        return Check("numbers", "fail", f"{len(faults)} faults", tuple(faults))
    if warnings:
        return Check("numbers", "warn", f"{len(warnings)} oddities", tuple(warnings))
    return Check("numbers", "pass", f"{len(modules)} quantized linears, scales finite and positive, constants agree")


def find_faults(weight: Weight) -> Iterator[str]:
    """What makes a quantized weight compute nonsense."""
    assert weight.scale is not None, "a quantized weight has scales"
    scale = weight.scale.flatten(1).amin(1) if weight.scale.ndim > 1 else weight.scale
    if not bool(torch.isfinite(weight.scale).all()):
        yield f"scales of {_rows(~torch.isfinite(scale))} are not finite"
    elif bool((scale <= 0).any()):
        yield f"scales of {_rows(scale <= 0)} are not positive"
    for static, its_input in ((weight.static, "its input"), (weight.visual_static, "its visual tokens")):
        if static is not None:
            yield from _find_static_faults(weight, static, its_input)


def _find_static_faults(weight: Weight, static: Static, its_input: str) -> Iterator[str]:
    scale_of_input, zero = float(static.scale), float(static.zero)
    if not -128 <= zero <= 127:
        yield f"the zero point {zero:g} of {its_input} does not fit int8"
    if not bool(torch.isfinite(static.deq_scale).all()):
        yield f"deq_scale of {_rows(~torch.isfinite(static.deq_scale))} is not finite"
        return
    assert weight.scale is not None, "a quantized weight has scales"
    distance = (static.deq_scale / (scale_of_input * weight.scale) - 1).abs()
    if bool((off := distance > DEQUANTIZATION_TOLERANCE).any()):
        yield f"deq_scale of {_rows(off)} is not the scale of {its_input} times the weight's"
        return
    # quant_bias holds the bias and the zero point's share, -zero * sum of the row: both are known, and it is a whole number.
    sums = integer_values(weight).sum(1, dtype=torch.float64)
    bias = torch.zeros_like(sums) if weight.bias is None else weight.bias.double()
    expected = bias / static.deq_scale.double() - zero * sums
    tolerance = 1.0 + 1e-6 * (expected.abs() + (zero * sums).abs())  # formed in float32
    if weight.bias is not None:  # from a bias that may have had more digits than the stored one
        tolerance += torch.finfo(weight.bias.dtype).eps * (bias / static.deq_scale.double()).abs()
    if bool((off := (static.quant_bias - expected).abs() > tolerance).any()):
        yield f"quant_bias of {_rows(off)} belongs to another zero point or bias than the stored ones ({zero:g})"


def find_oddities(checkpoint: Checkpoint, module: str, weight: Weight) -> Iterator[str]:
    """What computes, and hints at a mistake or costs accuracy."""
    if not weight.scheme.is_float:
        low = MIN_TOP_INTEGER[weight.scheme.weight_bits]
        values = integer_values(weight) if weight.group_scale is None else unpack(weight.values)
        top = values.int().abs().amax(1)
        if bool((off := (top < low) & (top > 0)).any()):
            yield f"{_rows(off)} use{'s'[: int(off.sum()) == 1]} less than half of the integers: the scale is too large"
    name = f"{module}.scale_bias"
    if weight.group_scale is not None and weight.scale is not None and name in checkpoint:
        values, second = unpack(weight.values), weight.group_scale.float()
        stored, expected = checkpoint.tensor(name), ascend.scale_bias(module, values, weight.scale[:, None], second)
        if stored.shape != expected.shape:
            yield f"scale_bias has shape {list(stored.shape)}; engines load {list(expected.shape)}"
        elif not torch.allclose(stored.float(), expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max())):
            yield "scale_bias is not 8 times the sums of its rows"


def check_choice(checkpoint: Checkpoint) -> Check:
    """Which layers are quantized, and which of them usually are not."""
    modules = quantized_modules(checkpoint)
    if not modules:
        return Check("choice", "warn", "nothing is quantized")
    unusual = tuple(
        f"{module} is {checkpoint.scheme(module).name}; usually it stays float: {USUALLY_FLOAT[module]}"
        for module in modules
        if module in USUALLY_FLOAT
    )
    facts = ", ".join(f"{count} {scheme}" for scheme, count in _scheme_counts(checkpoint).items())
    mixed = _mixed_classes(checkpoint)
    if unusual:
        return Check("choice", "warn", f"{facts}; {len(unusual)} unusual", (*unusual, *mixed))
    return Check("choice", "pass", facts, mixed)


def _scheme_counts(checkpoint: Checkpoint) -> dict[str, int]:
    counts: dict[str, int] = {}
    for module in linear_modules(checkpoint):
        part = "vision " if module.startswith("visual.") else ""
        name = part + checkpoint.scheme(module).name
        counts[name] = counts.get(name, 0) + 1
    return counts


def _mixed_classes(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Linears stored otherwise than most of their kind: meant, in mixed precision, or forgotten."""
    by_class: dict[str, dict[str, list[str]]] = {}
    for module in linear_modules(checkpoint):
        kind = ".".join(part for part in module.split(".") if not part.isdigit() or "merger" in module)
        by_class.setdefault(kind, {}).setdefault(checkpoint.scheme(module).name, []).append(module)
    lines = []
    for kind, schemes in by_class.items():
        usual = max(schemes, key=lambda name: len(schemes[name]))
        lines += [
            f"{module} is {name}, where most {kind} are {usual}"
            for name, modules in schemes.items()
            if name != usual
            for module in modules
        ]
    return tuple(lines)


def linear_modules(checkpoint: Checkpoint) -> list[str]:
    """Every linear of the model, in order."""
    shapes = expected_tensors(checkpoint.config)
    return [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2 and name != EMBEDDING]


def quantized_modules(checkpoint: Checkpoint) -> list[str]:
    """The linears that are stored quantized; a tied head has no weight of its own."""
    modules = linear_modules(checkpoint)
    return [module for module in modules if not checkpoint.scheme(module).is_dense]


def _rows(mask: Tensor) -> str:
    """`row 3`, `rows 3 and 17`, `rows 3, 17 and 40 more`."""
    rows = mask.nonzero().flatten().tolist()
    if len(rows) == 1:
        return f"row {rows[0]}"
    shown = ", ".join(map(str, rows[:3]))
    return f"rows {shown}" + (f" and {len(rows) - 3} more" if len(rows) > 3 else "")


assert HEAD == "lm_head.weight", "USUALLY_FLOAT names modules"
