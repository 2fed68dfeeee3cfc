"""What this machine can do, which back ends are active, and why."""

from __future__ import annotations

import dataclasses
import platform
import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from saccade import __version__
from saccade.api import usable_cpus
from saccade.base.errors import SaccadeError
from saccade.base.meter import available_memory_bytes
from saccade.checkpoints.describe import describe
from saccade.checkpoints.hub import resolve
from saccade.kernels.choose import BackEnd, back_ends, choose_device, processor_name

NEEDED = ("torch", "numpy", "tokenizers", "pillow", "av", "click", "rich", "huggingface_hub", "psutil")


@dataclass(frozen=True)
class Report:
    facts: dict[str, str]
    back_ends: list[BackEnd]
    problems: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def render(self) -> str:
        width = max(map(len, self.facts))
        lines = [f"{name:<{width}}  {value}" for name, value in self.facts.items()]
        for back_end in self.back_ends:
            lines.append(
                f"{back_end.name:<{width}}  {'active' if back_end.is_active else 'not active'}: {back_end.reason}"
            )
        lines += [f"problem: {problem}" for problem in self.problems]
        return "\n".join(lines if self.problems else [*lines, "all is well"])


def examine() -> Report:
    problems = []
    packages = {}
    for name in NEEDED:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            problems.append(f"package {name} is missing; run pip install saccade")
    facts = {
        "saccade": f"{__version__}, Python {sys.version.split()[0]}, {platform.system()} {platform.machine()}",
        "processor": f"{processor_name()}; {usable_cpus()} usable of {torch.get_num_threads()} threads torch would take",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory": f"{available_memory_bytes() / 1e9:.1f} GB available",
        "device": f"{choose_device()}"
        + (f" ({torch.cuda.get_device_name()})" if torch.cuda.is_available() else ", no CUDA device seen"),
        "packages": ", ".join(f"{name} {number}" for name, number in packages.items()),
    }
    try:
        description = describe(resolve("demo"))
        facts["demo model"] = "whole" if not description.problems else "damaged"
        problems += description.problems
    except SaccadeError as error:
        problems.append(str(error))
    return Report(facts, back_ends(), problems)
