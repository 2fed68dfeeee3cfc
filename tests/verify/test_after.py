"""A quantizer verifies what it wrote before it appears; big models block by block; samples may bring their answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from saccade import LLM
from saccade.api import quantize, quantize_exactly
from saccade.base.errors import OptionError
from saccade.quantize.report import Check, QuantizationReport, read_report
from saccade.verify import after, layers, verification
from saccade.verify.layers import SideBySide
from saccade.verify.options import VerifyOptions
from saccade.verify.samples import OPENING, Conversation, without_answer
from saccade.verify.verification import verify
from tests.test_cli import Run, run

from .conftest import CONVERSATIONS, PICTURE

__all__ = ["run"]

ANSWER = {"role": "assistant", "content": "A grey slope."}
NEAREST: dict[str, Any] = {"scheme": "w8a8-dynamic", "smooth": "none", "rounding": "rtn", "threads": 1}


def asked(has_answers: bool) -> Sequence[Conversation]:
    return [[*CONVERSATIONS[0], ANSWER], CONVERSATIONS[1]] if has_answers else CONVERSATIONS


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("report."))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- before it appears -----------------------------------------------------------------------------------------------


def test_what_is_written_is_verified_before_it_appears(tiny_checkpoint: Path, tmp_path: Path) -> None:
    look, out, seen = after.verifier(tiny_checkpoint, asked), tmp_path / "out", []

    def watched(folder: Path) -> QuantizationReport:
        seen.append((out.exists(), (folder / "model.safetensors").exists()))
        return look(folder)

    report = quantize(tiny_checkpoint, out, **NEAREST, verify=watched)
    assert seen == [(False, True)]
    assert report.verified is not None
    stored = read_report(out / "report.json")
    assert stored.checks == report.verified.checks
    assert stored.layers == report.verified.layers
    assert [check.name for check in stored.checks] == [
        "files", "tensors", "numbers", "choice", "weights", "runs", "layers", "logits",
    ]  # fmt: skip
    assert stored.verdict == "pass"
    assert stored.name == "out"
    assert stored.logits is not None
    assert {"quantize", "verify: layers"} <= stored.cost.seconds.keys()
    assert stored.recipe["scheme"] == "w8a8-dynamic"
    page = (out / "report.html").read_text()
    assert "down_proj" in page
    assert "src=" not in page
    assert "href=" not in page
    quantize(tiny_checkpoint, tmp_path / "unverified", **NEAREST)
    assert hashes(out) == hashes(tmp_path / "unverified")
    assert stored.hashes == hashes(out)


def test_a_verification_that_breaks_off_leaves_nothing_visible_and_is_taken_up_again(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    def stop(folder: Path) -> QuantizationReport:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_checkpoint, tmp_path / "out", **NEAREST, verify=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    progress = tmp_path / "out.partial" / "progress.json"
    before = progress.read_bytes()

    def look(folder: Path) -> QuantizationReport:
        assert progress.read_bytes() == before  # no block was made again
        return QuantizationReport("looked")

    quantize(tiny_checkpoint, tmp_path / "out", **NEAREST, verify=look)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_exact_mode_adds_the_report_and_changes_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    PICTURE.save(tmp_path / "pictures" / "one.png")
    for name, look in (("plain", None), ("verified", after.verifier(tiny_checkpoint, asked))):
        quantize_exactly(tiny_checkpoint, tmp_path / name, tmp_path / "pictures", is_dynamic=True, anti_method="m4",
                         verify=look)  # fmt: skip
    assert hashes(tmp_path / "plain") == hashes(tmp_path / "verified")
    report = read_report(tmp_path / "verified" / "report.json")
    assert report.recipe["mode"] == "exact"
    assert {check.name for check in report.checks if check.verdict == "pass"} >= {
        "tensors",
        "numbers",
        "layers",
        "logits",
    }
    assert not list((tmp_path / "plain").glob("report.*"))


# --- the commands ----------------------------------------------------------------------------------------------------


def test_the_command_verifies_unless_told_not_to(
    tiny_checkpoint: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saccade.cli.held_out.shipped", asked)
    given = ["--scheme", "w8a8-dynamic", "--smooth", "none", "--rounding", "rtn", "--threads", "1"]
    code, stdout, _ = run("quantize", str(tiny_checkpoint), str(tmp_path / "out"), *given)
    assert code == 0
    assert "verified: pass, see report.html there" in stdout
    code, stdout, _ = run("quantize", str(tiny_checkpoint), str(tmp_path / "quick"), *given, "--no-verify")
    assert code == 0
    assert "verified" not in stdout
    assert not (tmp_path / "quick" / "report.html").exists()


def test_a_failed_verification_is_exit_code_1_and_says_why(
    tiny_checkpoint: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = QuantizationReport("x", checks=(Check("logits", "fail", "mean KL 7", ("it is another model",)),))
    monkeypatch.setattr(after, "verify", lambda *given: failed)
    code, stdout, _ = run(
        "quantize",
        str(tiny_checkpoint),
        str(tmp_path / "out"),
        "--scheme",
        "w8a16",
        "--rounding",
        "rtn",
        "--smooth",
        "none",
    )
    assert code == 1
    assert "fail  logits   mean KL 7\n      it is another model\nverified: fail" in stdout
    assert read_report(tmp_path / "out" / "report.json").verdict == "fail"


def test_samples_of_a_file_are_compared_over_their_answers(
    tiny_checkpoint: Path, dynamic: Path, tmp_path: Path, run: Run
) -> None:
    PICTURE.save(tmp_path / "p.png")
    content = [{"type": "image", "image": "p.png"}, {"type": "text", "text": "What is it?"}]
    path = tmp_path / "held-out.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": content}, ANSWER]}) + "\n")
    num_tokens = len(LLM(tiny_checkpoint, device="cpu", kv_cache_tokens=256).tokenizer.encode("A grey slope.")) + 1
    for how in ([], ["--blockwise"]):
        given = ("verify", str(dynamic), "--against", str(tiny_checkpoint), "--samples", str(path), "--json", *how)
        code, stdout, _ = run(*given)
        assert code == 0
        assert json.loads(stdout)["logits"]["num_tokens"] == num_tokens
    assert run(*given, "--image", str(tmp_path / "p.png"))[0] == 2
    path.write_text("{}")
    code, _, stderr = run(*given)
    assert code == 1
    assert 'line 1 holds no "messages"' in stderr


# --- block by block --------------------------------------------------------------------------------------------------


def test_blockwise_opens_no_model_and_finds_the_same(
    tiny_checkpoint: Path, dynamic: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = verify(dynamic, tiny_checkpoint, asked(True)[:1])
    monkeypatch.setattr(verification, "LLM", None)
    found = verify(dynamic, tiny_checkpoint, asked(True)[:1], VerifyOptions(blockwise=True))
    assert found.verdict == "pass"
    assert [check.name for check in found.checks] == [check.name for check in whole.checks]
    assert found.layers == whole.layers
    assert whole.logits is not None
    assert found.logits is not None
    assert found.logits.num_tokens == whole.logits.num_tokens
    # Both are in float32; an activation between two integers may fall to another side in another order of sums.
    assert found.logits.kl_mean == pytest.approx(whole.logits.kl_mean, rel=0.3)
    assert "block by block in float32" in found.checks[-1].facts


def test_blockwise_without_a_source_says_that_it_runs(dynamic: Path) -> None:
    found = verify(dynamic, None, asked(True), VerifyOptions(blockwise=True))
    assert found.checks[-1].name == "runs"
    assert found.verdict == "pass"


def test_a_large_model_is_verified_blockwise(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    monkeypatch.setattr(after, "verify", lambda *given: chosen.append(given[-1].blockwise))
    after.verifier(tiny_checkpoint, asked)(tiny_checkpoint)
    monkeypatch.setattr(after, "WHOLE_BYTES", 1000)
    after.verifier(tiny_checkpoint, asked)(tiny_checkpoint)
    assert chosen == [False, True]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("blockwise", [False, True])
def test_a_verification_takes_the_threads_it_is_told_to(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, blockwise: bool
) -> None:
    if blockwise:
        monkeypatch.setattr(after, "WHOLE_BYTES", 1000)
    seen: set[int] = set()
    compare = verification.run_side_by_side

    def watched(*given: Any) -> SideBySide:
        seen.add(torch.get_num_threads())
        return compare(*given)

    monkeypatch.setattr(verification, "run_side_by_side", watched)
    after.verifier(tiny_checkpoint, asked, threads=3)(tiny_checkpoint)
    assert seen == {3}


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_in_pieces_gives_the_same_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    from saccade.checkpoints.formats import HEAD, open_checkpoint
    from saccade.verify.basis import rows_of
    from tests.parity.oracle import Shape, build

    build(tmp_path, Shape("head", tied=tied), seed=3)
    checkpoint = open_checkpoint(tmp_path)
    hidden = torch.randn(6, checkpoint.config.text.hidden_size)
    monkeypatch.setattr(layers, "HEAD_VALUES_AT_ONCE", 7 * hidden.shape[1])
    found = layers.Tables((checkpoint, checkpoint), torch.device("cpu")).logits(hidden)
    torch.testing.assert_close(found, hidden @ rows_of(checkpoint, HEAD)(slice(None)).T, rtol=1e-5, atol=1e-5)


def test_blockwise_has_no_sensitivity(tiny_checkpoint: Path, dynamic: Path) -> None:
    with pytest.raises(OptionError, match="hold both models in memory; leave blockwise out"):
        verify(dynamic, tiny_checkpoint, asked(True), VerifyOptions(blockwise=True, sensitivity=True))


def test_the_answer_is_the_last_turn_if_it_is_the_models() -> None:
    question = {"role": "user", "content": "Why?"}
    assert without_answer([question]) == ([question], None)
    assert without_answer([question, ANSWER]) == ([question], ANSWER["content"])
    parts = [{"type": "text", "text": "A "}, {"type": "text", "text": "slope."}]
    assert without_answer([question, {"role": "assistant", "content": parts}])[1] == "A slope."
    assert OPENING
