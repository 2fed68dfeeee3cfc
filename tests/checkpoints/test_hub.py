"""From a model's name to a folder, with and without a network. No test here needs one."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from saccade.base.errors import CheckpointError, OptionError
from saccade.checkpoints import hub
from saccade.checkpoints.hub import resolve

ID = "Qwen/Qwen2.5-VL-3B-Instruct"


def answer_with(monkeypatch: pytest.MonkeyPatch, outcome: Any) -> list[dict[str, Any]]:
    """Puts a fixed outcome in the place of the network, and returns the calls."""
    calls: list[dict[str, Any]] = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        calls.append({"repo_id": repo_id, **options})
        if isinstance(outcome, Exception):
            raise outcome
        return str(outcome)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setitem(sys.modules, "modelscope", types.SimpleNamespace(snapshot_download=snapshot_download))
    return calls


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert resolve(tmp_path) == resolve(str(tmp_path)) == tmp_path


def test_the_demo_is_the_packaged_one_whatever_lies_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    monkeypatch.setattr(hub, "DEMO_FOLDER", tmp_path / "packaged")
    with pytest.raises(CheckpointError, match="lacks the demo model"):
        resolve("demo")
    (tmp_path / "packaged").mkdir()
    assert resolve("demo") == tmp_path / "packaged"
    assert resolve("./demo") == Path("demo")


def test_a_file_is_answered_with_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=rf"config\.json is a file; pass the folder it is in, {tmp_path}"):
        resolve(str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    "wrong", ["/no/such/folder", "./nothing", "a/b/c", "nothing", "", "org/..", "a b/c", "org/na\nme"]
)
def test_what_is_neither_a_folder_nor_an_id_is_refused(wrong: str) -> None:
    with pytest.raises(CheckpointError):
        resolve(wrong)


def test_a_misspelt_folder_is_answered_with_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "qwen-3b").mkdir()
    with pytest.raises(CheckpointError, match=rf"qwen-3bb does not exist \(there is {tmp_path / 'qwen-3b'}\)"):
        resolve(tmp_path / "qwen-3bb")


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_only_configuration_text_and_safetensors_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: hub.Source
) -> None:
    calls = answer_with(monkeypatch, tmp_path)
    assert resolve(ID, source, revision="abc") == tmp_path
    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
    assert calls == [{"repo_id": ID, "revision": "abc", "allow_patterns": patterns}]


def test_offline_says_so_and_what_to_do(tmp_path: Path) -> None:
    """In a fresh process with the hub's own switch: nothing is replaced."""
    program = f"""
from saccade.checkpoints.hub import resolve
try:
    resolve({ID!r})
except Exception as error:
    print(type(error).__name__, error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, env=environment)
    assert run.stdout.startswith("CheckpointError")
    for words in ("HF_HUB_OFFLINE is set", f"hf download {ID} --local-dir", "copy that folder here", "try demo"):
        assert words in run.stdout


def test_an_unreachable_hub_says_so_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    answer_with(monkeypatch, LocalEntryNotFoundError("no connection"))
    with pytest.raises(
        CheckpointError, match=f"the hub cannot be reached; .* `hf download {ID} --local-dir .*try demo"
    ):
        resolve(ID)


def test_a_broken_download_is_one_line_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, TimeoutError("read timed out\nsecond line"))
    with pytest.raises(CheckpointError, match=r"downloading .* failed \(TimeoutError: read timed out\); try again"):
        resolve(ID)


def test_modelscope_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, ConnectionError("unreachable"))
    with pytest.raises(CheckpointError, match=f"modelscope download --model {ID} .*ConnectionError: unreachable"):
        resolve(ID, "modelscope")


def test_modelscope_without_its_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(CheckpointError, match=r"pip install saccade\[modelscope\]"):
        resolve(ID, "modelscope")


def test_an_unknown_source_is_answered_with_the_known_ones() -> None:
    with pytest.raises(OptionError, match="'github' is unknown; use huggingface or modelscope"):
        resolve(ID, "github")  # type: ignore[arg-type]


def test_what_a_folder_cannot_have_is_refused(tmp_path: Path) -> None:
    for folder in (hub.DEMO, str(tmp_path)):
        with pytest.raises(OptionError, match="revision 'v2' is of a hub id"):
            resolve(folder, revision="v2")
    with pytest.raises(CheckpointError, match="name is empty"):
        resolve("")
