"""Best mode from a job to a folder that appears whole: the blocks, then shards, settings and what comes along.

Knows files and what a report holds; what becomes of the numbers is `run.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from saccade.base.meter import peak_memory_bytes
from saccade.checkpoints.config import ModelConfig
from saccade.checkpoints.formats import Checkpoint
from saccade.checkpoints.json_file import read_json
from saccade.checkpoints.shard_writer import DEFAULT_SHARD_BYTES, ShardWriter
from saccade.checkpoints.writing import companions
from saccade.quantize.job import Job, key_of, require_room
from saccade.quantize.kept import Kept, has_all, state_of
from saccade.quantize.plan import Plan
from saccade.quantize.report import (
    FILE_NAME,
    Cost,
    InputRange,
    LayerMeasure,
    QuantizationReport,
    Verify,
    merged,
    to_json,
)
from saccade.quantize.report_page import PAGE_NAME, page
from saccade.quantize.run import Gathering, Run
from saccade.quantize.samples import Samples
from saccade.quantize.state import State, is_complete


@dataclass(frozen=True)
class BestReport:
    """What a run did. `seconds` are those of all processes that took part, `peak_memory_bytes` of the one that finished."""

    folder: Path
    plan: Plan
    samples: Samples | None
    layers: tuple[LayerMeasure, ...]
    output_bytes: int
    seconds: float
    peak_memory_bytes: int
    verified: QuantizationReport | None = None

    @property
    def worst(self) -> LayerMeasure | None:
        """The linear whose output suffers most."""
        return min((layer for layer in self.layers if layer.worst_db is not None), key=_worst_db, default=None)


def _worst_db(layer: LayerMeasure) -> float:
    assert layer.worst_db is not None, f"{layer.module} was not measured"
    return layer.worst_db


@torch.inference_mode()
def quantize_best(
    job: Job, *, force: bool = False, verify: Verify | None = None, max_shard_bytes: int = DEFAULT_SHARD_BYTES
) -> BestReport:
    """Does the job; `out` appears whole or not at all, and a job that was killed goes on where it was.

    `verify` looks at the folder before it appears; what it finds goes into report.json and report.html there.
    """
    file_names = job.format.file_names(job.plan.assignment)
    partial, key = job.out.with_name(job.out.name + ".partial"), key_of(job)
    is_published = job.out.exists() and any(job.out.iterdir()) and is_complete(partial, key)  # killed right at the end
    if not is_published:
        ShardWriter(job.out, force=force, names=file_names).discard()  # refuses at once what it would refuse at the end
        require_room(job)
    state = State(partial, key)
    with _threads(job.threads):
        run = Run(job, state, gathered(job))
        run.all_blocks()
    state.complete()
    layers = tuple(_measure(layer) for record in state.records for layer in record)
    output_bytes, names = 0, []
    replaces = force or is_published
    with ShardWriter(job.out, max_shard_bytes, force=replaces, names=file_names, hidden=state.result) as writer:
        for name, part in state.tensors():
            output_bytes += part.info(name).nbytes
            names.append(name)
            writer.add(name, part.read(name))
        settings = _settings(job.checkpoint, run.config)
        files = job.format.side_files(settings, job.plan.assignment, names)
        for file, text in files.items():
            writer.add_file(file, text)
        for file, content in companions(job.checkpoint.folder):
            if file not in (FILE_NAME, PAGE_NAME):
                writer.add_file(file, content)
        seconds = state.seconds
        report = BestReport(job.out, job.plan, job.samples, layers, output_bytes, seconds, peak_memory_bytes())
        known = _for_json(job, report)
        if verify is not None:
            known = replace(merged(known, verify(writer.complete())), name=job.out.name)
            writer.add_file(PAGE_NAME, page(known))
            report = replace(report, verified=known, peak_memory_bytes=peak_memory_bytes())
        writer.add_file(FILE_NAME, to_json(known))
    state.remove()
    return report


def gathered(job: Job) -> Kept | None:
    """The statistics that the job keeps, gathered now unless they are there; None if it keeps none."""
    if job.statistics is None:
        return None
    state = state_of(job, job.statistics)
    if not has_all(job, job.statistics):
        Gathering(job, state).all_blocks()
        state.complete()
    return Kept(state)


def _for_json(job: Job, report: BestReport) -> QuantizationReport:
    """What a later verification adds its measurements to."""
    cost = Cost(job.plan.source_bytes, report.output_bytes, report.peak_memory_bytes, {"quantize": report.seconds})
    recipe = job.recipe.as_json() | ({"samples_sha256": job.samples.digest} if job.samples else {})
    return QuantizationReport(job.out.name, str(job.checkpoint.folder), recipe, cost=cost, layers=report.layers)


def _settings(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, Any]:
    """The source's config.json, changed where the result differs."""
    settings = read_json(checkpoint.folder / "config.json")
    if config.text.tie_word_embeddings != checkpoint.config.text.tie_word_embeddings:
        settings["tie_word_embeddings"] = config.text.tie_word_embeddings
        if isinstance(text := settings.get("text_config"), dict) and "tie_word_embeddings" in text:
            settings["text_config"] = text | {"tie_word_embeddings": config.text.tie_word_embeddings}
    return settings


def _measure(entry: dict[str, Any]) -> LayerMeasure:
    """What `dataclasses.asdict` and JSON took apart."""
    ranges = entry["ranges"] and InputRange(*(tuple(entry["ranges"][name]) for name in ("before", "after")))
    return LayerMeasure(**{**entry, "ranges": ranges})


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
