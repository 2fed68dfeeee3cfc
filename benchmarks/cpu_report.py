"""docs/performance.md and its charts from the measurements of benchmarks/cpu.py: tables, and where this engine stands to its aims.

Each file of measurements is a machine, and a section. An aim is a ratio of two medians of one run, never a number of seconds: another
machine may be faster or slower, and the ratio stays.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from cpu_record import Record, medians, read

from saccade.bench.work import Storage, prefill_work, vision_work
from saccade.checkpoints.presets import PRESETS
from saccade.geometry import Grid

GRIDS = {"picture": Grid(1, 54, 72), "video": Grid(15, 20, 36)}
COLUMNS = (
    "system",
    "vision",
    "prefill",
    "first token",
    "a token",
    "read",
    "of the limit",
    "outside kernels",
    "answer",
    "peak memory",
    "loaded in",
    "eight at once",
    "rounds",
)
W4A8, W8A8, BF16 = "saccade w4a8", "saccade w8a8", "saccade bf16"
LLAMA_4BIT = ("llama.cpp Q4_0", "llama.cpp Q4_K_M")
TRANSFORMERS = ("transformers bf16", "transformers bf16, oneDNN off in decode")
TRANSFORMERS_FLOAT32 = ("transformers float32",)  # where torch has no fast bfloat16


@dataclass(frozen=True)
class Aim:
    """`value` is to be at most `bound`, or at least; None where a system of it was not measured."""

    what: str
    value: float | None
    bound: float
    is_ceiling: bool = True
    unit: str = "%"

    @property
    def line(self) -> str:
        show = {"%": "{:.0%}", "x": "{:.2f} x", "GB": "{:.2f} GB"}[self.unit]
        bound = f"{'at most' if self.is_ceiling else 'at least'} {show.format(self.bound)}"
        if self.value is None:
            return f"| {self.what} | not measured | {bound} | |"
        is_met = self.value <= self.bound if self.is_ceiling else self.value >= self.bound
        return f"| {self.what} | {show.format(self.value)} | {bound} | {'yes' if is_met else '**no**'} |"


def aims(rows: dict[str, Record], preset: str) -> list[Aim]:
    """All that is claimed of the picture cell."""

    def against(field: str, label: str, ours: str, bound: float, *theirs: str) -> Aim:
        """Ours over the least of theirs, of those that were measured."""
        there = [name for name in theirs if name in rows]
        least = min((getattr(rows[name], field) for name in there), default=None)
        value = None if least is None or ours not in rows else getattr(rows[ours], field) / least
        return Aim(f"{label}, {ours.removeprefix('saccade ')} over {' and '.join(there or theirs)}", value, bound)

    def reading(name: str) -> float | None:
        return rows[name].read_bytes_per_s / rows[name].bytes_per_s if name in rows else None

    def reading_over(ours: str, theirs: str) -> float | None:
        return rows[ours].read_bytes_per_s / rows[theirs].read_bytes_per_s if ours in rows and theirs in rows else None

    def arithmetic(name: str) -> float | None:
        row = rows.get(name)
        if row is None or row.integer_operations_per_s is None:
            return None
        config = PRESETS[preset]
        work = vision_work(config, [GRIDS["picture"]], Storage()).total + prefill_work(config, row.tokens_in, Storage())
        return work.operations / (row.vision_s + row.prefill_s) / row.integer_operations_per_s

    def eight(name: str) -> float | None:
        row = rows.get(name)
        return row.batch_tokens_per_s * row.token_s if row and row.batch_tokens_per_s else None

    transformers = TRANSFORMERS_FLOAT32 if TRANSFORMERS_FLOAT32[0] in rows else TRANSFORMERS
    return [
        *(Aim(f"decode, {name}: bytes read over the limit", reading(name), 0.92, False) for name in (BF16, W8A8, W4A8)),
        *(
            Aim(f"decode, w4a8: bytes a second over {peer}'s", reading_over(W4A8, peer), 1, False)
            for peer in LLAMA_4BIT
        ),
        Aim("decode, w8a8: bytes a second over llama.cpp Q8_0's", reading_over(W8A8, "llama.cpp Q8_0"), 1, False),
        *(
            Aim(f"vision and prefill, {name}: operations over oneDNN's int8 rate", arithmetic(name), 0.8, False)
            for name in (W8A8, W4A8)
        ),
        against("total_s", "answer", W4A8, 0.40, *LLAMA_4BIT),
        against("total_s", "answer", W4A8, 0.58, "OpenVINO int4", "vLLM w8a8"),
        against("total_s", "answer", W8A8, 0.75, "vLLM w8a8"),
        against("total_s", "answer", W8A8, 0.70, "OpenVINO int8"),
        against("total_s", "answer", BF16, 0.55, transformers[0]),
        *([against("total_s", "answer", BF16, 0.85, *transformers)] if len(transformers) > 1 else []),
        against("total_s", "answer", BF16, 1.00, "vLLM bf16"),
        against("first_token_s", "first token", W4A8, 0.25, *LLAMA_4BIT),
        against("first_token_s", "first token", W4A8, 0.50, "OpenVINO int4"),
        against("first_token_s", "first token", W8A8, 0.25, "llama.cpp Q8_0"),
        against("first_token_s", "first token", W8A8, 0.50, "OpenVINO int8"),
        against("first_token_s", "first token", W8A8, 0.75, "vLLM w8a8"),
        against("peak_memory_bytes", "peak memory", W4A8, 1.00, *LLAMA_4BIT, "OpenVINO int4"),
        against("peak_memory_bytes", "peak memory", W8A8, 1.00, "llama.cpp Q8_0", "OpenVINO int8", "vLLM w8a8"),
        against("peak_memory_bytes", "peak memory", BF16, 1.00, *transformers, "vLLM bf16"),
        Aim("peak memory, w4a8", rows[W4A8].peak_memory_bytes / 1e9 if W4A8 in rows else None, 3.5, unit="GB"),
        *(Aim(f"eight requests over one, {name}", eight(name), 5.0, False, "x") for name in (W4A8, W8A8, BF16)),
    ]


def report(files: list[Path], docs: Path) -> None:
    """Writes performance.md and the charts into `docs`: a section for each file."""
    lines = [
        "# Performance on a CPU",
        "",
        "<!-- python benchmarks/cpu.py report -->",
        "",
        "A published size's shapes with random weights. All systems of a machine in turn, round robin, medians over rounds; how "
        "the others were obtained, converted and set: [notes/peers.md](notes/peers.md).",
        "",
        "*Vision* is the tower, *first token* everything before it, preprocessing included. *Read*: bytes of weights and cache "
        "of a decoded token over its time; *the limit* is the fastest that torch read a gigabyte in the same minute. *Outside "
        "kernels*: the share of a token's time before and after the decoder's one call and the output head: choosing "
        "requests, packing, sampling, text. *Eight at once*: tokens per second of eight short requests together, over one "
        "request's. Peak memory is the process's, loading included. An aim against several systems is against the best of those "
        "that were measured.",
    ]
    for file in files:
        lines += machine_section(file, docs)
    (docs / "performance.md").write_text("\n".join([*lines, ""]))
    print("\n".join(lines))


def machine_section(file: Path, docs: Path) -> list[str]:
    """One machine's tables and aims; its charts are written into `docs`."""
    records, content = read(file), json.loads(file.read_text())
    machine, loads = content["machine"], [record.load_average for record in records]
    lines = [
        "",
        f"## {records[0].threads} threads of {machine['processor']}",
        "",
        f"The {content['preset'].upper()}. Kernels: {machine['kernels']}. The system's load average before the measurements lay "
        f"between {min(loads):.1f} and {max(loads):.1f}; other programs make every number worse."
        + (f" {machine['note']}" if "note" in machine else ""),
    ]
    for media in GRIDS:
        rows = medians([record for record in records if record.media == media])
        if not rows:
            continue
        rounds = {name: sum(r.system == name and r.media == media for r in records) for name in rows}
        chart_name = f"{file.stem.replace('cpu', 'performance', 1)}-{media}.svg"
        (docs / chart_name).write_text(chart(list(rows.values())))
        lines += ["", *section(media, list(rows.values()), rounds, chart_name)]
        if media == "picture":
            lines += [
                "",
                "### Where this stands to its aims",
                "",
                "| picture cell | measured | aim | met |",
                "|---|---|---|---|",
            ]
            lines += [aim.line for aim in aims(rows, content["preset"])]
    return lines


def section(media: str, rows: list[Record], rounds: dict[str, int], chart_name: str) -> list[str]:
    shape = {"picture": "One picture of 1008 x 756 pixels", "video": "One video, 30 frames of 504 x 280 pixels"}[media]
    lengths = sorted({int(row.tokens_in) for row in rows})
    tokens_in = str(lengths[0]) if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
    lines = [
        f"### {shape}, {tokens_in} tokens in, {int(rows[0].tokens_out)} out",
        "",
        f"![Seconds of an answer by stage]({chart_name})",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for row in rows:
        cells = [
            f"{row.system} ({row.version})",
            f"{row.vision_s:.1f} s",
            f"{row.prefill_s:.1f} s",
            f"{row.first_token_s:.1f} s",
            f"{row.token_s * 1e3:.0f} ms",
            f"{row.read_bytes_per_s / 1e9:.1f} GB/s",
            f"{row.read_bytes_per_s / row.bytes_per_s:.0%}",
            "" if row.outside_kernels is None else f"{row.outside_kernels:.1%}",
            f"{row.total_s:.1f} s",
            f"{row.peak_memory_bytes / 1e9:.1f} GB",
            f"{row.load_s:.1f} s",
            "" if row.batch_tokens_per_s is None else f"{row.batch_tokens_per_s * row.token_s:.1f} x",
            str(rounds[row.system]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def chart(rows: list[Record]) -> str:
    """Stacked bars: vision, prefill (all else before the first token included), decode."""
    colors = {"vision": "#7aa6c2", "prefill": "#e0a458", "decode": "#8fb77a"}
    left, width, height = 260, 560, 26
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
        seconds = (row.vision_s, row.first_token_s - row.vision_s, row.token_s * (row.tokens_out - 1))
        for value, color in zip(seconds, colors.values(), strict=True):
            span = value / longest * width
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="{span:.1f}" height="{height - 7}" fill="{color}"/>')
            x += span
        parts.append(f'<text x="{x + 6:.1f}" y="{y + 15}">{row.total_s:.1f} s</text>')
    return "\n".join([*parts, "</svg>", ""])
