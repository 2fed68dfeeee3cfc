"""What quantizing costs in time and memory at real sizes: the command line, in a process of its own, on random weights.

    python benchmarks/quantize_memory.py                    all cases, into benchmarks/results/quantization-memory.json
    python benchmarks/quantize_memory.py 3b --layers 4 --vision-depth 4 --json /tmp/trial.json
    python benchmarks/quantize_memory.py 3b --note "beside other work"     another case's result in the file stays

Each case makes its checkpoint in a temporary folder (3B: 13 GB of disk with what is written beside it), removed afterwards.
Random weights cost what trained ones do; accuracy measured on them says nothing. `small` has the size of the model on which
msModelSlim took 475 s and 0.8 to 1.1 GB for m2 with two photos on one thread: exact mode does the same work, best mode its own.
Photos are drawn unless --photos names a folder of some.

Memory is the process's resident set as the kernel counts it (VmHWM, Linux): its own pages, and of mapped files (libraries, the hidden
rows where they are many) those in memory at the time; `peak_anonymous_bytes` are its own pages alone. Files that are read and
written, not mapped, lie in the page cache, which no process is charged for. Processor seconds are those of all its threads: beside
other work they say more than the wall's.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path

import psutil
from PIL import Image

from saccade.base.meter import gigabytes
from saccade.kernels.choose import processor_name
from saccade.quantize.drawn_samples import drawn

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quantization-memory.json"
POLL_S = 0.2
PHOTO_SIZES = ((640, 479), (500, 375))  # width, height


@dataclass(frozen=True)
class Case:
    """`options` of `saccade quantize`; {model}, {out} and {photos} stand for folders. None: the preset's own depth."""

    preset: str
    num_photos: int
    threads: int | None
    options: tuple[str, ...]
    limit_bytes: float
    limit_s: float | None = None
    layers: int | None = None
    vision_depth: int | None = None


M2 = ("--scheme", "w8a8", "--smooth", "m2", "--format", "vllm-ascend", "--calibration", "{photos}")
EXACT = ("--model_path", "{model}", "--save_directory", "{out}", "--calib_images", "{photos}", "--anti_method", "m2")
CASES = {
    "small-exact": Case("small", 2, 1, EXACT, 1.1e9, 47),
    "small": Case("small", 2, 1, ("{model}", "{out}", *M2, "--no-verify"), 1.1e9, 47),
    "3b": Case("3b", 8, None, ("{model}", "{out}", *M2), 4e9),
    "72b": Case("72b", 8, None, ("{model}", "{out}", *M2), 8e9, layers=2),
}


@dataclass(frozen=True)
class Result:
    """Of one case. `said`: the command's first line and its last; peaks: the most its process held (see above)."""

    case: str
    command: str
    layers: int | None
    vision_depth: int | None
    threads: int
    seconds: float
    processor_seconds: float
    peak_memory_bytes: int
    peak_anonymous_bytes: int
    limit_bytes: float
    limit_s: float | None
    said: str
    day: str
    note: str = ""


@dataclass(frozen=True)
class Cost:
    """Of one process."""

    seconds: float
    processor_seconds: float
    peak_memory_bytes: int
    peak_anonymous_bytes: int


def measure(name: str, case: Case, photos: Sequence[Path], extra: Sequence[str], note: str) -> Result:
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        depth = [("--layers", case.layers), ("--vision-depth", case.vision_depth)]
        shorter = [text for option, count in depth if count is not None for text in (option, str(count))]
        tool = ROOT / "tools" / "random_checkpoint.py"
        subprocess.run([sys.executable, tool, case.preset, work / "model", *shorter], check=True, stdout=sys.stderr)
        save_photos(work / "photos", photos, case.num_photos)
        threads = case.threads or len(os.sched_getaffinity(0))
        options = [*case.options, "--threads", str(threads), *extra]
        places = {"model": str(work / "model"), "out": str(work / "out"), "photos": str(work / "photos")}
        command = [sys.executable, "-m", "saccade.cli", "quantize", *(option.format(**places) for option in options)]
        cost, said = run(command)
    shown = " ".join(["saccade", "quantize", *options])
    return Result(
        name, shown, case.layers, case.vision_depth, threads, *astuple(cost), case.limit_bytes, case.limit_s,
        said.replace(temporary, "."), datetime.date.today().isoformat(), note,
    )  # fmt: skip


def run(command: Sequence[str]) -> tuple[Cost, str]:
    """What it took, and what it said. Exits with the command's own complaint if it made nothing."""
    start, before = time.perf_counter(), children_seconds()
    peak, own = 0, 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        held = memory(process.pid)
        peak, own = max(peak, held.get("VmHWM", 0)), max(own, held.get("RssAnon", 0))
        time.sleep(POLL_S)
    out, _ = process.communicate()
    if process.returncode and "verified: fail" not in out:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{out}")
    lines = out.strip().splitlines()
    cost = Cost(round(time.perf_counter() - start, 1), round(children_seconds() - before, 1), peak, own)
    return cost, "; ".join(dict.fromkeys([lines[0], lines[-1]]))


def memory(process: int) -> dict[str, int]:
    """Bytes, by the kernel's names: VmHWM, the most it was, and RssAnon, among others; nothing once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}


def children_seconds() -> float:
    """Processor seconds of all processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def save_photos(folder: Path, photos: Sequence[Path], count: int) -> None:
    """`count` of the reference's sizes: of given photos other parts each time, or drawn."""
    folder.mkdir()
    for number in range(count):
        width, height = PHOTO_SIZES[number % len(PHOTO_SIZES)]
        if photos:
            whole = Image.open(photos[number % len(photos)]).convert("RGB")
            left = whole.width // 8 * (number // len(photos))
            picture = whole.crop((left, 0, left + whole.width // 2, whole.height)).resize((width, height))
        else:
            picture = drawn(number).picture.resize((width, height))
        picture.save(folder / f"{number}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="all by default")
    parser.add_argument("--photos", type=Path, help="a folder of photos to cut from")
    parser.add_argument("--layers", type=int, help="decoder layers, for a trial")
    parser.add_argument("--vision-depth", type=int, help="tower blocks, for a trial")
    parser.add_argument(
        "--option", action="append", default=[], help="one more for saccade quantize, as --option=--no-verify"
    )
    parser.add_argument(
        "--threads",
        type=int,
        help="in place of the case's own; one does not wait for the others where the machine is shared",
    )
    parser.add_argument("--note", default="", help="of the circumstances, kept with each result")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    photos = (
        sorted(path for path in options.photos.iterdir() if path.suffix in (".jpg", ".png")) if options.photos else []
    )
    for name in options.cases or CASES:
        case = CASES[name]
        case = replace(
            case,
            threads=options.threads or case.threads,
            layers=options.layers or case.layers,
            vision_depth=options.vision_depth or case.vision_depth,
        )
        result = measure(name, case, photos, options.option, options.note)
        print(
            f"{name}: {result.seconds} s, {result.processor_seconds} s of processors, {gigabytes(result.peak_memory_bytes)}"
            f" ({gigabytes(result.peak_anonymous_bytes)} its own); {result.said}",
            flush=True,
        )
        keep(options.json, result)


def keep(file: Path, result: Result) -> None:
    """In place of the case's result in `file`, if that is of the same machine."""
    machine = {"processor": processor_name(), "cpus": os.cpu_count(), "memory_bytes": psutil.virtual_memory().total}
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    others = known["results"] if known.get("machine") == machine else []
    of_case = {entry["case"]: entry for entry in [*others, asdict(result)]}
    results = [of_case[name] for name in CASES if name in of_case]
    file.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
