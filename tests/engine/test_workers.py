"""Several processes answer as one does, and none waits for a dead one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from saccade import LLM, SamplingParams
from saccade.base.errors import DeviceError, OptionError
from saccade.base.ranks import ALONE, Ranks
from saccade.checkpoints.presets import PRESETS
from saccade.engine import workers
from saccade.engine.runner import Runner
from saccade.engine.workers import own_device
from saccade.model.sharding import cut, cut_heads, cut_width, length
from tests.engine.sharded_answers import answer
from tests.goldens import GOLDENS

SCRIPT = Path(__file__).with_name("sharded_answers.py")
CASES: list[dict[str, str]] = [
    {"dtype": "float32", "speculation": "lookup"},
    {"dtype": "bfloat16"},
    {"dtype": "float32", "quantization": "w8a8-dynamic"},
    {"dtype": "float32", "quantization": "w4a8-g32", "head_quantization": "w8a16"},
    {"dtype": "float32", "quantization": "w4a16-g32"},
]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_answer_as_one_does(num_ranks: int, tmp_path: Path) -> None:
    cases = CASES if num_ranks == 2 else [CASES[1], CASES[3]]
    static = GOLDENS / "w8a8_m2_vllm" / "output"
    if static.exists() and num_ranks == 2:  # its model has two heads
        cases = [*cases, {"model": str(static), "dtype": "float32"}]
    out = tmp_path / "answers.json"
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(num_ranks),
        "--standalone",
    ]
    command = [*launch, str(SCRIPT), json.dumps(cases), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text()) == [answer(dict(case)) for case in cases]


def test_started_ranks_answer_and_a_dead_one_ends_the_run() -> None:
    llm = LLM("demo", device="cpu", kv_cache_tokens=4096, tensor_parallel=2)
    alone = LLM("demo", device="cpu", kv_cache_tokens=4096)
    params = SamplingParams(max_tokens=4, temperature=0.0)
    expected = alone.ask("Say hello.", sampling_params=params).outputs[0].token_ids
    assert llm.ask("Say hello.", sampling_params=params).outputs[0].token_ids == expected
    with pytest.raises(OptionError, match="one tensor-parallel model at a time"):
        LLM("demo", device="cpu", kv_cache_tokens=4096, tensor_parallel=2)
    os.kill(llm._crew.processes[0].pid, signal.SIGKILL)
    with pytest.raises(DeviceError, match="rank 1 ended with exit code -9"):
        llm.ask("Say hello.", sampling_params=params)
    with pytest.raises(DeviceError, match="open it again"):
        llm.ask("Say hello.", sampling_params=params)


def test_a_number_of_ranks_that_does_not_fit_is_refused_before_any_is_started() -> None:
    with pytest.raises(OptionError, match="tensor_parallel 3 shares 2 key heads unevenly; use a multiple of 2"):
        LLM("demo", device="cpu", tensor_parallel=3)


@pytest.mark.parametrize("size", ["3b", "7b", "32b", "72b"])
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_every_head_and_column_has_one_owner(size: str, num_ranks: int) -> None:
    config = PRESETS[size]
    text, vision = config.text, config.vision
    ranks = [Ranks(rank, num_ranks) for rank in range(num_ranks)]
    heads = [cut_heads(text.num_heads, text.num_kv_heads, each) for each in ranks]
    share = text.num_heads // text.num_kv_heads
    assert [q for each in heads for q in range(each.q.start, each.q.stop)] == list(range(text.num_heads))
    for each in heads:  # query head q reads key head q // share, which its rank holds, in the same order
        read = [q // share - each.kv.start for q in range(each.q.start, each.q.stop)]
        assert read == [local // (each.num_q // each.num_kv) for local in range(each.num_q)]
    for width in (text.intermediate_size, vision.intermediate_size, text.vocab_size):
        spans = [cut_width(width, each, "columns") for each in ranks]
        assert [column for span in spans for column in (span.start, span.stop)][1:-1] == [
            span.start for span in spans[1:] for _ in range(2)
        ]
        assert (spans[0].start, spans[-1].stop) == (0, width)
        assert max(map(length, spans)) <= 1.1 * width / num_ranks + 256


def test_groups_of_columns_stay_whole() -> None:
    for width, size in ((11_008, 256), (18_944, 256), (29_568, 128), (3456, 128), (704, 64)):
        for rank in range(4):
            span = cut_width(width, Ranks(rank, 4), "columns")
            assert span.start % size == span.stop % size == 0


def test_too_many_ranks_are_refused_with_the_number_that_fits() -> None:
    with pytest.raises(
        OptionError, match="tensor_parallel 32 is more than the 16 heads of the vision tower; use 16 or fewer"
    ):
        cut(16, Ranks(0, 32), "heads of the vision tower")
    assert cut(16, ALONE, "heads") == slice(0, 16)


@pytest.mark.parametrize("is_broken", [False, True])
def test_recordings_are_forgotten_before_ranks_part(monkeypatch: pytest.MonkeyPatch, is_broken: bool) -> None:
    """NCCL does not part from a CUDA graph that holds an exchange."""
    left: list[int] = []
    crew = workers.Crew(Ranks(rank=1, size=2))
    crew.is_broken = is_broken
    monkeypatch.setattr(Runner, "__init__", lambda self: None)
    monkeypatch.setattr(Ranks, "tell", lambda self, message: None)
    runner = workers.LeadingRunner(crew)
    runner.graphs = SimpleNamespace(recordings={"a step": 1})  # type: ignore[assignment]
    monkeypatch.setattr(workers, "disconnect", lambda: left.append(len(runner.graphs.recordings)))  # type: ignore[union-attr]
    crew.close()
    assert left == [0]


def test_a_rank_without_a_gpu_of_its_own_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_device(torch.device("cuda", 0)) == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DeviceError, match=r"rank 1 .* there is 1"):
        own_device(torch.device("cuda", 0))


class Waiting(Runner):
    """Computes nothing, and waits for a peer, as an exchange between GPUs does."""

    def __init__(self) -> None:
        self.given_up = threading.Event()

    def run(self, batch: Any, features: Any) -> Any:
        self.given_up.wait(10)
        return torch.zeros(1)

    def forget_recordings(self) -> None:
        pass


def test_a_rank_that_dies_within_an_exchange_ends_the_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's exchanges on GPUs notice nothing by themselves: whoever started the rank gives them up."""
    peer = subprocess.Popen(["sleep", "60"])
    monkeypatch.setattr(Ranks, "tell", lambda self, message: peer.kill())
    monkeypatch.setattr(Runner, "__init__", Waiting.__init__)
    monkeypatch.setattr(Runner, "run", Waiting.run)
    monkeypatch.setattr(Runner, "forget_recordings", Waiting.forget_recordings)
    crew = workers.Crew(Ranks(0, 2), [peer])
    runner = workers.LeadingRunner(crew)
    monkeypatch.setattr(Ranks, "abandon", lambda self: runner.given_up.set())  # type: ignore[attr-defined]
    with pytest.raises(DeviceError, match="rank 1 ended with exit code -9"):
        runner.run(None, ())  # type: ignore[arg-type]
    assert runner.given_up.is_set()  # type: ignore[attr-defined]
    with pytest.raises(DeviceError, match="open it again"):
        runner.run(None, ())  # type: ignore[arg-type]


ORPHAN = """
import os, signal, sys, time
from saccade import LLM
llm = LLM("demo", device="cpu", kv_cache_tokens=1024, tensor_parallel=2)
print(llm._crew.processes[0].pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_leader_that_dies_leaves_no_process_behind(tmp_path: Path) -> None:
    """It inherits the leader's streams: files, for a pipe would be waited for as long as it lives."""
    out, said = tmp_path / "out", tmp_path / "said"
    with out.open("w") as stdout, said.open("w") as stderr:
        subprocess.run([sys.executable, "-c", ORPHAN], stdout=stdout, stderr=stderr, timeout=120, check=False)
    status = Path(f"/proc/{int(out.read_text())}/status")
    for _ in range(100):
        if not status.exists() or "State:\tZ" in status.read_text():
            break
        time.sleep(0.1)
    else:
        os.kill(int(out.read_text()), signal.SIGKILL)
        pytest.fail("it lives on")
    assert "rank 1: rank 0 is gone" in said.read_text()
    assert "Traceback" not in said.read_text()
