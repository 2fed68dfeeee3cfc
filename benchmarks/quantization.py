"""How far quantized models lie from the float one: scheme x recipe x outlier variant, as a table and as JSON.

    python benchmarks/quantization.py --model demo --json benchmarks/results/quantization-demo.json

Each variant is the model with one published kind of outliers put into it (saccade/evals/outliers.py), its function unchanged.
Answers of held-out items are teacher-forced; KL is per token against the float variant, in nats, both run in float32 so that
rounding to bfloat16 is not measured along. `right` is the share of answers whose every token is the likeliest, which is what
greedy decoding would say letter for letter. Calibration is the built-in set, drawn from other seeds and by another hand than
the items; exact mode gets the pictures of that set.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from saccade import LLM
from saccade.api import quantize, quantize_exactly, usable_cpus
from saccade.checkpoints.formats import open_checkpoint
from saccade.checkpoints.hub import resolve
from saccade.evals.item import Item
from saccade.evals.outliers import INJECTORS, inject
from saccade.evals.tasks import TASKS
from saccade.evals.tasks import draw as draw_item
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


def recipes() -> list[Recipe]:
    low_bit = {"w_bit": 4, "is_dynamic": True, "is_lowbit": True, "open_outlier": False, "group_size": 128}
    exact = [("w8a8", {}), ("w8a8-dynamic", {"is_dynamic": True}), ("w4a8", low_bit)]
    rows = [
        Recipe(scheme, f"exact {method}", "as msModelSlim", {**options, "anti_method": method}, is_exact=True)
        for scheme, options in exact
        for method in ("m2", "m4")
    ]
    for scheme in ("w8a8", "w8a8-dynamic", "w4a8"):
        best = {"scheme": scheme, "format": "vllm-ascend"}
        rows.append(Recipe(scheme, "best", "as msModelSlim", best))
        rows.append(Recipe(scheme, "best rotated", "as msModelSlim", {**best, "rotate": True}))
    for scheme in ("w8a8", "w8a8-dynamic", "w4a8", "w8a16", "w4a16", "fp8"):
        plain = {"scheme": scheme, "smooth": "none", "rounding": "rtn"}
        rows.append(Recipe(scheme, "to nearest", "all decoder linears", plain))
        rows.append(Recipe(scheme, "best", "all decoder linears", {"scheme": scheme}))
    return rows


def items(per_task: int) -> list[Item]:
    return [draw_item(task, "test", ITEM_SEED, index) for task in TASKS for index in range(per_task)]


def scored(folder: Path, asked: Sequence[Item]) -> list[ScoredAnswer]:
    llm = LLM(folder, device="cpu", dtype="float32", kv_cache_tokens=16384)
    return list(
        score_answers(llm, [([{"role": "user", "content": list(item.content)}], item.answer) for item in asked])
    )


def measure(
    variant: str, source: Path, recipe: Recipe, exact: list[ScoredAnswer], asked: Sequence[Item], work: Path
) -> Row:
    out = work / "out"
    start = time.perf_counter()
    if recipe.is_exact:
        quantize_exactly(source, out, work / "pictures", force=True, **recipe.options)
    else:
        quantize(source, out, force=True, threads=usable_cpus(), **recipe.options)
    seconds = time.perf_counter() - start
    found = scored(out, asked)
    apart = join([token_divergence(a.logits, b.logits) for a, b in zip(exact, found, strict=True)]).summary()
    right = [bool((answer.logits.argmax(-1) == torch.tensor(answer.token_ids)).all()) for answer in found]
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    return Row(
        variant, recipe.scheme, recipe.name, recipe.layers, apart.mean_kl, apart.p99_kl, apart.top1_agreement,
        sum(right) / len(right), apart.num_tokens, size, round(seconds, 1),
    )  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    lines = ["| variant | scheme | recipe | layers | mean KL | p99 KL | top-1 | right | MB | s |", "|" + "---|" * 10]
    for row in rows:
        lines.append(
            f"| {row.variant} | {row.scheme} | {row.recipe} | {row.layers} | {row.mean_kl:.2e} | {row.p99_kl:.2e} | "
            f"{row.top1:.4f} | {row.right:.3f} | {row.size_bytes / 1e6:.1f} | {row.seconds:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--variants", nargs="*", default=list(INJECTORS))
    parser.add_argument("--schemes", nargs="*", help="only these")
    parser.add_argument("--recipes", nargs="*", help="only rows whose name begins so")
    parser.add_argument("--per-task", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    chosen = [
        recipe
        for recipe in recipes()
        if (not options.schemes or recipe.scheme in options.schemes)
        and (not options.recipes or any(recipe.name.startswith(name) for name in options.recipes))
    ]
    asked, rows = items(options.per_task), []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        (work / "pictures").mkdir()
        for number in range(NUM_PICTURES):
            drawn(number).picture.save(work / "pictures" / f"{number}.png")
        for variant in options.variants:
            source = work / variant
            inject(open_checkpoint(resolve(options.model)), variant).save(source)
            exact = scored(source, asked)
            for recipe in chosen:
                row = measure(variant, source, recipe, exact, asked, work)
                rows.append(row)
                print(table([row]).splitlines()[-1], flush=True)
                if options.json:
                    options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
