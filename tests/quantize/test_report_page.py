"""The page: whole on its own, escaped, honest about causes, and nothing shown that was not measured."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from saccade.quantize.report import (
    BlockMeasure,
    Check,
    Cost,
    InputRange,
    LayerMeasure,
    LogitsMeasure,
    QuantizationReport,
    read_report,
)
from saccade.quantize.report_page import COLOURS, colour, page, reason, worst_layers, write_report

RANGES = InputRange((0.1, 0.5, 1.0, 2.0, 4.0, 30.0, 90.0), (0.1, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0))
LAYERS = tuple(
    LayerMeasure(
        f"{block}.{name}",
        "dense" if "down" in name else "w8a8",
        {"text": 40.0 - index, "picture": 35.0 - index, "first": 9.0}
        if "model" in block
        else {"picture": 30.0 + index},
        weight_db=42.0,
        ranges=RANGES,
        size_bytes=1000,
    )
    for index in range(3)
    for block, names in (
        (f"visual.blocks.{index}", ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
        (f"model.layers.{index}", ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")),
    )
    for name in names
)
REPORT = QuantizationReport(
    "w8a8",
    source="demo",
    recipe={"scheme": "w8a8"},
    hashes={"config.json": "ab" * 32},
    machine="a processor",
    cost=Cost(4_000_000, 2_000_000, 10**9, {"smooth": 1.0, "round": 200.0}),
    checks=(Check("weights", "fail", "two rows", ("model.layers.0.mlp.gate_proj: rows 1, 2",)),),
    logits=LogitsMeasure(2, 30, 0.001, 0.02, 0.99, 0.9),
    blocks=tuple(
        BlockMeasure(f"model.layers.{i}", {"text": 40.0}, {"text": 1.0}, {"text": 40.0 - i}) for i in range(3)
    ),
    layers=LAYERS,
)


class Balanced(HTMLParser):
    """Knows which elements were opened and not closed, as far as HTML demands closing."""

    OPTIONAL = frozenset({"tr", "td", "th", "li", "p", "meta"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.OPTIONAL:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.OPTIONAL:
            assert self.open, f"</{tag}> closes nothing"
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def text_of(report: QuantizationReport) -> str:
    parser = Balanced()
    parser.feed(page(report))
    assert parser.open == []
    return " ".join(parser.text)


def test_the_page_needs_nothing_else() -> None:
    html = page(REPORT)
    assert not re.search(r"https?://|<script|<link|<img|@import|url\((?!#)", html)
    assert "<svg" in html


def test_every_part_of_the_report_is_shown() -> None:
    text = text_of(REPORT)
    for shown in (
        "fail",
        "model.layers.0.mlp.gate_proj: rows 1, 2",
        "0.001",
        "99.0%",
        "50% of 4 MB",
        "3.4 min",
        "ab" * 32,
    ):
        assert shown in text
    for title in (
        "Checks",
        "Decoder: error by layer",
        "Vision tower: error by layer",
        "Ranges before and after smoothing",
    ):
        assert title in text


def test_what_was_not_measured_has_no_section() -> None:
    text = text_of(QuantizationReport("bare"))
    for title in ("Checks", "error by layer", "Ranges", "worst", "Time", "Where it comes from"):
        assert title not in text


def test_every_layer_has_a_cell_for_each_kind_of_token() -> None:
    html = page(REPORT)
    for layer in LAYERS:
        shown = {
            re.search(r": ([^ ]+) dB", cell)[1]
            for cell in re.findall(rf"<title>{re.escape(layer.module)}, [^<]*", html)
        }  # type: ignore[index]
        assert shown == {f"{db:.1f}" for kind, db in layer.output_db.items() if kind != "first"}


def test_names_from_a_checkpoint_are_text() -> None:
    evil = "<script>alert('x')</script>&\""
    layer = LayerMeasure(f"model.layers.0.{evil}.q_proj", evil, {"text": 1.0})
    report = replace(REPORT, name=evil, source=evil, recipe={evil: evil}, hashes={evil: evil}, machine=evil)
    html = page(replace(report, checks=(Check(evil, "warn", evil, (evil,)),), layers=(layer,)))
    assert "<script" not in html
    assert "alert(&#x27;x&#x27;)" in html


def test_a_reason_names_the_largest_part_of_the_error() -> None:
    layer = LAYERS[0]
    assert reason(replace(layer, weight_db=20.0, rounding_db=40.0, input_db=50.0, kurtosis=30.0)) == (
        "rounding its weight (20 dB); a few weights are far larger than the rest (kurtosis 30)"
    )
    outlier = replace(RANGES, after=RANGES.before)
    assert reason(replace(layer, rounding_db=25.0, clipped=0.004, ranges=outlier)) == (
        "rounding its input (25 dB); the static range cuts 0.40% of the values; the largest channel is 90 times the median one"
    )
    inherited = reason(replace(layer, input_db=18.0, output_db={"text": 18.0, "picture": 30.0}))
    assert inherited == "what the linears before it hand on (18 dB); text suffers more than pictures"


def test_the_worst_layers_are_quantized_ones_in_order() -> None:
    worst = worst_layers(LAYERS)
    assert all(layer.scheme != "dense" for layer in worst)
    found = [layer.worst_db for layer in worst]
    assert found == sorted(found)  # type: ignore[type-var]


def test_colours_run_from_one_end_to_the_other() -> None:
    assert colour(-50) == colour(5) == "#{:02x}{:02x}{:02x}".format(*COLOURS[0])
    assert colour(45) == colour(200) == "#{:02x}{:02x}{:02x}".format(*COLOURS[-1])
    assert len({colour(db) for db in range(5, 46)}) == 41


def test_both_files_are_written(tmp_path: Path) -> None:
    write_report(REPORT, tmp_path / "new" / "folder")
    assert read_report(tmp_path / "new" / "folder" / "report.json") == REPORT
    assert (tmp_path / "new" / "folder" / "report.html").read_text(encoding="utf-8") == page(REPORT)


@pytest.mark.parametrize("value", [0.0, 1e-30, 3e38])
def test_extreme_ranges_are_drawn(value: float) -> None:
    extreme = replace(LAYERS[1], ranges=InputRange((value,) * 7, (value,) * 7))
    assert "nan" not in page(replace(REPORT, layers=(extreme,), blocks=())).lower()
