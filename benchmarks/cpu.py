"""One question about one picture, or one video, on a CPU: this engine in each scheme and other libraries, side by side.

    python benchmarks/cpu.py run --models /tmp/models                          all systems in turn, round after round
    python benchmarks/cpu.py run --models /tmp/models --only "w4a8" --rounds 1   those whose names hold a word
    python benchmarks/cpu.py run --models /tmp/models --add --rounds 1           one round more, beside what the file holds
    python benchmarks/cpu.py report                                            docs/performance.md and its charts

The model has the shapes of the published 3B and random weights: what it says is noise, what it costs is real. All systems read the
same checkpoint (`tools/random_checkpoint.py`) or what their own converters made of it; docs/notes/peers.md says how each was
obtained and converted. Each measurement is a process of its own, so that none profits from another's memory, and may have an
interpreter of its own (`--python vllm=/tmp/vllm/bin/python`), since the libraries' pins clash; a short answer about another picture,
not counted, comes first. After each, this machine's reading and integer rates are measured anew. A system whose library or model is
not there is named and left out. Each machine has a file of its own, named after its instruction set (`--results` for another name);
the report shows all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))  # python -m benchmarks.cpu, too
import cpu_report
from cpu_record import Record, processor_of, read, write
from torch_products import has_bf16, int8_product

from saccade.bench.machine import measure_machine
from saccade.checkpoints.presets import PRESETS
from saccade.kernels.choose import back_ends, processor_name
from saccade.kernels.library import load

ROOT = Path(__file__).parents[1]
PROGRAMS = ROOT / "benchmarks" / "cpu_systems"
RESULTS = ROOT / "benchmarks" / "results"

FRAMES = {"picture": (1, 756, 1008), "video": (30, 280, 504)}  # count, height, width: 972 and 2,700 tokens
QUESTION = "Describe this in detail."
TOKENS_OUT = 128


@dataclasses.dataclass(frozen=True)
class System:
    """One row of the table. `library`: run_<library>.py; `model`: a folder or file of --models, `{}` the preset's name."""

    library: str
    model: str = "random-{}"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    media: tuple[str, ...] = ("picture", "video")


TOWER_BF16 = {"projector": "random-{}-mmproj-bf16.gguf"}
TOWER_Q8_0 = {"projector": "random-{}-mmproj-q8_0.gguf"}
SYSTEMS = {
    "saccade w4a8": System("saccade", options={"quantization": "w4a8-g128"}),
    "saccade w4a8, int8 head": System(
        "saccade", options={"quantization": "w4a8-g128", "head_quantization": "w8a8-dynamic"}
    ),
    "saccade w8a8": System("saccade", options={"quantization": "w8a8-dynamic"}),
    "saccade w8a16": System("saccade", options={"quantization": "w8a16"}),
    "saccade bf16": System("saccade"),
    "transformers bf16": System("transformers"),
    "transformers bf16, oneDNN off in decode": System("transformers", options={"onednn_decode": False}),
    "transformers float32": System("transformers", options={"dtype": "float32"}),
    "llama.cpp Q4_0": System("llama_cpp", "random-{}-Q4_0.gguf", TOWER_BF16, ("picture",)),
    "llama.cpp Q4_K_M": System("llama_cpp", "random-{}-Q4_K_M.gguf", TOWER_BF16, ("picture",)),
    "llama.cpp Q8_0": System("llama_cpp", "random-{}-Q8_0.gguf", TOWER_Q8_0, ("picture",)),
    "OpenVINO int4": System("openvino", "random-{}-openvino-int4"),
    "OpenVINO int8": System("openvino", "random-{}-openvino-int8"),
    "vLLM w8a8": System("vllm", "random-{}-w8a8", media=("picture",)),
    "vLLM bf16": System("vllm", media=("picture",)),
}
MODULES = {
    "llama_cpp": "llama_cpp",
    "openvino": "openvino_genai",
}  # what a library is imported as, where it is not its name


# --- what is there --------------------------------------------------------------------------------------------------------


def missing(system: System, models: Path, preset: str, python: str) -> str | None:
    """Why a system cannot be measured here, or None."""
    module = MODULES.get(system.library, system.library)
    probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    if subprocess.run([python, "-c", probe], env=environment(), capture_output=True, check=False).returncode:
        return f"{python} has no {module}; name one that has: --python {system.library}=…"
    for name in (system.model, *(value for value in system.options.values() if str(value).endswith(".gguf"))):
        if not (models / name.format(preset)).exists():
            return f"{models / name.format(preset)} is not there (docs/notes/peers.md)"
    is_bf16 = system.options.get("dtype") != "float32"
    if system.library in ("transformers", "vllm") and is_bf16 != has_bf16():
        return f"torch has {'a' if has_bf16() else 'no'} fast bfloat16 product on this processor (docs/notes/peers.md)"
    return None


def environment() -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    }


def write_checkpoint(models: Path, preset: str) -> None:
    """The one that all systems start from, where it is not there yet."""
    folder = models / f"random-{preset}"
    if not folder.exists():
        command = [sys.executable, str(ROOT / "tools" / "random_checkpoint.py"), preset, str(folder)]
        subprocess.run(command, check=True, env=environment())


# --- measuring ------------------------------------------------------------------------------------------------------------


def measure(name: str, media: str, frames: Path, python: str, options: argparse.Namespace) -> Record:
    """Raises CalledProcessError if the system's program fails."""
    system, load_average = SYSTEMS[name], os.getloadavg()[0]
    cell = {
        "model": str(options.models / system.model.format(options.preset)),
        "media": media,
        "frames": str(frames),
        "question": QUESTION,
        "threads": options.threads,
        "tokens_out": options.tokens_out,
        "options": {
            key: str(options.models / value.format(options.preset)) if str(value).endswith(".gguf") else value
            for key, value in system.options.items()
        },
    }
    command = [python, str(PROGRAMS / f"run_{system.library}.py"), json.dumps(cell)]
    done = subprocess.run(command, check=True, env=environment(), stdout=subprocess.PIPE, text=True)
    numbers = json.loads(done.stdout.splitlines()[-1])
    machine = measure_machine(torch.device("cpu"), torch.bfloat16, buffer_bytes=1 << 30, matrices=(512,))
    return Record(
        system=name,
        media=media,
        threads=options.threads,
        tokens_out=options.tokens_out,
        bytes_per_s=machine.bytes_per_s,
        integer_operations_per_s=integer_rate(),
        load_average=load_average,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **numbers,
    )


def integer_rate(rows: int = 1024, outputs: int = 22016, columns: int = 2048) -> float | None:
    """Operations per second that oneDNN's int8 product reaches at a layer of the 3B's."""
    product = int8_product(rows, outputs, columns)
    if product is None:
        return None
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - start)
    return 2 * rows * outputs * columns / min(seconds)


def run(options: argparse.Namespace) -> int:
    """All cells of all rounds; the file is written anew after each. Returns how many failed."""
    torch.set_num_threads(options.threads)
    results = options.results or RESULTS / f"cpu-{instruction_set()}.json"
    if (other := processor_of(results)) not in (None, processor_name()):
        sys.exit(f"{results} holds measurements of {other}; name another file: --results FILE")
    pythons = {system.library: sys.executable for system in SYSTEMS.values()} | dict(options.python)
    chosen = [name for name in SYSTEMS if not options.only or any(word in name for word in options.only)]
    options.models.mkdir(parents=True, exist_ok=True)
    write_checkpoint(options.models, options.preset)
    cells = []
    for name in chosen:
        reason = missing(SYSTEMS[name], options.models, options.preset, pythons[SYSTEMS[name].library])
        if reason:
            print(f"left out: {name}: {reason}", flush=True)
        else:
            cells += [(name, media) for media in options.media if media in SYSTEMS[name].media]
    records = read(results) if options.add else []
    machine = {"processor": processor_name(), "kernels": next(b.reason for b in back_ends() if b.name == "cpu")}
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        for media, shape in FRAMES.items():
            np.save(Path(folder, media), np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
        for number in range(options.rounds):
            first = number % max(1, len(cells))
            for name, media in cells[first:] + cells[:first]:
                python, start = pythons[SYSTEMS[name].library], time.perf_counter()
                try:
                    record = measure(name, media, Path(folder, f"{media}.npy"), python, options)
                except subprocess.CalledProcessError as problem:
                    failures += 1
                    print(f"failed: {name}, {media}: exit status {problem.returncode}", flush=True)
                    continue
                records.append(record)
                write(results, machine, options.preset, records)
                print(
                    f"round {number + 1}, {name}, {media}: {record.total_s:.1f} s = vision {record.vision_s:.1f}, "
                    f"prefill {record.prefill_s:.1f}, {record.tokens_out - 1} tokens of {record.token_s * 1e3:.0f} ms; "
                    f"{record.tokens_in} tokens in, {record.peak_memory_bytes / 1e9:.1f} GB, loaded in {record.load_s:.0f} s; "
                    f"measured in {time.perf_counter() - start:.0f} s",
                    flush=True,
                )
    return failures


def instruction_set() -> str:
    """The kernels', or `none`."""
    library = load()
    return "none" if isinstance(library, str) else library.isa


def interpreter(text: str) -> tuple[str, str]:
    library, _, path = text.partition("=")
    known = sorted({system.library for system in SYSTEMS.values()})
    if library not in known or not Path(path).exists():
        raise argparse.ArgumentTypeError(
            f"{text!r} is no LIBRARY=INTERPRETER with one of {', '.join(known)} and a file"
        )
    return library, path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--only", nargs="+", metavar="WORD", help="systems whose name holds one of these")
    parser.add_argument("--media", nargs="+", choices=list(FRAMES), default=list(FRAMES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--add", action="store_true", help="keep what the file holds")
    parser.add_argument(
        "--models", type=Path, default=ROOT / "runs" / "models", help="folder of the checkpoint and its conversions"
    )
    parser.add_argument("--python", type=interpreter, action="append", default=[], metavar="LIBRARY=INTERPRETER")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--preset", default="3b", choices=list(PRESETS))
    parser.add_argument("--tokens-out", type=int, default=TOKENS_OUT)
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="where run writes, benchmarks/results/cpu-ISA.json"
    )
    options = parser.parse_args()
    if options.command == "run":
        sys.exit(run(options) > 0)
    cpu_report.report(sorted(RESULTS.glob("cpu-*.json")), ROOT / "docs")


if __name__ == "__main__":
    main()
