"""One question about one picture on a CPU, by this engine in each scheme and by other libraries, side by side.

    python benchmarks/cpu.py run                        all systems in turn, round after round, into benchmarks/results/cpu.json
    python benchmarks/cpu.py measure "saccade w4a8"     one system, once, added to the same file
    python benchmarks/cpu.py report                     docs/performance.md and its chart from the file

The model has the shapes of the published 3B and random weights: what it says is noise, what it costs is real. Each measurement is a
process of its own, so that none profits from another's memory; a short answer that is not counted comes first.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"
PAGE = ROOT / "docs" / "performance.md"
CHART = ROOT / "docs" / "performance.svg"

PICTURE = (756, 1008)  # height, width: 972 tokens
TOKENS_OUT = 128
SCHEMES = {
    "saccade bf16": None,
    "saccade w8a16": "w8a16",
    "saccade w8a8": "w8a8-dynamic",
    "saccade w4a8": "w4a8-g128",
}
COLUMNS = (
    "system",
    "vision",
    "prefill",
    "a token",
    "read",
    "of the limit",
    "outside kernels",
    "answer",
    "peak memory",
    "eight at once",
    "rounds",
)


@dataclass(frozen=True)
class Record:
    """Seconds of one answer. `token_bytes`: of weights and cache that a decoded token reads, where it is known."""

    system: str
    version: str
    threads: int
    tokens_in: int
    tokens_out: int
    load_s: float
    vision_s: float  # 0 where the library does not tell it from prefill
    prefill_s: float
    token_s: float
    total_s: float
    batch_tokens_per_s: float | None  # eight requests decoding together, without a picture
    token_bytes: int | None
    outside_kernels: float | None  # share of a decoded token's time spent neither in the decoder's step nor in the head
    peak_memory_bytes: int
    bytes_per_s: float  # the fastest this machine read memory in this process
    load_average: float
    date: str


def measure(system: str, threads: int, preset: str, tokens_out: int) -> Record:
    """Raises SystemExit for an unknown system."""
    import torch

    torch.set_num_threads(threads)
    load_average = os.getloadavg()[0]
    if system in SCHEMES:
        numbers = measure_saccade(SCHEMES[system], threads, preset, tokens_out)
    elif system in PEERS:
        numbers = PEERS[system](threads, preset, tokens_out)
    else:
        sys.exit(f"system {system!r} is unknown; choose one of {', '.join([*SCHEMES, *PEERS])}")
    from saccade.base.meter import peak_memory_bytes
    from saccade.bench.machine import measure_machine

    peak = peak_memory_bytes()
    machine = measure_machine(torch.device("cpu"), torch.bfloat16, buffer_bytes=1 << 30, matrices=(512,))
    return Record(
        system=system,
        threads=threads,
        tokens_out=tokens_out,
        peak_memory_bytes=peak,
        bytes_per_s=machine.bytes_per_s,
        load_average=load_average,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **numbers,
    )


def picture() -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, (*PICTURE, 3), dtype=np.uint8)


def measure_saccade(quantization: str | None, threads: int, preset: str, tokens_out: int) -> dict[str, Any]:
    import saccade
    from saccade import SamplingParams
    from saccade.api import messages_for
    from saccade.bench.model import random_llm
    from saccade.model.layers import size_bytes

    start = time.perf_counter()
    llm = random_llm(
        preset, quantization=quantization, threads=threads, kv_cache_tokens=4096, prefix_cache=False, speculation="off"
    )
    load_s = time.perf_counter() - start
    messages = messages_for("Describe this picture in detail.", [picture()])

    def answer(conversations: Any, count: int) -> Any:
        llm.engine.runner.encoder_cache.clear()
        return llm.chat(conversations, SamplingParams(max_tokens=count, min_tokens=count, temperature=0))

    answer(messages, 3)
    runner, kernel_s = llm.engine.runner, [0.0]
    if runner.decoder_step is not None:
        runner.decoder_step = timed(runner.decoder_step, kernel_s)
    runner.model.head = timed(runner.model.head, kernel_s)  # type: ignore[method-assign]
    start = time.perf_counter()
    output = answer(messages, tokens_out)[0]
    total_s = time.perf_counter() - start
    decode_s = output.timings.decode_s
    outside = 1 - sum(kernel_s[-2 * (tokens_out - 1) :]) / decode_s if runner.decoder_step is not None else None
    texts = [messages_for(f"Tell me about the number {number}.") for number in range(8)]
    together = answer(texts, 24)
    slowest = max(result.timings.decode_s for result in together)
    model, config = llm.engine.runner.model, llm.config
    text, tokens_in = config.text, len(output.prompt_token_ids)
    cache = 2 * text.num_layers * text.num_kv_heads * text.head_dim * 2 * (tokens_in + tokens_out // 2)
    head = 0 if text.tie_word_embeddings else size_bytes(model.language.embed_tokens)
    return {
        "version": saccade.__version__,
        "tokens_in": tokens_in,
        "load_s": load_s,
        "vision_s": output.timings.vision_s,
        "prefill_s": output.timings.prefill_s,
        "token_s": decode_s / (tokens_out - 1),
        "outside_kernels": outside,
        "total_s": total_s,
        "batch_tokens_per_s": 8 * 23 / slowest,
        "token_bytes": size_bytes(model.language) + size_bytes(model.lm_head) * (head > 0) - head + cache,
    }


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The same function, whose every call leaves its seconds behind."""

    def call(*args: Any) -> Any:
        start = time.perf_counter()
        result = function(*args)
        seconds.append(time.perf_counter() - start)
        return result

    return call


def measure_transformers(threads: int, preset: str, tokens_out: int) -> dict[str, Any]:
    """generate() as it comes: bfloat16, SDPA, greedy."""
    import torch
    import transformers
    from transformers.initialization import no_init_weights

    from saccade.api import messages_for
    from saccade.bench.model import stand_in_tokenizer
    from saccade.checkpoints.presets import PRESETS, config_json
    from saccade.inputs.options import MediaLimits, MediaOptions
    from saccade.inputs.pixels import patches

    start = time.perf_counter()
    config = PRESETS[preset]
    theirs = transformers.Qwen2_5_VLConfig(**config_json(config))
    theirs._attn_implementation = "sdpa"
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with no_init_weights():
        model = transformers.Qwen2_5_VLForConditionalGeneration(theirs).eval()
    torch.set_default_dtype(previous)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(min(parameter.numel(), 1 << 20)) * 0.02
            parameter.view(-1).copy_(noise.bfloat16().repeat(-(-parameter.numel() // len(noise)))[: parameter.numel()])
    load_s = time.perf_counter() - start
    prompt = stand_in_tokenizer(config).build(
        messages_for("Describe this picture in detail.", [picture()]), defaults=MediaOptions(), limits=MediaLimits()
    )
    ids = torch.tensor([prompt.token_ids])
    grid = prompt.media[0].receipt.grid
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).long(),
        "pixel_values": patches(prompt.media[0].frames, config),
        "image_grid_thw": torch.tensor([[grid.t, grid.h, grid.w]]),
    }

    def answer_s(count: int) -> float:
        model.model.rope_deltas = None  # kept between calls otherwise
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        return time.perf_counter() - start

    vision_times: list[float] = []
    tower = model.model.visual.forward

    def timed(*args: Any, **keywords: Any) -> Any:
        start = time.perf_counter()
        result = tower(*args, **keywords)
        vision_times.append(time.perf_counter() - start)
        return result

    model.model.visual.forward = timed
    first_s, total_s = answer_s(1), answer_s(tokens_out)
    return {
        "version": transformers.__version__,
        "tokens_in": len(prompt.token_ids),
        "load_s": load_s,
        "vision_s": vision_times[0],
        "prefill_s": first_s - vision_times[0],
        "token_s": (total_s - first_s) / (tokens_out - 1),
        "total_s": total_s,
        "batch_tokens_per_s": None,
        "token_bytes": None,
        "outside_kernels": None,
    }


PEERS: dict[str, Callable[[int, str, int], dict[str, Any]]] = {"transformers bf16": measure_transformers}


# --- the file ----------------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Record]:
    return [Record(**record) for record in json.loads(path.read_text())["records"]] if path.exists() else []


def add(path: Path, record: Record) -> None:
    from saccade.kernels.choose import back_ends, processor_name

    records = [*read(path), record]
    machine = {"processor": processor_name(), "kernels": next(b.reason for b in back_ends() if b.name == "cpu")}
    content = {"machine": machine, "picture": PICTURE, "records": [dataclasses.asdict(r) for r in records]}
    path.write_text(json.dumps(content, indent=1) + "\n")


# --- the page ----------------------------------------------------------------------------------------------------------------


def medians(records: list[Record]) -> list[Record]:
    """One record for each system, each of its numbers the median over rounds."""
    out = []
    for system in dict.fromkeys(record.system for record in records):
        rounds = [record for record in records if record.system == system]
        columns = {
            field.name: [getattr(record, field.name) for record in rounds] for field in dataclasses.fields(Record)
        }
        numbers = {
            name: statistics.median(values)
            for name, values in columns.items()
            if all(isinstance(value, int | float) for value in values)
        }
        out.append(dataclasses.replace(rounds[-1], **numbers))
    return out


def report(path: Path) -> None:
    records = read(path)
    machine = json.loads(path.read_text())["machine"]
    rows = medians(records)
    rounds = {row.system: sum(r.system == row.system for r in records) for row in rows}
    lines = [
        "# Performance on a CPU",
        "",
        "<!-- python benchmarks/cpu.py report -->",
        "",
        f"One picture of {PICTURE[1]} x {PICTURE[0]} pixels, {int(rows[0].tokens_in)} tokens in, {int(rows[0].tokens_out)} out; "
        f"the published 3B's shapes with random weights; {int(rows[0].threads)} threads of {machine['processor']}. "
        f"Kernels: {machine['kernels']}.",
        "",
        "![Seconds of an answer by stage](performance.svg)",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for row in rows:
        rate = row.token_bytes / row.token_s if row.token_bytes else None
        cells = [
            row.system,
            f"{row.vision_s:.1f} s",
            f"{row.prefill_s:.1f} s",
            f"{row.token_s * 1e3:.0f} ms",
            f"{rate / 1e9:.1f} GB/s" if rate else "",
            f"{rate / row.bytes_per_s:.0%}" if rate else "",
            "" if row.outside_kernels is None else f"{row.outside_kernels:.1%}",
            f"{row.total_s:.1f} s",
            f"{row.peak_memory_bytes / 1e9:.1f} GB",
            f"{row.batch_tokens_per_s * row.token_s:.1f} x" if row.batch_tokens_per_s else "",
            str(rounds[row.system]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    loads = [record.load_average for record in records]
    lines += [
        "",
        "Medians over rounds. *Read*: bytes of weights and cache of a decoded token over its time; *the limit* is the fastest "
        "that torch read a gigabyte in the same process. *Outside kernels*: the share of a token's time before and after the "
        "decoder's one call and the output head: choosing requests, packing, sampling, text. *Eight at once*: tokens per second "
        "of eight short requests together, over one request's. Peak memory is the process's, loading included. The system's "
        f"load average before the measurements lay between {min(loads):.1f} and {max(loads):.1f}; other programs make every "
        "number worse.",
        "",
    ]
    PAGE.write_text("\n".join(lines))
    CHART.write_text(chart(rows))


def chart(rows: list[Record]) -> str:
    """Stacked bars: vision, prefill, decode."""
    colors = {"vision": "#7aa6c2", "prefill": "#e0a458", "decode": "#8fb77a"}
    left, width, height = 150, 560, 26
    longest = max(row.total_s for row in rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 70}" height="{(len(rows) + 1) * height + 10}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for index, (stage, color) in enumerate(colors.items()):
        x = left + index * 90
        parts.append(
            f'<rect x="{x}" y="6" width="12" height="12" fill="{color}"/><text x="{x + 17}" y="17">{stage}</text>'
        )
    for line, row in enumerate(rows, start=1):
        y, x = line * height + 4, float(left)
        parts.append(f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{row.system}</text>')
        seconds = (row.vision_s, row.prefill_s, row.token_s * (row.tokens_out - 1))
        for value, color in zip(seconds, colors.values(), strict=True):
            span = value / longest * width
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="{span:.1f}" height="{height - 7}" fill="{color}"/>')
            x += span
        parts.append(f'<text x="{x + 6:.1f}" y="{y + 15}">{row.total_s:.1f} s</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "measure", "report"])
    parser.add_argument("systems", nargs="*", help="those to measure; all if none is named")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--preset", default="3b", help="3b, 7b or tiny")
    parser.add_argument("--tokens-out", type=int, default=TOKENS_OUT)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    systems = options.systems or [*SCHEMES, *PEERS]
    if options.command == "report":
        report(options.results)
    elif options.command == "measure":
        for system in systems:
            record = measure(system, options.threads, options.preset, options.tokens_out)
            add(options.results, record)
            print(json.dumps(dataclasses.asdict(record)))
    else:
        keywords = {"threads": options.threads, "preset": options.preset, "tokens-out": options.tokens_out}
        arguments = [f"--{name}={value}" for name, value in keywords.items()]
        for number in range(options.rounds):
            for system in systems[number % len(systems) :] + systems[: number % len(systems)]:
                command = [sys.executable, __file__, "measure", system, *arguments, f"--results={options.results}"]
                subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
