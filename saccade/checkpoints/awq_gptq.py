"""Weight-only int4 checkpoints of the AWQ and GPTQ tools, read: both keep a linear transposed, in words of eight 4-bit numbers.

Which linears are quantized is told by their tensors (`qweight`), because the config names only some that are not. Written
are such weights as compressed-tensors. Letters: O outputs, H inputs, G columns in a group; a word is an int32.

AWQ (its gemm layout): qweight [H, O/8], each word eight outputs of one input in the order 0, 2, 4, 6, 1, 3, 5, 7; qzeros
[H/G, O/8] alike; scales [H/G, O]. GPTQ: qweight [H/8, O], each word eight inputs of one output in order; qzeros [H/G, O/8], in
order, less one in the first version of the format; scales [H/G, O]; g_idx [H], the group of each input.
A number stands for (number - zero point) * scale.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from saccade.base.errors import CheckpointError
from saccade.checkpoints.compressed_tensors import held_size, repack_words, spread
from saccade.checkpoints.json_file import printable
from saccade.checkpoints.stored import (
    FLOATS,
    Expected,
    Tensors,
    find_mismatches,
    read_bias,
    read_scale,
    refusal,
    refused,
)
from saccade.schemes.scheme import W4A16, W4A16_ASYM, Scheme, Weight

METHODS = ("awq", "gptq")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output of a word's nth number
_WORDS_AT_A_TIME = 16  # of a row of AWQ's qweight: a line of the processor's cache


@dataclass(frozen=True)
class Config:
    """quantization_config, parsed, and the modules that have packed tensors: a `Stored`. group_size: None for whole rows."""

    method: Literal["awq", "gptq"]
    group_size: int | None
    is_symmetric: bool
    zero_offset: int  # what is added to a stored zero point
    modules: frozenset[str]
    source: str = "quantization_config of config.json"
    notes: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        groups = "" if self.group_size is None else f" in groups of {self.group_size}"
        return f"int4{'' if self.is_symmetric else ' with zero points'}{groups}"

    @property
    def format_name(self) -> str:
        return self.method.upper()

    def is_quantized(self, module: str) -> bool:
        return module in self.modules

    def find_problems(self, tensors: Tensors, module: str, shape: tuple[int, ...]) -> list[str]:
        if len(shape) != 2:
            return [f"{module} has a qweight; only linear layers are read quantized"]
        O, H = shape  # noqa: E741
        size = self.group_size or H
        if O % 8 or H % 32 or H % size:
            return [f"{module} of shape {list(shape)} cannot hold {self.summary}: its rows or columns are not divided"]
        words = (H, O // 8) if self.method == "awq" else (H // 8, O)
        expected = {
            "qweight": Expected([words], (torch.int32,)),
            "scales": Expected([(H // size, O)], FLOATS),
            "qzeros": Expected([(H // size, O // 8)], (torch.int32,), is_required=not self.is_symmetric),
            "g_idx": Expected([(H,)], (torch.int32, torch.int64), is_required=False),
        }
        problems = find_mismatches(tensors, module, expected, f"{self.format_name} {self.summary}", self.source)
        return problems or refused(lambda: self._require_file_order(tensors, f"{module}.g_idx"))

    def scheme(self, tensors: Tensors, module: str) -> Scheme:
        num_columns = tensors.info(f"{module}.qweight").shape[0] * (1 if self.method == "awq" else 8)
        return (W4A16 if self.is_symmetric else W4A16_ASYM)[held_size(self.group_size, num_columns)]

    def read(self, tensors: Tensors, module: str) -> Weight:
        self._require_file_order(tensors, f"{module}.g_idx")
        scheme = self.scheme(tensors, module)
        words = tensors.tensor(f"{module}.qweight")
        values = _unpack_awq(words) if self.method == "awq" else repack_words(words.t().contiguous())
        assert scheme.group_size is not None, f"{scheme.name} has groups"
        num_groups = 2 * values.shape[1] // scheme.group_size
        scale = read_scale(tensors, f"{module}.scales").t()
        zero = self._read_zero(tensors, f"{module}.qzeros")
        return Weight(
            values,
            spread(scale, len(values), num_groups),
            read_bias(tensors, module),
            scheme,
            zero=None if zero is None else spread(zero, len(values), num_groups),
        )

    def _read_zero(self, tensors: Tensors, name: str) -> Tensor | None:
        """[O, number of groups] int8, 8 less than stored; None where there are none: 8 everywhere in the file, or nothing."""
        if name not in tensors:
            return None
        words = tensors.tensor(name)
        octets = words.view(torch.uint8)
        nibbles = torch.stack([octets & 15, octets >> 4], dim=2).view(len(words), -1, 8)
        if self.method == "awq":
            nibbles = nibbles[:, :, torch.tensor(AWQ_ORDER).argsort()]
        zero = nibbles.flatten(1).t().to(torch.int8) + (self.zero_offset - 8)
        if int(zero.max()) > 7:
            raise refusal(tensors, name, "holds the zero point 16", "no 4-bit number is; quantize again as gptq_v2")
        if not self.is_symmetric:
            return zero
        if bool(zero.any()):
            raise refusal(
                tensors, name, "holds zero points other than 8", f"{self.source} says symmetric, which must be false"
            )
        return None

    def _require_file_order(self, tensors: Tensors, name: str) -> None:
        if name not in tensors or self.group_size is None:
            return
        index = tensors.tensor(name)
        if not torch.equal(index, torch.arange(len(index), dtype=index.dtype) // self.group_size):
            raise refusal(
                tensors, name, "sorts inputs into groups by activation (desc_act), which is not read",
                "use a checkpoint quantized with desc_act false, or an AWQ one",
            )  # fmt: skip


def _unpack_awq(words: Tensor) -> Tensor:
    """words: [H, O/8] int32. Returns values as `pack` lays them out, [O, H/2] uint8.

    A packed byte joins the inputs h and h + 16 of an output. Bytes of all outputs of a word are formed at once: the low halves
    of both words' bytes give those of numbers 0, 2, 4, 6, the high halves those of 1, 3, 5, 7.
    """
    num_inputs, num_words = words.shape
    out = torch.empty(num_words, 8, num_inputs // 32, 16, dtype=torch.uint8)
    for start in range(0, num_words, _WORDS_AT_A_TIME):
        part = words[:, start : start + _WORDS_AT_A_TIME].t().contiguous()  # [W, H]
        first, second = part.view(len(part), -1, 2, 16).unbind(dim=2)  # [W, H/32, 16] each
        even = (first & 0x0F0F0F0F) | ((second & 0x0F0F0F0F) << 4)
        odd = ((first >> 4) & 0x0F0F0F0F) | (second & -0x0F0F0F10)
        for nibbles, numbers in ((even, AWQ_ORDER[0::2]), (odd, AWQ_ORDER[1::2])):
            octets = nibbles.view(torch.uint8).view(*nibbles.shape, 4) ^ 0x88  # minus 8, modulo 16, both halves
            for octet, output in enumerate(numbers):
                out[start : start + len(part), output] = octets[..., octet]
    return out.view(8 * num_words, num_inputs // 2)


def parse(config: Mapping[str, Any], names: Collection[str]) -> Config:
    """Reads quantization_config; names: the checkpoint's tensors. Raises CheckpointError for what Saccade does not read."""
    where = "quantization_config of config.json"
    method = config.get("quant_method")
    assert method in METHODS, f"{method} is another module's"
    bits, size = config.get("bits", config.get("w_bit", 4)), config.get("group_size", config.get("q_group_size", 128))
    if bits != 4:
        raise CheckpointError(f"{where} has {printable(bits)} bits; {method.upper()} is read with 4")
    if not (type(size) is int and (size == -1 or (size > 0 and size % 32 == 0))):
        raise CheckpointError(f"{where} has groups of {printable(size)} columns; multiples of 32 and -1 are read")
    layout = config.get("version", config.get("checkpoint_format", ""))
    known = ("", "gemm") if method == "awq" else ("", "gptq", "gptq_v2")
    if not isinstance(layout, str) or layout.lower() not in known:
        raise CheckpointError(f"{where} has the layout {printable(layout)}; read are {' and '.join(known[1:])}")
    has_zeros = config.get("zero_point", True) if method == "awq" else not config.get("sym", True)
    offset = 1 if method == "gptq" and layout.lower() != "gptq_v2" else 0
    modules = frozenset(name.removesuffix(".qweight") for name in names if name.endswith(".qweight"))
    if not modules:
        raise CheckpointError(f"{where} says {method}, and no tensor is called qweight; are these its weights?")
    return Config(method, None if size == -1 else size, not has_zeros, offset, modules)
