"""The report as data: what two writers know becomes one, and the file gives back what was written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from saccade.base.errors import CheckpointError
from saccade.quantize.report import (
    EXACT_DB,
    BlockMeasure,
    Check,
    Cost,
    InputRange,
    LayerMeasure,
    LogitsMeasure,
    QuantizationReport,
    merged,
    read_report,
    sqnr_db,
    to_json,
)

WHOLE = QuantizationReport(
    "w8a8",
    source="demo",
    recipe={"scheme": "w8a8", "overrides": [{"match": "*down_proj", "scheme": "dense"}]},
    hashes={"model.safetensors": "00ff"},
    machine="a processor",
    cost=Cost(source_bytes=200, output_bytes=100, peak_memory_bytes=50, seconds={"smooth": 1.5}),
    checks=(Check("schema", "warn", "one stranger", ("x.y",)),),
    logits=LogitsMeasure(2, 30, 0.001, 0.02, 0.99, 0.9),
    blocks=(BlockMeasure("model.layers.0", {"text": 40.0}, {"text": 0.9999}, {"text": 38.0}),),
    layers=(
        LayerMeasure(
            "model.layers.0.mlp.gate_proj", "w8a8", {"text": 41.0}, 42.0, ranges=InputRange((0.0,) * 7, (1.0,) * 7)
        ),
        LayerMeasure("lm_head", "dense"),
    ),
)


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(to_json(WHOLE))
    assert read_report(path) == WHOLE


def test_what_one_writer_does_not_know_is_the_others() -> None:
    quantized = replace(WHOLE, checks=(), logits=None, blocks=(), layers=())
    verified = replace(WHOLE, recipe={}, cost=Cost(seconds={"verify": 2.0}), hashes={})
    both = merged(quantized, verified)
    assert both.layers == WHOLE.layers
    assert both.recipe == WHOLE.recipe
    assert both.cost == replace(WHOLE.cost, seconds={"smooth": 1.5, "verify": 2.0})


def test_the_worst_check_is_the_reports_verdict() -> None:
    fine, bad = Check("a", "pass", ""), Check("b", "fail", "")
    assert QuantizationReport("x").verdict == "pass"
    assert replace(WHOLE, checks=(bad, fine, *WHOLE.checks)).verdict == "fail"
    assert WHOLE.verdict == "warn"


def test_a_layer_is_as_bad_as_its_worst_kind_of_token_the_first_one_aside() -> None:
    assert LayerMeasure("x", "w8a8", {"text": 30.0, "picture": 25.0, "first": 3.0}).worst_db == 25.0
    assert LayerMeasure("x", "w8a8", {"first": 3.0}).worst_db == 3.0
    assert LayerMeasure("x", "dense").worst_db is None


def test_equal_outputs_have_a_number_that_json_can_hold() -> None:
    assert sqnr_db(1.0, 0.0) == sqnr_db(1e300, 1e-300) == EXACT_DB
    assert sqnr_db(0.0, 1.0) == -EXACT_DB
    assert sqnr_db(100.0, 1.0) == pytest.approx(20)


@pytest.mark.parametrize(
    "text", ['{"name": "x", "colour": 1}', '{"name": "x", "cost": 3}', "{}", '{"name": "x", "layers": [1]}']
)
def test_another_programs_report_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match="no report of this version"):
        read_report(path)
