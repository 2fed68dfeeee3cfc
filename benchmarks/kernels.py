"""How fast the CPU kernels of linear layers are, at the sizes of Qwen2.5-VL-3B, and how fast the machine lets them be.

    python benchmarks/kernels.py --rows 1 1024 --schemes w8a8-dynamic w4a8-g256 --json kernels.json

One row is bound by reading the weights: GB/s of weights and scales, beside a loop that only reads. Many rows are bound by
arithmetic: TOP/s, beside torch's own operators on the same shape (`onednn.qlinear_pointwise` for int8, `linear` for bfloat16).
Weights are taken in turn from more memory than the caches hold. The best of several rounds counts: other programs only slow
a machine down.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from ctypes import c_int64, c_void_p
from dataclasses import replace
from pathlib import Path

import torch

from saccade.kernels.choose import choose, processor_name
from saccade.kernels.library import load
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
COLD_BYTES = 640 << 20  # server processors report up to 480 MiB of L3
ROUNDS = 5


def best_s(run: Callable[[], object], rounds: int = ROUNDS) -> float:
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def read_rate() -> float:
    """Bytes per second of reading and nothing else."""
    library = load()
    assert not isinstance(library, str), library
    buffer = torch.ones(COLD_BYTES // 4, dtype=torch.int64)  # twice the size
    read = library.functions.saccade_read
    read.argtypes = [c_void_p, c_int64]
    return buffer.nbytes / best_s(lambda: read(buffer.data_ptr(), buffer.numel()), 8)


def random_weight(scheme: str, outputs: int, columns: int) -> Weight:
    dense = Weight(torch.randn(outputs, columns, dtype=torch.bfloat16) * 0.02, bias=torch.randn(outputs).bfloat16())
    kind = scheme_of(scheme)
    return dense if kind.is_dense else quantize_weight(dense, kind)


def copy_of(weight: Weight) -> Weight:

    parts = {name: getattr(weight, name) for name in ("values", "scale", "group_scale")}
    return replace(weight, **{name: None if part is None else part.clone() for name, part in parts.items()})


def measure(scheme: str, shape: tuple[int, int], rows: int) -> dict[str, float]:
    linear = choose(torch.device("cpu")).linear
    first = random_weight(scheme, *shape)
    copies = (
        max(1, min(COLD_BYTES // first.size_bytes, 200))
        if rows <= 64
        else max(2, min(4, COLD_BYTES // first.size_bytes))
    )
    weights = [first, *(copy_of(first) for _ in range(copies - 1))]
    x = torch.randn(rows, shape[1]).bfloat16()

    def run() -> None:
        for weight in weights:
            linear(x, weight)

    seconds = best_s(run) / copies
    return {
        "us": round(seconds * 1e6, 1),
        "gbytes_per_s": round(first.size_bytes / seconds / 1e9, 2),
        "tops": round(2 * rows * shape[0] * shape[1] / seconds / 1e12, 3),
    }


def onednn_int8(shape: tuple[int, int], rows: int) -> float:
    """Seconds of torch's own int8 linear, its weight packed beforehand, rows quantized beforehand."""
    weight = torch.randint(-127, 128, shape, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, [rows, shape[1]])
    x = torch.randint(0, 255, (rows, shape[1]), dtype=torch.uint8)
    scale, zero = torch.full((shape[0],), 1e-3), torch.zeros(shape[0], dtype=torch.int32)
    return best_s(
        lambda: torch.ops.onednn.qlinear_pointwise(
            x, 1.0, 0, packed, scale, zero, None, 1.0, 0, torch.bfloat16, "none", [], ""
        )
    )


def dense_bf16(shape: tuple[int, int], rows: int) -> float:
    weight, x = torch.randn(shape).bfloat16(), torch.randn(rows, shape[1]).bfloat16()
    return best_s(lambda: torch.nn.functional.linear(x, weight))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=["dense", "w8a16", "w8a8-dynamic", "w4a8-g256"])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 1024])
    parser.add_argument("--peers", action="store_true", help="torch's own operators too, where rows are many")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    library = load()
    assert not isinstance(library, str), library
    torch.manual_seed(0)
    choose(torch.device("cpu"))
    rate = read_rate()
    result: dict[str, object] = {
        "processor": processor_name(),
        "isa": library.isa,
        "threads": library.num_threads,
        "read_gbytes_per_s": round(rate / 1e9, 2),
        "linears": [],
    }
    print(f"{processor_name()}, {library.isa}, {library.num_threads} threads, reads {rate / 1e9:.2f} GB/s")
    for name in options.shapes:
        shape = SHAPES[name]
        for rows in options.rows:
            peers = {}
            if options.peers and rows >= 64:
                peers = {"onednn int8": onednn_int8(shape, rows), "torch bf16": dense_bf16(shape, rows)}
                for peer, seconds in peers.items():
                    print(
                        f"{name:16} {rows:5} rows  {peer:14} {2 * rows * shape[0] * shape[1] / seconds / 1e12:7.3f} TOP/s"
                    )
            for scheme in options.schemes:
                if (group := scheme_of(scheme).group_size) and shape[1] % group:
                    continue
                figures = measure(scheme, shape, rows)
                print(
                    f"{name:16} {rows:5} rows  {scheme:14} {figures['us']:10.1f} us {figures['gbytes_per_s']:7.2f} GB/s"
                    f" ({figures['gbytes_per_s'] * 1e9 / rate:4.0%}) {figures['tops']:7.3f} TOP/s",
                    flush=True,
                )
                result["linears"].append({"shape": name, "rows": rows, "scheme": scheme, **figures})  # type: ignore[attr-defined]
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
