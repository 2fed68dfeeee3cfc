"""What every quantized format answers about its linears, and what reading them has in common.

Knows headers, names and errors; knows no format. Modules and tensors go by canonical name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from saccade.base.errors import CheckpointError
from saccade.checkpoints.shards import TensorInfo
from saccade.schemes.scheme import Scheme, Weight

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class Tensors(Protocol):
    """A checkpoint's tensors by canonical name."""

    def __contains__(self, name: object) -> bool: ...

    def info(self, name: str) -> TensorInfo: ...

    def tensor(self, name: str) -> Tensor: ...


class Stored(Protocol):
    """How the linears of a quantized checkpoint are stored: what its config or description says, without a tensor."""

    @property
    def source(self) -> str:
        """The file that says so."""

    @property
    def summary(self) -> str:
        """What it says of the whole, in a few words."""

    @property
    def format_name(self) -> str:
        """The format, as people call it."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What of it Saccade does otherwise, harmless: a line each."""

    def is_quantized(self, module: str) -> bool:
        """Whether the weight of `module` is not stored as a plain tensor."""

    def find_problems(self, tensors: Tensors, module: str, shape: tuple[int, ...]) -> list[str]:
        """What keeps the quantized `module`, whose weight is `shape` by the config, from being read: a line each, from headers."""

    def scheme(self, tensors: Tensors, module: str) -> Scheme:
        """The scheme of a quantized module whose headers `find_problems` has seen."""

    def read(self, tensors: Tensors, module: str) -> Weight:
        """The weight of such a module. Raises CheckpointError for its values."""


@dataclass(frozen=True)
class Expected:
    """What a tensor of a quantized linear may look like. `hint` stands for shapes where there are none that fit."""

    shapes: list[tuple[int, ...]]
    dtypes: tuple[torch.dtype, ...]
    is_required: bool = True
    hint: str = ""


def find_mismatches(
    tensors: Tensors, module: str, expected: Mapping[str, Expected], kind: str, source: str
) -> list[str]:
    """Compares headers with `expected` (by suffix of the name); `source` is the file that says the module is of this `kind`."""
    problems = []
    files = [tensors.info(name).file for suffix in expected if (name := f"{module}.{suffix}") in tensors]
    where = f" from {files[0]}" if files else ""
    for suffix, wanted in expected.items():
        name = f"{module}.{suffix}"
        if name not in tensors:
            if wanted.is_required:
                problems.append(f"{name} is missing{where}; {module} is {kind} by {source} and needs it")
            continue
        info = tensors.info(name)
        if info.shape not in wanted.shapes:
            shapes = " or ".join(str(list(shape)) for shape in wanted.shapes) or wanted.hint
            problems.append(f"{info.name} in {info.file} has shape {list(info.shape)}; {kind} implies {shapes}")
        elif info.dtype not in wanted.dtypes:
            kinds = ", ".join(type_name(dtype) for dtype in wanted.dtypes)
            problems.append(f"{info.name} in {info.file} is {type_name(info.dtype)}; {kind} implies {kinds}")
    return problems


def read_bias(tensors: Tensors, module: str) -> Tensor | None:
    return tensors.tensor(f"{module}.bias") if f"{module}.bias" in tensors else None


def read_scale(tensors: Tensors, name: str) -> Tensor:
    """A tensor of scales as float32. Raises CheckpointError if one is not finite."""
    scale = tensors.tensor(name).float()
    if not bool(torch.isfinite(scale).all()):
        raise refusal(tensors, name, "holds NaN or an infinity", "the file is damaged, fetch it again")
    return scale


def narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype` if that rounds nothing, else as it is."""
    narrow = tensor.to(dtype)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor


def refusal(tensors: Tensors, name: str, fact: str, remedy: str) -> CheckpointError:
    info = tensors.info(name)
    return CheckpointError(f"{info.name} in {info.file} {fact}; {remedy}")


def refused(check: Callable[[], None]) -> list[str]:
    """What `check` raises a CheckpointError for, as a problem among others."""
    try:
        check()
    except CheckpointError as error:
        return [str(error)]
    return []


def type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
