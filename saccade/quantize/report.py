"""What is known of a quantized checkpoint: checks, error by layer, ranges, logits, cost, recipe; to report.json and back.

A run of `quantize` knows the recipe and the cost, `verify` measures; each writes its part, `merged` makes one report of both.
Knows names and numbers; knows no tensors, no model and no page.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from saccade.base.errors import CheckpointError
from saccade.checkpoints.json_file import read_json

T = TypeVar("T")
Kind = Literal["text", "picture", "first"]
Verdict = Literal["pass", "warn", "fail"]

KINDS: tuple[Kind, ...] = (
    "text",
    "picture",
    "first",
)  # a sequence's first token, whose outliers drown all others, apart
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)  # over channels, of `InputRange`
EXACT_DB = 200.0  # the SQNR of equal outputs: JSON knows no infinity
FILE_NAME = "report.json"
MAX_REPORT_BYTES = 64 << 20


@dataclass(frozen=True)
class InputRange:
    """The largest magnitude of each channel of a linear's input over the samples, as QUANTILES over the channels.

    `before` as the float model has it, `after` as the quantized one does: smoothed, rotated.
    """

    before: tuple[float, ...]
    after: tuple[float, ...]


@dataclass(frozen=True)
class LayerMeasure:
    """One linear of the checkpoint. What was not measured is None or absent.

    `output_db`: SQNR of its output when the blocks before are exact, by kind of token: the error of this linear and of those
    before it in its block. Of the three that make it, each alone: `weight_db` of the weight against the source's, in one basis;
    `rounding_db` of its input by being rounded; `input_db` of its input by the linears before it.
    """

    module: str  # "model.layers.3.self_attn.q_proj"
    scheme: str  # "w8a8", "dense"
    output_db: Mapping[str, float] = field(default_factory=dict)
    weight_db: float | None = None
    rounding_db: float | None = None
    input_db: float | None = None
    ranges: InputRange | None = None
    clipped: float | None = None  # share of input values that a static range cut
    kurtosis: float | None = None  # of the source's weight; 3 is a normal distribution
    size_bytes: int | None = None

    @property
    def worst_db(self) -> float | None:
        """Over the kinds of tokens, the first one left out unless there is no other."""
        usual = [db for kind, db in self.output_db.items() if kind != "first"]
        return min(usual or self.output_db.values(), default=None)


@dataclass(frozen=True)
class BlockMeasure:
    """One block. A delta is what the block adds to the residual stream.

    `delta_db`, `delta_cosine`: of the delta when the blocks before are exact. `stream_db`: of the stream behind the block,
    with the errors of all blocks up to it.
    """

    block: str  # "model.layers.3"
    delta_db: Mapping[str, float] = field(default_factory=dict)
    delta_cosine: Mapping[str, float] = field(default_factory=dict)
    stream_db: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LogitsMeasure:
    """Final logits against the float model's, over the answers' tokens with the same tokens before them."""

    num_samples: int
    num_tokens: int
    kl_mean: float  # nats
    kl_p99: float
    top1: float  # share of tokens at which both models like the same token best
    greedy_prefix: float  # share of the float model's greedy answer that the quantized one writes before it departs


@dataclass(frozen=True)
class Sensitivity:
    """Linears that run as one product (q, k and v), and what quantizing them alone does to the answers."""

    modules: tuple[str, ...]
    scheme: str
    kl: float  # mean over answer tokens, nats, all else being float
    bytes_saved: int  # against float


@dataclass(frozen=True)
class MixedPrecision:
    """Which linears to store better, so that the mean KL is at most `target_kl`; `kl` was measured with these rules.

    `rules`: each a mapping of `match` and `scheme`, as a recipe has them. `kl` above the target: it cannot be reached.
    """

    target_kl: float
    kl_before: float
    kl: float
    extra_bytes: int
    rules: tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class Check:
    """One named line of a verification: the verdict, the facts, and what is behind them."""

    name: str
    verdict: Verdict
    facts: str
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cost:
    source_bytes: int | None = None
    output_bytes: int | None = None
    peak_memory_bytes: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)  # by phase


@dataclass(frozen=True)
class QuantizationReport:
    """Everything, each part optional."""

    name: str  # of the quantized folder
    source: str = ""  # the float model's folder or id
    recipe: Mapping[str, Any] = field(default_factory=dict)  # what JSON can hold
    hashes: Mapping[str, str] = field(default_factory=dict)  # SHA-256 by file name
    machine: str = ""
    cost: Cost = Cost()
    checks: tuple[Check, ...] = ()
    logits: LogitsMeasure | None = None
    blocks: tuple[BlockMeasure, ...] = ()
    layers: tuple[LayerMeasure, ...] = ()
    sensitivity: tuple[Sensitivity, ...] = ()  # the most sensitive first
    mixed: MixedPrecision | None = None

    @property
    def verdict(self) -> Verdict:
        """The worst of the checks."""
        return max((check.verdict for check in self.checks), key=("pass", "warn", "fail").index, default="pass")


Verify = Callable[[Path], QuantizationReport]  # of a quantized folder


def sqnr_db(signal: float, noise: float) -> float:
    """Signal to quantization noise, from their sums of squares; EXACT_DB at most."""
    if noise <= 0:
        return EXACT_DB
    return min(EXACT_DB, 10 * math.log10(signal / noise)) if signal > 0 else -EXACT_DB


def merged(older: QuantizationReport, newer: QuantizationReport) -> QuantizationReport:
    """`newer`, with what it does not say taken from `older`; the phases of both."""
    cost = _filled(older.cost, newer.cost)
    seconds = {**older.cost.seconds, **newer.cost.seconds}
    return dataclasses.replace(_filled(older, newer), cost=dataclasses.replace(cost, seconds=seconds))


def _filled(older: T, newer: T) -> T:
    missing = {f.name: getattr(older, f.name) for f in dataclasses.fields(newer) if not getattr(newer, f.name)}  # type: ignore[arg-type]
    return dataclasses.replace(newer, **missing)  # type: ignore[type-var]


# --- report.json -----------------------------------------------------------------------------------------------------


def to_json(report: QuantizationReport) -> str:
    return json.dumps(dataclasses.asdict(report), indent=1, allow_nan=False)


def read_report(path: Path) -> QuantizationReport:
    """Raises CheckpointError when the file is absent, no JSON, or not such a report."""
    entries = read_json(path, MAX_REPORT_BYTES)
    try:
        return typing.cast(QuantizationReport, _built(QuantizationReport, entries))
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{path} is no report of this version ({error}); make it again") from error


def _built(hint: Any, value: Any) -> Any:
    """What `dataclasses.asdict` took apart, by the type hints."""
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return hint(**{name: _built(hints[name], part) for name, part in value.items()})  # type: ignore[operator]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return None if value is None else _built(arguments[0], value)
    if origin is tuple:
        return tuple(_built(arguments[0], part) for part in value)
    return value
