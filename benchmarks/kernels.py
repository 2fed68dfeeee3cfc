"""How fast the CPU's linear layers are at the sizes of Qwen2.5-VL-3B, and how fast the machine lets them be.

    python benchmarks/kernels.py --rows 1 1024 --schemes w8a8-dynamic w4a8-g256 --json kernels.json

Few rows are bound by reading the weights: GB/s of weights and scales, over that of a loop that only reads, measured in turn. Many
rows are bound by arithmetic: TOP/s, beside torch's own operators on the same shape (`onednn.qlinear_pointwise` for int8, its
rows quantized beforehand; `linear` for bfloat16; both in float32 where torch has no fast bfloat16). Weights are taken in turn
from more memory than the caches hold. The best of several rounds counts: other programs only slow a machine down. With
--threads 1 the clock is the thread's processor time, which other programs stretch less than the wall's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from ctypes import c_int64, c_void_p
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # python -m benchmarks.kernels, too
from torch_products import float_product, has_bf16, int8_product

from saccade.kernels.choose import choose, processor_name
from saccade.kernels.library import Library, load
from saccade.schemes.affine import quantize_weight
from saccade.schemes.scheme import Weight, scheme_of

SHAPES = {
    "decoder.qkv": (2560, 2048),
    "decoder.output": (2048, 2048),
    "decoder.gate_up": (22016, 2048),
    "decoder.down": (2048, 11008),
    "vision.qkv": (3840, 1280),
    "vision.gate_up": (6840, 1280),
    "vision.down": (1280, 3420),
}
SCHEMES = ["dense", "w8a8-dynamic", "w4a8-g256", "w8a16", "w4a16-g128"]
COLD_BYTES = 640 << 20  # server processors report up to 480 MiB of L3
MANY_ROWS = 64  # from here on arithmetic is the bound, and torch's operators are measured too


class Bench:
    def __init__(self, library: Library, threads: int, rounds: int) -> None:
        self.rounds = rounds
        self.clock = time.thread_time if threads == 1 else time.perf_counter
        self.linear = choose(torch.device("cpu")).linear
        self.buffer = torch.ones(COLD_BYTES // 8, dtype=torch.int64)
        self.read = library.functions.saccade_read
        self.read.argtypes = [c_void_p, c_int64]

    def best_s(self, run: Callable[[], object]) -> float:
        run()
        times = []
        for _ in range(self.rounds):
            start = self.clock()
            run()
            times.append(self.clock() - start)
        return min(times)

    def read_bytes_per_s(self) -> float:
        """Of reading and nothing else."""
        return self.buffer.nbytes / self.best_s(lambda: self.read(self.buffer.data_ptr(), self.buffer.numel()))

    def measure(self, scheme: str, shape: tuple[int, int], rows: int) -> dict[str, float]:
        first = random_weight(scheme, *shape)
        copies = max(1, COLD_BYTES // first.size_bytes) if rows < MANY_ROWS else 2
        weights = [first, *(copy_of(first) for _ in range(copies - 1))]
        x = torch.randn(rows, shape[1]).bfloat16()
        before = self.read_bytes_per_s()
        seconds = self.best_s(lambda: [self.linear(x, weight) for weight in weights]) / copies
        rate = max(before, self.read_bytes_per_s())
        return {
            "us": round(seconds * 1e6, 1),
            "gbytes_per_s": round(first.size_bytes / seconds / 1e9, 2),
            "of_read_rate": round(first.size_bytes / seconds / rate, 3),
            "tops": round(tops(shape, rows, seconds), 3),
        }

    def peers(self, shape: tuple[int, int], rows: int) -> dict[str, float]:
        """TOP/s of torch's own operators, their weights packed beforehand where they can be."""
        products = {
            "onednn_int8": int8_product(rows, *shape),
            "torch_bf16" if has_bf16() else "torch_float32": float_product(rows, *shape),
        }
        seconds = {name: self.best_s(product) for name, product in products.items() if product}
        return {f"{name}_tops": round(tops(shape, rows, value), 3) for name, value in seconds.items()}


def tops(shape: tuple[int, int], rows: int, seconds: float) -> float:
    return 2 * rows * shape[0] * shape[1] / seconds / 1e12


def random_weight(scheme: str, outputs: int, columns: int) -> Weight:
    dense = Weight(torch.randn(outputs, columns, dtype=torch.bfloat16) * 0.02, bias=torch.randn(outputs).bfloat16())
    kind = scheme_of(scheme)
    return dense if kind.is_dense else quantize_weight(dense, kind)


def copy_of(weight: Weight) -> Weight:
    parts = {name: getattr(weight, name) for name in ("values", "scale", "group_scale")}
    return replace(weight, **{name: None if part is None else part.clone() for name, part in parts.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 1024])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    library = load()
    assert not isinstance(library, str), library
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    bench = Bench(library, options.threads, options.rounds)
    rate = bench.read_bytes_per_s()
    print(f"{processor_name()}, {library.isa}, {options.threads} threads, reads {rate / 1e9:.2f} GB/s")
    found: list[dict[str, Any]] = []
    for name in options.shapes:
        shape = SHAPES[name]
        for rows in options.rows:
            peers = bench.peers(shape, rows) if rows >= MANY_ROWS else {}
            if peers:
                print(f"{name:16} {rows:5} rows  " + ", ".join(f"{peer} {value}" for peer, value in peers.items()))
            for scheme in options.schemes:
                group_size = scheme_of(scheme).group_size
                if group_size and shape[1] % group_size:
                    continue
                figures = bench.measure(scheme, shape, rows)
                found.append({"shape": name, "rows": rows, "scheme": scheme, **figures, **peers})
                print(
                    f"{name:16} {rows:5} rows  {scheme:14} {figures['us']:10.1f} us  {figures['gbytes_per_s']:6.2f} GB/s "
                    f"({figures['of_read_rate']:4.0%} of reading)  {figures['tops']:6.3f} TOP/s",
                    flush=True,
                )
    if options.json:
        machine = {
            "processor": processor_name(),
            "isa": library.isa,
            "threads": options.threads,
            "torch": torch.__version__,
        }
        options.json.write_text(
            json.dumps({**machine, "read_gbytes_per_s": rate / 1e9, "linears": found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
