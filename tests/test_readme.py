"""What the README says can be typed, can be typed."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import click
import pytest

from saccade.cli import program
from saccade.evals.report import render_markdown

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_example_runs_and_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})
    assert "stop" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line", [line for block in blocks("sh") for line in block.splitlines() if line.startswith("saccade ")]
)
def test_every_command_line_is_understood(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    command = program.get_command(click.Context(program), words[0])
    assert command is not None
    parsed = command.make_context(words[0], words[1:])  # raises on an unknown flag or a bad value
    assert parsed.params


def test_every_option_in_the_text_exists() -> None:
    known = {"--help"}
    for name in program.list_commands(click.Context(program)):
        command = program.get_command(click.Context(program), name)
        assert command is not None
        known |= {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) - known
    of_benchmarks = {"--models", "--media", "--rounds"}
    assert unknown == {"--benchmark", "--nproc-per-node", *of_benchmarks}  # the reference's, torchrun's, benchmarks'


def test_the_table_of_scores_is_the_committed_measurement() -> None:
    """`saccade eval demo --limit N --json saccade/demo/scores.json --markdown` writes both."""
    figures = json.loads((ROOT / "saccade" / "demo" / "scores.json").read_text(encoding="utf-8"))
    assert figures["tasks"]
    assert render_markdown(figures) in README


def test_every_linked_file_is_there() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_make_target_is_there() -> None:
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
