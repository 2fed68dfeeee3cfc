"""What this machine can do, and the back end that follows from it."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

from saccade.base.errors import DeviceError, OptionError
from saccade.base.meter import logger
from saccade.kernels import cpu, reference
from saccade.kernels.library import ISA_VARIABLE, load
from saccade.kernels.record import OPS, Kernels

BACK_ENDS = ("reference", "cpu", "triton")
OLDEST_CAPABILITY = (8, 0)  # Ampere: bfloat16 and int8 in matrix units
OLDEST_TRITON = (3, 3)  # the compiler of 3.2 ends the process at the kernel for fp8


@dataclass(frozen=True)
class BackEnd:
    """A line of `saccade doctor`: a back end, whether it serves here, and why."""

    name: str
    is_active: bool
    reason: str


def choose_device(name: str = "auto") -> torch.device:
    """`auto`: a CUDA device if there is one, else the CPU; of several, where none is named, the current one, the first at the start.

    A CUDA device always comes with its number. Raises DeviceError for a device this machine lacks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"device {name!r} is unknown; use auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise OptionError(f"device {name!r} is not supported; use auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"device {name!r} asked for, but torch {torch.__version__} {_cuda_lack()}; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"device {name!r} asked for, but there are only {torch.cuda.device_count()} CUDA devices")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _cuda_lack() -> str:
    if torch.version.cuda is None:
        return "was built without CUDA (https://pytorch.org says how to install one with it)"
    return f"(CUDA {torch.version.cuda}) sees no device of it: does nvidia-smi, and is the driver new enough?"


def choose(device: torch.device, overrides: dict[str, str] | None = None) -> Kernels:
    """The kernels for `device`; `overrides` maps an op to a back end, to bisect a wrong number.

    On a CPU the C++ ops take as many threads as torch takes at this moment. A CUDA device becomes this thread's current one, which
    is where Triton launches. Raises OptionError for unknown names, and for a back end that does not serve `device`.
    """
    if device.type == "cuda" and device.index is not None:  # without a number it is the current one
        torch.cuda.set_device(device)
    best = {"cpu": "cpu", "cuda": "triton"}[device.type]
    lack = lack_of(best, device)
    if lack is not None and device.type == "cuda" and set(overrides or ()) != set(OPS):
        logger.warning(
            "Triton does not serve %s: %s; until then torch's own operators do, several times slower", device, lack
        )
    chosen = dict.fromkeys(OPS, best if lack is None else "reference")
    for op, back_end in (overrides or {}).items():
        if op not in OPS:
            raise OptionError(f"kernel {op!r} is unknown; ops are {', '.join(OPS)}")
        if back_end not in BACK_ENDS:
            raise OptionError(
                f"back end {back_end!r} of kernel {op!r} is unknown; choose one of {', '.join(BACK_ENDS)}"
            )
        if (lack := lack_of(back_end, device)) is not None:
            raise OptionError(f"back end {back_end!r} of kernel {op!r} does not serve {device} here: {lack}")
        chosen[op] = back_end
    made = {name: _make(name) for name in set(chosen.values())}
    if len(made) == 1:
        return made.popitem()[1]
    return Kernels(
        **{op: getattr(made[name], op) for op, name in chosen.items()},
        sources={op: made[name].sources[op] for op, name in chosen.items()},
    )


def lack_of(back_end: str, device: torch.device) -> str | None:
    """What `back_end` lacks to serve `device`, None if nothing."""
    if back_end == "cpu":
        library = load()
        return library if isinstance(library, str) else None if device.type == "cpu" else "it is C++ for processors"
    return _triton_lack(device) if back_end == "triton" else None


def _triton_lack(device: torch.device) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    major, minor = _triton_version()
    if (major, minor) < OLDEST_TRITON:
        return f"triton {major}.{minor} is too old; pip install 'triton>={OLDEST_TRITON[0]}.{OLDEST_TRITON[1]}', which torch 2.7 brings"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 interprets on the CPU; unset it"
    if device.type != "cuda":
        return "Triton compiles for NVIDIA GPUs; TRITON_INTERPRET=1 interprets it, for tests"
    if torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than Ampere"
    return _trial(device)


def _triton_version() -> tuple[int, int]:
    try:
        major, minor, *_ = version("triton").split(".")
    except PackageNotFoundError:  # a build of torch's own, under another name
        return OLDEST_TRITON
    return int(major), int(minor)


@cache
def _trial(device: torch.device) -> str | None:
    """What goes wrong when the smallest kernel is compiled and run: Triton needs a C compiler, and to know the card."""
    try:
        from saccade.kernels.triton_common import mark

        with torch.cuda.device(device):
            if mark(device).tolist() == [1]:
                return None
    except Exception as error:  # compilers, drivers and linkers fail in ways of their own
        return f"its smallest kernel fails: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return "its smallest kernel does not do what it says"


def _make(back_end: str) -> Kernels:
    if back_end == "triton":
        from saccade.kernels import triton_kernels  # imports Triton, which takes a moment

        return triton_kernels.kernels()
    if back_end == "reference":
        return reference.kernels()
    library = load()
    assert not isinstance(library, str), library
    library.set_num_threads(torch.get_num_threads())
    return cpu.kernels(library)


def back_ends() -> list[BackEnd]:
    """Every back end, with the reason it is active or not."""
    device = choose_device()
    return [
        _cpu(),
        BackEnd("triton", *_triton(device)),
        BackEnd("reference", True, f"plain torch {torch.__version__}, every op, any device"),
    ]


def _triton(device: torch.device) -> tuple[bool, str]:
    if (lack := lack_of("triton", device)) is not None:
        return False, lack
    ops = [op for op, source in choose(device).sources.items() if source == "triton"]
    if not ops:
        return False, "interpreted, where an op is given to it"
    return True, f"for {', '.join(ops)} on {torch.cuda.get_device_name(device)}"


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
