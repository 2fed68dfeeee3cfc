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
from typing import Literal, Protocol

import torch
from torch import Tensor

from saccade.base.errors import CheckpointError
from saccade.checkpoints.json_file import printable, read_json
from saccade.checkpoints.shards import MAX_INDEX_BYTES, TensorInfo
from saccade.schemes.packing import pack, pack_row_pairs, unpack, unpack_row_pairs
from saccade.schemes.scheme import DENSE, GROUP_SIZES, W4A8, W8A8, W8A8_DYNAMIC, W8A16, Scheme, Static, Weight

Dialect = Literal["vllm", "mindie"]

FLOAT = "FLOAT"
_TAGS = {W8A8: "W8A8", W8A8_DYNAMIC: "W8A8_DYNAMIC", W8A16: "W8A16", **dict.fromkeys(W4A8.values(), "W4A8_DYNAMIC")}
READ_TAGS = (FLOAT, *dict.fromkeys(_TAGS.values()))
MAX_GROUP_SCALE = 17  # 7 * 17 = 119 fits int8
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)

# Engines that split a layer over devices need its scale_bias whole (split by outputs) or for 16 blocks of inputs (split by
# those). The original knows only the language model's names and writes the vision tower's attention unreduced.
_SPLIT_BY_OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "attn.qkv")
_SPLIT_BY_INPUTS = ("o_proj", "down_proj", "attn.proj")
_UNKNOWN_TO_THE_ORIGINAL = ("attn.qkv", "attn.proj")
_INPUT_BLOCKS = 16


class Tensors(Protocol):
    """A checkpoint's tensors by canonical name."""

    def __contains__(self, name: object) -> bool: ...

    def info(self, name: str) -> TensorInfo: ...

    def tensor(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class Description:
    """quant_model_description*.json: how each tensor is stored, by canonical name."""

    file: Path
    kind: str  # "W8A8", ...: what most linears are
    dialect: Dialect
    tags: Mapping[str, str]

    def tag(self, module: str) -> str:
        """How the weight of `module` is stored; what the file does not list is float."""
        return self.tags.get(f"{module}.weight", FLOAT)


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
    if tag == _TAGS[W4A8[32]]:
        num_columns = tensors.info(f"{module}.weight").shape[1]
        return W4A8[num_columns // tensors.info(f"{module}.weight_scale_second").shape[1]]
    return next((scheme for scheme, its_tag in _TAGS.items() if its_tag == tag), DENSE)


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
    problems = []
    file = tensors.info(f"{module}.weight").file
    for suffix, (shapes, dtypes, is_required) in _expected(tag, *shape).items():
        name = f"{module}.{suffix}"
        if name not in tensors:
            if is_required:
                problems.append(f"{name} is missing from {file}; {module} is {tag} by {source} and needs it")
            continue
        info = tensors.info(name)
        if info.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes) or "groups of 32, 64, 128 or 256 columns"
            problems.append(f"{info.name} in {info.file} has shape {list(info.shape)}; {tag} implies {wanted}")
        elif info.dtype not in dtypes:
            kinds = ", ".join(_type_name(dtype) for dtype in dtypes)
            problems.append(f"{info.name} in {info.file} is {_type_name(info.dtype)}; {tag} implies {kinds}")
    return problems


def _expected(tag: str, O: int, H: int) -> dict[str, tuple[list[tuple[int, ...]], tuple[torch.dtype, ...], bool]]:  # noqa: E741
    """Suffix -> (possible shapes, possible types, whether it must be there). A bias is a float tensor like any other."""
    rows: list[tuple[int, ...]] = [(O, 1), (O,)]
    one: list[tuple[int, ...]] = [(1,), ()]
    values: list[tuple[int, ...]] = [(O, H)]
    expected = {"weight": (values, (torch.int8,), True), "weight_scale": (rows, _FLOATS, tag != "W8A8")}
    if tag == "W8A8":
        expected |= {
            "input_scale": (one, _FLOATS, True),
            "input_offset": (one, (*_FLOATS, torch.int8), True),
            "quant_bias": ([(O,)], (torch.int32,), True),
            "deq_scale": ([(O,)], (torch.float32, torch.int64), True),
        }
    if tag == "W4A8_DYNAMIC":
        if O % 2 == 0:
            values.append((O // 2, H))
        groups: list[tuple[int, ...]] = [(O, H // size) for size in GROUP_SIZES if H % size == 0]
        expected["weight_scale_second"] = (groups, _FLOATS, True)
    return expected


def read(tensors: Tensors, description: Description, module: str) -> Weight:
    """The quantized weight of `module`, whose headers `find_problems` has seen. Raises CheckpointError for its values."""
    scheme = scheme_of_module(tensors, description, module)
    values = tensors.tensor(f"{module}.weight")
    for offset in ("weight_offset", "weight_offset_second"):
        if (name := f"{module}.{offset}") in tensors and bool(tensors.tensor(name).any()):
            raise _refusal(tensors, name, "is not zero", "Saccade's quantized weights are symmetric")
    bias = tensors.tensor(f"{module}.bias") if f"{module}.bias" in tensors else None
    group_scale = static = None
    if scheme.group_size is not None:
        group_scale = _read_group_scale(tensors, f"{module}.weight_scale_second")
        if len(values) < len(group_scale):
            values = unpack_row_pairs(values)
        elif int(values.min()) < -8 or int(values.max()) > 7:
            raise _refusal(tensors, f"{module}.weight", "holds values beyond -8..7", "the file is damaged")
        lowest = values.view(*group_scale.shape, -1).amin(dim=2).int() * group_scale
        if int(lowest.min()) < -128:  # the highest is at most 7 * 17
            raise _refusal(tensors, f"{module}.weight", "times its group scales leaves int8", "the file is damaged")
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
        raise _refusal(tensors, name, f"holds other than whole numbers from 1 to {MAX_GROUP_SCALE}", "it is damaged")
    return scale.to(torch.int8)


def _read_static(tensors: Tensors, module: str) -> Static:
    scale, zero = (tensors.tensor(f"{module}.{suffix}").float().view(1) for suffix in ("input_scale", "input_offset"))
    if not 0 < float(scale) < torch.inf:
        raise _refusal(tensors, f"{module}.input_scale", f"is {float(scale):g}", "a positive number is expected")
    if float(zero) != float(zero.round()) or not torch.isfinite(zero):
        raise _refusal(tensors, f"{module}.input_offset", f"is {float(zero):g}", "a whole number is expected")
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
    return FLOAT if scheme.is_dense else _TAGS[scheme]


def description_name(scheme: Scheme, dialect: Dialect) -> str:
    suffix = "" if dialect == "vllm" else f"_{tag_of(scheme).lower()}"
    return f"quant_model_description{suffix}.json"


def weights_stem(scheme: Scheme) -> str:
    """The weight files' name before `.safetensors`, or before `-00001-of-0000N.safetensors` of a shard."""
    return f"quant_model_weight_{tag_of(scheme).lower()}"


def description_head(scheme: Scheme, dialect: Dialect) -> dict[str, str | int]:
    """The entries before those of the tensors, in order; `scheme` is what most linears are."""
    head: dict[str, str | int] = {"version": "1.0.0"} if dialect == "vllm" else {}
    head["model_quant_type"] = tag_of(scheme)
    if dialect == "vllm" and scheme.group_size is not None:
        head["group_size"] = scheme.group_size
    return head


def description_entries(names: Iterable[str], scheme: Scheme) -> dict[str, str]:
    """The entries of one linear's tensors: all carry its tag but the bias, which is float."""
    return {name: FLOAT if name.endswith(".bias") else tag_of(scheme) for name in names}


def write(
    module: str, weight: Weight, dialect: Dialect, dtype: torch.dtype, *, as_the_original: bool = False
) -> dict[str, Tensor]:
    """The tensors of a quantized linear, in the files' order: what `read` turns into the same weight, bit for bit.

    dtype: the model's own, which biases and 8-bit scales have unless that would round them. `as_the_original` keeps the
    tool's unreduced scale_bias of vision attention, which engines cannot load.
    """
    assert weight.scale is not None, f"{module} is dense: its tensors are written as they are"
    tensors = {"weight": weight.values}
    if weight.bias is not None:
        tensors["bias"] = weight.bias.to(dtype)
    column = weight.scale[:, None]
    if weight.group_scale is None:
        column = _narrowed(column, dtype)
    tensors |= {"weight_scale": column, "weight_offset": torch.zeros_like(column)}
    if weight.group_scale is not None:
        values = unpack(weight.values)
        tensors["weight"] = pack_row_pairs(values) if dialect == "vllm" else values
        tensors["weight_scale_second"] = weight.group_scale.float()
        tensors["weight_offset_second"] = torch.zeros_like(weight.group_scale, dtype=torch.int64)
        if dialect == "vllm":
            tensors["scale_bias"] = scale_bias(module, weight, as_the_original=as_the_original)
    if (static := weight.static) is not None:
        is_bf16 = dtype == torch.bfloat16
        tensors["input_scale"] = _narrowed(static.scale, dtype) if is_bf16 else static.scale
        tensors["input_offset"] = _narrowed(static.zero, dtype) if is_bf16 else static.zero
        tensors["quant_bias"] = static.quant_bias
        tensors["deq_scale"] = static.deq_scale if is_bf16 else static.deq_scale.view(torch.int32).to(torch.int64)
    return {f"{module}.{suffix}": tensor.contiguous() for suffix, tensor in tensors.items()}


def scale_bias(module: str, weight: Weight, *, as_the_original: bool = False) -> Tensor:
    """8 times the sums of the dequantized rows: [O, 1], or [O, 16] where inputs are split.

    Kernels that take an int8 activation as two nibbles add it. Formed as the original does, from bfloat16 scales.
    """
    assert weight.group_scale is not None, f"{module} is not of 4 bits"
    assert weight.scale is not None, f"{module} has no scale"
    groups = unpack(weight.values).view(*weight.group_scale.shape, -1).float()
    second, first = weight.group_scale.to(torch.bfloat16), weight.scale.to(torch.bfloat16)
    wide = (groups * second[:, :, None]).flatten(1) * first[:, None]
    if as_the_original and any(part in module for part in _UNKNOWN_TO_THE_ORIGINAL):
        return wide
    if any(part in module for part in _SPLIT_BY_OUTPUTS):
        return 8 * wide.sum(1, keepdim=True)
    assert any(part in module for part in _SPLIT_BY_INPUTS), f"how engines split {module} is not known"
    return 8 * wide.view(len(wide), _INPUT_BLOCKS, -1).sum(2)


def quantized_norm(
    norm: str, gain: Tensor, scheme: Scheme, dialect: Dialect
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A norm's tensors as methods that touch norms write them, a zero float32 bias beside the gain, and their entries."""
    bias = torch.zeros(gain.shape, dtype=torch.float32)
    tensors = {f"{norm}.weight": gain, f"{norm}.bias": bias}
    entries = dict.fromkeys(tensors, FLOAT)
    if dialect == "mindie":
        copies = {f"{norm}.module.weight": gain, f"{norm}.module.bias": bias}
        tensors |= copies
        entries |= dict.fromkeys(copies, tag_of(scheme))
    return tensors, entries


def _narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype` if that rounds nothing, else as it is."""
    narrow = tensor.to(dtype)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor


def _refusal(tensors: Tensors, name: str, fact: str, remedy: str) -> CheckpointError:
    info = tensors.info(name)
    return CheckpointError(f"{info.name} in {info.file} {fact}; {remedy}")


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
