"""Measure on this card which cut of each product is fastest, and keep it for all cards of the name.

    python -m tools.tune_triton                               3B and 7B, every scheme: saccade/kernels/tuned/CARD.json
    python -m tools.tune_triton --sizes 7b --schemes w8a16 dense --rows 1
    TRITON_INTERPRET=1 python -m tools.tune_triton --tiny     on a CPU: that it runs; prints, keeps nothing

Each candidate's result is held against that of the default cut before it is timed; one that this card cannot run is left out. Of a
dense weight cuBLAS is one of them. Kernels are compiled several at once, and what was found is kept product by
product, so that an interrupted run was not in vain.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product as combinations

import torch
import triton

from saccade.kernels import reference
from saccade.kernels.triton_common import IS_INTERPRETED
from saccade.kernels.triton_cuts import FEW_ROWS, TUNED_ROWS, Cut, cut_of, key_of, path_of, write
from saccade.kernels.triton_linear import multiply
from saccade.kernels.triton_rows import Rows, rows_for
from saccade.schemes.affine import quantize_weight
from saccade.schemes.scheme import DENSE, SCHEMES, Scheme, Weight, fitting

SHAPES = {  # columns and outputs of q/k/v, output, gate and up, down
    "3b": ((2048, 2560), (2048, 2048), (2048, 22_016), (11_008, 2048)),
    "7b": ((3584, 4608), (3584, 3584), (3584, 37_888), (18_944, 3584)),
    "tiny": ((64, 96),),
}
HEADS = {"3b": (2048, 151_936), "7b": (3584, 152_064), "tiny": (64, 512)}  # always dense, and of few rows
SCHEME_NAMES = ("dense", "w8a16", "w4a16-g128", "w8a8-dynamic", "w4a8-g128", "w4a8-g256")


def candidates(num_rows: int, weight: Weight, itemsize: int, device: torch.device) -> Iterator[Cut]:
    """The default first, then its neighbours. `itemsize`: bytes of a value of x."""
    default = cut_of(num_rows, weight, itemsize, device)
    yield default
    if default.is_for_one_row:
        yield from (cut for cut in one_row_cuts(weight) if cut != default)
        if weight.scheme.is_dense:
            return
        default = cut_of(2, weight, itemsize, device)  # by the matrix unit
        yield default
    few = num_rows <= FEW_ROWS
    for block_o, block_h, splits, num_warps, num_stages in combinations(
        (16, 32, 64) if few else (64, 128),
        (default.block_h // 2, default.block_h, 2 * default.block_h),
        sorted({max(1, default.splits // 2), default.splits, 2 * default.splits}) if few else (1,),
        (4,) if few else (4, 8),
        (3, 5) if few else (3, 4),
    ):
        cut = Cut(default.block_t, block_o, block_h, splits, num_warps, num_stages)
        if cut != default and block_h >= 32 and cut.fits(weight):
            yield cut


def one_row_cuts(weight: Weight) -> Iterator[Cut]:
    """Those in which a thread has 16 to 64 bytes of a tile: fewer are slow to read, more leave no registers."""
    for block_o, block_h, num_warps in combinations((2, 4, 8, 16), (256, 512, 1024, 2048), (4, 8)):
        if 512 * num_warps <= block_o * block_h * weight.values.element_size() <= 2048 * num_warps:
            yield Cut(1, block_o, block_h, 1, num_warps, 1)


def computed(cuts: Sequence[Cut], rows: Rows, weight: Weight, like: torch.Tensor) -> Iterator[tuple[Cut, torch.Tensor]]:
    """Those of `cuts` that run here, and what they compute; says which do not."""

    def compute(cut: Cut) -> torch.Tensor | None:
        out = torch.empty_like(like)
        try:
            multiply(rows.values, rows.scale, weight, out, cut)
        except Exception as problem:  # too large for this card, or for its compiler
            print(f"  {cut} does not run: {type(problem).__name__}: {str(problem)[:200]}", file=sys.stderr)
            return None
        return out

    # The compiler works without Python's lock for most of its time; the interpreter is Python.
    with ThreadPoolExecutor(1 if IS_INTERPRETED else min(8, os.cpu_count() or 1)) as pool:
        for cut, out in zip(cuts, pool.map(compute, cuts), strict=True):
            if out is not None:
                yield cut, out


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """The median; on a card with its cache emptied in between, as a decoding step finds it."""
    if device.type == "cuda":
        return 1e-3 * float(triton.testing.do_bench(call, warmup=5, rep=20, return_mode="median"))
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def random_weight(scheme: Scheme, num_columns: int, num_outputs: int, device: torch.device) -> Weight:
    """In the scheme, or in what such a layer takes instead."""
    scheme = fitting(scheme, num_columns)
    weight = Weight(torch.randn(num_outputs, num_columns, dtype=torch.bfloat16, device=device) / num_columns**0.5)
    return weight if scheme is DENSE else quantize_weight(weight, scheme)


def tune(
    num_rows: int, weight: Weight, device: torch.device, cuts: Iterable[Cut] | None = None
) -> tuple[Cut | None, float, float]:
    """The fastest cut (None: cuBLAS), its seconds, and those of the default. `cuts`: to be tried beside the default; None: many."""
    x = torch.randn(num_rows, weight.in_features, dtype=torch.bfloat16, device=device)
    rows = rows_for(x, weight)
    itemsize = rows.values.element_size()
    default = cut_of(num_rows, weight, itemsize, device)
    expected = torch.empty(num_rows, weight.out_features, dtype=x.dtype, device=device)
    multiply(rows.values, rows.scale, weight, expected, default)
    times: dict[Cut | None, float] = {}
    if weight.scheme.is_dense:
        times[None] = seconds(lambda: reference.linear(x, weight), device)
    tried = dict.fromkeys([default, *(candidates(num_rows, weight, itemsize, device) if cuts is None else cuts)])
    for cut, out in list(computed(list(tried), rows, weight, expected)):
        error = (out.float() - expected.float()).abs().max() / expected.float().abs().max()
        if not error < 0.02:
            print(f"  WRONG {key_of(num_rows, weight)}: {cut} is off by {error:.1%}", file=sys.stderr)
            continue

        def call(cut: Cut = cut, out: torch.Tensor = out) -> None:
            multiply(rows.values, rows.scale, weight, out, cut)

        times[cut] = seconds(call, device)
    best = min(times, key=lambda cut: times[cut])
    return best, times[best], times.get(None if weight.scheme.is_dense and num_rows != 1 else default, float("nan"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["3b", "7b"], choices=list(SHAPES))
    parser.add_argument("--schemes", nargs="+", default=list(SCHEME_NAMES), choices=list(SCHEMES), metavar="SCHEME")
    parser.add_argument("--rows", nargs="+", type=int, default=list(TUNED_ROWS), choices=TUNED_ROWS)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape on a CPU, interpreted")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        sys.exit("this machine has no CUDA device; TRITON_INTERPRET=1 and --tiny run every part on a CPU")
    device = torch.device("cpu" if args.tiny else "cuda")
    card = "" if args.tiny else torch.cuda.get_device_name(device)
    for size, name, num_rows in combinations(["tiny"] if args.tiny else args.sizes, args.schemes, args.rows):
        shapes = (*SHAPES[size], HEADS[size]) if name == "dense" and num_rows == 1 else SHAPES[size]
        for num_columns, num_outputs in shapes:
            weight = random_weight(SCHEMES[name], num_columns, num_outputs, device)
            best, fastest, without = tune(num_rows, weight, device)
            rate = weight.size_bytes / fastest / 1e12
            key = key_of(num_rows, weight)
            print(
                f"{key:44} {1e6 * fastest:8.1f} us, {rate:5.2f} TB/s, {without / fastest:4.2f} x the default: {best or 'cuBLAS'}",
                flush=True,
            )
            if not args.tiny:
                write(card, {key: best})
    if not args.tiny:
        print(path_of(card))


if __name__ == "__main__":
    main()
