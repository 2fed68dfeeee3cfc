"""The C++ kernels as a library: whether it is there, which instruction set it uses, how many threads. Knows no ops.

Built from `csrc` when the package is installed (or by `make kernels`) and loaded with ctypes.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from saccade.base.errors import OptionError

INTERFACE = 7  # saccade_interface() of csrc/entry.cpp; goes up with every change of an entry point or a structure
FILE_VARIABLE = "SACCADE_LIBRARY"  # another build of the library, with sanitizers for example
FILE = Path(os.environ.get(FILE_VARIABLE) or Path(__file__).with_name("_saccade_cpu.so"))
# Large tensors in pages of 2 MiB, where the system gives them on request (torch reads this at the first large tensor): reading
# weights of 8 and 16 bits is 8 to 14 % faster, as the processor prefetches only within a page.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

ISA_VARIABLE = "SACCADE_ISA"  # forces an instruction set, so that all can be tested on one machine


@dataclass(frozen=True)
class Library:
    """The loaded library. `isas` are its instruction sets, the most able last; `supported` those this machine has."""

    functions: ctypes.CDLL
    isas: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.functions.saccade_isa_name.restype = ctypes.c_char_p
        names: list[str] = []
        while (name := self.functions.saccade_isa_name(len(names))) is not None:
            names.append(name.decode())
        object.__setattr__(self, "isas", tuple(names))

    @property
    def supported(self) -> tuple[str, ...]:
        return tuple(isa for i, isa in enumerate(self.isas) if self.functions.saccade_isa_is_supported(i))

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self.isas[int(self.functions.saccade_isa())]

    def use(self, isa: str) -> None:
        """From now on `isa`. Raises OptionError if it is unknown or this machine lacks it."""
        if isa not in self.supported:
            fact = "is not supported by this processor" if isa in self.isas else "is unknown"
            raise OptionError(f"{ISA_VARIABLE} {isa!r} {fact}; choose one of {', '.join(self.supported)}")
        self.functions.saccade_set_isa(self.isas.index(isa))

    @property
    def num_threads(self) -> int:
        return int(self.functions.saccade_num_threads())

    def set_num_threads(self, count: int) -> None:
        """At most as many as there are CPUs for this process: more would only take turns."""
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.functions.saccade_set_num_threads(max(1, min(count, cpus)))


@cache
def load() -> Library | str:
    """The library, with the instruction set that SACCADE_ISA names or the best one; or why there is none."""
    if not FILE.exists():
        return f"{FILE.name} is missing: there was no C++ compiler at install; install g++, then run pip install again"
    try:
        functions = ctypes.CDLL(str(FILE))
        if (interface := int(functions.saccade_interface())) != INTERFACE:
            return f"{FILE.name} has interface {interface}, not {INTERFACE}: it was built from other sources; run make kernels"
        library = Library(functions)
    except (OSError, AttributeError) as error:
        return f"{FILE.name} does not load ({error}); run make kernels, or pip install again"
    if forced := os.environ.get(ISA_VARIABLE):
        library.use(forced)
    return library
