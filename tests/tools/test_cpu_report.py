"""The report of benchmarks/cpu.py: a section for each machine, and aims against what was measured there."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import cpu

RECORD = cpu.Record(
    system="",
    media="picture",
    version="1",
    threads=2,
    tokens_in=1003,
    tokens_out=128,
    load_s=1.0,
    vision_s=2.0,
    prefill_s=2.0,
    token_s=0.1,
    total_s=20.0,
    token_bytes=10**9,
    peak_memory_bytes=10**9,
    bytes_per_s=2e10,
    integer_operations_per_s=None,
    load_average=0.0,
    date="",
)


def measured(file: Path, processor: str, *systems: str) -> Path:
    records = [cpu.dataclasses.replace(RECORD, system=system) for system in systems]
    cpu.write(file, {"processor": processor, "kernels": "C++"}, "3b", records)
    return file


def test_each_machine_has_a_section_with_its_own_chart_and_aims(tmp_path: Path) -> None:
    files = [
        measured(tmp_path / "cpu-amx.json", "an Intel", "saccade bf16", "transformers bf16"),
        measured(tmp_path / "cpu-avx2.json", "an AMD", "saccade bf16", "transformers float32", "llama.cpp Q4_K_M"),
    ]
    cpu.cpu_report.report(files, tmp_path)
    _, intel, amd = (tmp_path / "performance.md").read_text().split("\n## ")
    assert intel.startswith("2 threads of an Intel\n")
    assert "(performance-amx-picture.svg)" in intel
    assert "| answer, bf16 over transformers bf16 | 100% |" in intel
    assert amd.startswith("2 threads of an AMD\n")
    assert "llama.cpp Q4_K_M" in (tmp_path / "performance-avx2-picture.svg").read_text()
    assert amd.count("| answer, bf16 over transformers float32 | 100% |") == 1
    assert "transformers bf16" not in amd


def test_an_aim_names_only_the_systems_that_were_measured(tmp_path: Path) -> None:
    file = measured(tmp_path / "cpu-x.json", "a processor", "saccade w4a8", "llama.cpp Q4_K_M")
    lines = [aim.line for aim in cpu.cpu_report.aims(cpu.cpu_report.medians(cpu.read(file)), "3b")]
    assert "| answer, w4a8 over llama.cpp Q4_K_M | 100% | at most 40% | **no** |" in lines
    assert "| answer, w4a8 over OpenVINO int4 and vLLM w8a8 | not measured | at most 58% | |" in lines


def test_measurements_of_two_processors_are_never_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = measured(tmp_path / "cpu-x.json", "another processor", "saccade w4a8")
    monkeypatch.setattr("sys.argv", ["cpu.py", "run", "--models", str(tmp_path), "--results", str(file), "--add"])
    with pytest.raises(SystemExit, match="holds measurements of another processor"):
        cpu.main()
