"""The whole of it: a quantized folder, perhaps the model it was made from, and samples become a report of named checks.

Knows the order of the checks and what passes; every measurement is elsewhere. Thresholds and their reasons: docs/verifying.md.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from saccade.api import LLM
from saccade.base.errors import CheckpointError, DeviceError, OptionError, SaccadeError
from saccade.base.meter import peak_memory_bytes, progress
from saccade.checkpoints.formats import Checkpoint, open_checkpoint, open_unverified
from saccade.engine.options import SamplingParams
from saccade.inputs.chat import ChatTokenizer
from saccade.inputs.options import MediaOptions
from saccade.kernels.choose import choose, choose_device, processor_name
from saccade.quantize.report import (
    FILE_NAME,
    Check,
    Cost,
    LayerMeasure,
    LogitsMeasure,
    QuantizationReport,
    Verdict,
    merged,
    read_report,
)
from saccade.schemes.scheme import SCHEMES
from saccade.scoring import ScoredAnswer, TokenDivergence, join, score_prompts, token_divergence
from saccade.verify.basis import find_rotation
from saccade.verify.layers import SideBySide, run_side_by_side
from saccade.verify.options import VerifyOptions
from saccade.verify.samples import Conversation, Sample, given_sample, without_answer
from saccade.verify.schema import check_choice, check_files, check_numbers, check_tensors
from saccade.verify.sensitivity import Trials, mix, rank
from saccade.verify.weights import WeightMeasure, compare_weights

# A linear's output against the float model's, by bits of its weight: (fails below, warns below), in dB. At 0 dB the error is as
# large as the signal: the layer computes something else. The demo model's worst layers have 34 at 8 bits and 15 at 4.
OUTPUT_FLOORS_DB = {8: (6.0, 18.0), 4: (1.0, 8.0)}
WARN_TOP1 = 0.95  # below this share of equal best tokens the two models tell different stories
WARN_KL_SHARE = 0.2  # of `max_kl`
MAX_DETAILS = 50


@dataclass
class _Run:
    checks: list[Check] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def has_failed(self) -> bool:
        return any(check.verdict == "fail" for check in self.checks)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def verify(
    folder: Path,
    against: Path | None = None,
    conversations: Sequence[Conversation] = (),
    options: VerifyOptions | None = None,
) -> QuantizationReport:
    """Verifies the quantized checkpoint in `folder`, against the float one it was made from if that is given.

    `conversations`: what both models are asked; none leaves out all that runs a model. Those that end with an answer are
    compared over it, others over the float model's, or, blockwise, where no model is whole, over a fixed opening.
    What cannot be read or run is a failed check, not an exception; raises CheckpointError when `against` itself cannot be
    read, or when it is quantized, OptionError for a sensitivity without anything to be near to, DeviceError for a device that
    is not there, and PromptError or MediaError for conversations that cannot be prepared.
    """
    options = options or VerifyOptions()
    if (options.sensitivity or options.target_kl is not None) and (against is None or not conversations):
        raise OptionError("sensitivity and target_kl compare answers with the float model's; give it (--against)")
    if (options.sensitivity or options.target_kl is not None) and options.blockwise:
        raise OptionError("sensitivity and target_kl hold both models in memory; leave blockwise out")
    choose_device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    run = _Run()
    report = QuantizationReport(folder.name, machine=f"{processor_name()}, torch {torch.__version__}")
    source = None if against is None else _open_source(against)
    run.checks.append(check_files(folder, against))
    with run.phase("verify: tensors"):
        quantized = _check_tensors(folder, source, run)
    if quantized is None:
        return replace(report, checks=tuple(run.checks))
    report = replace(report, source="" if source is None else str(against))
    layers: list[LayerMeasure] = []
    if source is not None and not run.has_failed:
        with run.phase("verify: weights"):
            rotation = find_rotation(source, quantized)
            measures = list(compare_weights(source, quantized, rotation))
        run.checks.append(check_weights(measures))
        layers = [LayerMeasure(m.module, m.scheme.name, weight_db=m.db) for m in measures if "embed" not in m.module]
    may_run = conversations and all(check.verdict != "fail" for check in run.checks if check.name != "weights")
    if may_run:
        report = _run_models(report, quantized, source, layers, conversations, options, run)
    cost = Cost(
        source_bytes=None if source is None else _num_bytes(source),
        output_bytes=_num_bytes(quantized),
        peak_memory_bytes=peak_memory_bytes(),
        seconds={name: round(seconds, 3) for name, seconds in run.seconds.items()},
    )
    report = replace(report, cost=cost, hashes=_hashes(folder) if options.hashes else {}, checks=tuple(run.checks))
    return _with_what_is_known(folder, report if report.layers else replace(report, layers=tuple(layers)))


def _open_source(folder: Path) -> Checkpoint:
    source = open_checkpoint(folder)
    if source.quantization is not None:
        raise CheckpointError(
            f"{folder} is quantized itself ({source.quantization}); give --against the model it was made from"
        )
    return source


def _check_tensors(folder: Path, source: Checkpoint | None, run: _Run) -> Checkpoint | None:
    """The checks that need no run. Returns the checkpoint, None where it cannot even be opened."""
    try:
        quantized = open_unverified(folder)
    except CheckpointError as error:
        run.checks.append(Check("tensors", "fail", "the folder cannot be opened", (str(error),)))
        return None
    run.checks.append(check_tensors(quantized))
    if source is not None:
        sizes = [(config.text, config.vision) for config in (source.config, quantized.config)]
        if replace(sizes[0][0], tie_word_embeddings=False) != replace(sizes[1][0], tie_word_embeddings=False) or (
            sizes[0][1] != sizes[1][1]
        ):
            run.checks.append(Check("source", "fail", f"{source.folder} has other sizes: it is another model"))
    if not run.has_failed:
        run.checks += [check_numbers(quantized), check_choice(quantized)]
    return quantized


def _num_bytes(checkpoint: Checkpoint) -> int:
    return sum(checkpoint.info(name).nbytes for name in checkpoint.names())


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("report."))
    hashes = {}
    with progress(len(files), "hashing") as advance:
        for path in files:
            with path.open("rb") as file:
                hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
            advance(1)
    return hashes


def _with_what_is_known(folder: Path, report: QuantizationReport) -> QuantizationReport:
    """The recipe, the time and the rest that whoever quantized wrote into the folder."""
    path = folder / FILE_NAME
    if not path.is_file():
        return report
    try:
        return merged(read_report(path), report)
    except CheckpointError as error:
        return replace(report, checks=(*report.checks, Check("report", "warn", str(error))))


# --- weights ---------------------------------------------------------------------------------------------------------


def check_weights(measures: Sequence[WeightMeasure]) -> Check:
    """The verdict on `compare_weights`."""
    faults, warnings = [], []
    for m in measures:
        if m.basis == "unknown":
            warnings.append(f"{m.module} is in a basis that is not known here; the layers' outputs tell more")
        elif m.bad_rows:
            rows = ", ".join(map(str, m.bad_rows[:5])) + (f" and {len(m.bad_rows) - 5} more" * (len(m.bad_rows) > 5))
            faults.append(
                f"{m.module}: rows {rows} are not the source's (worst is {m.gain:.2f} times it, {m.db:.1f} dB in all)"
            )
        elif m.db < m.floor_db:
            warnings.append(
                f"{m.module} ({m.scheme.name}) has {m.db:.1f} dB; {m.floor_db:g} are expected of such weights"
            )
        if m.bias == "lost":
            faults.append(f"{m.module}: the source's bias is lost")
        elif m.bias == "changed":
            warnings.append(f"{m.module} has another bias than the source")
    quantized = [m for m in measures if not m.scheme.is_dense]
    worst = min(quantized, key=lambda m: m.db, default=None)
    nearest = [m.nearest for m in quantized if m.nearest is not None]
    facts = "no quantized weight" if worst is None else f"worst {worst.module} at {worst.db:.1f} dB"
    if nearest:
        facts += f", {sum(nearest) / len(nearest):.2%} of integers nearest to the source in {len(nearest)} linears"
    counted = {
        basis: sum(m.basis == basis for m in quantized) for basis in ("source", "smoothed", "rescaled", "unknown")
    }
    facts += "; " + ", ".join(f"{count} {_BASES[basis]}" for basis, count in counted.items() if count)
    verdict: Verdict = "fail" if faults else "warn" if warnings else "pass"
    return Check("weights", verdict, facts, tuple([*faults, *warnings][:MAX_DETAILS]))


_BASES = {
    "source": "as in the source",
    "smoothed": "smoothed through norms or rotated",
    "rescaled": "rescaled between layers",
    "unknown": "in an unknown basis",
}


# --- runs ------------------------------------------------------------------------------------------------------------


def _run_models(
    report: QuantizationReport,
    quantized: Checkpoint,
    source: Checkpoint | None,
    layers: Sequence[LayerMeasure],
    conversations: Sequence[Conversation],
    options: VerifyOptions,
    run: _Run,
) -> QuantizationReport:
    """Answers, errors by layer, logits: everything for which a model has to run."""
    if options.blockwise:
        return _run_blockwise(report, quantized, source, layers, conversations, options, run)
    exact: list[ScoredAnswer] = []
    samples: list[Sample] = []
    if source is not None:
        with run.phase("verify: float model"):
            try:
                llm = _open(source.folder, options)
                samples = answer(llm, conversations, options.answer_tokens)
                exact = score(llm, samples)
                del llm
            except DeviceError as error:
                run.checks.append(Check("float model", "warn", f"too large to run whole here: {error}"))
    with run.phase("verify: quantized model"):
        try:
            llm = _open(quantized.folder, options)
            samples = samples or answer(llm, conversations, options.answer_tokens)
            scored = score(llm, samples)
            del llm
        except (CheckpointError, DeviceError) as error:
            run.checks.append(Check("runs", "fail", "it cannot be run", (str(error),)))
            return report
    run.checks.append(check_runs([answered.logits for answered in scored]))
    if source is None:
        return report
    side_by_side = _side_by_side(source, quantized, samples, options, run)
    run.checks.append(check_layers(side_by_side))
    if exact:
        pairs = [(e.logits, q.logits) for e, q in zip(exact, scored, strict=True)]
        logits = measure_logits(pairs)
        run.checks.append(check_logits(logits, options.max_kl, "through the serving kernels"))
    else:
        logits = measure_logits(_by_sample(side_by_side, samples))
        run.checks.append(check_logits(logits, options.max_kl, "block by block, over the quantized model's answers"))
    report = _with_layers(report, logits, side_by_side, layers)
    if options.sensitivity or options.target_kl is not None:
        with run.phase("verify: sensitivity"):
            report = _with_sensitivity(report, source, quantized, samples, options, run)
    return report


def _run_blockwise(
    report: QuantizationReport,
    quantized: Checkpoint,
    source: Checkpoint | None,
    layers: Sequence[LayerMeasure],
    conversations: Sequence[Conversation],
    options: VerifyOptions,
    run: _Run,
) -> QuantizationReport:
    """As `_run_models`, in the memory of a block of each. Alone, the quantized model stands beside itself."""
    tokenizer = ChatTokenizer(quantized.folder, quantized.config)
    media = MediaOptions(max_pixels=options.sample_pixels)
    samples = [given_sample(tokenizer, asked, media, options.answer_tokens) for asked in conversations]
    try:
        side_by_side = _side_by_side(source or quantized, quantized, samples, options, run)
    except SaccadeError as error:
        run.checks.append(Check("runs", "fail", "it cannot be run", (str(error),)))
        return report
    pairs = _by_sample(side_by_side, samples)
    run.checks.append(check_runs([logits for _, logits in pairs]))
    if source is None:
        return report
    run.checks.append(check_layers(side_by_side))
    logits = measure_logits(pairs)
    run.checks.append(check_logits(logits, options.max_kl, "block by block in float32, over given answers"))
    return _with_layers(report, logits, side_by_side, layers)


def _side_by_side(
    source: Checkpoint, quantized: Checkpoint, samples: Sequence[Sample], options: VerifyOptions, run: _Run
) -> SideBySide:
    with run.phase("verify: layers"):
        device = choose_device(options.device)
        return run_side_by_side(source, quantized, samples, choose(device), device)


def _by_sample(found: SideBySide, samples: Sequence[Sample]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each sample's logits, of the float and of the quantized model."""
    lengths = [len(sample.answer) for sample in samples]
    return list(zip(*(torch.split(rows, lengths) for rows in (found.exact, found.quantized)), strict=True))


def _with_layers(
    report: QuantizationReport, logits: LogitsMeasure, found: SideBySide, weights: Sequence[LayerMeasure]
) -> QuantizationReport:
    return replace(report, logits=logits, blocks=tuple(found.blocks), layers=_joined(weights, found.layers))


def _with_sensitivity(
    report: QuantizationReport,
    source: Checkpoint,
    quantized: Checkpoint,
    samples: Sequence[Sample],
    options: VerifyOptions,
    run: _Run,
) -> QuantizationReport:
    trials = Trials(source, quantized, samples, choose_device(options.device))
    ranking = rank(trials)
    mixed = None if options.target_kl is None else mix(trials, ranking, options.target_kl)
    worst = f"most at {', '.join(ranking[0].modules)} with {ranking[0].kl:.4g}" if ranking else "nothing is quantized"
    unknown = tuple(f"{module} is in an unknown basis and was left as it is" for module in trials.unknown)
    run.checks.append(Check("ranking", "warn" if unknown else "pass", f"mean KL of one alone: {worst}", unknown))
    if mixed is not None:
        facts = (
            f"mean KL {mixed.kl_before:.4g} -> {mixed.kl:.4g} by storing {len(mixed.rules)} linears better, "
            f"{mixed.extra_bytes / 1e6:.3g} MB more"
        )
        reached = mixed.kl <= mixed.target_kl
        why = () if reached else (f"{mixed.target_kl:g} cannot be reached: this is with every product raised",)
        run.checks.append(Check("mixed", "pass" if reached else "warn", facts, why))
    return replace(report, sensitivity=tuple(ranking), mixed=mixed)


def _open(folder: Path, options: VerifyOptions) -> LLM:
    media = MediaOptions(max_pixels=options.sample_pixels)
    return LLM(folder, media=media, device=options.device, threads=options.threads)


def answer(llm: LLM, conversations: Sequence[Conversation], max_tokens: int) -> list[Sample]:
    """Each conversation with the answer it ends with, or the model's greedy one. Raises what preparing them raises."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, repetition_penalty=1.0)
    samples = []
    for conversation in conversations:
        if without_answer(conversation)[1] is not None:
            samples.append(given_sample(llm.tokenizer, conversation, llm.media, max_tokens))
            continue
        output = llm.chat(conversation, params)[0]
        samples.append(Sample(llm.prepare(conversation), tuple(output.outputs[0].token_ids)))
    return samples


def score(llm: LLM, samples: Sequence[Sample]) -> list[ScoredAnswer]:
    return list(score_prompts(llm, ((sample.prompt, sample.answer) for sample in samples)))


def check_runs(scored: Sequence[torch.Tensor]) -> Check:
    """scored: of each sample, logits [A, V]."""
    bad = [number for number, logits in enumerate(scored) if not bool(torch.isfinite(logits).all())]
    if bad:
        return Check("runs", "fail", f"logits of sample {bad[0] + 1} are not finite")
    return Check("runs", "pass", f"{len(scored)} samples answered, {sum(map(len, scored))} tokens scored")


def check_layers(found: SideBySide) -> Check:
    """Quantized linears by the worst of their outputs over the kinds of tokens."""
    faults, warnings = [], []
    quantized = [layer for layer in found.layers if layer.scheme != "dense" and layer.worst_db is not None]
    for layer in quantized:
        db = _db(layer)
        fail, warn = OUTPUT_FLOORS_DB[SCHEMES[layer.scheme].weight_bits]
        if db < fail:
            faults.append(f"{layer.module} ({layer.scheme}) has {db:.1f} dB: it computes something else")
        elif db < warn:
            warnings.append(f"{layer.module} ({layer.scheme}) has {db:.1f} dB; {warn:g} are expected")
    worst = min(quantized, key=_db, default=None)
    facts = "no quantized layer" if worst is None else f"worst {worst.module} at {_db(worst):.1f} dB"
    if found.blocks:
        block = min(found.blocks, key=lambda block: min(block.delta_cosine.values()))
        facts += f", least aligned {block.block} with cosine {min(block.delta_cosine.values()):.4f}"
    verdict: Verdict = "fail" if faults else "warn" if warnings else "pass"
    facts += ", rotated" if found.is_rotated else ""
    return Check("layers", verdict, facts, tuple([*faults, *warnings][:MAX_DETAILS]))


def _db(layer: LayerMeasure) -> float:
    assert layer.worst_db is not None, f"{layer.module} was not measured"
    return layer.worst_db


def measure_logits(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> LogitsMeasure:
    """pairs: of each sample, logits [A, V] of the float and of the quantized model for its answer's tokens."""
    divergences: list[TokenDivergence] = [token_divergence(exact, other) for exact, other in pairs]
    summary = join(divergences).summary()
    prefixes = [_prefix((other.argmax(-1) == exact.argmax(-1)).tolist()) for exact, other in pairs]
    return LogitsMeasure(
        len(pairs),
        summary.num_tokens,
        summary.mean_kl,
        summary.p99_kl,
        summary.top1_agreement,
        sum(prefixes) / len(prefixes),
    )


def _prefix(matches: Sequence[bool]) -> float:
    """Share of the tokens before the first that does not match."""
    return (matches.index(False) if False in matches else len(matches)) / len(matches)


def check_logits(measured: LogitsMeasure, max_kl: float, how: str) -> Check:
    facts = (
        f"mean KL {measured.kl_mean:.4g}, 99th percentile {measured.kl_p99:.4g}, same best token {measured.top1:.1%}, "
        f"greedy answers agree for {measured.greedy_prefix:.0%} of their length; {measured.num_tokens} tokens, {how}"
    )
    if measured.kl_mean > max_kl:
        return Check("logits", "fail", facts, (f"mean KL is above {max_kl:g}: it is another model",))
    if measured.kl_mean > WARN_KL_SHARE * max_kl or measured.top1 < WARN_TOP1:
        return Check("logits", "warn", facts)
    return Check("logits", "pass", facts)


def _joined(weights: Sequence[LayerMeasure], outputs: Sequence[LayerMeasure]) -> tuple[LayerMeasure, ...]:
    """What is known of each layer from its weights and from its outputs, in the order data flows."""
    db = {layer.module: layer.weight_db for layer in weights}
    return tuple(replace(layer, weight_db=db.get(layer.module)) for layer in outputs)


def render(report: QuantizationReport, write: Callable[[str], None]) -> None:
    """A line for each check, the offenders below it, the verdict last."""
    for check in report.checks:
        write(f"{check.verdict:<5} {check.name:<8} {check.facts}")
        for detail in check.details:
            write(f"      {detail}")
    counts = {verdict: sum(check.verdict == verdict for check in report.checks) for verdict in ("pass", "warn", "fail")}
    write(f"{report.name}: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count))
