"""What this machine can do at best: how fast it reads memory and multiplies matrices, measured, not looked up."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from saccade import __version__
from saccade.base.meter import available_memory_bytes
from saccade.kernels.choose import processor_name

BUFFER_BYTES = 2 << 30  # beyond every cache: server processors report up to 480 MiB of L3
ATTEMPTS = 5  # the best counts: other programs and clocks only ever slow a machine down
CPU_MATRICES = (2048, 4096)
CUDA_MATRICES = (4096, 8192)
SMALL_MATRIX = 256
PACKAGES = ("numpy", "pillow", "av", "tokenizers", "transformers")


@dataclass(frozen=True)
class MachineLimits:
    """The machine, and the two rates every stage is held against."""

    device: str  # "cpu" or the GPU's name
    processor: str
    num_threads: int
    num_cpus: int
    memory_bytes: int  # of the device
    dtype: str
    bytes_per_s: float  # read from memory, the best of several ways
    bandwidth_method: str
    operations_per_s: float  # of a square matrix product
    matrix_dtype: str  # in which that is: dtype, or float32 where the processor is faster in it
    matrix_size: int
    versions: dict[str, str]

    def limit_s(self, operations: float, num_bytes: float) -> float:
        """Seconds below which no program can do this work here: all operations at peak, or all bytes at full bandwidth."""
        return max(operations / self.operations_per_s, num_bytes / self.bytes_per_s)


def measure_machine(
    device: torch.device, dtype: torch.dtype, *, buffer_bytes: int = BUFFER_BYTES, matrices: tuple[int, ...] = ()
) -> MachineLimits:
    """Takes some seconds, and `buffer_bytes` of memory, or a quarter of what is free where that is less."""
    is_cpu = device.type == "cpu"
    free = available_memory_bytes() if is_cpu else torch.cuda.mem_get_info(device)[0]
    rate, method = _bandwidth(device, min(buffer_bytes, free // 4))
    # Without instructions for 16 bits a large product of them takes minutes; a small one shows it.
    product = max((dtype, torch.float32), key=lambda each: _matmul(device, each, SMALL_MATRIX)[0]) if is_cpu else dtype
    peak, size = max(_matmul(device, product, size) for size in matrices or (CPU_MATRICES if is_cpu else CUDA_MATRICES))
    return MachineLimits(
        device="cpu" if is_cpu else torch.cuda.get_device_name(device),
        processor=processor_name(),
        num_threads=torch.get_num_threads(),
        num_cpus=os.cpu_count() or 1,
        memory_bytes=_memory_bytes(device),
        dtype=str(dtype).removeprefix("torch."),
        bytes_per_s=rate,
        bandwidth_method=method,
        operations_per_s=peak,
        matrix_dtype=str(product).removeprefix("torch."),
        matrix_size=size,
        versions=_versions(),
    )


def _bandwidth(device: torch.device, num_bytes: int) -> tuple[float, str]:
    """(bytes per second, how) of the fastest way torch has to go through a buffer."""
    columns = 4096
    block = torch.randn(columns, 256, device=device).to(torch.bfloat16)  # finite as bfloat16, and in pairs as float32
    copies = max(1, num_bytes // block.nbytes)
    buffer = torch.empty(copies, block.numel(), dtype=torch.bfloat16, device=device)
    buffer.copy_(block.view(1, -1).expand(copies, -1))
    del block
    matrix, wide = buffer.view(-1, columns), buffer.view(-1).view(torch.float32)
    vector = torch.ones(columns, dtype=torch.bfloat16, device=device)
    ways: dict[str, tuple[Callable[[], object], int]] = {
        "sum of int64": (lambda: buffer.view(-1).view(torch.int64).sum(), buffer.nbytes),
        "dot product of float32": (lambda: torch.dot(wide[: 1 << 30], wide[: 1 << 30]), min(buffer.nbytes, 4 << 30)),
        "bfloat16 matrix times vector": (lambda: torch.mv(matrix, vector), buffer.nbytes),
    }
    if device.type == "cuda":
        half = len(matrix) // 2
        ways["copy, read and write"] = (lambda: matrix[:half].copy_(matrix[half : 2 * half]), 2 * half * columns * 2)
    return max((moved / _best_s(way, device), name) for name, (way, moved) in ways.items())


def _matmul(device: torch.device, dtype: torch.dtype, size: int) -> tuple[float, int]:
    """(operations per second, size) of a product of two size x size matrices."""
    left, right = (_normal(size, device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / _best_s(lambda: torch.mm(left, right, out=out), device), size


def _normal(size: int, device: torch.device) -> Tensor:
    return torch.randn(size, size, device=device)


def _best_s(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of some calls, the first left out; on a GPU by its own clock."""
    call()
    times = []
    for _ in range(ATTEMPTS):
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device)
            start, end = (torch.Event(device, enable_timing=True) for _ in range(2))
            start.record(stream)
            call()
            end.record(stream)
            end.synchronize()
            times.append(float(start.elapsed_time(end)) / 1000)
        else:
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
    return min(times)


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    import psutil

    return int(psutil.virtual_memory().total)


def _versions() -> dict[str, str]:
    versions = {"saccade": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return versions
