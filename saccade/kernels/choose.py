"""What this machine can do, and the back end that follows from it."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from saccade.base.errors import DeviceError, OptionError
from saccade.kernels import cpu, reference
from saccade.kernels.library import ISA_VARIABLE, load
from saccade.kernels.record import OPS, Kernels

BACK_ENDS = ("reference", "cpu")


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
    """The kernels for `device`; `overrides` maps an op to a back end, to bisect a wrong number.

    On a CPU the C++ ops take as many threads as torch takes at this moment. Raises OptionError for unknown names.
    """
    for op, back_end in (overrides or {}).items():
        if op not in OPS:
            raise OptionError(f"kernel {op!r} is unknown; ops are {', '.join(OPS)}")
        if back_end not in BACK_ENDS:
            raise OptionError(
                f"back end {back_end!r} of kernel {op!r} is unknown; choose one of {', '.join(BACK_ENDS)}"
            )
    library = load()
    if device.type != "cpu" or isinstance(library, str):
        return reference.kernels()
    library.set_num_threads(torch.get_num_threads())
    chosen, plain = cpu.kernels(library), reference.kernels()
    ops = [op for op, back_end in (overrides or {}).items() if back_end == "reference"]
    replaced = {op: getattr(plain, op) for op in ops}
    return replace(chosen, **replaced, sources={**chosen.sources, **dict.fromkeys(ops, "reference")})


def back_ends() -> list[BackEnd]:
    """Every back end, with the reason it is active or not."""
    return [_cpu(), BackEnd("reference", True, f"plain torch {torch.__version__}, every op, any device")]


def _cpu() -> BackEnd:
    library = load()
    if isinstance(library, str):
        return BackEnd("cpu", False, f"{library}; until then torch's own operators serve, several times slower")
    ops = [op for op, source in cpu.kernels(library).sources.items() if source == "cpu"]
    best = library.supported[-1]
    why = "the best this processor has" if library.isa == best else f"forced by {ISA_VARIABLE}; the best is {best}"
    return BackEnd("cpu", True, f"C++ with {library.isa} ({why}), for {', '.join(ops)}")


def processor_name() -> str:
    """The processor's own name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown processor"
