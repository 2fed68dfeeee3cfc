"""Statistics of the float model's inputs, kept so that a second scheme needs no second forward.

A folder for each model, set of samples and way of weighing them, made by one forward of the float model, a block at a time, and
taken up again where it was killed. What a block is given here is what the float model gives it, not what the rounded blocks before
do: kept statistics know nothing of a scheme. Knows files and names; what a block does is `run.py`'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade.checkpoints.shards import Shards
from saccade.quantize.job import Job, fingerprint
from saccade.quantize.state import State, is_complete
from saccade.quantize.statistics import Seen


def state_of(job: Job, folder: Path) -> State:
    """Where this job's statistics lie, or are being gathered, below `folder`."""
    key = _key(job)
    return State(folder / key[:16], key)


def has_all(job: Job, folder: Path) -> bool:
    key = _key(job)
    return is_complete(folder / key[:16], key)


def _key(job: Job) -> str:
    """Of all that the numbers depend on."""
    recipe, samples = job.recipe, job.samples
    assert samples is not None, "statistics are of samples"
    has_tower = any(name.startswith("visual.") and not scheme.is_dense for name, scheme in job.plan.assignment.items())
    ways = (recipe.seed, recipe.balance, recipe.is_rotated, recipe.rounded_by == "gptq", has_tower)
    what = (fingerprint(job.checkpoint), samples.digest, ways, str(job.device), job.threads, torch.__version__)
    return hashlib.sha256(repr(what).encode()).hexdigest()


def tensors_of(module: str, seen: Seen, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Named for a file. The kept rows are the model's own, so its type holds them."""
    for field in fields(seen):
        tensor = getattr(seen, field.name)
        if tensor is not None:
            yield f"{module}.{field.name}", tensor.to(dtype) if field.name == "rows" else tensor


class Kept:
    """Complete statistics, read a linear at a time."""

    def __init__(self, state: State) -> None:
        self._parts: Mapping[str, Shards] = dict(state.tensors())

    def seen(self, module: str, device: torch.device) -> Seen:
        """Of the inputs of the linear whose first part is `module`."""
        found: dict[str, Any] = {}
        for field in fields(Seen):
            part = self._parts.get(f"{module}.{field.name}")
            tensor = None if part is None else part.read(f"{module}.{field.name}").to(device)
            found[field.name] = tensor.float() if tensor is not None and field.name == "rows" else tensor
        return Seen(**found)
