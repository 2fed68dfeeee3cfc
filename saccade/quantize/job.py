"""A quantization that has passed every check and not begun: checkpoint, samples, plan, format.

Knows what can be refused; changes nothing.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from saccade.base.errors import CheckpointError, OptionError
from saccade.base.meter import gigabytes
from saccade.checkpoints.formats import Checkpoint, open_checkpoint, require_tokenizer
from saccade.checkpoints.writing import Format, format_named, require_apart, require_writable
from saccade.inputs.chat import ChatTokenizer
from saccade.quantize.best_recipe import BestRecipe
from saccade.quantize.plan import Plan, make_plan, needs_samples
from saccade.quantize.samples import BUILTIN, Samples, load_samples


@dataclass(frozen=True)
class Job:
    """A quantization that has passed every check and not begun."""

    checkpoint: Checkpoint
    out: Path
    recipe: BestRecipe
    plan: Plan
    format: Format
    samples: Samples | None
    device: torch.device
    threads: int
    statistics: Path | None = None  # where those of the float model are kept

    @property
    def notes(self) -> tuple[str, ...]:
        """What was given and is not used."""
        if self.samples is not None:
            return self.samples.notes
        if self.recipe.calibration == BUILTIN:
            return ()
        return (
            f"calibration {self.recipe.calibration!r} is not read: without smoothing, gptq and static activations only weights count",
        )


def prepare(
    source: Path,
    out: Path,
    recipe: BestRecipe,
    *,
    device: str = "cpu",
    threads: int = 2,
    statistics: Path | None = None,
) -> Job:
    """Opens the checkpoint, reads the samples and makes the plan; no weight is read.

    Raises OptionError, CheckpointError, MediaError or PromptError.
    """
    checkpoint = open_checkpoint(source)
    if checkpoint.quantization is not None:
        raise CheckpointError(
            f"{source} is quantized already ({checkpoint.quantization}); quantize the one it was made from"
        )
    require_apart(source, out)
    plan = make_plan(checkpoint.config, recipe)
    dtype: torch.dtype = getattr(torch, checkpoint.config.dtype)
    format_ = format_named(recipe.format, dtype, recipe.kv_cache == "int8", recipe.visual_scales)
    require_writable(format_, plan.assignment)
    require_tokenizer(source)
    samples = None
    if needs_samples(recipe):
        tokenizer = ChatTokenizer(source, checkpoint.config)
        samples = load_samples(recipe.calibration, tokenizer, recipe.samples, recipe.seed, recipe.max_pixels)
        if recipe.visual_scales and not any(prompt.media for prompt in samples.prompts):
            raise OptionError(f"visual_scales are found on pictures, and {recipe.calibration} has none; leave it out")
        num_patches = sum(medium.receipt.grid.num_patches for prompt in samples.prompts for medium in prompt.media)
        plan = make_plan(checkpoint.config, recipe, samples.num_tokens, num_patches)
    return Job(
        checkpoint, out, recipe, plan, format_, samples, torch.device(device), threads, statistics if samples else None
    )


def key_of(job: Job) -> str:
    """Of all that the result's bytes depend on."""
    samples, is_kept = job.samples.digest if job.samples else "", job.statistics is not None
    what = (job.recipe.digest(), fingerprint(job.checkpoint), samples, str(job.device), job.threads, torch.__version__)
    return hashlib.sha256(repr((what, is_kept)).encode()).hexdigest()


def fingerprint(checkpoint: Checkpoint) -> str:
    """Changes with the checkpoint's settings and files, weights by size and time."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in checkpoint.shards.files]
    return repr(((checkpoint.folder / "config.json").read_text(), files))


def require_room(job: Job) -> None:
    """The finished parts and the folder made of them lie on the disk together for a while."""
    needed = int(2.05 * job.plan.output_bytes)
    folder = job.out.resolve().parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder} has {gigabytes(free)} free; quantizing takes {gigabytes(needed)} there for a while: make room, or "
            "choose another place"
        )
