"""What this machine can do, and the back end that follows from it."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from saccade.base.errors import DeviceError, OptionError
from saccade.kernels import reference
from saccade.kernels.record import OPS, Kernels

BACK_ENDS = ("reference",)


@dataclass(frozen=True)
class BackEnd:
    """A line of `saccade doctor`: a back end, whether it serves here, and why."""

    name: str
    is_active: bool
    reason: str


def choose_device(name: str = "auto") -> torch.device:
    """`auto`: the first CUDA device if there is one, else the CPU. Raises DeviceError for a device this machine lacks."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"device {name!r} is unknown; use auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise OptionError(f"device {name!r} is not supported; use auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            f"device {name!r} asked for, but torch {torch.__version__} sees no CUDA device; use --device cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"device {name!r} asked for, but there are only {torch.cuda.device_count()} CUDA devices")
    return device


def choose(device: torch.device, overrides: dict[str, str] | None = None) -> Kernels:
    """The kernels for `device`; `overrides` maps an op to a back end, to bisect a wrong number."""
    for op, back_end in (overrides or {}).items():
        if op not in OPS:
            raise OptionError(f"kernel {op!r} is unknown; ops are {', '.join(OPS)}")
        if back_end not in BACK_ENDS:
            raise OptionError(
                f"back end {back_end!r} of kernel {op!r} is unknown; choose one of {', '.join(BACK_ENDS)}"
            )
    return reference.kernels()


def back_ends() -> list[BackEnd]:
    """Every back end, with the reason it is active or not."""
    return [BackEnd("reference", True, f"plain torch {torch.__version__}, every op, any device")]


def processor_name() -> str:
    """The processor's own name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown processor"
