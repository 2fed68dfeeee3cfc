"""`saccade verify` as typed: lines and JSON, exit codes, what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from saccade.cli import main

from .conftest import PICTURE, edited


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["saccade", "verify", *arguments])
    code = 0
    try:
        main()
    except SystemExit as error:
        code = int(str(error.code or 0))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def picture(tmp_path: Path) -> str:
    PICTURE.save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


def test_a_line_for_each_check(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tiny_checkpoint: Path,
    dynamic: Path,
    picture: str,
) -> None:
    given = (str(dynamic), "--against", str(tiny_checkpoint), "--image", picture, "--answer-tokens", "4")
    code, out, _ = run(capsys, monkeypatch, *given)
    assert code == 0
    names = [line.split()[1] for line in out.splitlines()[:-1]]
    assert names == ["files", "tensors", "numbers", "choice", "weights", "runs", "layers", "logits"]
    assert out.splitlines()[-1].startswith("dynamic: ")
    code, out, _ = run(capsys, monkeypatch, *given, "--json", "--max-kl", "0")
    assert code == 1
    report = json.loads(out)
    assert report["logits"]["num_tokens"] == 4
    assert len(report["hashes"]) == len([path for path in dynamic.iterdir() if path.is_file()])


def test_a_fault_is_exit_code_1_and_a_warning_only_when_strict(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, dynamic: Path, tmp_path: Path, picture: str
) -> None:
    strange = edited(dynamic, tmp_path / "strange", lambda t: t.update({"stranger": t["lm_head.weight"][:1].clone()}))
    asked = ("--image", picture, "--answer-tokens", "2")
    assert run(capsys, monkeypatch, str(strange), *asked)[0] == 0
    assert run(capsys, monkeypatch, str(strange), *asked, "--strict")[0] == 1
    damaged = edited(dynamic, tmp_path / "damaged", lambda t: t.pop("lm_head.weight"))
    code, out, _ = run(capsys, monkeypatch, str(damaged), *asked)
    assert code == 1
    assert "lm_head.weight is missing" in out


def test_a_quantized_source_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, dynamic: Path
) -> None:
    code, _, err = run(capsys, monkeypatch, str(dynamic), "--against", str(dynamic))
    assert code == 1
    assert "is quantized itself" in err


def test_what_samples_hold_is_read_or_refused_in_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, dynamic: Path, tmp_path: Path
) -> None:
    samples = tmp_path / "samples.jsonl"

    def asked(content: object) -> tuple[int, str]:
        turns = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": content}]
        samples.write_text(json.dumps(turns))
        code, _, err = run(capsys, monkeypatch, str(dynamic), "--samples", str(samples))
        return code, err

    assert asked(["one, ", {"type": "text", "text": "two"}]) == (0, "")
    for wrong, words in ((5, "content is a int"), ([5], "part 0 is a int"), ([{"type": "text", "text": 5}], '"text"')):
        code, err = asked(wrong)
        assert (code, err.count("\n"), "message 1 (assistant)" in err, words in err) == (1, 1, True, True)


def test_places_and_devices_that_are_not_there_are_told_before_the_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, dynamic: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for option in (
        ("--report", str(tmp_path / "file" / "report")),
        ("--target-kl", "1", "--write-recipe", str(tmp_path / "no" / "r.yaml")),
    ):
        code, out, err = run(capsys, monkeypatch, str(dynamic), *option)
        assert code in (1, 2)
        assert (out, err.count("\n"), option[-1] in err) == ("", 1, True)
    code, out, err = run(capsys, monkeypatch, str(dynamic), "--device", "cuda:9")
    assert (code, out, "'cuda:9'" in err) == (1, "", True)
