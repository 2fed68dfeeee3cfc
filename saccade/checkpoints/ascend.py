"""Quantized weights as Ascend's tools store them, for vLLM Ascend and for MindIE: to and from `Weight`.

Knows the description file, the tensors of a quantized linear (their names, types and packings) and what accompanies norms;
knows no model. The two dialects hold the same numbers. They differ in the description's name and head, in the packing of
4-bit weights (and their scale_bias), and in copies of the norms; which of them wrote a tensor is seen from the tensor.
Letters: O outputs, H inputs, G columns in a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from saccade.base.errors import CheckpointError
from saccade.checkpoints.json_file import printable, read_json
from saccade.checkpoints.shards import MAX_INDEX_BYTES
from saccade.checkpoints.stored import FLOATS, Expected, Tensors, find_mismatches, narrowed, read_bias, refusal
from saccade.schemes.affine import MAX_GROUP_SCALE
from saccade.schemes.packing import pack, pack_row_pairs, unpack, unpack_row_pairs
from saccade.schemes.scheme import DENSE, GROUP_SIZES, W4A8, W8A8, W8A8_DYNAMIC, W8A16, Scheme, Static, Weight

Dialect = Literal["vllm", "mindie"]

FLOAT = "FLOAT"
TAGS = {W8A8: "W8A8", W8A8_DYNAMIC: "W8A8_DYNAMIC", W8A16: "W8A16", **dict.fromkeys(W4A8.values(), "W4A8_DYNAMIC")}
READ_TAGS = (FLOAT, *dict.fromkeys(TAGS.values()))

# Engines that split a layer over devices need its scale_bias whole (split by outputs) or for 16 blocks of inputs (split by
# those). The original knows only the language model's names and writes the vision tower's attention unreduced.
_SPLIT_BY_OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "attn.qkv")
_SPLIT_BY_INPUTS = ("o_proj", "down_proj", "attn.proj")
_UNKNOWN_TO_THE_ORIGINAL = ("attn.qkv", "attn.proj")
_INPUT_BLOCKS = 16


@dataclass(frozen=True)
class Description:
    """quant_model_description*.json: how each tensor is stored, by canonical name."""

    file: Path
    kind: str  # "W8A8", ...: what most linears are
    dialect: Dialect
    tags: Mapping[str, str]

    @property
    def source(self) -> str:
        return self.file.name

    @property
    def summary(self) -> str:
        return printable(self.kind)

    @property
    def format_name(self) -> str:
        return {"vllm": "vLLM Ascend", "mindie": "MindIE"}[self.dialect]

    @property
    def notes(self) -> tuple[str, ...]:
        return ()

    def tag(self, module: str) -> str:
        """How the weight of `module` is stored; what the file does not list is float."""
        return self.tags.get(f"{module}.weight", FLOAT)

    def is_quantized(self, module: str) -> bool:
        return self.tag(module) != FLOAT

    def find_problems(self, tensors: Tensors, module: str, shape: tuple[int, ...]) -> list[str]:
        return find_problems(tensors, self, module, shape)

    def scheme(self, tensors: Tensors, module: str) -> Scheme:
        return scheme_of_module(tensors, self, module)

    def read(self, tensors: Tensors, module: str) -> Weight:
        return read(tensors, self, module)


# --- reading ---------------------------------------------------------------------------------------------------------


def read_description(folder: Path, canonical: Callable[[str], str]) -> Description | None:
    """The folder's description, None if it has none; `canonical` renames a tensor. Raises CheckpointError if malformed."""
    files = sorted(folder.glob("quant_model_description*.json"))
    if not files:
        return None
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise CheckpointError(
            f"{folder} holds several descriptions ({names}); keep the one that belongs to its weights"
        )
    entries = read_json(files[0], MAX_INDEX_BYTES)
    kind = entries.get("model_quant_type")
    if not isinstance(kind, str):
        raise CheckpointError(
            f"{files[0]}: model_quant_type is {printable(kind)}; one of {', '.join(READ_TAGS[1:])} is expected"
        )
    tags = {canonical(name): tag for name, tag in entries.items() if isinstance(tag, str) and "." in name}
    return Description(files[0], kind, "vllm" if "version" in entries else "mindie", tags)


def scheme_of_module(tensors: Tensors, description: Description, module: str) -> Scheme:
    """The scheme of a linear whose headers `find_problems` has seen."""
    tag = description.tag(module)
    if tag == TAGS[W4A8[32]]:
        num_columns = tensors.info(f"{module}.weight").shape[1]
        return W4A8[num_columns // tensors.info(f"{module}.weight_scale_second").shape[1]]
    return next((scheme for scheme, its_tag in TAGS.items() if its_tag == tag), DENSE)


def find_problems(tensors: Tensors, description: Description, module: str, shape: tuple[int, ...]) -> list[str]:
    """What keeps the quantized `module`, whose weight is `shape` by the config, from being read: a line each, from headers."""
    tag, source = description.tag(module), description.file.name
    if tag not in READ_TAGS:
        known = ", ".join(READ_TAGS)
        return [f"{module} is {printable(tag)} by {source}; Saccade reads {known}: use the checkpoint it was made from"]
    if len(shape) != 2 or module.endswith("embed_tokens"):
        return [f"{module} is {tag} by {source}; only linear layers are read quantized"]
    if f"{module}.weight" not in tensors:
        return [f"{module}.weight is missing; {source} lists it as {tag}"]
    return find_mismatches(tensors, module, _expected(tag, *shape), tag, source)


def _expected(tag: str, O: int, H: int) -> dict[str, Expected]:  # noqa: E741
    """By suffix. A bias is a float tensor like any other."""
    rows: list[tuple[int, ...]] = [(O, 1), (O,)]
    one: list[tuple[int, ...]] = [(1,), ()]
    values: list[tuple[int, ...]] = [(O, H)]
    expected = {"weight": Expected(values, (torch.int8,)), "weight_scale": Expected(rows, FLOATS, tag != "W8A8")}
    if tag == "W8A8":
        expected |= {
            "input_scale": Expected(one, FLOATS),
            "input_offset": Expected(one, (*FLOATS, torch.int8)),
            "quant_bias": Expected([(O,)], (torch.int32,)),
            "deq_scale": Expected([(O,)], (torch.float32, torch.int64)),
        }
    if tag == "W4A8_DYNAMIC":
        if O % 2 == 0:
            values.append((O // 2, H))
        groups: list[tuple[int, ...]] = [(O, H // size) for size in GROUP_SIZES if H % size == 0]
        expected["weight_scale_second"] = Expected(groups, FLOATS, hint="groups of 32, 64, 128 or 256 columns")
    return expected


def read(tensors: Tensors, description: Description, module: str) -> Weight:
    """The quantized weight of `module`, whose headers `find_problems` has seen. Raises CheckpointError for its values."""
    scheme = scheme_of_module(tensors, description, module)
    values = tensors.tensor(f"{module}.weight")
    for offset in ("weight_offset", "weight_offset_second"):
        if (name := f"{module}.{offset}") in tensors and bool(tensors.tensor(name).any()):
            raise refusal(tensors, name, "is not zero", "Saccade's quantized weights are symmetric")
    bias = read_bias(tensors, module)
    group_scale = static = None
    if scheme.group_size is not None:
        group_scale = _read_group_scale(tensors, f"{module}.weight_scale_second")
        if len(values) < len(group_scale):
            values = unpack_row_pairs(values)
        elif int(values.min()) < -8 or int(values.max()) > 7:
            raise refusal(tensors, f"{module}.weight", "holds values beyond -8..7", "the file is damaged")
        lowest = values.view(*group_scale.shape, -1).amin(dim=2).int() * group_scale
        if int(lowest.min()) < -128:  # the highest is at most 7 * 17
            raise refusal(tensors, f"{module}.weight", "times its group scales leaves int8", "the file is damaged")
        values = pack(values)
    if scheme.activation == "static":
        static = _read_static(tensors, module)
    if f"{module}.weight_scale" in tensors:
        scale = tensors.tensor(f"{module}.weight_scale").flatten().float()
    else:
        assert static is not None, f"{module} has no weight_scale"
        scale = static.deq_scale / static.scale  # some writers leave it out: the product needs deq_scale alone
    return Weight(values, scale, bias, scheme, group_scale, static)


def _read_group_scale(tensors: Tensors, name: str) -> Tensor:
    scale = tensors.tensor(name).float()
    if not bool(((scale >= 1) & (scale <= MAX_GROUP_SCALE) & (scale == scale.round())).all()):
        raise refusal(tensors, name, f"holds other than whole numbers from 1 to {MAX_GROUP_SCALE}", "it is damaged")
    return scale.to(torch.int8)


def _read_static(tensors: Tensors, module: str) -> Static:
    scale, zero = (tensors.tensor(f"{module}.{suffix}").float().view(1) for suffix in ("input_scale", "input_offset"))
    if not 0 < float(scale) < torch.inf:
        raise refusal(tensors, f"{module}.input_scale", f"is {float(scale):g}", "a positive number is expected")
    if float(zero) != float(zero.round()) or not torch.isfinite(zero):
        raise refusal(tensors, f"{module}.input_offset", f"is {float(zero):g}", "a whole number is expected")
    deq_scale = tensors.tensor(f"{module}.deq_scale")
    if deq_scale.dtype == torch.int64:  # the low 32 bits are those of a float32
        deq_scale = deq_scale.to(torch.int32).view(torch.float32)
    return Static(scale, zero, tensors.tensor(f"{module}.quant_bias"), deq_scale)


def find_norm_problems(tensors: Tensors, norms: Iterable[str]) -> list[str]:
    """Some writers give each norm a bias, which is zero for this model, and a copy `X.module.weight` of its gain.

    The model applies neither, so a bias that is not zero or a copy that is none keeps the checkpoint from being run.
    Reads those tensors; `norms` names the modules.
    """
    problems = []
    for norm in norms:
        for name in (f"{norm}.bias", f"{norm}.module.bias"):
            if name in tensors and bool(tensors.tensor(name).any()):
                info = tensors.info(name)
                problems.append(f"{info.name} in {info.file} is not zero; the RMS norms of Qwen2.5-VL have no bias")
        copy, gain = f"{norm}.module.weight", f"{norm}.weight"
        if copy in tensors and gain in tensors and not torch.equal(tensors.tensor(copy), tensors.tensor(gain)):
            info = tensors.info(copy)
            problems.append(f"{info.name} in {info.file} differs from {gain}, of which it should be a copy")
    return problems


# --- writing ---------------------------------------------------------------------------------------------------------


def tag_of(scheme: Scheme) -> str:
    """The description's word for a scheme."""
    return FLOAT if scheme.is_dense else TAGS[scheme]


def description_name(tag: str, dialect: Dialect) -> str:
    suffix = "" if dialect == "vllm" else f"_{tag.lower()}"
    return f"quant_model_description{suffix}.json"


def weights_stem(tag: str) -> str:
    """The weight files' name before `.safetensors`, or before `-00001-of-0000N.safetensors` of a shard."""
    return f"quant_model_weight_{tag.lower()}"


def description_head(tag: str, group_size: int | None, dialect: Dialect) -> dict[str, str | int]:
    """The entries before those of the tensors, in order; `tag` is what most linears are, `group_size` that of 4 bits."""
    head: dict[str, str | int] = {"version": "1.0.0"} if dialect == "vllm" else {}
    head["model_quant_type"] = tag
    if dialect == "vllm" and group_size is not None:
        head["group_size"] = group_size
    return head


def description_entries(names: Iterable[str], tag: str) -> dict[str, str]:
    """The entries of one linear's tensors: all carry its tag but the bias, which is float."""
    return {name: FLOAT if name.endswith(".bias") else tag for name in names}


def write(
    module: str, weight: Weight, dialect: Dialect, dtype: torch.dtype, *, as_the_original: bool = False
) -> dict[str, Tensor]:
    """The tensors of a quantized linear, in the files' order: what `read` turns into the same weight, bit for bit.

    dtype: the model's own, which biases and 8-bit scales have unless that would round them. `as_the_original` keeps the
    tool's unreduced scale_bias of vision attention, which engines cannot load.
    """
    assert weight.scale is not None, f"{module} is dense: its tensors are written as they are"
    assert weight.visual_static is None, f"{module} has two input scales, and the files have one"
    column = weight.scale[:, None]
    bias = None if weight.bias is None else weight.bias.to(dtype)
    if weight.group_scale is not None:
        second = weight.group_scale.float()
        return int4_tensors(
            module, unpack(weight.values), bias, column, second, dialect, as_the_original=as_the_original
        )
    calibrated = None
    if (static := weight.static) is not None:
        ranges = (static.scale, static.zero)
        if dtype == torch.bfloat16:
            ranges = (narrowed(static.scale, dtype), narrowed(static.zero, dtype))
        calibrated = (*ranges, static.quant_bias, static.deq_scale)
    return int8_tensors(module, weight.values, bias, narrowed(column, dtype), calibrated, dtype)


def int8_tensors(
    module: str,
    values: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    calibrated: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The tensors of an 8-bit linear, in the files' order and the types they are given in.

    scale: [O, 1]; calibrated: with static activations input_scale [1], input_offset [1], quant_bias [O] int32 and deq_scale [O]
    float32, whose bits are stored in the low half of an int64 unless the model's `dtype` is bfloat16.
    """
    tensors = {"weight": values} | ({} if bias is None else {"bias": bias})
    tensors |= {"weight_scale": scale, "weight_offset": torch.zeros_like(scale)}
    if calibrated is not None:
        tensors |= dict(zip(("input_scale", "input_offset", "quant_bias", "deq_scale"), calibrated, strict=True))
        if dtype != torch.bfloat16:
            tensors["deq_scale"] = tensors["deq_scale"].view(torch.int32).to(torch.int64)
    return _named(module, tensors)


def int4_tensors(
    module: str,
    values: Tensor,
    bias: Tensor | None,
    first: Tensor,
    second: Tensor,
    dialect: Dialect,
    *,
    as_the_original: bool = False,
) -> dict[str, Tensor]:
    """The tensors of a 4-bit linear, in the files' order. values: [O, H] int8 from -8 to 7; first: [O, 1]; second: [O, H/G] float32."""
    tensors = {"weight": pack_row_pairs(values) if dialect == "vllm" else values}
    tensors |= {} if bias is None else {"bias": bias}
    tensors |= {"weight_scale": first, "weight_offset": torch.zeros_like(first)}
    tensors |= {
        "weight_scale_second": second,
        "weight_offset_second": torch.zeros_like(second, dtype=torch.int64),
    }
    if dialect == "vllm":
        tensors["scale_bias"] = scale_bias(module, values, first, second, as_the_original=as_the_original)
    return _named(module, tensors)


def _named(module: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{module}.{suffix}": tensor.contiguous() for suffix, tensor in tensors.items()}


def has_scale_bias(module: str) -> bool:
    """Whether it is known how engines split the layer, and hence what its scale_bias is."""
    return any(part in module for part in (*_SPLIT_BY_OUTPUTS, *_SPLIT_BY_INPUTS))


def scale_bias(module: str, values: Tensor, first: Tensor, second: Tensor, *, as_the_original: bool = False) -> Tensor:
    """8 times the sums of the dequantized rows: [O, 1], or [O, 16] where inputs are split.

    Kernels that take an int8 activation as two nibbles add it. Formed as the original does, from bfloat16 scales.
    values: [O, H] int8; first: [O, 1]; second: [O, H/G].
    """
    groups = values.view(*second.shape, -1).float() * second.to(torch.bfloat16)[:, :, None]
    wide = groups.flatten(1) * first.to(torch.bfloat16)
    if as_the_original and any(part in module for part in _UNKNOWN_TO_THE_ORIGINAL):
        return wide
    if any(part in module for part in _SPLIT_BY_OUTPUTS):
        return 8 * wide.sum(1, keepdim=True)
    assert has_scale_bias(module), f"how engines split {module} is not known"
    return 8 * wide.view(len(wide), _INPUT_BLOCKS, -1).sum(2)


def quantized_norm(norm: str, gain: Tensor, tag: str, dialect: Dialect) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A norm's tensors as methods that touch norms write them, a zero float32 bias beside the gain, and their entries."""
    bias = torch.zeros(gain.shape, dtype=torch.float32)
    tensors = {f"{norm}.weight": gain, f"{norm}.bias": bias}
    entries = dict.fromkeys(tensors, FLOAT)
    if dialect == "mindie":
        copies = {f"{norm}.module.weight": gain, f"{norm}.module.bias": bias}
        tensors |= copies
        entries |= dict.fromkeys(copies, tag)
    return tensors, entries
