"""report.html: a report as one page that needs nothing else, drawn as inline SVG, for wide and narrow windows, light and dark.

Knows numbers and how to show them; knows no model. Nothing of a checkpoint's names reaches the page unescaped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from saccade.quantize.report import (
    FILE_NAME,
    KINDS,
    QUANTILES,
    BlockMeasure,
    LayerMeasure,
    QuantizationReport,
    to_json,
)

PAGE_NAME = "report.html"
NUM_WORST = 10
NUM_RANKED = 15
# Colours of a heat map from its first number of dB to its last: red is bad, blue is good, both are told apart by everybody
# (ColorBrewer's RdYlBu), and dark figures are legible on each.
LOW_DB, HIGH_DB = 5.0, 45.0
COLOURS = (
    (215, 82, 63),
    (244, 139, 92),
    (253, 201, 128),
    (245, 236, 178),
    (196, 226, 222),
    (139, 187, 217),
    (104, 148, 200),
)
PROJECTIONS = {
    "model": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "visual": ("qkv", "proj", "gate_proj", "up_proj", "down_proj"),
}
# One linear of each different input, and what the input is.
INPUTS = {
    "model": {
        "q_proj": "into q, k, v",
        "o_proj": "into o",
        "gate_proj": "into gate, up",
        "down_proj": "into down",
    },
    "visual": {"qkv": "into qkv", "proj": "into proj", "gate_proj": "into gate, up", "down_proj": "into down"},
}
PARTS = {"model": "Decoder", "visual": "Vision tower"}
MANY_CLIPPED, OUTLIER_RATIO, HEAVY_TAIL, FAR_APART_DB = 1e-3, 20.0, 8.0, 6.0  # what a reason is given from


def write_report(report: QuantizationReport, folder: Path) -> None:
    """report.json and report.html in `folder`, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE_NAME).write_text(to_json(report), encoding="utf-8")
    (folder / PAGE_NAME).write_text(page(report), encoding="utf-8")


def page(report: QuantizationReport) -> str:
    """The whole page. What the report does not say has no section."""
    sections = [
        _tiles(report),
        _checks(report),
        *(_heat_maps(report.layers)),
        _worst(report.layers),
        _sensitivity(report),
        *(_stream(report.blocks)),
        *(_ranges(report.layers)),
        _cost(report),
        _recipe(report),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.name)}: quantization report</title><style>{_STYLE}</style></head><body><main>"
        f"<header><h1>{escape(report.name)}</h1>{_badge(report.verdict)}</header>"
        f"<p class=quiet>{escape(_origin(report))}</p>{''.join(sections)}</main></body></html>\n"
    )


def _origin(report: QuantizationReport) -> str:
    parts = [f"made from {report.source}" * bool(report.source), f"measured on {report.machine}" * bool(report.machine)]
    return ", ".join(part for part in parts if part)


# --- numbers ---------------------------------------------------------------------------------------------------------


def _tiles(report: QuantizationReport) -> str:
    cost, logits = report.cost, report.logits
    tiles: list[tuple[str, str, str]] = []
    if cost.output_bytes is not None:
        before = cost.source_bytes
        share = f"{cost.output_bytes / before:.0%} of {_size(before)}" if before else ""
        tiles.append((_size(cost.output_bytes), "size", share))
    if logits is not None:
        tiles += [
            (f"{logits.kl_mean:.3g}", "mean KL, nats", f"99th percentile {logits.kl_p99:.3g}"),
            (f"{logits.top1:.1%}", "same best token", f"of {logits.num_tokens} in {logits.num_samples} answers"),
            (f"{logits.greedy_prefix:.0%}", "of greedy answers agree", "before they part"),
        ]
    if worst := worst_layers(report.layers)[:1]:
        tiles.append((f"{worst[0].worst_db:.1f} dB", "worst layer", worst[0].module))
    if cost.seconds:
        peak = f"at most {_size(cost.peak_memory_bytes)} of memory" if cost.peak_memory_bytes else ""
        tiles.append((_time(sum(cost.seconds.values())), "time", peak))
    shown = (
        f"<div class=tile><b>{escape(value)}</b><span>{escape(name)}</span><small>{escape(note)}</small></div>"
        for value, name, note in tiles
    )
    return f"<div class=tiles>{''.join(shown)}</div>" if tiles else ""


def _checks(report: QuantizationReport) -> str:
    if not report.checks:
        return ""
    rows = []
    for check in report.checks:
        details = ""
        if check.details:
            lines = "".join(f"<li>{escape(line)}</li>" for line in check.details)
            opened = " open" if check.verdict == "fail" else ""
            details = f"<details{opened}><summary>{len(check.details)} in detail</summary><ul>{lines}</ul></details>"
        rows.append(f"<tr><td>{_badge(check.verdict)}<td>{escape(check.name)}<td>{escape(check.facts)}{details}</tr>")
    return _section("Checks", f"<table class=checks>{''.join(rows)}</table>")


def _badge(verdict: str) -> str:
    sign = {"pass": "✓", "warn": "!", "fail": "✗"}[verdict]
    return f"<span class='badge {verdict}'>{sign} {verdict}</span>"


def worst_layers(layers: Sequence[LayerMeasure]) -> list[LayerMeasure]:
    """The quantized layers, the worst output first."""
    measured = [layer for layer in layers if layer.worst_db is not None and layer.scheme != "dense"]
    return sorted(measured, key=lambda layer: layer.worst_db or 0.0)


def _worst(layers: Sequence[LayerMeasure]) -> str:
    worst = worst_layers(layers)[:NUM_WORST]
    if not worst:
        return ""
    rows = [
        f"<tr><td class=name>{escape(layer.module)}<td>{escape(layer.scheme)}"
        + "".join(f"<td class=number>{_db(layer.output_db.get(kind))}" for kind in KINDS)
        + f"<td class=number>{_db(layer.weight_db)}<td class=why>{escape(reason(layer))}</tr>"
        for layer in worst
    ]
    head = "<tr><th>layer<th>scheme<th>text<th>picture<th>first<th>weight<th>why</tr>"
    note = "Signal to noise in dB: of the output by kind of token, and of the weight alone."
    return _section("The worst layers", f"<div class=wide><table>{head}{''.join(rows)}</table></div>", note)


def reason(layer: LayerMeasure) -> str:
    """Where most of a layer's error comes from, of the three places it can come from, and the likeliest cause there."""
    sources = {"weight": layer.weight_db, "rounding": layer.rounding_db, "input": layer.input_db}
    measured = {name: db for name, db in sources.items() if db is not None}
    if not measured:
        return "its parts were not measured"
    main = min(measured, key=lambda name: measured[name])
    lines = {
        "weight": "rounding its weight",
        "rounding": "rounding its input",
        "input": "what the linears before it hand on",
    }
    parts = [f"{lines[main]} ({measured[main]:.0f} dB)"]
    if main == "weight" and (layer.kurtosis or 0) > HEAVY_TAIL:
        parts.append(f"a few weights are far larger than the rest (kurtosis {layer.kurtosis:.0f})")
    if main == "rounding" and (layer.clipped or 0) > MANY_CLIPPED:
        parts.append(f"the static range cuts {layer.clipped:.2%} of the values")
    if main == "rounding" and layer.ranges is not None:
        top, median = layer.ranges.after[-1], layer.ranges.after[QUANTILES.index(0.5)]
        if top > OUTLIER_RATIO * median > 0:
            parts.append(f"the largest channel is {top / median:.0f} times the median one")
    picture, text = layer.output_db.get("picture"), layer.output_db.get("text")
    if picture is not None and text is not None and abs(picture - text) > FAR_APART_DB:
        parts.append("pictures suffer more than text" if picture < text else "text suffers more than pictures")
    return "; ".join(parts)


def _sensitivity(report: QuantizationReport) -> str:
    """The products whose rounding the answers feel most, and what mixed precision makes of it."""
    parts = []
    if mixed := report.mixed:
        parts.append(
            f"<p>Stored better: {len(mixed.rules)} linears, {_size(mixed.extra_bytes)} more; mean KL {mixed.kl_before:.3g} becomes "
            f"{mixed.kl:.3g} (target {mixed.target_kl:.3g}).</p>"
        )
        if mixed.rules:
            rules = "".join(f"<li>{escape(rule['match'])}: {escape(rule['scheme'])}</li>" for rule in mixed.rules)
            parts.append(f"<details><summary>Which, and how</summary><ul>{rules}</ul></details>")
    if ranked := report.sensitivity[:NUM_RANKED]:
        most = max(max(entry.kl for entry in ranked), 1e-30)
        rows = "".join(
            f"<tr><td class=name>{escape(_product(entry.modules))}<td>{escape(entry.scheme)}<td class=number>{entry.kl:.3g}"
            f"<td class=bar><i style='width:{100 * entry.kl / most:.1f}%'></i></tr>"
            for entry in ranked
        )
        parts.append(f"<div class=wide><table>{rows}</table></div>")
    note = "Mean KL to the float model when this alone is quantized."
    return _section("What the answers feel most", "".join(parts), note) if parts else ""


def _product(modules: Sequence[str]) -> str:
    """`model.layers.0.self_attn.q_proj, k_proj, v_proj`."""
    return ", ".join([*modules[:1], *(module.rpartition(".")[2] for module in modules[1:])])


# --- heat maps -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    part: str  # "model" or "visual"
    index: int
    projection: str


def _place(module: str) -> _Place | None:
    """Where in a map a linear of a block stands; None for those of no block."""
    names = module.split(".")
    if len(names) < 4 or names[0] not in PROJECTIONS or not names[2].isdigit():
        return None
    return _Place(names[0], int(names[2]), names[-1]) if names[-1] in PROJECTIONS[names[0]] else None


def _heat_maps(layers: Sequence[LayerMeasure]) -> Iterator[str]:
    placed = {place: layer for layer in layers if (place := _place(layer.module)) is not None}
    for part, title in PARTS.items():
        kinds = [
            kind for kind in KINDS if any(kind in layer.output_db for p, layer in placed.items() if p.part == part)
        ]
        maps = [
            (f"<h3>{kind} tokens</h3>" * (part == "model"))
            + _heat_map({place: layer for place, layer in placed.items() if place.part == part}, part, kind)
            for kind in kinds
            if kind != "first"
        ]
        if maps:
            note = (
                "Signal to noise of each linear's output in dB, blocks before it exact; it holds the errors of the linears "
                "before it in its block. Hatched: kept in float."
            )
            yield _section(f"{title}: error by layer", _legend() + "".join(maps), note)


def _heat_map(placed: Mapping[_Place, LayerMeasure], part: str, kind: str) -> str:
    width, height, left, top = 30, 22, 76, 18
    count = 1 + max(place.index for place in placed)
    parts = []
    for row, projection in enumerate(PROJECTIONS[part]):
        y = top + row * height
        parts.append(f"<text x={left - 6} y={y + 15} text-anchor=end>{projection}</text>")
        for index in range(count):
            layer = placed.get(_Place(part, index, projection))
            db = None if layer is None else layer.output_db.get(kind)
            if layer is None or db is None:
                continue
            x = left + index * width
            hatch = f"<rect x={x} y={y} width={width - 1} height={height - 1} fill=url(#float)>"
            title = f"<title>{escape(layer.module)}, {escape(layer.scheme)}: {_db(db)} dB</title>"
            parts.append(
                f"<g>{title}<rect x={x} y={y} width={width - 1} height={height - 1} rx=2 fill='{colour(db)}'></rect>"
                + (f"{hatch}</rect>" if layer.scheme == "dense" else "")
                + f"<text class=cell x={x + width / 2 - 0.5} y={y + 15} text-anchor=middle>{_whole(db)}</text></g>"
            )
    every = 1 if count <= 40 else 5
    parts += [
        f"<text x={left + index * width + width / 2} y={top - 6} text-anchor=middle>{index}</text>"
        for index in range(0, count, every)
    ]
    w, h = left + count * width + 4, top + len(PROJECTIONS[part]) * height + 4
    drawing = (
        f"<svg class=heat width={w} height={h} role=img aria-label='error by layer'>{_HATCH}{''.join(parts)}</svg>"
    )
    return f"<div class=wide>{drawing}</div>"


_HATCH = (
    "<defs><pattern id=float width=5 height=5 patternUnits=userSpaceOnUse patternTransform='rotate(45)'>"
    "<line x1=0 y1=0 x2=0 y2=5 stroke='#0005' stroke-width=2></line></pattern></defs>"
)


def _legend() -> str:
    steps = [LOW_DB + (HIGH_DB - LOW_DB) * i / 8 for i in range(9)]
    swatches = "".join(f"<i style='background:{colour(db)}'></i>" for db in steps)
    return f"<p class=legend>{LOW_DB:.0f} dB or less {swatches} {HIGH_DB:.0f} dB or more</p>"


def colour(db: float) -> str:
    """Of a cell."""
    place = min(1.0, max(0.0, (db - LOW_DB) / (HIGH_DB - LOW_DB))) * (len(COLOURS) - 1)
    low = min(int(place), len(COLOURS) - 2)
    mixed = (round(a + (b - a) * (place - low)) for a, b in zip(COLOURS[low], COLOURS[low + 1], strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


# --- curves ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Curve:
    name: str
    style: str  # a class of the style sheet
    values: Sequence[float | None]


def _stream(blocks: Sequence[BlockMeasure]) -> Iterator[str]:
    charts = []
    for part, title in PARTS.items():
        own = [block for block in blocks if block.block.startswith(f"{part}.") and block.block[-1].isdigit()]
        kinds = [kind for kind in KINDS if any(kind in block.stream_db for block in own)]
        curves = [_Curve(kind, kind, [_shown(block.stream_db.get(kind)) for block in own]) for kind in kinds]
        curves += [
            _Curve(f"{kind}, block alone", f"{kind} thin", [_shown(block.delta_db.get(kind)) for block in own])
            for kind in kinds
            if kind != "first"
        ]
        if own:
            charts.append(_chart(f"{title}, dB by block", curves))
    if charts:
        note = "The residual stream behind each block with all errors up to it, and what each block alone adds wrongly."
        yield _section("How the error grows", f"<div class=charts>{''.join(charts)}</div>", note)


def _shown(db: float | None) -> float | None:
    """Exact equality would flatten every other value."""
    return None if db is None else min(db, 60.0)


def _ranges(layers: Sequence[LayerMeasure]) -> Iterator[str]:
    placed = {
        place: layer for layer in layers if (place := _place(layer.module)) is not None and layer.ranges is not None
    }
    charts = []
    for part, inputs in INPUTS.items():
        for projection, name in inputs.items():
            chosen = sorted((p.index, x) for p, x in placed.items() if (p.part, p.projection) == (part, projection))
            found = [layer.ranges for _, layer in chosen if layer.ranges is not None] if chosen else []
            if not found:
                continue
            middle = QUANTILES.index(0.5)
            curves = [
                _Curve("largest before", "before", [ranges.before[-1] for ranges in found]),
                _Curve("largest after", "after", [ranges.after[-1] for ranges in found]),
                _Curve("median before", "before thin", [ranges.before[middle] for ranges in found]),
                _Curve("median after", "after thin", [ranges.after[middle] for ranges in found]),
            ]
            charts.append(_chart(f"{PARTS[part]}: {name}", curves, is_log=True))
    if charts:
        note = (
            "The largest magnitude of each input channel over the samples, by block: the largest channel and the median one, in "
            "the float model (before) and in the quantized one (after smoothing). The nearer they lie, the less is lost."
        )
        yield _section("Ranges before and after smoothing", f"<div class=charts>{''.join(charts)}</div>", note)


def _chart(title: str, curves: Sequence[_Curve], is_log: bool = False) -> str:
    width, height, left, right, top, bottom = 360, 190, 40, 8, 8, 22
    values = [value for curve in curves for value in curve.values if value is not None and (value > 0 or not is_log)]
    if not values:
        return ""
    ticks = _log_ticks(min(values), max(values)) if is_log else _ticks(min(values), max(values))
    low, high = ticks[0], ticks[-1]
    count = max(len(curve.values) for curve in curves)

    def place(index: int, value: float) -> tuple[float, float]:
        x = left + (width - left - right) * (index / max(count - 1, 1) if count > 1 else 0.5)
        share = math.log(value / low) / math.log(high / low) if is_log else (value - low) / (high - low)
        return round(x, 1), round(height - bottom - share * (height - top - bottom), 1)

    parts = []
    for tick in ticks:
        _, y = place(0, tick)
        parts.append(f"<line class=grid x1={left} x2={width - right} y1={y} y2={y}></line>")
        parts.append(f"<text x={left - 5} y={y + 4} text-anchor=end>{tick:g}</text>")
    for index in sorted({0, (count - 1) // 2, count - 1}):
        x, _ = place(index, low)
        parts.append(f"<text x={x} y={height - 6} text-anchor=middle>{index}</text>")
    for curve in curves:
        points = [
            place(index, value)
            for index, value in enumerate(curve.values)
            if value is not None and (value > 0 or not is_log)
        ]
        path = " ".join(f"{x},{y}" for x, y in points)
        parts.append(f"<polyline class='{curve.style}' points='{path}'><title>{escape(curve.name)}</title></polyline>")
        parts += [f"<circle class='{curve.style}' cx={x} cy={y} r=2></circle>" for x, y in points if count <= 12]
    keys = "".join(f"<span><i class='{curve.style}'></i>{escape(curve.name)}</span>" for curve in curves)
    return (
        f"<figure><figcaption>{escape(title)}</figcaption><svg viewBox='0 0 {width} {height}' role=img "
        f"aria-label='{escape(title, quote=True)}'>{''.join(parts)}</svg><p class=keys>{keys}</p></figure>"
    )


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers that enclose both, three to seven of them."""
    step = 10.0 ** math.floor(math.log10(max(high - low, 1e-3)))
    step = next(s for s in (step / 2, step, 2 * step, 5 * step, 10 * step) if (high - low) / s <= 5)
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    return [step * number for number in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**power for power in range(first, max(last, first + 1) + 1)]


# --- cost and origin -------------------------------------------------------------------------------------------------


def _cost(report: QuantizationReport) -> str:
    seconds = report.cost.seconds
    if not seconds:
        return ""
    longest = max(max(seconds.values()), 1e-9)
    rows = "".join(
        f"<tr><td>{escape(phase)}<td class=number>{_time(value)}"
        f"<td class=bar><i style='width:{100 * value / longest:.1f}%'></i></tr>"
        for phase, value in seconds.items()
    )
    return _section("Time", f"<table class=time>{rows}</table>")


def _recipe(report: QuantizationReport) -> str:
    parts = []
    if report.recipe:
        text = json.dumps(report.recipe, indent=2, ensure_ascii=False)
        parts.append(f"<details open><summary>Recipe</summary><pre>{escape(text)}</pre></details>")
    if report.hashes:
        rows = "".join(
            f"<tr><td>{escape(name)}<td><code>{escape(sha)}</code></tr>" for name, sha in report.hashes.items()
        )
        table = f"<div class=wide><table>{rows}</table></div>"
        parts.append(f"<details><summary>SHA-256 of {len(report.hashes)} files</summary>{table}</details>")
    return _section("Where it comes from", "".join(parts)) if parts else ""


def _section(title: str, body: str, note: str = "") -> str:
    return f"<section><h2>{escape(title)}</h2>{f'<p class=quiet>{escape(note)}</p>' if note else ''}{body}</section>"


def _db(db: float | None) -> str:
    return "–" if db is None else "exact" if db >= 199 else f"{db:.1f}"


def _whole(db: float) -> str:
    return "=" if db >= 199 else f"{db:.0f}"


def _size(num_bytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes} bytes"


def _time(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.1f} s"


_STYLE = """
:root{color-scheme:light dark;--back:#fff;--card:#f5f6f8;--ink:#1c2330;--quiet:#5b6472;--line:#d9dde3;--text:#2266b8;
--picture:#c2550f;--first:#6d7683;--pass:#1d7a46;--warn:#9a6500;--fail:#b3261e}
@media(prefers-color-scheme:dark){:root{--back:#14181f;--card:#1e242d;--ink:#e6e9ee;--quiet:#a0a9b6;--line:#343c48;
--text:#7db4f5;--picture:#f5a366;--first:#98a2b0;--pass:#63c98c;--warn:#e5b34f;--fail:#f38b83}}
*{box-sizing:border-box}body{margin:0;background:var(--back);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1240px;margin:0 auto;padding:20px 16px 60px}header{display:flex;gap:12px;align-items:center;flex-wrap:wrap}
h1{font-size:24px;margin:0;overflow-wrap:anywhere}h2{font-size:18px;margin:36px 0 4px}h3{font-size:14px;margin:14px 0 4px;
color:var(--quiet);font-weight:600}.quiet{color:var(--quiet);margin:2px 0 10px;max-width:80ch}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:16px 0}
.tile{background:var(--card);border-radius:8px;padding:12px;display:flex;flex-direction:column;overflow-wrap:anywhere}
.tile b{font-size:22px;line-height:1.2}.tile small{color:var(--quiet)}
table{border-collapse:collapse}td,th{padding:4px 10px 4px 0;text-align:left;vertical-align:top;
border-bottom:1px solid var(--line)}
th{color:var(--quiet);font-weight:600}.checks{width:100%}.checks td:last-child{width:100%;overflow-wrap:anywhere}
.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}.name{white-space:nowrap}.why{min-width:280px}
.badge{border:1px solid;border-radius:10px;padding:1px 9px;font-size:13px;font-weight:600;white-space:nowrap}
.pass{color:var(--pass)}.warn{color:var(--warn)}.fail{color:var(--fail)}summary{cursor:pointer;color:var(--quiet)}
ul{margin:4px 0;padding-left:20px}.wide{overflow-x:auto}svg text{font:11px system-ui,sans-serif;fill:var(--quiet)}
svg .cell{fill:#1a1a1a;font-size:11px}.heat{display:block}.legend{display:flex;align-items:center;color:var(--quiet);
font-size:13px;gap:0;margin:6px 0}.legend i{width:22px;height:12px;display:inline-block}.legend i:first-of-type{margin-left:8px}
.legend i:last-of-type{margin-right:8px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(340px,100%),1fr));gap:18px}figure{margin:0}
figcaption{font-size:14px;font-weight:600}figure svg{width:100%;display:block}.grid{stroke:var(--line)}
polyline{fill:none;stroke-width:2}.thin{stroke-dasharray:2 3;stroke-width:1.5;border-top-style:dotted!important}
.text,.after{stroke:var(--text);color:var(--text)}.picture{stroke:var(--picture);color:var(--picture)}
.first,.before{stroke:var(--first);color:var(--first)}circle{fill:currentColor;stroke:none!important}
.keys{display:flex;flex-wrap:wrap;gap:2px 14px;margin:2px 0;font-size:12.5px;color:var(--quiet)}
.keys i{display:inline-block;width:18px;border-top:3px solid;margin-right:5px;vertical-align:middle}
.time td{white-space:nowrap}.bar{width:40vw;max-width:420px}.bar i{display:block;height:10px;margin-top:6px;
background:var(--text);border-radius:3px;min-width:2px}pre{overflow-x:auto;background:var(--card);padding:12px;border-radius:8px}
"""
