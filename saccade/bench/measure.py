"""Measures an answer stage by stage, and holds every stage against the limit this machine sets it.

The distance from the limit says where time can still be won: a stage at 90 % is done, one at 5 % is not.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from saccade.api import LLM, Conversation
from saccade.base.errors import OptionError, SaccadeError
from saccade.base.meter import peak_memory_bytes, progress
from saccade.bench.against import Comparison, against_transformers, require_transformers
from saccade.bench.machine import MachineLimits, measure_machine
from saccade.bench.options import BenchOptions
from saccade.bench.work import Storage, Work, decode_all_work, prefill_work, vision_work
from saccade.checkpoints.config import ModelConfig
from saccade.checkpoints.hub import resolve
from saccade.engine.options import SamplingParams
from saccade.inputs.prompt import MediaReceipt
from saccade.model.layers import bytes_per_linear_value
from saccade.outputs import RequestOutput

if TYPE_CHECKING:
    from rich.table import Table

STAGES = ("media decode", "preprocessing", "vision", "prefill", "decoded token", "total")


@dataclass(frozen=True)
class Stage:
    """One stage in every repeat. `work` is what it must do at least, `limit_s` the time no program can beat here."""

    name: str
    seconds: tuple[float, ...]
    work: Work
    limit_s: float

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles_s(self) -> tuple[float, float]:
        """Half of the repeats lie between these."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, method="inclusive")
        return low, high

    @property
    def reached(self) -> float:
        """Share of the possible speed, 1 at the limit; 0 where the stage did not run."""
        return self.limit_s / self.median_s if self.median_s > 0 else 0.0

    def as_json(self) -> dict[str, Any]:
        low, high = self.quartiles_s
        return {
            "median_s": self.median_s,
            "quartiles_s": [low, high],
            "min_s": min(self.seconds),
            "max_s": max(self.seconds),
            "operations": self.work.operations,
            "bytes": self.work.bytes,
            "limit_s": self.limit_s,
            "reached": self.reached,
            "repeats_s": list(self.seconds),
        }


@dataclass(frozen=True)
class BenchResult:
    model: str
    config: ModelConfig
    quantization: str | None
    kernels: Mapping[str, str]  # op -> back end
    media: list[MediaReceipt]
    tokens_in: int
    tokens_out: int
    tokens_per_step: float  # of the answers' decoding; more than 1 where guesses were right
    warmup: int
    load_s: float  # until the model was ready, from the constructor on
    first_answer_s: float  # of the first, warm-up or not: what is made once is in it
    stages: tuple[Stage, ...]  # in the order of STAGES
    peak_memory_bytes: int  # of the process, loading included
    peak_device_bytes: int | None  # of the GPU's allocator
    machine: MachineLimits
    load_average: float  # of the system before the first answer: other programs make every number worse
    command: str
    date: str  # UTC
    against: Comparison | None = None

    def stage(self, name: str) -> Stage:
        return self.stages[STAGES.index(name)]

    def as_json(self) -> dict[str, Any]:
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        named["stages"] = {stage.name: stage.as_json() for stage in self.stages}
        named["kernels"] = dict(self.kernels)
        for name in ("config", "machine", "against"):
            named[name] = None if named[name] is None else dataclasses.asdict(named[name])
        named["media"] = [dataclasses.asdict(receipt) for receipt in self.media]
        return named

    def write(self, path: str | os.PathLike[str]) -> None:
        Path(path).write_text(json.dumps(self.as_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def headline(self) -> str:
        """The result in one line."""
        total, token = self.stage("total"), self.stage("decoded token")
        memory = self.peak_memory_bytes if self.peak_device_bytes is None else self.peak_device_bytes
        return (
            f"{self.model}: {self.tokens_in} tokens in, {self.tokens_out} out in {_time(total.median_s)}; "
            f"{1 / token.median_s:.1f} tokens/s while decoding, {token.reached:.0%} of the limit; "
            + (f"{self.tokens_per_step:.2f} tokens a step; " if self.tokens_per_step > 1 else "")
            + f"peak memory {memory / 1e9:.1f} GB"
        )

    def conditions(self) -> str:
        """Where and how it was measured, in three lines."""
        machine = self.machine
        threads = f"{machine.num_threads} thread" + ("" if machine.num_threads == 1 else "s")
        place = machine.processor if machine.device == "cpu" else machine.device
        return (
            f"ready in {_time(self.load_s)}, first answer in {_time(self.first_answer_s)}\n"
            f"{place}, {threads}, {machine.dtype}, torch {machine.versions['torch']}; "
            f"load average {self.load_average:.1f}; {len(self.stages[0].seconds)} repeats after {self.warmup}\n"
            f"limits measured here: {machine.bytes_per_s / 1e9:.1f} GB/s ({machine.bandwidth_method}), "
            f"{machine.operations_per_s / 1e12:.3g} TFLOP/s "
            f"({machine.matrix_size} x {machine.matrix_size} matrices of {machine.matrix_dtype})"
        )

    def table(self) -> Table:
        """The stages for a terminal."""
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for title in ("stage", "median", "half within", "limit here", "reached"):
            table.add_column(title, justify="left" if title == "stage" else "right", no_wrap=True)
        for stage in self.stages:
            low, high = stage.quartiles_s
            table.add_row(
                stage.name,
                _time(stage.median_s),
                f"{_time(low)} .. {_time(high)}",
                _time(stage.limit_s),
                f"{stage.reached:.1%}",
                end_section=stage.name == STAGES[-2],
            )
        return table

    def show(self) -> None:
        """Prints headline, table and conditions."""
        from rich.console import Console

        console = Console(highlight=False, soft_wrap=True)
        console.print(self.headline(), markup=False)
        console.print(self.table())
        console.print(self.conditions(), markup=False)
        if self.against is not None:
            console.print(self.against.headline(), markup=False)


def bench(
    llm: LLM,
    messages: Conversation,
    params: SamplingParams,
    options: BenchOptions,
    *,
    name: str = "",
    machine: MachineLimits | None = None,
) -> BenchResult:
    """Answers one conversation warmup + repeat times, each from the start: no cache serves a later one.

    `name` is the checkpoint's: what the result calls the model, and where --against finds it; a random model names itself.
    `params` should fix the length (min_tokens = max_tokens). `machine` is measured after the answers unless given.
    Raises OptionError when the answers have fewer than two tokens or differ in length, SaccadeError when one fails.
    """
    if options.against is not None:
        require_transformers()
    model = llm.engine.runner.model
    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    runs: list[tuple[RequestOutput, float]] = []
    with progress(options.warmup + options.repeat, "measuring") as advance:
        for _ in range(options.warmup + options.repeat):
            runs.append(_answer(llm, messages, params))
            advance(1)
    first_answer_s = runs[0][1]
    runs = runs[options.warmup :]
    output = runs[0][0]
    tokens_out = _tokens_out(runs)
    peak = peak_memory_bytes()
    peak_device = torch.cuda.max_memory_allocated(model.device) if model.device.type == "cuda" else None
    machine = machine or measure_machine(model.device, model.dtype)
    tower, decoder = (
        Storage(bytes_per_linear_value(part), model.dtype.itemsize, model.lm_head.bytes_per_value)
        for part in (model.visual, model.language)
    )
    seconds = [_stage_seconds(answer, total, tokens_out) for answer, total in runs]
    works = stage_works(llm.config, output.media, len(output.prompt_token_ids), tokens_out, tower, decoder)
    result = BenchResult(
        model=_model_name(options, name),
        config=llm.config,
        quantization=llm.quantization,
        kernels=model.kernels.sources,
        media=output.media,
        tokens_in=len(output.prompt_token_ids),
        tokens_out=tokens_out,
        tokens_per_step=statistics.median(_tokens_per_step(answer, tokens_out) for answer, _ in runs),
        warmup=options.warmup,
        load_s=llm.load_s,
        first_answer_s=first_answer_s,
        stages=_stages(seconds, works, tokens_out, machine),
        peak_memory_bytes=peak,
        peak_device_bytes=peak_device,
        machine=machine,
        load_average=load_average,
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    if options.against is not None:
        folder = resolve(name, source=llm.options.source, revision=llm.options.revision)
        first_token_s = result.stage("vision").median_s + result.stage("prefill").median_s
        token_s = result.stage("decoded token").median_s
        comparison = against_transformers(
            llm, folder, llm.prepare(messages), tokens_out, options.warmup, options.repeat, first_token_s, token_s
        )
        result = dataclasses.replace(result, against=comparison)
    return result


def _model_name(options: BenchOptions, name: str) -> str:
    if options.random is None:
        return name
    counts = {"decoder layers": options.layers, "tower blocks": options.vision_depth}
    cuts = [f"{count} {what}" for what, count in counts.items() if count is not None]
    return f"random {options.random}" + (f" with {' and '.join(cuts)}" if cuts else "")


def _answer(llm: LLM, messages: Conversation, params: SamplingParams) -> tuple[RequestOutput, float]:
    """One answer with cold caches, and its seconds from reading the media to the last token."""
    scheduler = llm.engine.scheduler
    llm.engine.runner.encoder_cache.clear()
    was_on, scheduler.prefix_cache = scheduler.prefix_cache, False
    try:
        start = time.perf_counter()
        output = llm.chat(messages, params)[0]
        total_s = time.perf_counter() - start
    finally:
        scheduler.prefix_cache = was_on
    if output.outputs[0].finish_reason == "error":
        raise SaccadeError(f"the answer to be measured failed: {output.outputs[0].error}")
    return output, total_s


def _tokens_out(runs: Sequence[tuple[RequestOutput, float]]) -> int:
    lengths = sorted({len(output.outputs[0].token_ids) for output, _ in runs})
    if lengths[0] < 2 or len(lengths) > 1:
        raise OptionError(
            f"answers of {' and '.join(map(str, lengths))} tokens cannot be measured token by token; "
            "fix their length: --min-tokens 128 --max-tokens 128"
        )
    return lengths[0]


def _tokens_per_step(output: RequestOutput, tokens_out: int) -> float:
    return (tokens_out - 1) / (tokens_out - 1 - output.num_accepted_tokens)


def _stage_seconds(output: RequestOutput, total_s: float, tokens_out: int) -> tuple[float, ...]:
    """In the order of STAGES."""
    times = output.timings
    token_s = times.decode_s / (tokens_out - 1)
    return times.media_s, times.preprocessing_s, times.vision_s, times.prefill_s, token_s, total_s


def stage_works(
    config: ModelConfig,
    media: Sequence[MediaReceipt],
    tokens_in: int,
    tokens_out: int,
    tower: Storage,
    decoder: Storage,
) -> tuple[Work, ...]:
    """The least work of each stage but the total, in the order of STAGES; a decoded token stands for the mean of all.

    Decoding media has to write the pixels, preprocessing to read them, to write and read resized ones, and to write
    float32 patch rows; their few operations are not counted.
    """
    vision = config.vision
    decoded = sum(3 * r.original_size[0] * r.original_size[1] * max(1, len(r.frame_indices)) for r in media)
    resized = sum(3 * r.model_size[0] * r.model_size[1] * max(1, len(r.frame_indices)) for r in media)
    rows = sum(r.grid.num_patches for r in media) * vision.patch_values * 4
    grids = [receipt.grid for receipt in media]
    decode = decode_all_work(config, tokens_in, tokens_out, decoder)
    return (
        Work(0, decoded),
        Work(0, decoded + 2 * resized + rows),
        vision_work(config, grids, tower).total if grids else Work(),
        prefill_work(config, tokens_in, decoder),
        Work(decode.operations / (tokens_out - 1), decode.bytes / (tokens_out - 1)),
    )


def _stages(
    seconds: Sequence[tuple[float, ...]], works: Sequence[Work], tokens_out: int, machine: MachineLimits
) -> tuple[Stage, ...]:
    limits = [machine.limit_s(work.operations, work.bytes) for work in works]
    times = [*[1] * (len(works) - 1), tokens_out - 1]  # how often each happens in an answer
    total = Work()
    for work, count in zip(works, times, strict=True):
        total += Work(work.operations * count, work.bytes * count)
    total_limit = sum(limit * count for limit, count in zip(limits, times, strict=True))
    columns = zip(*seconds, strict=True)
    return tuple(
        Stage(name, tuple(column), work, limit)
        for name, column, work, limit in zip(STAGES, columns, [*works, total], [*limits, total_limit], strict=True)
    )


def _time(seconds: float) -> str:
    return (
        f"{seconds:.2f} s"
        if seconds >= 1
        else f"{seconds * 1e3:.3g} ms"
        if seconds >= 1e-3
        else f"{seconds * 1e6:.0f} us"
    )
