"""The command line as a newcomer types it: answers on stdout, one line per error, help without the heavy libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from saccade import cli
from saccade.bench.machine import measure_machine
from tests.parity.test_transformers import picture

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `saccade ...` in this process. Returns exit code, stdout and stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["saccade", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    picture(120, 90, 1).save(path)
    return path


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; sys.argv = ['saccade', '--help']\ntry:\n from saccade.cli import main; main()\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'numpy', 'PIL', 'rich', 'transformers', 'av'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "ask" in out
    assert out.strip().endswith("[]")


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_torchs_threads_do_not_wait_awake_unless_told_to(given: dict[str, str], expected: str) -> None:
    code = "import os, sys; sys.argv = ['saccade', '--help']\nfrom saccade.cli import main\n"
    code += "try:\n main()\nfinally:\n print(os.environ.get('GOMP_SPINCOUNT'))"
    others = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**others, **given}).stdout
    assert out.strip().splitlines()[-1] == expected


@pytest.mark.parametrize("command", ["ask", "inspect", "quantize", "verify", "doctor", "bench", "eval", "demo"])
def test_every_command_explains_itself(run: Run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f" {command} [OPTIONS]" in out
    assert "--verbose" in out


@pytest.mark.parametrize(
    ("arguments", "help_command"),
    [(["askk"], "saccade --help"), (["ask", "hi", "--nothing"], "saccade ask --help"), (["ask"], "saccade ask --help")],
)
def test_wrong_usage_names_a_help_that_exists(run: Run, arguments: list[str], help_command: str) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert f"({help_command} tells more)" in err
    assert run(*help_command.split()[1:])[0] == 0


def test_a_question_about_a_picture_is_answered(run: Run, tiny_checkpoint: Path, photo: Path) -> None:
    arguments = [
        "ask",
        "What is this?",
        "--image",
        str(photo),
        "--model",
        str(tiny_checkpoint),
        "--max-tokens",
        "8",
        "--ignore-eos",
    ]
    code, out, err = run(*arguments, "--dtype", "float32")
    assert code == 0, err
    assert out.strip()
    assert "ended by length after 8 tokens" in err


def test_json_holds_answer_receipt_and_counts(run: Run, tiny_checkpoint: Path, photo: Path) -> None:
    code, out, err = run(
        "ask", "Hi", "--image", str(photo), "--model", str(tiny_checkpoint), "--max-tokens", "4", "--json", "--n", "2"
    )
    assert code == 0, err
    answer = json.loads(out)
    assert len(answer["outputs"]) == 2
    assert answer["media"][0]["original_size"] == [120, 90]
    assert answer["media"][0]["model_size"] == [112, 84]
    assert answer["media"][0]["num_tokens"] == 12
    assert answer["usage"]["prompt_tokens"] > 12


def test_a_dry_run_prints_the_receipt_and_loads_no_weights(
    run: Run, tiny_checkpoint: Path, photo: Path, tmp_path: Path
) -> None:
    """The weights' bytes are gone; only their headers are left to read."""
    hollow = tmp_path / "hollow"
    hollow.mkdir()
    for file in tiny_checkpoint.iterdir():
        data = file.read_bytes()
        if file.suffix == ".safetensors":
            header = 8 + int.from_bytes(data[:8], "little")
            with (hollow / file.name).open("wb") as out_file:
                out_file.write(data[:header])
                out_file.truncate(len(data))
        else:
            (hollow / file.name).write_bytes(data)
    code, out, err = run("ask", "Hi", "--image", str(photo), "--model", str(hollow), "--dry-run")
    assert code == 0, err
    assert "120 x 90 -> 112 x 84, 12 tokens" in out
    assert "answer up to 1024" in out
    assert "memory" in out
    plan = json.loads(run("ask", "Hi", "--image", str(photo), "--model", str(hollow), "--dry-run", "--json")[1])
    assert plan["memory_bytes"]["total"] == sum(v for k, v in plan["memory_bytes"].items() if k != "total")


def test_the_references_spellings_are_understood(run: Run, tiny_checkpoint: Path, photo: Path) -> None:
    code, out, err = run(
        *("ask", "--question", "Hi", "--image_file", str(photo), "--model_name_or_path", str(tiny_checkpoint)),
        *("--max_length", "4", "--min_length", "4", "--quant_type", "weight_only_int8", "--top_p", "0.001", "--json"),
    )
    assert code == 0, err
    assert len(json.loads(out)["outputs"][0]["token_ids"]) == 4


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["ask"], 2, "give a question"),
        (["ask", "Hi", "--image", "no-such.jpg"], 1, "no-such.jpg"),
        (["ask", "Hi", "--model", "no/such/folder"], 1, "no/such/folder"),
        (["ask", "Hi", "--temperature", "-3"], 2, "temperature is -3"),
        (["ask", "Hi", "--fps", "1", "--num-frames", "4"], 2, "exclude each other"),
        (["ask", "Hi", "--dtype", "int3"], 2, "'int3'"),
        (["ask", "Hi", "--quantization", "w1a1"], 2, "'w1a1'"),
        (["ask", "Hi", "--draw", "x.png"], 2, "--draw needs an --image"),
        (["ask", "Hi", "--image", "x.png", "--draw", "x.svg"], 2, "x.svg is of no kind of picture"),
        (["ask", "Hi", "--image", "x.png", "--draw", "/no/x.png"], 2, "/no/x.png cannot be written: /no is no folder"),
        (["bench", "--random", "tiny", "--model", "demo"], 2, "is measured in place of a --model"),
        (["bench", "--json", "/no/x.json"], 2, "/no/x.json cannot be written: /no is no folder"),
        (["aks"], 2, "aks"),
        (["inspect", "/nowhere"], 1, "/nowhere"),
    ],
)
def test_an_error_is_one_line_with_the_value(
    run: Run, tiny_checkpoint: Path, arguments: list[str], code: int, message: str
) -> None:
    if arguments[0] == "ask" and "--model" not in arguments:
        arguments = [*arguments, "--model", str(tiny_checkpoint)]
    found, out, err = run(*arguments)
    assert found == code
    assert message in err
    assert err.count("\n") == 1
    assert out == ""


def test_verbose_shows_the_traceback(run: Run, tiny_checkpoint: Path) -> None:
    _, _, err = run("ask", "Hi", "--image", "no-such.jpg", "--model", str(tiny_checkpoint), "--verbose")
    assert "Traceback" in err


def test_inspect_tells_what_a_checkpoint_holds(run: Run, tiny_checkpoint: Path) -> None:
    code, out, _ = run("inspect", str(tiny_checkpoint), "--check")
    assert code == 0
    assert "Qwen2_5_VL" in out
    assert "every weight is finite" in out


def test_drawing_marks_the_boxes(tmp_path: Path, photo: Path) -> None:
    from saccade.drawing import draw_answer
    from saccade.geometry import Grid
    from saccade.inputs.prompt import MediaReceipt
    from saccade.outputs import CompletionOutput

    receipt = MediaReceipt("image", 0, str(photo), "", (120, 90), (112, 84), Grid(1, 6, 8), 12)
    text = '[{"bbox_2d": [28, 28, 84, 56], "label": "dog"}, {"point_2d": [14, 14]}]'
    drawn = draw_answer(photo, CompletionOutput(0, text, [], "stop", None, None, None, (receipt,)))
    plain = Image.open(photo).convert("RGB")
    assert drawn.size == (120, 90)
    assert drawn.getpixel((30, 45)) != plain.getpixel((30, 45))  # the box's left edge
    assert drawn.getpixel((15, 15)) != plain.getpixel((15, 15))  # the point
    assert drawn.getpixel((110, 80)) == plain.getpixel((110, 80))


def test_a_benchmark_of_fewer_tokens_than_the_default_wants_one_option(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = partial(measure_machine, buffer_bytes=8 << 20, matrices=(64,))  # takes half a minute otherwise
    monkeypatch.setattr("saccade.bench.measure.measure_machine", limits)
    code, out, _ = run("bench", "--max-tokens", "3", "--warmup", "0", "--repeat", "1")
    assert code == 0
    assert "3 out in" in out
