"""Attention and the ops between products, for each instruction set and for torch: milliseconds of processor time on one thread.

    python benchmarks/small_ops.py [amx avx512bf16 avx512 avx2 portable reference]

The shapes are the 3B's: a picture of 3,888 patches, a prompt of 1,000 tokens, and one token over a cache of 1,000.
Processor time, not the clock on the wall: other programs disturb it less.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from saccade.kernels import cpu, library, reference
from saccade.kernels.record import Kernels, PagedLayout, Segments

PATCHES, TOKENS = 3888, 1000


def milliseconds(call: Callable[[], object], times: int) -> float:
    call()
    taken = []
    for _ in range(times):
        start = time.process_time()
        call()
        taken.append(time.process_time() - start)
    return min(taken) * 1e3


def measure(kernels: Kernels) -> dict[str, float]:
    bf16 = torch.bfloat16
    q, k, v = torch.randn(PATCHES, 3, 16, 80, dtype=bf16).unbind(1)
    angles = torch.randn(PATCHES, 40)
    patches, patch_gain = torch.randn(PATCHES, 1280, dtype=bf16), torch.randn(1280, dtype=bf16)
    gates = torch.randn(PATCHES, 2 * 3420, dtype=bf16)
    queries = torch.randn(TOKENS, 16, 128, dtype=bf16)
    k_cache, v_cache = torch.randn(2, 32, 32, 2, 128, dtype=bf16)
    table, slots = torch.arange(32)[None], torch.arange(TOKENS)
    prompt, one = PagedLayout((TOKENS,), (TOKENS,), table, slots), PagedLayout((1,), (TOKENS,), table, slots[:1])
    windows = Segments((64,) * (PATCHES // 64) + (PATCHES % 64,))
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "full attention": (lambda: kernels.attention_varlen(q, k, v, Segments((PATCHES,)), 0.1), 2),
        "windows of 64": (lambda: kernels.attention_varlen(q, k, v, windows, 0.1), 5),
        "prompt": (lambda: kernels.attention_paged(queries, k_cache, v_cache, prompt, 0.1), 5),
        "one query": (lambda: kernels.attention_paged(queries[:1], k_cache, v_cache, one, 0.1), 50),
        "rotary, tower": (lambda: kernels.rope(q, k, angles, angles), 5),
        "SiLU, tower": (lambda: kernels.silu_mul(gates), 5),
        "norm, tower": (lambda: kernels.rms_norm(patches, patch_gain, 1e-6, patches), 5),
    }
    return {name: milliseconds(call, times) for name, (call, times) in calls.items()}


def main() -> None:
    loaded = library.load()
    if isinstance(loaded, str):
        sys.exit(loaded)
    torch.set_num_threads(1)
    loaded.set_num_threads(1)
    for name in sys.argv[1:] or [*reversed(loaded.supported), "reference"]:
        if name != "reference":
            loaded.use(name)
        result = measure(reference.kernels() if name == "reference" else cpu.kernels(loaded))
        print(f"{name:>10}: " + ", ".join(f"{op} {value:.3g}" for op, value in result.items()), flush=True)


if __name__ == "__main__":
    main()
