"""Quantized weights as the compressed-tensors library stores them, for vLLM, SGLang and transformers: to and from `Weight`.

Knows quantization_config of config.json (which linears are quantized, and how) and the tensors of a quantized linear; knows of
the model only which of its modules are linears. Formats of a group: int-quantized, pack-quantized, float-quantized,
naive-quantized; several of them in one checkpoint are mixed-precision.

What the files cannot say: that group scales are whole multiples of a row's scale. They are written multiplied out, and the entry
`integer_group_scales` of quantization_config, which other readers skip, lets reading take them apart again. And that visual tokens
have an input scale of their own: tensors `input_scale_visual` and `input_zero_point_visual` beside the usual ones, which then are of
all other tokens. Readers that skip these would compute nonsense, so input_activations has `visual_scales` there: the library allows no
key that it does not know.
Letters: O outputs, H inputs, G columns in a group.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor

from saccade.base.errors import CheckpointError, OptionError
from saccade.checkpoints.config import is_int8
from saccade.checkpoints.json_file import printable
from saccade.checkpoints.stored import (
    FLOATS,
    Expected,
    Tensors,
    find_mismatches,
    narrowed,
    read_bias,
    read_scale,
    refusal,
    refused,
)
from saccade.kernels import cpu_pack
from saccade.kernels.library import Library, load
from saccade.schemes.affine import Levels, join_group_scales, split_group_scales, static_weight
from saccade.schemes.packing import pack, unpack
from saccade.schemes.scheme import (
    FP8,
    GROUP_SIZES,
    W4A8,
    W4A8_FLOAT,
    W4A16,
    W4A16_ASYM,
    W8A8,
    W8A8_DYNAMIC,
    W8A16,
    Scheme,
    Weight,
)

METHOD = "compressed-tensors"
PACKED = "pack-quantized"
_FORMATS = (PACKED, "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
_INTEGER_SCALES = "integer_group_scales"
_VISUAL_SCALES = "visual_scales"
_TEXTUAL = ("input_scale", "input_zero_point")
_VISUAL = ("input_scale_visual", "input_zero_point_visual")
_INT8_CACHE = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
_WORDS_AT_A_TIME = 1 << 16  # a quarter megabyte, which stays in the processor's cache

# Modules that are linears in every engine; the patch embedding, a convolution, is none.
_IS_LINEAR = re.compile(r"(_proj|qkv|(?<!patch_embed)\.proj|merger\.mlp\.\d+|lm_head)$")
# How one module may be called: (canonical prefix, other prefixes). Configs are written against any of them.
_SPELLINGS = (
    ("model.", ("model.language_model.", "language_model.model.", "language_model.")),
    ("visual.", ("model.visual.",)),
    ("lm_head", ("language_model.lm_head",)),
)


# --- what the config says --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """One of the config's groups. group_size: None for one scale per row, or for one in all, which is read alike."""

    name: str
    targets: tuple[str, ...]
    format: str
    bits: int
    is_float: bool
    group_size: int | None
    is_symmetric: bool
    activation: Literal["none", "static", "dynamic"]
    has_visual_scales: bool = False

    @property
    def kind(self) -> str:
        """In a few words, for people: `int4 in groups of 128, dynamic activations`."""
        numbers = f"{'fp' if self.is_float else 'int'}{self.bits}" + ("" if self.is_symmetric else " with zero points")
        groups = "" if self.group_size is None else f" in groups of {self.group_size}"
        return numbers + groups + ("" if self.activation == "none" else f", {self.activation} activations")


@dataclass(frozen=True)
class Config:
    """quantization_config, parsed: a `Stored`."""

    groups: tuple[Group, ...]
    ignore: tuple[str, ...]
    has_integer_scales: bool
    notes: tuple[str, ...] = ()
    source: str = "quantization_config of config.json"
    _found: dict[str, Group | None] = field(default_factory=dict, compare=False, repr=False)

    @property
    def summary(self) -> str:
        return " and ".join(dict.fromkeys(group.kind for group in self.groups))

    @property
    def format_name(self) -> str:
        return METHOD

    def group(self, module: str) -> Group | None:
        """The group a module belongs to, None if it is not quantized. A name or pattern is stronger than the class Linear."""
        if module not in self._found:
            self._found[module] = self._match(module) if _IS_LINEAR.search(module) else None
        return self._found[module]

    def _match(self, module: str) -> Group | None:
        spellings = _spellings(module)
        if "Linear" in self.ignore or any(_matches(entry, spellings) for entry in self.ignore):
            return None
        for group in self.groups:
            if any(_matches(target, spellings) for target in group.targets):
                return group
        return next((group for group in self.groups if "Linear" in group.targets), None)

    def is_quantized(self, module: str) -> bool:
        return self.group(module) is not None

    def find_problems(self, tensors: Tensors, module: str, shape: tuple[int, ...]) -> list[str]:
        group = self._group(module)
        if len(shape) != 2:
            return [f"{module} is {group.kind} by {group.name} of {self.source}; only linear layers are read quantized"]
        if (plain := f"{module}.weight") in tensors and not any(
            f"{module}.{suffix}" in tensors for suffix in ("weight_packed", "weight_scale")
        ):
            info = tensors.info(plain)
            if info.dtype in FLOATS:
                return [
                    f"{info.name} in {info.file} is a plain tensor without weight_scale, and {group.name} of {self.source} has "
                    f"it as {group.kind}; add {module} to ignore there if it was not quantized"
                ]
        try:
            expected = _expected(
                group,
                *shape,
                is_packed=f"{module}.weight_packed" in tensors,
                has_visual=_has_visual(tensors, module, group),
            )
        except CheckpointError as error:
            return [f"{module} is {group.kind} by {group.name} of {self.source}: {error}"]
        problems = find_mismatches(tensors, module, expected, group.kind, f"{group.name} of {self.source}")
        return problems or refused(lambda: _require_file_order(tensors, module, group.group_size))

    def scheme(self, tensors: Tensors, module: str) -> Scheme:
        group = self._group(module)
        packed = f"{module}.weight_packed"
        columns = 8 * tensors.info(packed).shape[1] if packed in tensors else tensors.info(f"{module}.weight").shape[1]
        if group.bits == 8:
            return _scheme_of_8_bits(group)
        if group.activation == "dynamic":
            whole = self.has_integer_scales or group.group_size is None
            return (W4A8 if whole else W4A8_FLOAT)[held_size(group.group_size, columns)]
        return (W4A16 if group.is_symmetric else W4A16_ASYM)[held_size(group.group_size, columns)]

    def read(self, tensors: Tensors, module: str) -> Weight:
        group, scheme = self._group(module), self.scheme(tensors, module)
        _require_file_order(tensors, module, group.group_size)
        bias, scale = read_bias(tensors, module), read_scale(tensors, f"{module}.weight_scale")
        if group.bits == 4:
            return _read_int4(tensors, module, group, scheme, scale, bias)
        values = _read_int8(tensors, module) if not group.is_float else tensors.tensor(f"{module}.weight")
        if not group.is_symmetric and bool(_read_zero(tensors, module, len(values), 8).any()):
            raise refusal(
                tensors, f"{module}.weight_zero_point", "is not zero", "8-bit weights are read symmetric only"
            )
        rows = scale.flatten().expand(len(values)).contiguous()
        if scheme.activation != "static":
            return Weight(values, rows, bias, scheme)
        levels = _read_levels(tensors, module, _TEXTUAL)
        visual = _read_levels(tensors, module, _VISUAL) if _has_visual(tensors, module, group) else None
        return static_weight(values, rows, bias, levels, visual)

    def _group(self, module: str) -> Group:
        group = self.group(module)
        assert group is not None, f"{module} is not quantized"
        return group


def _spellings(module: str) -> tuple[str, ...]:
    for prefix, others in _SPELLINGS:
        if module.startswith(prefix):
            rest = module.removeprefix(prefix)
            return module, *(other + rest for other in others)
    return (module,)


def _matches(entry: str, spellings: Sequence[str]) -> bool:
    """As the library matches: a pattern from the start of the name, a plain entry as a whole."""
    if entry.startswith("re:"):
        return any(re.match(entry.removeprefix("re:"), name) is not None for name in spellings)
    return entry in spellings


def parse(config: Mapping[str, Any]) -> Config:
    """Reads quantization_config. Raises CheckpointError for what is malformed or asks for more than Saccade does."""
    where = "quantization_config of config.json"
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError(f"{where} has no config_groups; it does not say how the weights are stored")
    for key in ("sparsity_config", "transform_config"):
        section = config.get(key)
        if isinstance(section, dict) and any(section.get(part) for part in ("config_groups", "targets")):
            raise CheckpointError(f"{where} has a {key}, which Saccade does not read; use a checkpoint without it")
    ignore = config.get("ignore") or []
    if not _is_texts(ignore):
        raise CheckpointError(f"ignore in {where} is {printable(ignore)}; a list of names is expected")
    for entry in [*ignore, *(t for g in groups.values() if isinstance(g, dict) for t in _targets(g))]:
        _require_pattern(entry, where)
    default = config.get("format")
    return Config(
        tuple(_parse_group(name, group, default, where) for name, group in groups.items()),
        tuple(ignore),
        config.get(_INTEGER_SCALES) is True,
        tuple(_notes(config, groups)),
    )


def _notes(config: Mapping[str, Any], groups: Mapping[str, Any]) -> Iterator[str]:
    cache = config.get("kv_cache_scheme")
    if isinstance(cache, dict) and is_int8(cache):
        if not cache.get("dynamic"):
            yield "kv_cache_scheme has stored ranges for int8 keys and values; each token's own is taken, which is finer"
    elif cache is not None:
        yield "kv_cache_scheme is not followed: of quantized caches Saccade has int8 (--kv-cache-dtype int8)"
    for name, group in groups.items():
        inputs = group.get("input_activations") or {}
        if inputs.get("type") == "float" and not inputs.get("dynamic"):
            yield f"{printable(name)} has a stored range for fp8 activations; each token's own is taken, which is finer"


def _parse_group(name: str, group: Any, default_format: Any, where: str) -> Group:
    at = f"{printable(name)} of {where}"
    if not isinstance(group, dict) or not _targets(group):
        raise CheckpointError(f"{at} has no targets; it does not say which layers it is about")
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, dict):
        raise CheckpointError(f"{at} has no weights; only checkpoints with quantized weights are read")
    if group.get("output_activations") is not None:
        raise CheckpointError(f"{at} quantizes outputs, which Saccade does not; use a checkpoint that does not")
    bits: Any = weights.get("num_bits")
    kind, size = weights.get("type", "int"), weights.get("group_size")
    strategy = weights.get("strategy") or ("group" if isinstance(size, int) and size > 0 else "channel")
    if (bits, kind) not in ((8, "int"), (4, "int"), (8, "float")):
        raise CheckpointError(
            f"{at} has weights of {printable(bits)} bits, type {printable(kind)}; int4, int8, fp8 are read"
        )
    if strategy not in ("channel", "tensor", "group") or (strategy == "group" and bits == 8):
        raise CheckpointError(
            f"{at} has {kind}{bits} weights by {printable(strategy)}; read are by channel, and int4 by group"
        )
    if strategy == "group" and not (type(size) is int and size > 0 and size % 32 == 0):
        raise CheckpointError(f"{at} has groups of {printable(size)} columns; multiples of 32 are read")
    if weights.get("dynamic"):
        raise CheckpointError(f"{at} has dynamic weights; stored ones are expected")
    its_format = group.get("format") or default_format
    if its_format not in _FORMATS:
        raise CheckpointError(f"{at} has the format {printable(its_format)}; read are {', '.join(_FORMATS)}")
    activation = _parse_activation(inputs, bits, kind, at)
    if kind == "float" and activation == "none":
        raise CheckpointError(f"{at} has fp8 weights and plain activations; fp8 is read with fp8 activations")
    is_symmetric = weights.get("symmetric", True) is not False
    if bits == 4 and not is_symmetric and activation != "none":
        raise CheckpointError(f"{at} has zero points of int4 weights and quantized activations; one of them is read")
    group_size = size if strategy == "group" else None
    targets = tuple(_targets(group))
    has_visual_scales = activation == "static" and isinstance(inputs, dict) and inputs.get(_VISUAL_SCALES) is True
    return Group(
        name, targets, its_format, bits, kind == "float", group_size, is_symmetric, activation, has_visual_scales
    )


def _parse_activation(inputs: Any, bits: int, kind: str, at: str) -> Literal["none", "static", "dynamic"]:
    if inputs is None:
        return "none"
    if not isinstance(inputs, dict) or inputs.get("num_bits") != 8 or inputs.get("type", "int") != kind:
        raise CheckpointError(f"{at} has other activations than 8 bits of type {kind}; use a checkpoint that has these")
    if inputs.get("dynamic"):
        if inputs.get("strategy") != "token" or inputs.get("symmetric", True) is False:
            raise CheckpointError(f"{at} has dynamic activations other than symmetric by token, which alone are read")
        return "dynamic"
    if inputs.get("strategy", "tensor") != "tensor" or bits == 4:
        raise CheckpointError(
            f"{at} has static activations other than by tensor of int8 or fp8 weights, which alone are read"
        )
    return "dynamic" if kind == "float" else "static"  # fp8 takes each token's own scale, finer than the stored one


def _targets(group: Mapping[str, Any]) -> list[str]:
    targets = group.get("targets")
    return targets if _is_texts(targets) else []


def _is_texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _require_pattern(entry: str, where: str) -> None:
    if entry.startswith("re:"):
        try:
            re.compile(entry.removeprefix("re:"))
        except re.error as error:
            raise CheckpointError(f"{where} holds the pattern {printable(entry)}, which is none: {error}") from error


# --- reading ---------------------------------------------------------------------------------------------------------


def _scheme_of_8_bits(group: Group) -> Scheme:
    if group.is_float:
        return FP8
    return {"none": W8A16, "static": W8A8, "dynamic": W8A8_DYNAMIC}[group.activation]


def held_size(group_size: int | None, num_columns: int) -> int:
    """The group size in memory: the file's, or the largest one that divides it (or a whole row); its scales are then repeated."""
    size = group_size or num_columns
    return max((held for held in GROUP_SIZES if size % held == 0), default=0)


def _expected(group: Group, O: int, H: int, *, is_packed: bool, has_visual: bool) -> dict[str, Expected]:  # noqa: E741
    """By suffix. Raises CheckpointError if the columns and the groups do not fit each other."""
    size = group.group_size
    if group.bits == 4 and H % (size or 32):
        raise CheckpointError(f"{H} columns are no multiple of {size or 32}")
    rows: list[tuple[int, ...]] = [(O, H // size)] if size else [(O, 1), (O,), (1,), ()]
    expected = {"weight_scale": Expected(rows, FLOATS)}
    if is_packed or (group.format == PACKED and group.bits == 4):
        words = -(-H * group.bits // 32)
        expected["weight_packed"] = Expected([(O, words)], (torch.int32,))
        expected["weight_shape"] = Expected([(2,)], (torch.int64, torch.int32), is_required=False)
    else:
        expected["weight"] = Expected([(O, H)], (torch.float8_e4m3fn,) if group.is_float else (torch.int8,))
    if not group.is_symmetric:
        zeros = [(-(-O * group.bits // 32), rows[0][1]), rows[0]] if rows[0][1:] else rows
        expected["weight_zero_point"] = Expected(zeros, (torch.int32, torch.int8), is_required=group.bits == 4)
    if group.activation == "static":
        one: list[tuple[int, ...]] = [(1,), ()]
        expected["input_scale"] = Expected(one, FLOATS)
        expected["input_zero_point"] = Expected(one, (torch.int8, torch.int32), is_required=False)
        if has_visual:
            scale, zero = _VISUAL
            expected |= {scale: Expected(one, FLOATS), zero: Expected(one, (torch.int8,))}
    return expected


def _has_visual(tensors: Tensors, module: str, group: Group) -> bool:
    """Whether the linear has an input scale of visual tokens: in the tower, all are."""
    return group.has_visual_scales and f"{module}.{_VISUAL[0]}" in tensors


def _read_levels(tensors: Tensors, module: str, names: tuple[str, str]) -> Levels:
    """Scale and zero point [1] of a static activation; the latter 0 if there is none."""
    scale_name, zero_name = (f"{module}.{name}" for name in names)
    scale = read_scale(tensors, scale_name).view(1)
    if float(scale) <= 0:
        raise refusal(tensors, scale_name, f"is {float(scale):g}", "a positive number is expected")
    return scale, tensors.tensor(zero_name).view(1) if zero_name in tensors else torch.zeros(1)


def _read_int8(tensors: Tensors, module: str) -> Tensor:
    packed = f"{module}.weight_packed"
    if packed not in tensors:
        return tensors.tensor(f"{module}.weight")
    num_columns = _columns(tensors, module, per_word=4)
    words = tensors.tensor(packed)
    return (words.view(torch.uint8)[:, :num_columns] ^ 0x80).contiguous().view(torch.int8)


def _read_int4(
    tensors: Tensors, module: str, group: Group, scheme: Scheme, scale: Tensor, bias: Tensor | None
) -> Weight:
    name = f"{module}.weight_packed"
    if name in tensors:
        _columns(tensors, module, per_word=8)
        values = repack_words(tensors.tensor(name))
    else:
        integers = tensors.tensor(f"{module}.weight")
        if int(integers.min()) < -8 or int(integers.max()) > 7:
            raise refusal(tensors, f"{module}.weight", "holds values beyond -8..7", "the file is damaged")
        values = pack(integers)
    num_rows, num_columns = len(values), 2 * values.shape[1]
    assert scheme.group_size is not None, f"{scheme.name} has groups"
    num_groups = num_columns // scheme.group_size
    if scheme.is_two_stage and group.group_size is None:
        ones = torch.ones(num_rows, num_groups, dtype=torch.int8)
        return Weight(values, scale.flatten().expand(num_rows).contiguous(), bias, scheme, ones)
    scale = spread(scale.view(-1, scale.shape[1] if scale.ndim == 2 else 1), num_rows, num_groups)
    if scheme.is_two_stage:
        parts = _split(scale)
        if parts is None:
            raise refusal(
                tensors, f"{module}.weight_scale", f"holds scales that are no whole multiples, against {_INTEGER_SCALES}",
                f"remove {_INTEGER_SCALES} from quantization_config of config.json",
            )  # fmt: skip
        return Weight(values, parts[0], bias, scheme, parts[1])
    zero = None
    if not group.is_symmetric:
        zero = spread(_read_zero(tensors, module, num_rows, 4), num_rows, num_groups)
    return Weight(values, scale, bias, scheme, zero=zero)


def _split(scale: Tensor) -> tuple[Tensor, Tensor] | None:
    library = load()
    return cpu_pack.split_group_scales(library, scale) if isinstance(library, Library) else split_group_scales(scale)


def repack_words(words: Tensor) -> Tensor:
    """words: [O, H/8] int32 of 4-bit values plus 8, the first in the lowest bits, H a multiple of 32. Returns `pack` of the values.

    Without the library by torch's operations, several times slower. Of 32 columns the first 16 lie in one int64 and the last 16 in
    another, two in a byte; a packed byte joins one of each. All even columns are joined at once, then all odd ones, and their
    bytes take turns.
    """
    if isinstance(library := load(), Library) and words.device.type == "cpu":
        return cpu_pack.repack(library, words)
    num_rows, num_columns = len(words), 8 * words.shape[1]
    out = torch.empty(num_rows, num_columns // 32, 8, dtype=torch.int16)
    low, high = 0x0F0F0F0F0F0F0F0F, -0x0F0F0F0F0F0F0F10
    step = max(1, _WORDS_AT_A_TIME // max(1, words.shape[1]))
    for start in range(0, num_rows, step):
        first, last = words[start : start + step].view(torch.int64).view(-1, num_columns // 32, 2).unbind(dim=2)
        even = ((last & low) << 4).bitwise_or_(first & low)
        odd = ((first >> 4) & low).bitwise_or_(last & high)
        part = out[start : start + step]
        part.copy_(odd.view(torch.uint8).view(part.shape)).bitwise_left_shift_(8)
        part.bitwise_or_(even.view(torch.uint8).view(part.shape))
    return out.view(torch.uint8).view(num_rows, num_columns // 2).bitwise_xor_(0x88)  # minus 8, modulo 16, both halves


def _columns(tensors: Tensors, module: str, per_word: int) -> int:
    """The number of columns: what weight_shape says, checked against the packed tensor, or all the words have room for."""
    words = tensors.info(f"{module}.weight_packed").shape
    name = f"{module}.weight_shape"
    if name not in tensors:
        return words[1] * per_word
    shape = [int(size) for size in tensors.tensor(name)]
    if shape[0] != words[0] or -(-shape[1] // per_word) != words[1]:
        raise refusal(tensors, name, f"is {shape}, and weight_packed has shape {list(words)}", "the file is damaged")
    return shape[1]


def _read_zero(tensors: Tensors, module: str, num_rows: int, bits: int) -> Tensor:
    """[O, number of groups] int8; packed along O unless a writer left it plain; zeros where the file has none."""
    name = f"{module}.weight_zero_point"
    if name not in tensors:
        return torch.zeros(num_rows, 1, dtype=torch.int8)
    zero = tensors.tensor(name)
    if zero.dtype == torch.int32 and bits == 4:
        octets = zero.t().clone(memory_format=torch.contiguous_format).view(torch.uint8)
        return (
            torch.stack([octets & 15, octets >> 4], dim=2).flatten(1)[:, :num_rows].t().to(torch.int8) - 8
        ).contiguous()
    if int(zero.min()) < -8 or int(zero.max()) > 7:
        raise refusal(tensors, name, "holds values beyond -8..7", "the file is damaged")
    return zero.to(torch.int8).view(-1, zero.shape[1] if zero.ndim == 2 else 1)


def spread(tensor: Tensor, num_rows: int, num_groups: int) -> Tensor:
    """[1 or O, 1 or fewer groups] -> [O, groups]: what a larger group has, each of its parts has."""
    return tensor.repeat_interleave(num_groups // tensor.shape[1], dim=1).expand(num_rows, num_groups).contiguous()


def _require_file_order(tensors: Tensors, module: str, group_size: int | None) -> None:
    """Old writers could sort columns by activation and say in weight_g_idx which group each belongs to."""
    name = f"{module}.weight_g_idx"
    if name in tensors and group_size is not None:
        index = tensors.tensor(name)
        if not torch.equal(index, torch.arange(len(index), dtype=index.dtype) // group_size):
            raise refusal(
                tensors, name, "sorts columns into groups by activation",
                "quantize without activation order (actorder: weight is fine)",
            )  # fmt: skip


# --- writing ---------------------------------------------------------------------------------------------------------


def write(module: str, weight: Weight, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a quantized linear: what `Config.read` turns into the same weight, bit for bit.

    Scales of rows are float32; those of groups are in the model's `dtype` unless that would round them. Two stages: the row's
    scale comes back to the bit if it leaves the five lowest bits of its mantissa free and the group's have no common factor
    (see `affine.settled_scales`), else within 2^-23.
    Raises OptionError for a static zero point that is no int8.
    """
    assert weight.scale is not None, f"{module} is dense: its tensors are written as they are"
    scheme = weight.scheme
    shape = torch.tensor([weight.out_features, weight.in_features])
    tensors: dict[str, Tensor] = {}
    if scheme.weight_bits == 4:
        tensors["weight_packed"] = _words(unpack(weight.values))
        scale = weight.scale if weight.group_scale is None else join_group_scales(weight.scale, weight.group_scale)
        tensors["weight_scale"] = narrowed(scale, dtype)
        tensors["weight_shape"] = shape
        if weight.zero is not None:
            missing = -weight.out_features % 8
            zero = torch.nn.functional.pad(weight.zero.t(), (0, missing), value=-8)
            tensors["weight_zero_point"] = _words(zero).t()
    elif scheme == W8A16:
        octets = torch.nn.functional.pad(weight.values, (0, -weight.in_features % 4), value=-128)
        tensors["weight_packed"] = (octets.view(torch.uint8) ^ 0x80).view(torch.int32)
        tensors |= {"weight_scale": weight.scale[:, None], "weight_shape": shape}
    else:
        tensors |= {"weight": weight.values, "weight_scale": weight.scale[:, None]}
    for names, static in ((_TEXTUAL, weight.static), (_VISUAL, weight.visual_static)):
        if static is None:
            continue
        if not -128 <= float(static.zero) <= 127:
            raise OptionError(
                f"{module} has the input zero point {float(static.zero):g}, and compressed-tensors keeps it as int8; "
                "use w8a8-dynamic, or an Ascend format"
            )
        tensors |= dict(zip(names, (static.scale, static.zero.to(torch.int8)), strict=True))
    if weight.bias is not None:
        tensors["bias"] = weight.bias.to(dtype)
    return {f"{module}.{suffix}": tensor.contiguous() for suffix, tensor in tensors.items()}


def _words(values: Tensor) -> Tensor:
    """values: [O, H] int8 from -8 to 7, H a multiple of 8. Returns [O, H/8] int32, the first value in the lowest bits."""
    nibbles = (values.contiguous().view(torch.uint8) ^ 8) & 15  # plus 8, modulo 16
    return (nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).contiguous().view(torch.int32)


def config_entry(
    assignment: Mapping[str, Scheme], has_int8_cache: bool = False, has_visual_scales: bool = False
) -> dict[str, Any]:
    """quantization_config for these linears: canonical module name -> scheme, dense ones included.

    `has_int8_cache`: whoever serves it is to keep keys and values as int8, each token and head with a scale of its own.
    `has_visual_scales`: some linear has an input scale of visual tokens.
    """
    by_scheme: dict[Scheme, list[str]] = {}
    for module, scheme in assignment.items():
        by_scheme.setdefault(scheme, []).append(module)
    dense = [module for scheme, modules in by_scheme.items() if scheme.is_dense for module in modules]
    quantized = {scheme: modules for scheme, modules in by_scheme.items() if not scheme.is_dense}
    assert quantized, "no linear is quantized"
    is_uniform = len(quantized) == 1
    groups = {
        f"group_{index}": _group_entry(scheme, list(_written_targets(modules, is_uniform)), has_visual_scales)
        for index, (scheme, modules) in enumerate(quantized.items())
    }
    formats = {group["format"] for group in groups.values()}
    entry: dict[str, Any] = {
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": list(_ignore(dense, [module for modules in quantized.values() for module in modules])),
        "kv_cache_scheme": dict(_INT8_CACHE) if has_int8_cache else None,
        "global_compression_ratio": None,
    }
    if any(scheme.is_two_stage for scheme in quantized):
        entry[_INTEGER_SCALES] = True
    return entry


def _group_entry(scheme: Scheme, targets: list[str], has_visual_scales: bool) -> dict[str, Any]:
    kind = "float" if scheme.is_float else "int"
    weights: dict[str, Any] = {"num_bits": scheme.weight_bits, "type": kind, "strategy": "channel"}
    if scheme.group_size is not None:
        weights |= {"strategy": "group", "group_size": scheme.group_size}
    weights |= {"symmetric": not scheme.is_asymmetric, "dynamic": False}
    inputs: dict[str, Any] | None = None
    if scheme.activation == "dynamic":
        inputs = {"num_bits": 8, "type": kind, "strategy": "token", "symmetric": True, "dynamic": True}
    elif scheme.activation == "static":
        inputs = {"num_bits": 8, "type": kind, "strategy": "tensor", "symmetric": False, "dynamic": False}
        if has_visual_scales:
            inputs[_VISUAL_SCALES] = True
    is_packed = scheme.weight_bits == 4 or scheme == W8A16
    return {
        "targets": targets,
        "format": PACKED if is_packed else f"{kind}-quantized",
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
    }


def _written_targets(modules: Sequence[str], are_all: bool) -> Iterator[str]:
    """What a group says of its modules. `are_all`: there is no other group. A head is of another class, and engines prefix it."""
    layers = [module for module in modules if module != "lm_head"]
    yield from ["Linear"] if are_all else _patterns(layers)
    if "lm_head" in modules:
        yield "re:.*lm_head$"


def _patterns(modules: Sequence[str]) -> Iterator[str]:
    """Patterns that match these modules whatever prefix an engine gives them: one for each name below its layers' number."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for module in modules:
        if match := re.fullmatch(r"(?:model|visual)\.(layers|blocks)\.(\d+)\.(.+)", module):
            numbers.setdefault((match[1], match[3]), []).append(int(match[2]))
        else:
            yield module if module == "lm_head" else f"re:.*{re.escape(module)}$"
    by_numbers: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (part, name), found in numbers.items():
        by_numbers.setdefault((part, tuple(found)), []).append(name)
    for (part, which), names in by_numbers.items():
        escaped = "|".join(re.escape(name) for name in names)
        yield rf"re:.*{part}\.({'|'.join(map(str, which))})\.({escaped})$"


def _ignore(dense: Sequence[str], quantized: Sequence[str]) -> Iterator[str]:
    """What stays dense. A tower without a quantized layer is named as a whole: that pattern fits every engine's spelling."""
    rest = list(dense)
    if not any(module.startswith("visual.") for module in quantized):
        rest = [module for module in dense if not module.startswith("visual.")]
        yield r"re:.*visual\..*"
    else:
        yield r"re:.*visual\.patch_embed\..*"
    yield from _patterns(rest)
    if (
        "lm_head" not in rest and "lm_head" not in quantized
    ):  # a tied head is no linear of ours, but one of the engines'
        yield "lm_head"
