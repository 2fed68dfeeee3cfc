"""What an evaluation found, for people: the terminal's lines, the README's table, a page with plots and the worst answers.

Knows figures as `Evaluation.figures` writes them; runs nothing.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from saccade.evals.run import Evaluation, Outcome
from saccade.inputs.prompt import Medium

Figures = Mapping[str, Any]

NUM_WORST = 12
FRAMES_SHOWN = 4  # of a clip
BINS_PER_DECADE = 4
NEW_LINE, TABLE_FOLLOWS = "\n", "\n\n"
SMALLEST_KL = 1e-8  # nats; smaller ones share the first bin


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def interval(values: Mapping[str, float]) -> str:
    return f"{100 * values['low']:.1f}–{100 * values['high']:.1f}"


def small(value: float) -> str:
    """A KL or a p-value: three digits, whatever its size."""
    return "0" if value == 0 else f"{value:.3g}"


# --- terminal --------------------------------------------------------------------------------------------------------


def render_text(figures: Figures) -> str:
    """The result first, then a line for each task."""
    lines = [
        f"{figures['model']}: {percent(figures['mean']['mean'])} right on average over {len(figures['tasks'])} tasks "
        f"({interval(figures['mean'])}), {figures['num_items']} items"
    ]
    if figures["comparisons"]:
        whole = figures["comparisons"][""]
        lines.append(
            f"{figures['against']}: {percent(whole['score']['mean'])}; difference "
            f"{100 * whole['difference']['mean']:+.1f} points ({interval(whole['difference'])}), "
            f"McNemar p = {small(whole['mcnemar']['p_value'])} "
            f"({whole['mcnemar']['only_a']} right here alone, {whole['mcnemar']['only_b']} there alone)"
        )
        lines.append(_divergence_text(whole))
    if figures["num_errors"]:
        lines.append(f"{figures['num_errors']} items could not be asked and count as wrong; see --json")
    lines += ["", *_columns([_header(figures), *(_row(figures, task) for task in figures["tasks"])])]
    return "\n".join(lines)


def _divergence_text(comparison: Figures) -> str:
    found = comparison["divergence"]
    first = comparison["median_first_divergence"]
    return (
        f"KL {small(found['mean_kl'])} mean, {small(found['p99_kl'])} p99 over {found['num_tokens']} answer tokens, "
        f"top-1 agreement {percent(found['top1_agreement'])}; greedy answers equal {percent(comparison['greedy_match'])}"
        + ("" if first is None else f", the others differ from token {first:g} on (median)")
    )


def _header(figures: Figures) -> list[str]:
    head = ["task", "metric", "items", "right", "95 % interval"]
    return [*head, "reference", "KL", "p99 KL", "top-1", "p"] if figures["comparisons"] else head


def _row(figures: Figures, task: Figures) -> list[str]:
    name = task["task"] if task["overlap"] is None else f"{task['task']} (mean IoU {task['overlap']:.2f})"
    row = [name, task["metric"], str(task["num_items"]), percent(task["score"]["mean"]), interval(task["score"])]
    if figures["comparisons"]:
        found = figures["comparisons"][task["task"]]
        divergence = found["divergence"]
        row += [
            percent(found["score"]["mean"]),
            small(divergence["mean_kl"]),
            small(divergence["p99_kl"]),
            percent(divergence["top1_agreement"]),
            small(found["mcnemar"]["p_value"]),
        ]
    return row


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    left = 2  # columns of words; the others are figures
    return [
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def render_markdown(figures: Figures) -> str:
    """A table for a page such as the README, from the figures alone, as `saccade eval --markdown` prints it."""
    header = _header(figures)
    rows = [header, ["---"] * 2 + ["---:"] * (len(header) - 2), *(_row(figures, task) for task in figures["tasks"])]
    mean = [
        "**mean over tasks**",
        "",
        str(figures["num_items"]),
        f"**{percent(figures['mean']['mean'])}**",
        interval(figures["mean"]),
    ]
    if figures["comparisons"]:
        whole = figures["comparisons"][""]
        divergence = whole["divergence"]
        mean += [
            percent(whole["score"]["mean"]),
            small(divergence["mean_kl"]),
            small(divergence["p99_kl"]),
            percent(divergence["top1_agreement"]),
            small(whole["mcnemar"]["p_value"]),
        ]
    return "\n".join("| " + " | ".join(row) + " |" for row in [*rows, mean])


# --- the page --------------------------------------------------------------------------------------------------------


def worst(evaluation: Evaluation, count: int = NUM_WORST) -> list[int]:
    """Numbers of the items to look at: where there is a reference, those it has right and the model wrong, then by KL; else
    the wrong ones, one of each task in turn."""
    outcomes = evaluation.outcomes
    if evaluation.pairings:
        pairs = evaluation.pairings
        lost = [pair.reference_is_right and not outcome.is_right for pair, outcome in zip(pairs, outcomes, strict=True)]
        return sorted(range(len(outcomes)), key=lambda i: (not lost[i], -pairs[i].kl))[:count]
    wrong: dict[str, list[int]] = {}
    for index, outcome in enumerate(outcomes):
        if not outcome.is_right:
            wrong.setdefault(outcome.item.task, []).append(index)
    ranked = [(place, index) for rows in wrong.values() for place, index in enumerate(rows)]
    return [index for _, index in sorted(ranked)][:count]


def render_html(evaluation: Evaluation, media: Mapping[int, Sequence[Medium]]) -> str:
    """One file that needs no other. `media`: pictures and clips of the `worst` items, by item number, as the model sees them."""
    figures = evaluation.figures()
    title = f"{evaluation.model} against {evaluation.against}" if evaluation.against else evaluation.model
    table = [_header(figures), *(_row(figures, task) for task in figures["tasks"])]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p class=lead>{html.escape(render_text(figures).partition(TABLE_FOLLOWS)[0]).replace(NEW_LINE, '<br>')}</p>",
        "<h2>Right answers by task</h2>",
        accuracy_bars(figures),
        _table(table),
    ]
    if evaluation.pairings:
        parts += ["<h2>How far the predictions lie apart</h2>", kl_histogram(evaluation.token_kl.numpy())]
        parts.append(f"<p>{html.escape(_divergence_text(figures['comparisons']['']))}.</p>")
    parts.append("<h2>Answers to look at</h2><div class=cards>")
    parts += [_card(evaluation, index, media.get(index, ())) for index in worst(evaluation)]
    parts.append("</div>")
    options = ", ".join(f"{name} {value}" for name, value in figures["options"].items())
    parts.append(f"<footer>saccade eval, {html.escape(options)}. Intervals: 95 %, bootstrap over items.</footer>")
    return _PAGE.replace("{title}", html.escape(title)).replace("{body}", "\n".join(parts))


def _table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def accuracy_bars(figures: Figures) -> str:
    """A bar for each task with its interval as a line; the reference's mean as a tick."""
    row, left, width, right = 26, 130, 520, 70
    tasks = figures["tasks"]
    height = row * len(tasks) + 30
    parts = [f'<svg viewBox="0 0 {left + width + right} {height}" role="img" aria-label="right answers by task">']
    for share in (0, 0.25, 0.5, 0.75, 1):
        x = left + share * width
        parts.append(f'<line x1="{x:g}" x2="{x:g}" y1="0" y2="{height - 22}" class=grid />')
        parts.append(f'<text x="{x:g}" y="{height - 6}" text-anchor="middle" class=tick>{100 * share:g} %</text>')
    for number, task in enumerate(tasks):
        y, score = row * number + row / 2, task["score"]
        low, mean, high = (left + width * score[name] for name in ("low", "mean", "high"))
        parts.append(f'<text x="{left - 8}" y="{y + 4:g}" text-anchor="end">{html.escape(task["task"])}</text>')
        parts.append(f'<rect x="{left}" y="{y - 8:g}" width="{mean - left:.1f}" height="16" class=bar />')
        parts.append(f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y:g}" y2="{y:g}" class=whisker />')
        if task["task"] in figures["comparisons"]:
            x = left + width * figures["comparisons"][task["task"]]["score"]["mean"]
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 10:g}" y2="{y + 10:g}" class=reference />')
        parts.append(f'<text x="{left + width + 8}" y="{y + 4:g}">{percent(score["mean"])}</text>')
    note = "<p class=note>The dark line is the 95 % interval" + (
        ", the orange tick the reference's mean" if figures["comparisons"] else ""
    )
    return "".join(parts) + "</svg>" + note + ".</p>"


def kl_histogram(kl: Any) -> str:
    """How many answer tokens have a KL of which size; the horizontal axis is logarithmic."""
    low, high = math.log10(SMALLEST_KL), 2.0
    num_bins = round((high - low) * BINS_PER_DECADE)
    counts, _ = np.histogram(np.log10(np.clip(kl, SMALLEST_KL, 10**high * 0.999)), bins=num_bins, range=(low, high))
    left, width, height = 60, 640, 200
    tallest = max(int(counts.max()), 1)
    parts = [f'<svg viewBox="0 0 {left + width + 20} {height + 46}" role="img" aria-label="histogram of KL">']
    for number, count in enumerate(counts):
        bar, x = height * int(count) / tallest, left + width * number / num_bins
        parts.append(
            f'<rect x="{x:.1f}" y="{height - bar + 4:.1f}" width="{width / num_bins - 1:.1f}" height="{bar:.1f}" class=bar />'
        )
    for exponent in range(round(low), round(high) + 1):
        x = left + width * (exponent - low) / (high - low)
        label = f"≤ 1e{exponent}" if exponent == round(low) else f"1e{exponent}" if exponent else "1"
        parts.append(f'<text x="{x:.1f}" y="{height + 20}" text-anchor="middle" class=tick>{label}</text>')
    parts.append(f'<text x="{left - 6}" y="14" text-anchor="end" class=tick>{tallest}</text>')
    parts.append(f'<text x="{left - 6}" y="{height + 4}" text-anchor="end" class=tick>0</text>')
    parts.append(
        f'<text x="{left + width / 2}" y="{height + 40}" text-anchor="middle">KL of an answer token, nats</text>'
    )
    return "".join(parts) + "</svg>"


def _card(evaluation: Evaluation, index: int, media: Sequence[Medium]) -> str:
    outcome: Outcome = evaluation.outcomes[index]
    item = outcome.item
    lines = [
        f"<b>{html.escape(item.task)}</b> {html.escape(item.id)}",
        f"<q>{html.escape(item.question)}</q>",
        f"right: <code>{html.escape(item.answer)}</code>",
        f"answer: <code class={'good' if outcome.is_right else 'bad'}>{html.escape(outcome.error or outcome.text)}</code>",
    ]
    if evaluation.pairings:
        pairing = evaluation.pairings[index]
        first = (
            "equal to the reference's"
            if pairing.first_divergence is None
            else f"differs from token {pairing.first_divergence} on"
        )
        lines.append(f"KL {small(pairing.kl)}, {first}")
    pictures = "".join(f'<img src="{_data_uri(frame)}" alt="">' for medium in media for frame in _frames(medium))
    return f"<div class=card><div>{pictures}</div><p>{'<br>'.join(lines)}</p></div>"


def _frames(medium: Medium) -> list[Any]:
    frames = medium.frames.permute(0, 2, 3, 1).numpy()  # [F, H, W, 3]
    chosen = np.linspace(0, len(frames) - 1, min(len(frames), FRAMES_SHOWN)).round().astype(int)
    return [frames[number] for number in chosen]


def _data_uri(pixels: Any) -> str:
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels)
    picture.thumbnail((360, 360))
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root { color-scheme: light dark; --ink: #1d2733; --paper: #fff; --soft: #66717e; --line: #d8dee5; --bar: #6ea8d8; --dark: #17466e }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e2e8ee; --paper: #14191f; --soft: #93a0ad; --line: #323c46; --bar: #3d78a8; --dark: #b8dcf7 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
body { max-width: 860px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em; margin-bottom: 0 } h2 { font-size: 1.15em; margin-top: 2em } .lead { font-size: 1.05em }
svg { width: 100%; max-width: 720px; font: 12px system-ui, sans-serif; fill: var(--ink) }
.bar { fill: var(--bar) } .grid { stroke: var(--line) } .whisker { stroke: var(--dark); stroke-width: 2 }
.reference { stroke: #e07b1f; stroke-width: 3 } .tick, .note, footer { fill: var(--soft); color: var(--soft); font-size: 12px }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
td, th { padding: 3px 9px; border-bottom: 1px solid var(--line); text-align: right }
td:nth-child(-n+2), th:nth-child(-n+2) { text-align: left }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 14px }
.card { border: 1px solid var(--line); border-radius: 6px; padding: 10px; font-size: 13px; overflow-wrap: anywhere }
.card img { max-width: 48%; min-width: 80px; margin: 0 4px 4px 0; image-rendering: auto } .card p { margin: 4px 0 0 }
.good { color: #1c7c3c } .bad { color: #c23b22 } code { font: 12px ui-monospace, monospace; white-space: pre-wrap }
</style></head><body>
{body}
</body></html>
"""
