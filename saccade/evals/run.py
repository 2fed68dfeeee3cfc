"""Asks a model every item, and compares it with another: answers, scores, and how far their predictions lie apart.

Knows items and models; draws no page (report.py). Two models are run one after the other, never both in memory: what the first
predicts for the right answers waits in a temporary file.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saccade.api import LLM
from saccade.base.errors import OptionError, SaccadeError
from saccade.base.meter import progress
from saccade.base.options import check_values, option
from saccade.checkpoints.config import read_config
from saccade.checkpoints.formats import open_checkpoint
from saccade.checkpoints.hub import resolve
from saccade.engine.options import EngineOptions, SamplingParams
from saccade.evals.item import Item
from saccade.evals.metrics import asks_for_boxes, mean_overlap, model_answer, score
from saccade.evals.outliers import inject, read_spec
from saccade.evals.statistics import Interval, McNemar, bootstrap, mcnemar
from saccade.inputs.chat import ChatTokenizer
from saccade.inputs.options import MediaOptions
from saccade.inputs.prompt import Medium, Prompt
from saccade.outputs import RequestOutput
from saccade.planning import loading_of
from saccade.scoring import Divergence, TokenDivergence, answer_tokens, join, score_prompts, token_divergence

RIGHT = 0.5  # a graded score from which an answer counts as right where only right and wrong are compared


@dataclass(frozen=True)
class Candidate:
    """A model and how it is held, opened when its turn comes. `inject`: outliers put into it, NAME or NAME:STRENGTH.

    Raises OptionError for a quantization or an injector that there is not.
    """

    model: str = "demo"
    engine: EngineOptions = field(default_factory=EngineOptions)
    media: MediaOptions = field(default_factory=MediaOptions)
    inject: str | None = None

    def __post_init__(self) -> None:
        loading_of(self.engine)
        if self.inject is not None:
            read_spec(self.inject)

    @property
    def name(self) -> str:
        parts = [self.model, self.inject and f"+ {self.inject}", *self.engine.quantizations()]
        parts.append(None if self.engine.dtype == "auto" else self.engine.dtype)
        parts.append(None if self.engine.kv_cache_dtype == "auto" else f"{self.engine.kv_cache_dtype} cache")
        return " ".join(part for part in parts if part)

    def open(self) -> LLM:
        """Raises CheckpointError, DeviceError or OptionError."""
        options = dataclasses.asdict(self.engine)
        if self.inject is None:
            return LLM(self.model, media=self.media, **options)
        folder = resolve(self.model, source=self.engine.source, revision=self.engine.revision)
        source = inject(open_checkpoint(folder), self.inject)
        return LLM.from_source(source.config, source, ChatTokenizer(folder, source.config), media=self.media, **options)

    def shown(self, items: Iterable[Item]) -> Iterator[tuple[Medium, ...]]:
        """Each item's pictures and clips as the model sees them; no weight is read."""
        folder = resolve(self.model, source=self.engine.source, revision=self.engine.revision)
        tokenizer = ChatTokenizer(folder, read_config(folder))
        for item in items:
            try:
                yield tokenizer.build(item.messages, defaults=self.media).media
            except SaccadeError:  # one that could not be asked either: its outcome says why
                yield ()


@dataclass(frozen=True)
class EvalOptions:
    """How items are asked. The same options over the same items give the same figures, bit for bit."""

    limit: int | None = option(None, "items of each task; default: 100 of each of ours, all of a data set", low=1)
    seed: int = option(0, "draws the items and the intervals", low=0, high=2**32 - 1)
    max_tokens: int = option(200, "most tokens of an answer", low=1)

    def __post_init__(self) -> None:
        check_values(self)


@dataclass(frozen=True)
class Outcome:
    """One item answered. overlap: mean intersection over union, of an item that asks for boxes."""

    item: Item
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    score: float
    overlap: float | None = None
    error: str | None = None

    @property
    def is_right(self) -> bool:
        return self.score >= RIGHT


@dataclass(frozen=True)
class Pairing:
    """One item answered by both models. kl: mean over the right answer's tokens; first_divergence: index of the first
    token in which the greedy answers differ, None where they are equal; reference_is_right: whether the reference was."""

    kl: float
    first_divergence: int | None
    reference_is_right: bool


@dataclass(frozen=True)
class TaskResult:
    task: str
    metric: str
    num_items: int
    score: Interval
    overlap: float | None  # mean over the items that ask for boxes


@dataclass(frozen=True)
class Comparison:
    """A model (q) against a reference (p). difference: of the mean scores, model minus reference, paired by item."""

    score: Interval  # the reference's
    difference: Interval
    mcnemar: McNemar  # a: the model, b: the reference
    divergence: Divergence
    greedy_match: float  # share of items whose answers are equal token by token
    median_first_divergence: float | None  # token index, over the items whose answers are not


@dataclass(frozen=True)
class Evaluation:
    """`tasks` in the order they were asked. `comparisons` holds one for each task, and one of all under ""."""

    model: str
    against: str | None
    options: EvalOptions
    tasks: tuple[TaskResult, ...]
    mean: Interval  # over tasks, each weighing the same
    comparisons: dict[str, Comparison]
    outcomes: tuple[Outcome, ...]
    pairings: tuple[Pairing, ...]
    token_kl: Tensor  # [tokens of all right answers] float64, nats; empty without a reference

    @property
    def num_errors(self) -> int:
        return sum(outcome.error is not None for outcome in self.outcomes)

    def figures(self) -> dict[str, Any]:
        """Everything but the single answers, as JSON holds it."""
        return {
            "model": self.model,
            "against": self.against,
            "options": dataclasses.asdict(self.options),
            "num_items": len(self.outcomes),
            "num_errors": self.num_errors,
            "mean": dataclasses.asdict(self.mean),
            "tasks": [dataclasses.asdict(task) for task in self.tasks],
            "comparisons": {task: dataclasses.asdict(found) for task, found in self.comparisons.items()},
        }

    def answers(self) -> list[dict[str, Any]]:
        """A row for each item, as JSON holds it."""
        rows = []
        for index, outcome in enumerate(self.outcomes):
            row = {
                "id": outcome.item.id,
                "task": outcome.item.task,
                "question": outcome.item.question,
                "right": outcome.item.answer,
                "answer": outcome.text,
                "score": outcome.score,
                "finish_reason": outcome.finish_reason,
                "error": outcome.error,
            }
            rows.append(row | (dataclasses.asdict(self.pairings[index]) if self.pairings else {}))
        return rows


def evaluate(
    candidate: Candidate,
    items: Sequence[Item],
    options: EvalOptions | None = None,
    *,
    against: Candidate | None = None,
    show_progress: bool = False,
) -> Evaluation:
    """Asks `candidate` every item, greedily, and where there is a reference to compare `against`, asks that one too.

    An item that cannot be asked (its picture is unreadable, its prompt too long) scores 0 and is counted as an error.
    Raises CheckpointError, DeviceError or OptionError; OptionError when there is no item.
    """
    options = options or EvalOptions()
    if not items:
        raise OptionError("there is no item to ask; name tasks (--tasks) or a data set (--dataset)")
    if against is None:
        outcomes = answer(candidate.open(), items, options, show_progress=show_progress)
        return _summary(candidate, items, options, outcomes)
    with Spool() as spool:
        reference = against.open()
        vocabulary = reference.tokenizer.added_tokens, reference.config.text.vocab_size
        expected = answer(reference, items, options, show_progress=show_progress)
        asked = [outcome.item for outcome in expected if outcome.error is None]
        spool.write(_right_answers(reference, asked, "scoring", show_progress))
        del reference
        llm = candidate.open()
        if (llm.tokenizer.added_tokens, llm.config.text.vocab_size) != vocabulary:
            raise OptionError(
                f"{candidate.name} and {against.name} have different vocabularies; compare models of one tokenizer"
            )
        outcomes = answer(llm, items, options, show_progress=show_progress)
        found = _right_answers(llm, asked, "scoring", show_progress)
        parts = [token_divergence(p, q) for p, q in zip(spool.read(), found, strict=True)]
    divergences = iter(parts)
    by_item = [join([]) if outcome.error else next(divergences) for outcome in expected]
    return _summary(candidate, items, options, outcomes, against, expected, by_item)


def answer(llm: LLM, items: Sequence[Item], options: EvalOptions, *, show_progress: bool = False) -> list[Outcome]:
    """The model's greedy answer to each item, and what it is worth."""
    params = SamplingParams(max_tokens=options.max_tokens, temperature=0, repetition_penalty=1.0)
    outputs = llm.chat([item.messages for item in items], params, show_progress=show_progress)
    return [_outcome(item, output) for item, output in zip(items, outputs, strict=True)]


def _outcome(item: Item, output: RequestOutput) -> Outcome:
    said = output.outputs[0]
    return Outcome(
        item,
        said.text,
        tuple(said.token_ids),
        str(said.finish_reason),
        0.0 if said.error else score(item, said.text, output.media),
        mean_overlap(item, said.text, output.media) if asks_for_boxes(item) else None,
        said.error,
    )


def _right_answers(llm: LLM, items: Sequence[Item], label: str, show_progress: bool) -> Iterator[Tensor]:
    """Logits [A, V] of each item's right answer."""

    def prepared() -> Iterator[tuple[Prompt, tuple[int, ...]]]:
        for item in items:
            prompt = llm.prepare(item.messages)
            yield prompt, answer_tokens(llm, model_answer(item, [medium.receipt for medium in prompt.media]))

    with progress(len(items) if show_progress else 0, label) as advance:
        for scored in score_prompts(llm, prepared()):
            advance(1)
            yield scored.logits


class Spool:
    """Logits of one model that wait for the other's, in a temporary file: written once, read once in the same order."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # closed by __exit__
        self._shapes: list[torch.Size] = []

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            self._shapes.append(tensor.shape)
            self._file.write(tensor.numpy().tobytes())

    def read(self) -> Iterator[Tensor]:
        self._file.seek(0)
        for shape in self._shapes:
            data = bytearray(self._file.read(4 * shape.numel()))
            yield torch.frombuffer(data, dtype=torch.float32).view(shape)


# --- figures ---------------------------------------------------------------------------------------------------------


def _summary(
    candidate: Candidate,
    items: Sequence[Item],
    options: EvalOptions,
    outcomes: Sequence[Outcome],
    against: Candidate | None = None,
    expected: Sequence[Outcome] = (),
    divergences: Sequence[TokenDivergence] = (),
) -> Evaluation:
    places: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        places.setdefault(item.task, []).append(index)
    pairings = (
        [
            Pairing(tokens.summary().mean_kl, first_difference(ours.token_ids, theirs.token_ids), theirs.is_right)
            for ours, theirs, tokens in zip(outcomes, expected, divergences, strict=bool(expected))
        ]
        if expected
        else []
    )
    comparisons = {}
    if expected:
        for task, chosen in {"": list(places.values()), **{task: [rows] for task, rows in places.items()}}.items():
            comparisons[task] = _comparison(chosen, outcomes, expected, divergences, pairings, options.seed)
    tasks = [_task_result(task, [outcomes[index] for index in rows], options.seed) for task, rows in places.items()]
    return Evaluation(
        model=candidate.name,
        against=against.name if against else None,
        options=options,
        tasks=tuple(tasks),
        mean=bootstrap([[outcomes[i].score for i in rows] for rows in places.values()], seed=options.seed),
        comparisons=comparisons,
        outcomes=tuple(outcomes),
        pairings=tuple(pairings),
        token_kl=join(divergences).kl,
    )


def _task_result(task: str, outcomes: Sequence[Outcome], seed: int) -> TaskResult:
    overlaps = [outcome.overlap for outcome in outcomes if outcome.overlap is not None]
    return TaskResult(
        task,
        "/".join(sorted({outcome.item.metric for outcome in outcomes})),
        len(outcomes),
        bootstrap([[outcome.score for outcome in outcomes]], seed=seed),
        sum(overlaps) / len(overlaps) if overlaps else None,
    )


def _comparison(
    groups: Sequence[Sequence[int]],
    outcomes: Sequence[Outcome],
    expected: Sequence[Outcome],
    divergences: Sequence[TokenDivergence],
    pairings: Sequence[Pairing],
    seed: int,
) -> Comparison:
    """groups: the items of each task by their number."""
    rows = [index for group in groups for index in group]
    firsts = sorted(first for i in rows if (first := pairings[i].first_divergence) is not None)
    return Comparison(
        bootstrap([[expected[i].score for i in group] for group in groups], seed=seed),
        bootstrap([[outcomes[i].score - expected[i].score for i in group] for group in groups], seed=seed),
        mcnemar([outcomes[i].is_right for i in rows], [expected[i].is_right for i in rows]),
        join([divergences[i] for i in rows]).summary(),
        1 - len(firsts) / len(rows),
        (firsts[(len(firsts) - 1) // 2] + firsts[len(firsts) // 2]) / 2 if firsts else None,
    )


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token in which two answers differ, None for equal ones; the end of the shorter one is a difference."""
    if tuple(a) == tuple(b):
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
