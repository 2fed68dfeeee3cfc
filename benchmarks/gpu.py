"""One command that says how fast an NVIDIA GPU runs the reference benchmark, and how far that is from what the card allows.

    python benchmarks/gpu.py --out benchmarks/results/gpu.json          # a card, meant to take under ten minutes
    python benchmarks/gpu.py --out cells.json --only machine cells      # some of its parts, see PARTS
    python benchmarks/gpu.py --tiny --out /tmp/tiny.json                # a CPU, interpreted: that every part runs

1. Every kernel and sampling against the reference, on the card; answers whose tokens are chosen there, steps queued ahead, against
the same chosen on the host.  2. The tile of each product of one row, dense and w8a16, that is fastest on this card; kept for all cards
of its name (saccade/kernels/tuned), and what cells run with.  3. Copy bandwidth and matrix rates, measured there.  4. Cells: 3B and 7B
with random weights of real shape, a picture (997 prompt tokens) and a video (2725), 128 tokens out, batch 1, by quantization; and one
with tokens chosen on the host, for what the card's choice is worth.  5. The 3B picture by transformers on the same weights: sdpa, and
sdpa with a static cache and torch.compile, if there is time; its best counts.
A cell that fails is written with its error; the others go on. The JSON is written anew after every part and cell, each part's
seconds with it. Times of a card that --tiny prints are times of an interpreter.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product as combinations
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # a machine lent with its card measures a checkout: nothing is installed there
TINY = "--tiny" in sys.argv
if TINY:
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from saccade import SamplingParams  # noqa: E402
from saccade.api import LLM, messages_for  # noqa: E402
from saccade.bench.machine import MachineLimits, measure_machine  # noqa: E402
from saccade.bench.measure import bench  # noqa: E402
from saccade.bench.model import random_llm  # noqa: E402
from saccade.bench.options import BenchOptions  # noqa: E402
from saccade.checkpoints.config import GenerationConfig  # noqa: E402
from saccade.engine.device_sampling import DeviceSampler  # noqa: E402
from saccade.engine.sampling import Sampler  # noqa: E402
from saccade.kernels import reference, triton_cuts  # noqa: E402
from saccade.kernels.choose import choose  # noqa: E402
from saccade.kernels.record import OPS, Kernels, PagedLayout, Segments  # noqa: E402
from saccade.kernels.triton_cuts import key_of, write  # noqa: E402
from saccade.kernels.triton_linear import gated_rows  # noqa: E402
from saccade.kernels.triton_rows import rows_for  # noqa: E402
from saccade.schemes.affine import quantize_weight  # noqa: E402
from saccade.schemes.scheme import SCHEMES, W8A8, Static, Weight  # noqa: E402
from tools.tune_triton import HEADS, SHAPES, one_row_cuts, random_weight, tune  # noqa: E402

BUDGET_S = 420.0  # cells that would begin later are left out, and said to be
COMPILE_BEGINS_S = 480.0  # as is torch.compile, which takes minutes
PARTS = ("kernels", "tuning", "machine", "cells", "transformers")
QUANTIZATIONS = (None, "w8a16", "w4a16-g128", "w8a8-dynamic", "w4a8-g128", "fp8")


def validate(device: torch.device, dtype: torch.dtype, shapes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Largest distance of every Triton op from the reference in float32, over the reference's largest value."""
    kernels = choose(device, dict.fromkeys(OPS, "triton"))
    checks: list[tuple[str, Callable[[], tuple[Tensor, Tensor]]]] = []

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def of_linear(name: str, rows: int, columns: int, outputs: int) -> tuple[Tensor, Tensor]:
        x = randn(rows, columns)
        if name == W8A8.name:
            values = torch.randint(-127, 128, (outputs, columns), device=device, dtype=torch.int8)
            deq = torch.full((outputs,), 1e-4, device=device)
            static = Static(*(torch.tensor([n], device=device) for n in (0.03, 3.0)), deq.int(), deq)
            weight = Weight(values, deq / 0.03, None, W8A8, static=static)
        else:
            weight = Weight(randn(outputs, columns) * 0.05, bias=randn(outputs))
            weight = weight if name == "dense" else quantize_weight(weight, SCHEMES[name])
        return kernels.linear(x, weight), reference.linear(x.float(), weight.to(device, torch.float32))

    def of_gate(name: str, rows: int, columns: int, outputs: int) -> tuple[Tensor, Tensor]:
        x, gate_up = randn(rows, columns), Weight(randn(2 * outputs, columns) * 0.05)
        gate_up = gate_up if name == "dense" else quantize_weight(gate_up, SCHEMES[name])
        got = gated_rows(rows_for(x, gate_up), gate_up, Weight(randn(16, outputs)), dtype).values
        return got, reference.silu_mul(reference.linear(x.float(), gate_up.to(device, torch.float32)))

    for index, (columns, outputs) in enumerate(shapes):
        for name, rows in (
            ("dense", 1),
            ("w8a16", 1),
            *((n, 3) for n in ("w8a16", "w4a16-g128", "w8a8-dynamic", "w4a8-g128")),
        ):
            label = f"gate {name}, {rows} x {columns} -> {outputs}"
            checks.append((label, lambda n=name, r=rows, c=columns, o=outputs: of_gate(n, r, c, o)))
        label = f"linear dense, 1 x {columns} -> {outputs}"
        checks.append((label, lambda c=columns, o=outputs: of_linear("dense", 1, c, o)))
        # Each number of rows has kernels of its own to compile, a second each; another shape has few.
        for rows in (1, 5, 16, 40, 200) if index < 2 else (1, 40):
            for name in (
                "w8a16",
                "w8a8",
                "w8a8-dynamic",
                "w4a8-g64",
                "w4a8-g128",
                "w4a16-g128",
                "w4a8-float-g64",
                "fp8",
            ):
                label = f"linear {name}, {rows} x {columns} -> {outputs}"
                checks.append((label, lambda n=name, r=rows, c=columns, o=outputs: of_linear(n, r, c, o)))
    checks += [
        ("rms_norm", lambda: _norm(kernels, randn)),
        ("rope", lambda: _rope(kernels, randn)),
        ("silu_mul", lambda: _silu(kernels, randn)),
        ("attention_varlen", lambda: _varlen(kernels, randn)),
        ("attention_paged, prefill", lambda: _paged(kernels, randn, (40,), (90,))),
        ("attention_paged, decode", lambda: _paged(kernels, randn, (1, 1, 1), (700, 33, 5))),
        ("sampling, likeliest", lambda: _sampled(kernels, randn, temperature=0.0)),
        ("sampling, drawn", lambda: _sampled(kernels, randn, temperature=0.8, top_k=50, top_p=0.9, min_p=0.01)),
        ("tokens chosen on the card, greedy", lambda: _answers(device, temperature=0.0, repetition_penalty=1.05)),
        ("tokens chosen on the card, drawn", lambda: _answers(device, temperature=0.7, top_p=0.9, seed=1)),
    ]
    results = []
    for label, check in checks:
        torch.manual_seed(0)
        try:
            got, expected = check()
            error = float((got.float() - expected.float()).abs().max() / expected.float().abs().max())
            results.append(
                {"op": label, "error": error, "is_right": error < (0.03 if dtype != torch.float32 else 1e-4)}
            )
        except Exception as problem:  # one that does not compile must not hide the others
            results.append(
                {"op": label, "error": None, "is_right": False, "problem": f"{type(problem).__name__}: {problem}"[:500]}
            )
    return results


def _norm(kernels: Kernels, randn: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    x, residual, gain = randn(7, 2048), randn(7, 2048), randn(2048)
    return kernels.rms_norm(x, gain, 1e-6, residual)[0], reference.rms_norm(
        x.float(), gain.float(), 1e-6, residual.float()
    )[0]


def _rope(kernels: Kernels, randn: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    q, k, angles = randn(9, 28, 128), randn(9, 4, 128), randn(9, 64).float()
    got, expected = (
        ops.rope(wide(q), wide(k), angles.cos(), angles.sin())
        for ops, wide in ((kernels, lambda x: x), (reference.kernels(), lambda x: x.float()))
    )
    return torch.cat(got, dim=1), torch.cat(expected, dim=1)


def _silu(kernels: Kernels, randn: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    x = randn(7, 2 * 3420)
    return kernels.silu_mul(x), reference.silu_mul(x.float())


def _varlen(kernels: Kernels, randn: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    segments = Segments((64, 64, 32, 300))
    q, k, v = (randn(460, 4, 80) for _ in range(3))
    got = kernels.attention_varlen(q, k, v, segments, 80**-0.5)
    return got, reference.attention_varlen(q.float(), k.float(), v.float(), segments, 80**-0.5)


def _paged(
    kernels: Kernels, randn: Callable[..., Tensor], queries: tuple[int, ...], contexts: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    k, v = randn(64, 32, 4, 128), randn(64, 32, 4, 128)
    order = torch.randperm(64, device=k.device)
    width = -(-max(contexts) // 32)
    tables = torch.stack([order[s * 3 : s * 3 + width] for s in range(len(contexts))])
    layout = PagedLayout(queries, contexts, tables, order[:0])
    q = randn(sum(queries), 28, 128)
    got = kernels.attention_paged(q, k, v, layout, 128**-0.5)
    return got, reference.attention_paged(q.float(), k.float(), v.float(), layout, 128**-0.5)


def _sampled(kernels: Kernels, randn: Callable[..., Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """Four tokens of four answers, with penalties; of equal logits the first is meant, so none may differ."""
    vocab_size, num_rows = 151_936, 4
    options |= {"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.1, "min_tokens": 2}
    told: list[list[list[int]]] = [[], []]
    samplers = [
        Sampler(
            SamplingParams(seed=seed, **options).resolved(GenerationConfig((7,))), range(50 * seed), (7,), vocab_size
        )
        for seed in (*range(num_rows), *range(num_rows))
    ]
    there, here = samplers[:num_rows], samplers[num_rows:]
    logits = [4 * randn(num_rows, vocab_size) for _ in range(4)]
    rows = DeviceSampler(num_rows, vocab_size, logits[0].device, kernels.likeliest)
    rows.begin(there)
    for num_said, step in enumerate(logits):
        numbers = torch.tensor([sampler.next_number() for sampler in there], dtype=torch.float64)
        may_end = torch.tensor([num_said >= 2] * num_rows)
        draws = not there[0].params.is_greedy
        told[0].append(rows.next_tokens(step, numbers.to(step.device), may_end.to(step.device), draws)[1].tolist())
        told[1].append([sampler.next_token(row) for sampler, row in zip(here, step.float().cpu(), strict=True)])
    return _differing(torch.tensor(told[0]), torch.tensor(told[1]))


def _differing(got: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Of token ids every one is as wrong as any other."""
    is_wrong = (got != expected).float()
    return 1 + is_wrong, torch.ones_like(is_wrong)


def _answers(device: torch.device, **options: Any) -> tuple[Tensor, Tensor]:
    """Four requests' tokens, recorded steps queued ahead of each other; and the same steps one after the other, the host choosing."""
    llm = random_llm(
        "tiny", device=device.type, kv_cache_tokens=512, prefix_cache=False
    )  # so that both are computed alike
    params = SamplingParams(max_tokens=12, min_tokens=12, ignore_eos=True, **options)
    graphs = llm.engine.runner.graphs
    if graphs is None and not TINY:
        raise RuntimeError("decoding is not recorded on this machine")
    told = []
    for chooses in (True, False):
        if graphs is not None and not chooses:
            graphs.head = None
        outputs = llm.chat([messages_for(f"Say {word}.") for word in ("one", "two", "three", "four")], params)
        told.append(torch.tensor([output.outputs[0].token_ids for output in outputs]))
    return _differing(*told)


# --- tuning -----------------------------------------------------------------------------------------------------------


def tune_one_row(device: torch.device) -> dict[str, Any]:
    """By product: the fastest cut (None: cuBLAS), its seconds and those of the default. Kept, unless TINY."""
    found: dict[str, Any] = {}
    for size, name in combinations(("tiny",) if TINY else ("3b", "7b"), ("dense", "w8a16")):
        for columns, outputs in (*SHAPES[size], *((HEADS[size],) if name == "dense" else ())):
            weight = random_weight(SCHEMES[name], columns, outputs, device)
            key = key_of(1, weight)
            try:
                cut, took, default = tune(1, weight, device, one_row_cuts(weight))
            except Exception as problem:  # the default serves
                found[key] = {"error": f"{type(problem).__name__}: {problem}"[:500]}
                continue
            found[key] = {"cut": cut and dataclasses.astuple(cut), "seconds": took, "default_seconds": default}
            print(f"{key}: {weight.size_bytes / took / 1e12:.2f} TB/s, {default / took:.2f} x the default", flush=True)
            if not TINY:
                write(torch.cuda.get_device_name(device), {key: cut})
    triton_cuts._table.cache_clear()
    return found


# --- cells ------------------------------------------------------------------------------------------------------------


def media(kind: str) -> tuple[list[Any], list[Any]]:
    """A picture of 1512 x 2016 halves in the model's sizes: 972 tokens with 54 x 72 patches; or frames of a video: 15 x 720 patches."""
    noise = np.random.default_rng(0)
    if TINY:
        frames = noise.integers(0, 256, (4, 56, 56, 3), dtype=np.uint8)
    elif kind == "picture":
        frames = noise.integers(0, 256, (1, 756, 1008, 3), dtype=np.uint8)
    else:
        frames = noise.integers(0, 256, (30, 280, 504, 3), dtype=np.uint8)
    return ([frames[0]], []) if kind == "picture" else ([], [frames])


def open_model(size: str, quantization: str | None) -> tuple[LLM, float]:
    """Random weights, and the seconds that took."""
    options: dict[str, Any] = {"quantization": quantization, "kv_cache_tokens": 4096}
    if TINY:
        options |= {"device": "cpu", "kernels": dict.fromkeys(OPS, "triton"), "kv_cache_tokens": 256}
    began = time.perf_counter()
    llm = random_llm(size, **options)
    return llm, time.perf_counter() - began


def run_cell(
    llm: LLM, size: str, kind: str, machine: MachineLimits, tokens: int, *, chooses: bool = True
) -> dict[str, Any]:
    """`chooses`: whether the card chooses tokens; else the host does, from logits."""
    graphs = llm.engine.runner.graphs
    head = None if graphs is None else graphs.head
    if graphs is not None and not chooses:
        graphs.head = None
    try:
        images, videos = media(kind)
        params = SamplingParams(max_tokens=tokens, min_tokens=tokens, temperature=0.0, ignore_eos=True)
        repeats = BenchOptions(warmup=0 if TINY else 2, repeat=1 if TINY else 5)
        result = bench(llm, messages_for("Describe this.", images, videos), params, repeats, name=size, machine=machine)
    finally:
        if graphs is not None:
            graphs.head = head
    cell: dict[str, Any] = {"tokens_in": result.tokens_in, "tokens_out": tokens, "headline": result.headline()}
    cell["stages"] = {
        stage.name: {k: v for k, v in stage.as_json().items() if k != "repeats_s"} for stage in result.stages
    }
    cell["total_s"], cell["reached"] = result.stage("total").median_s, result.stage("total").reached
    cell["kernels"] = dict(result.kernels)
    cell["recorded"] = None if graphs is None else graphs.failure or len(graphs.recordings)
    return cell


def run_cells(
    report: dict[str, Any], machine: MachineLimits, elapsed: Callable[[], float], save: Callable[[], None]
) -> None:
    """Fills report["cells"], a model opened once for all that are asked of it."""
    cells = report["cells"] = {}
    tokens, device = 3 if TINY else 128, torch.device("cpu" if TINY else "cuda")
    for how in QUANTIZATIONS:
        for size in ("tiny",) if TINY else ("3b", "7b"):
            asked = [("picture", True), ("video", True)]
            if how is None and size != "7b":
                asked.append(("picture", False))
            names = [
                f"{size} {kind} {how or 'bf16'}{'' if chooses else ', tokens chosen on the host'}"
                for kind, chooses in asked
            ]
            llm, load_s, left_out = None, 0.0, "the time was up"
            if elapsed() < BUDGET_S:
                try:
                    llm, load_s = open_model(size, how)
                except Exception as problem:
                    left_out = f"{type(problem).__name__}: {problem}"[:500]
            for name, (kind, chooses) in zip(names, asked, strict=True):
                began = elapsed()
                try:
                    if llm is None or began > BUDGET_S:
                        raise RuntimeError(f"left out: {left_out}")
                    cells[name] = cell = run_cell(llm, size, kind, machine, tokens, chooses=chooses)
                    cell |= {"load_s": load_s, "seconds": elapsed() - began}
                    print(f"{name}: {cell['total_s']:.3f} s, {cell['reached']:.0%} of the limit", flush=True)
                except Exception as problem:
                    cells[name] = {"error": f"{type(problem).__name__}: {problem}"[:500]}
                    print(f"{name}: FAILED {problem}", flush=True)
                save()
            del llm
            free(device)


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def transformers_times(tokens: int, size: str, may_compile: Callable[[], bool]) -> dict[str, Any]:
    """generate() over the same random weights by transformers, in each of its settings; total seconds, best of three."""
    import transformers

    times: dict[str, Any] = {"version": transformers.__version__}
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model"
        command = [sys.executable, "-m", "tools.random_checkpoint", size, str(target)]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        llm = LLM(target, kv_cache_tokens=4096, **({"device": "cpu"} if TINY else {}))
        from saccade.bench.against import _generate_s, _inputs

        images, videos = media("picture")
        inputs = _inputs(llm, llm.prepare(messages_for("Describe this.", images, videos)))
        runner = llm.engine.runner
        model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
            target, dtype=runner.model.dtype, attn_implementation="sdpa"
        )
        model = model.to(runner.model.device).eval()
        for setting, cache in (("sdpa", None), ("sdpa, static cache, compiled", "static")):
            try:
                if cache is not None:
                    if TINY:
                        times[setting] = "left out: nothing to compile for"
                        continue
                    if not may_compile():
                        times[setting] = "left out: the time was up"
                        continue
                    model.generation_config.cache_implementation = cache  # generate() compiles decoding for it
                times[setting] = min(_generate_s(model, inputs, tokens) for _ in range(1 if TINY else 3))
            except Exception as problem:
                times[setting] = f"{type(problem).__name__}: {problem}"[:300]
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a CPU in Triton's interpreter")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write; written anew after every part")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run; all by default")
    arguments = parser.parse_args()
    began = time.perf_counter()
    if not TINY and not torch.cuda.is_available():
        sys.exit("this machine has no CUDA device; --tiny runs every part on a CPU")
    device, dtype = torch.device("cpu" if TINY else "cuda"), torch.float32 if TINY else torch.bfloat16
    report: dict[str, Any] = {
        "is_tiny": TINY,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }

    def elapsed() -> float:
        return time.perf_counter() - began

    def save() -> None:
        report["seconds"] = elapsed()
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")

    def ends(part: str) -> None:
        report["part_seconds"][part] = elapsed() - sum(report["part_seconds"].values())
        save()

    report["part_seconds"] = {}
    machine: MachineLimits | None = None
    wrong: list[dict[str, Any]] = []
    if "kernels" in arguments.only:
        shapes = [(128, 40)] if TINY else [(2048, 2560), (18_944, 3584), (3584, 4608), (5120, 1024), (8192, 1280)]
        report["kernels"] = validate(device, dtype, shapes)
        wrong = [check for check in report["kernels"] if not check["is_right"]]
        print(f"kernels: {len(report['kernels']) - len(wrong)} of {len(report['kernels'])} right", flush=True)
        for check in wrong:
            print(f"  WRONG {check['op']}: {check.get('problem') or check['error']}", flush=True)
        ends("kernels")
    if "tuning" in arguments.only:
        report["tuning"] = tune_one_row(device)
        ends("tuning")
        free(device)
    if "machine" in arguments.only or "cells" in arguments.only:
        machine = measure_machine(device, dtype, **({"buffer_bytes": 1 << 22, "matrices": (128,)} if TINY else {}))
        report["machine"] = dataclasses.asdict(machine)
        print(
            f"{machine.device}: {machine.bytes_per_s / 1e12:.2f} TB/s, {machine.operations_per_s / 1e12:.0f} TFLOP/s "
            f"{machine.dtype}",
            flush=True,
        )
        ends("machine")
    if "cells" in arguments.only and machine is not None:
        run_cells(report, machine, elapsed, save)
        ends("cells")
    if "transformers" in arguments.only:
        try:
            tokens, size = (3, "tiny") if TINY else (128, "3b")
            report["transformers"] = transformers_times(tokens, size, may_compile=lambda: elapsed() < COMPILE_BEGINS_S)
            print(f"transformers, {size} picture bf16: {report['transformers']}", flush=True)
        except Exception as problem:
            report["transformers"] = {"error": f"{type(problem).__name__}: {problem}"[:500]}
        ends("transformers")
    failed = [name for name, cell in report.get("cells", {}).items() if "error" in cell]
    if wrong or failed:
        sys.exit(f"{len(wrong)} kernels wrong, {len(failed)} cells without a result; see {arguments.out}")


if __name__ == "__main__":
    main()
