"""How far quantized models lie from the float one: scheme x recipe x outlier variant, as a table and as JSON.

    python benchmarks/quantization.py --model demo --json benchmarks/results/quantization-demo.json

Each variant is the model with one published kind of outliers put into it (saccade/evals/outliers.py), its function unchanged.
Answers of held-out items are teacher-forced; KL is per token against the float variant, in nats, both run in float32 so that
rounding to bfloat16 is not measured along. `right` is the share of answers whose every token is the likeliest, which is what
greedy decoding would say letter for letter; `score` is the mean of all tasks on other held-out items, answered freely in
the model's own type, of the variants in --scored and the recipes that are meant to lose no answers. Calibration is the
built-in set, drawn from other seeds and by another hand than the items; exact mode gets pictures of that set. Which samples are
drawn moves a KL by a third, so that rows of best mode are means over --seeds; answers are given by the first.

A run that was stopped goes on behind the last row in the JSON. The file says of which weights and code its rows are, and rows of
others are not mixed with them: give such a run another file. Each row names the instruction set, on which last bits, and through
ties of calibration a few per cent of a figure, depend. Seconds are of the processor.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import saccade
from saccade import LLM
from saccade.api import quantize, quantize_exactly
from saccade.checkpoints.formats import open_checkpoint
from saccade.checkpoints.hub import resolve
from saccade.evals.item import Item
from saccade.evals.outliers import INJECTORS, inject
from saccade.evals.run import EvalOptions, answer
from saccade.evals.tasks import TASKS
from saccade.evals.tasks import draw as draw_item
from saccade.kernels.library import Library, load
from saccade.quantize.best_recipe import HEADS, Rule
from saccade.quantize.drawn_samples import drawn
from saccade.scoring import ScoredAnswer, join, score_answers, token_divergence

NUM_PICTURES = 8  # for exact mode
ITEM_SEED = 90_210


@dataclass(frozen=True)
class Recipe:
    """A row of the table. `layers`: which linears, so that like is compared with like."""

    scheme: str
    name: str
    layers: str
    options: dict[str, Any]
    is_exact: bool = False
    is_scored: bool = False  # whether it answers freely, too

    @property
    def is_drawn(self) -> bool:
        """Whether it is calibrated with samples that a seed draws."""
        return self.name.startswith("best")


@dataclass(frozen=True)
class Row:
    variant: str
    scheme: str
    recipe: str
    layers: str
    mean_kl: float
    p99_kl: float
    top1: float
    right: float
    num_tokens: int
    size_bytes: int
    seconds: float
    score: float | None = None
    isa: str | None = None  # the kernels' instruction set; None where it was not noted
    seed_kls: tuple[float, ...] = ()  # of each calibration seed


FLOAT = Recipe("bfloat16", "the model", "", {}, is_scored=True)
LIKE_REFERENCE, ALL = "as msModelSlim", "all decoder linears"
STATIC = "as msModelSlim, compressed-tensors"  # which alone has scales of visual tokens' own
ONE, TWO, BEST_TWO = "to nearest, one scale", "to nearest, visual scales", "best, visual scales"


def recipes() -> list[Recipe]:
    """Like beside like: best mode beside exact mode with its layers and group, and beside rounding to nearest with all."""
    low_bit = {"w_bit": 4, "is_dynamic": True, "is_lowbit": True, "open_outlier": False, "group_size": 256}
    exact: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("w8a8", {}, {}),
        ("w8a8-dynamic", {"is_dynamic": True}, {}),
        ("w4a8", low_bit, {"group_size": 256}),
    ]
    rows = []
    for scheme, options, ours in exact:
        for method in ("m2", "m4"):
            rows.append(Recipe(scheme, f"exact {method}", LIKE_REFERENCE, {**options, "anti_method": method}, True))
        best = {"scheme": scheme, "format": "vllm-ascend", **ours}
        rows.append(Recipe(scheme, "best", LIKE_REFERENCE, best, is_scored=scheme != "w8a8-dynamic"))
    for scheme in ("w8a8-dynamic", "w4a8", "w8a16", "w4a16", "fp8"):
        rows.append(
            Recipe(scheme, "to nearest", ALL, {"scheme": scheme, "smooth": "none", "rounding": "rtn", "rotate": False})
        )
        rows.append(Recipe(scheme, "best", ALL, {"scheme": scheme}, is_scored=scheme == "w8a16"))
    layers = {"scheme": "w8a8", "layers": "reference", "vision": "reference"}
    plain = {**layers, "smooth": "none", "rounding": "rtn"}
    rows += [
        Recipe("w8a8", ONE, STATIC, plain),
        Recipe("w8a8", TWO, STATIC, {**plain, "visual_scales": True}),
        Recipe("w8a8", BEST_TWO, STATIC, {**layers, "visual_scales": True}),
    ]
    alone = {"scheme": "w8a16", "smooth": "none", "rounding": "mse", "rules": (Rule("*", "float"),)}
    rows += [Recipe(head, "head", "the head alone", {**alone, "head": head}) for head in HEADS[1:]]
    return rows


def items(per_task: int) -> list[Item]:
    return [draw_item(task, "test", ITEM_SEED, index) for task in TASKS for index in range(per_task)]


def scored(folder: Path, asked: Sequence[Item]) -> list[ScoredAnswer]:
    llm = LLM(folder, device="cpu", dtype="float32", kv_cache_tokens=16384)
    return list(
        score_answers(llm, [([{"role": "user", "content": list(item.content)}], item.answer) for item in asked])
    )


def mean_score(folder: Path, per_task: int) -> float:
    """Over all tasks, of free answers: the figure `saccade eval` prints, on items of its own."""
    asked = [draw_item(task, "test", ITEM_SEED + 1, index) for task in TASKS for index in range(per_task)]
    llm = LLM(folder, device="cpu", kv_cache_tokens=16384)
    outcomes = answer(llm, asked, EvalOptions())
    return sum(outcome.score for outcome in outcomes) / len(outcomes)


def measure(
    variant: str,
    source: Path,
    recipe: Recipe,
    exact: list[ScoredAnswer],
    asked: Sequence[Item],
    work: Path,
    num_scored: int,
    threads: int,
    seed: int,
) -> Row:
    """`num_scored`: items of each task that are answered freely besides; 0 for none. `seed`: of what calibrates best mode."""
    out = work / "out"
    start = time.process_time()
    if recipe == FLOAT:
        out = source
    elif recipe.is_exact:
        quantize_exactly(source, out, work / "pictures", force=True, **recipe.options)
    else:
        quantize(source, out, force=True, threads=threads, seed=seed, **recipe.options)
    seconds = time.process_time() - start
    found = scored(out, asked)
    apart = join([token_divergence(a.logits, b.logits) for a, b in zip(exact, found, strict=True)]).summary()
    right = [bool((answer.logits.argmax(-1) == torch.tensor(answer.token_ids)).all()) for answer in found]
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    return Row(
        variant, recipe.scheme, recipe.name, recipe.layers, apart.mean_kl, apart.p99_kl, apart.top1_agreement,
        sum(right) / len(right), apart.num_tokens, size, round(seconds, 1),
        mean_score(out, num_scored) if num_scored else None,
        instruction_set(),
    )  # fmt: skip


def mean(rows: Sequence[Row]) -> Row:
    """Of the same recipe with several seeds; the score is the first's."""

    def over(name: str) -> float:
        return sum(getattr(row, name) for row in rows) / len(rows)

    names = ("mean_kl", "p99_kl", "top1", "right", "seconds")
    return replace(rows[0], **{name: over(name) for name in names}, seed_kls=tuple(row.mean_kl for row in rows))


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| variant | scheme | recipe | layers | mean KL | p99 KL | top-1 | right | score | MB | s |",
        "|" + "---|" * 11,
    ]
    for row in rows:
        score = "" if row.score is None else f"{100 * row.score:.1f}"
        lines.append(
            f"| {row.variant} | {row.scheme} | {row.recipe} | {row.layers} | {row.mean_kl:.2e} | {row.p99_kl:.2e} | "
            f"{row.top1:.4f} | {row.right:.3f} | {score} | {row.size_bytes / 1e6:.1f} | {row.seconds:.0f} |"
        )
    return "\n".join(lines)


def made_by(model: Path) -> dict[str, str]:
    """What figures depend on besides the options: the weights, and the code that quantizes and asks."""
    package = Path(saccade.__file__).parent
    code = [path for part in ("quantize", "schemes", "evals") for path in sorted((package / part).rglob("*.py"))]
    return {"weights": digest(sorted(model.glob("*.safetensors"))), "code": digest(code)}


def instruction_set() -> str:
    library = load()
    return library.isa if isinstance(library, Library) else "torch"


def digest(files: Sequence[Path]) -> str:
    whole = hashlib.sha256()
    for path in files:
        whole.update(path.read_bytes())
    return whole.hexdigest()[:12]


def read(path: Path, origin: dict[str, str]) -> list[Row]:
    """Raises SystemExit where the file's rows were made by other weights or code than `origin`."""
    found = json.loads(path.read_text())
    if found["made_by"] != origin:
        raise SystemExit(f"{path} was made by {found['made_by']}, this would be {origin}: name another file")
    return [Row(**row) for row in found["rows"]]


def write(path: Path, origin: dict[str, str], rows: Sequence[Row]) -> None:
    path.write_text(json.dumps({"made_by": origin, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--variants", nargs="*", default=list(INJECTORS))
    parser.add_argument("--schemes", nargs="*", help="only these")
    parser.add_argument("--recipes", nargs="*", help="only rows whose name begins so")
    parser.add_argument("--per-task", type=int, default=8)
    parser.add_argument("--scored", nargs="*", default=list(INJECTORS), help="variants that answer freely, too")
    parser.add_argument("--score-items", type=int, default=20, help="of each task")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of best mode's calibration samples")
    parser.add_argument("--threads", type=int, default=1, help="of one quantization; the bits depend on it")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    chosen = [FLOAT] + [
        recipe
        for recipe in recipes()
        if (not options.schemes or recipe.scheme in options.schemes)
        and (not options.recipes or any(recipe.name.startswith(name) for name in options.recipes))
    ]
    asked = items(options.per_task)
    origin = made_by(resolve(options.model))
    rows = read(options.json, origin) if options.json and options.json.exists() else []
    done = {(row.variant, row.scheme, row.recipe, row.layers) for row in rows}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        (work / "pictures").mkdir()
        for number in range(NUM_PICTURES):
            drawn(number).picture.save(work / "pictures" / f"{number}.png")
        for variant in options.variants:
            missing = [each for each in chosen if (variant, each.scheme, each.name, each.layers) not in done]
            if not missing:
                continue
            source = work / variant
            inject(open_checkpoint(resolve(options.model)), variant).save(source)
            exact = scored(source, asked)
            for recipe in missing:
                num_scored = options.score_items if variant in options.scored and recipe.is_scored else 0
                of_seeds = [
                    measure(
                        variant, source, recipe, exact, asked, work, 0 if number else num_scored, options.threads, seed
                    )
                    for number, seed in enumerate(options.seeds if recipe.is_drawn else options.seeds[:1])
                ]
                rows.append(mean(of_seeds))
                print(table(rows[-1:]).splitlines()[-1], flush=True)
                if options.json:
                    write(options.json, origin, rows)
    print(table(rows))
    print(side_by_side(rows))
    print(against_exact(rows))
    print(visual_scales(rows))
    print(scores(rows))
    for line in [*losses(rows), *spread(rows)]:
        print(line)


def side_by_side(rows: Sequence[Row]) -> str:
    """Mean KL alone, like beside like."""
    names = ("exact m2", "exact m4", "to nearest", "best")
    found = {(row.variant, row.scheme, row.layers, row.recipe): f"{row.mean_kl:.2e}" for row in rows}
    places = dict.fromkeys(place[:3] for place in found if place[3] == "best")
    lines = [f"| variant | scheme | layers | {' | '.join(names)} |", "|" + "---|" * 7]
    lines += [f"| {' | '.join([*place, *(found.get((*place, name), '') for name in names)])} |" for place in places]
    return "\n".join(lines)


def against_exact(rows: Sequence[Row]) -> str:
    """Mean KL of best mode, and of the better of exact mode's methods on the same layers: variants by schemes."""
    of: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row.layers == LIKE_REFERENCE:
            of.setdefault((row.variant, row.scheme), {})[row.recipe] = row.mean_kl
    schemes = list(dict.fromkeys(scheme for _, scheme in of))
    lines = [f"| variant | {' | '.join(schemes)} |", "|" + "---|" * (len(schemes) + 1)]
    for variant in dict.fromkeys(variant for variant, _ in of):
        cells = []
        for scheme in schemes:
            found = of.get((variant, scheme), {})
            others = [kl for recipe, kl in found.items() if recipe != "best"]
            cells.append(f"{found['best']:.2e} / {min(others):.2e}" if "best" in found and others else "")
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def visual_scales(rows: Sequence[Row]) -> str:
    """Mean KL of w8a8 with one static scale and with another of visual tokens, on the same layers."""
    of = {(row.variant, row.recipe): row for row in rows if row.scheme == "w8a8"}
    names = (ONE, TWO, "best", BEST_TWO)
    lines = [f"| variant | {' | '.join(names)} |", "|" + "---|" * (len(names) + 1)]
    for variant in dict.fromkeys(variant for variant, _ in of):
        found = [of.get((variant, name)) for name in names]
        lines.append(f"| {variant} | {' | '.join('' if row is None else f'{row.mean_kl:.2e}' for row in found)} |")
    return "\n".join(lines)


def scores(rows: Sequence[Row]) -> str:
    """Per cent of the tasks' items answered rightly, variant by variant; schemes that answered."""
    found = {(row.variant, row.scheme): f"{100 * row.score:.1f}" for row in rows if row.score is not None}
    variants, schemes = (list(dict.fromkeys(column)) for column in zip(*found, strict=True)) if found else ([], [])
    lines = [f"| variant | {' | '.join(schemes)} |", "|" + "---|" * (len(schemes) + 1)]
    lines += [f"| {v} | {' | '.join(found.get((v, scheme), '') for scheme in schemes)} |" for v in variants]
    return "\n".join(lines)


def losses(rows: Sequence[Row]) -> list[str]:
    """Where best mode is not ahead of what stands beside it, in mean KL."""
    lines = []
    for best in rows:
        for other in rows:
            place = (best.variant, best.scheme, best.layers)
            is_beside = best.recipe == "best" != other.recipe and (other.variant, other.scheme, other.layers) == place
            if is_beside and other.mean_kl <= best.mean_kl:
                lines.append(
                    f"not ahead: {', '.join(place)}: {best.mean_kl:.2e} against {other.mean_kl:.2e} of {other.recipe}"
                )
    return lines or ["best mode is ahead in every row"]


def spread(rows: Sequence[Row]) -> list[str]:
    """How far the seeds of best mode lie apart, and where one of them alone is not ahead of exact mode."""
    several = [row for row in rows if len(row.seed_kls) > 1]
    if not several:
        return []
    apart = [max(row.seed_kls) / min(row.seed_kls) for row in several]
    lines = [
        f"seeds lie apart by a factor of {statistics.median(apart):.2f} in the median row, {max(apart):.2f} at most"
    ]
    worst = [replace(row, mean_kl=max(row.seed_kls)) for row in several]
    exact = [row for row in rows if row.recipe.startswith("exact")]
    return lines + [f"against exact mode, each with its worst seed: {line}" for line in losses([*worst, *exact])]


if __name__ == "__main__":
    main()
