"""Compile every Triton kernel for NVIDIA cards that are not there, down to machine code.

    python -m tools.compile_triton                         A100, L4, H100/H200, B200, RTX 5090
    python -m tools.compile_triton --capability 90 --dtype float32

The interpreter says whether a kernel is right; only the compiler says whether it exists: types that a card lacks, tiles that do
not fit. Triton needs no card for that. The back end's own functions are called with tensors of the CPU, each with shapes that reach
another kernel or tile; every launch is replaced by its compilation, and nothing runs. Prints a line a kernel: the most shared
memory of its variants and the limit of the card. Exits with 1 if one does not compile or does not fit, or does not round as it is
told to.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from saccade.kernels import triton_attention, triton_cuts, triton_heads, triton_linear, triton_rows, triton_sampling
from saccade.kernels.record import PagedLayout, Said, Segments
from saccade.schemes.affine import quantize_weight
from saccade.schemes.scheme import SCHEMES, W8A8, Static, Weight

# Shared memory a program may have, in KiB (CUDA C++ Programming Guide, table of technical specifications), by compute capability.
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
MULTIPROCESSORS = 132
LINEARS = ("dense", "w8a16", "w8a8", "w8a8-dynamic", "w4a8-g32", "w4a8-g128", "w4a8-g256", "w4a16-g32", "w4a16-g128",
           "w4a16-asym-g128", "w4a8-float-g64", "fp8")  # fmt: skip


class AbsentCard:
    """What Triton asks its driver for in order to compile."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """Stands in for every launch: compiles for the card, and keeps the most shared memory of each kernel, in bytes."""

    def __init__(self, capability: int) -> None:
        self.shared: dict[str, int] = {}
        self.variants: dict[str, set[str]] = {}  # of each kernel, by their hashes
        self.limit = SHARED_KIB[capability] * 1024
        driver.set_active(AbsentCard(capability))
        launch = JITFunction.run

        def compile_only(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            compiled = launch(kernel, *args, grid=grid, warmup=True, **options)
            name = kernel.fn.__name__
            self.variants.setdefault(name, set()).add(compiled.hash)
            self.shared[name] = max(self.shared.get(name, 0), compiled.metadata.shared)
            if compiled.metadata.shared > self.limit:
                raise MemoryError(f"{name} wants {compiled.metadata.shared} bytes of shared memory: {options}")
            if not options["enable_fp_fusion"] and "fma.rn.f32" in compiled.asm["ptx"]:
                raise ArithmeticError(f"{name} rounds a product and the sum behind it only once")

        JITFunction.run = compile_only


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each op by name, with a call of it."""

    def zeros(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=of)

    x = zeros(4, 2048)
    yield "rms_norm", lambda: triton_rows.rms_norm(x, x[0], 1e-6)
    yield "rms_norm, residual", lambda: triton_rows.rms_norm(x, x[0], 1e-6, x)
    yield "silu_mul", lambda: triton_rows.silu_mul(zeros(4, 2 * 11008))
    for name in ("w8a8", "w8a8-dynamic", "fp8"):
        weight = _weight(name)
        yield f"rms_norm for {name}", lambda weight=weight: triton_rows.norm_rows(x, x[0], 1e-6, x, weight)
        yield (
            f"silu_mul for {name}",
            lambda weight=weight: triton_rows.rows_for(zeros(4, 2 * 11008), weight, is_gated=True),
        )
    for head_dim, num_heads, num_kv_heads in ((80, 16, 16), (128, 16, 2)):
        q, k = zeros(364, num_heads, head_dim), zeros(364, num_kv_heads, head_dim)
        angles = zeros(364, head_dim // 2, of=torch.float32)
        yield f"rope {head_dim}", lambda q=q, k=k, angles=angles: triton_heads.rope(q, k, angles, angles)
        for lengths in ((300, 64), (64,) * 5 + (44,)):
            segments = Segments(lengths)
            yield (
                f"attention_varlen {head_dim}",
                lambda q=q, k=k, segments=segments: triton_attention.attention_varlen(q, k, k, segments, 0.1),
            )
    for cache_dtype, row in ((dtype, 128), (torch.int8, 132)):
        cache = zeros(200, 16, 2, row, of=cache_dtype)
        for query, context in ((1, 20), (1, 3000), (300, 300)):
            layout = PagedLayout((query,), (context,), zeros(1, 200, of=torch.int64), zeros(query, of=torch.int64))
            q, k = zeros(query, 16, 128), zeros(query, 2, 128)
            angles = zeros(query, 64, of=torch.float32)
            name = f"{query} of {context}, {str(cache_dtype).removeprefix('torch.')}"
            yield (
                f"store_kv {name}",
                lambda k=k, cache=cache, layout=layout: triton_heads.store_kv(k, k, cache, cache, layout),
            )
            yield (
                f"rope_and_store {name}",
                lambda angles=angles, cache=cache, layout=layout: triton_heads.rope_and_store(
                    zeros(len(angles), 20 * 128), angles, angles, cache, cache, layout, 16
                ),
            )
            yield (
                f"attention_paged {name}",
                lambda q=q, cache=cache, layout=layout: triton_attention.attention_paged(q, cache, cache, layout, 0.1),
            )
    flags, counts, column = (
        zeros(2, 5000, of=torch.bool),
        zeros(2, 5000, of=torch.float32),
        zeros(2, 1, of=torch.float32),
    )
    said = Said(flags, counts, flags, column, column, column)
    yield "likeliest", lambda: triton_sampling.likeliest(zeros(2, 5000), said, flags[:, 0].contiguous())
    for name in LINEARS:
        weight = _weight(name)
        few = (1, 4) if triton_cuts.has_one_row_kernel(weight) else (1,)
        for rows in (*few, 40, 300):  # of each a tile of its own
            if name != "dense" or rows == 1:  # more of them are cuBLAS's
                yield (
                    f"linear {name}, {rows} rows",
                    lambda weight=weight, rows=rows: triton_linear.linear(zeros(rows, 1280), weight),
                )
        for rows in () if name == "fp8" else few[:1] if name == "dense" else few:
            for down in (_weight("w8a16"), _weight("w8a8")):  # the gate's numbers as they are, and quantized
                for columns in (1280, 8192):  # the latter split
                    gate = _weight(name, columns)
                    yield (
                        f"gate {name}, {rows} x {columns}, for {down.scheme.name}",
                        lambda gate=gate, down=down, rows=rows, columns=columns: triton_linear.gated_rows(
                            triton_rows.rows_for(zeros(rows, columns), gate), gate, down, dtype
                        ),
                    )


def _weight(name: str, columns: int = 1280) -> Weight:
    """[256, columns] with a bias."""
    if name == W8A8.name:
        ones = torch.ones(256)
        static = Static(ones[:1], ones[:1], ones.int(), ones)
        return Weight(torch.zeros(256, columns, dtype=torch.int8), ones, None, W8A8, static=static)
    bias = torch.zeros(256, dtype=torch.bfloat16)
    weight = Weight(torch.zeros(256, columns, dtype=torch.bfloat16), bias=bias)
    return weight if name == "dense" else quantize_weight(weight, SCHEMES[name])


def compile_all(capability: int, dtype: torch.dtype, only: Sequence[str]) -> bool:
    """Whether every op whose name holds one of `only` (none: every op) compiles; says which does not."""
    triton_cuts.num_programs = lambda device: 4 * MULTIPROCESSORS
    triton_attention._num_multiprocessors = lambda device: MULTIPROCESSORS
    triton_linear._is_torch_faster = lambda *_: False
    compiled, failed = Compiled(capability), 0
    for name, call in calls(dtype):
        if only and not any(part in name for part in only):
            continue
        try:
            call()
        except Exception as problem:  # one must not hide the others
            failed += 1
            print(f"sm_{capability} {dtype}: {name} does not compile: {type(problem).__name__}: {str(problem)[-800:]}")
    for kernel, shared in compiled.shared.items():
        print(
            f"sm_{capability} {kernel.strip('_'):16} {shared / 1024:6.1f} of {compiled.limit // 1024} KiB shared memory"
        )
    return failed == 0 and len(compiled.shared) > 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 89, 90, 100, 120], choices=list(SHARED_KIB))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="ops whose names hold one of them")
    args = parser.parse_args()
    launch = JITFunction.run
    is_good = True
    for capability in args.capability:
        JITFunction.run = launch
        is_good &= compile_all(capability, getattr(torch, args.dtype), args.only)
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
