"""`saccade eval`: how many answers are right, and how far a model lies from another."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import click

from saccade.base.errors import OptionError
from saccade.base.options import suggestion
from saccade.cli.flags import MODEL_HELP, flags, gather, require_places
from saccade.engine.options import EngineOptions
from saccade.evals.run import Candidate, EvalOptions
from saccade.inputs.options import MediaOptions

ITEMS_OF_A_TASK = 100
FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("eval")
@click.argument("model", default="demo")
@click.option("--against", help=f"a reference to compare with: {MODEL_HELP}")
@click.option("--against-quantization", help="quantizes the reference while loading")
@click.option("--against-dtype", default=None, help="the reference's working type; default: as --dtype")
@click.option("--tasks", help="names, with commas between; default: all, or none with --dataset")
@click.option(
    "--dataset",
    "datasets",
    multiple=True,
    type=FILE,
    help="items of your own, a JSON object on each line (docs/evaluating.md); may be given several times",
)
@click.option("--inject", metavar="NAME[:STRENGTH]", help="outliers put into the model (docs/outliers.md)")
@click.option("--json", "json_file", type=FILE, help="write the figures here")
@click.option("--answers", "answers_file", type=FILE, help="write every answer here, a JSON object on each line")
@click.option("--html", "html_file", type=FILE, help="write a page with plots and the worst answers here")
@click.option("--markdown", is_flag=True, help="print the table for a page, and nothing else")
@click.option("--list", "is_list", is_flag=True, help="print the tasks and end")
@flags(EvalOptions)
@flags(MediaOptions)
@flags(EngineOptions)
def command(
    model: str,
    against: str | None,
    against_quantization: str | None,
    against_dtype: str | None,
    tasks: str | None,
    datasets: tuple[Path, ...],
    inject: str | None,
    json_file: Path | None,
    answers_file: Path | None,
    html_file: Path | None,
    markdown: bool,
    is_list: bool,
    **values: Any,
) -> None:
    """Ask a model questions whose answers are known; with --against, measure how far it lies from another.

    Works as typed, offline: saccade eval demo --quantization w8a8-dynamic --against demo --limit 20
    """
    options = gather(EvalOptions, values)
    media = gather(MediaOptions, values)
    engine = gather(EngineOptions, values)
    from saccade.evals.dataset import read_dataset
    from saccade.evals.report import render_html, render_markdown, render_text, worst
    from saccade.evals.run import evaluate
    from saccade.evals.tasks import TASKS, draw

    if is_list:
        width = max(map(len, TASKS))
        print("\n".join(f"{name:<{width}}  {description}" for name, description in TASKS.items()))
        return
    if against is None and (against_quantization or against_dtype):
        raise click.UsageError(
            "--against-quantization and --against-dtype need --against, the reference they belong to"
        )
    require_places(json_file, answers_file, html_file)
    names = [name.strip() for name in tasks.split(",") if name.strip()] if tasks else [] if datasets else list(TASKS)
    names = list(dict.fromkeys(names))
    for name in names:
        if name not in TASKS:
            raise OptionError(f"task {name!r} is unknown{suggestion(name, TASKS)}")
    items = [item for path in datasets for item in read_dataset(path, limit=options.limit)]
    items += [
        draw(name, "test", options.seed, index) for name in names for index in range(options.limit or ITEMS_OF_A_TASK)
    ]
    candidate = Candidate(model, engine, media, inject)
    reference = None
    if against is not None:
        dtype = against_dtype or engine.dtype
        reference = Candidate(
            against, dataclasses.replace(engine, quantization=against_quantization, dtype=dtype), media
        )
    start = time.perf_counter()
    found = evaluate(candidate, items, options, against=reference, show_progress=True)
    seconds = time.perf_counter() - start
    print(render_markdown(found.figures()) if markdown else render_text(found.figures()))
    if json_file is not None:
        json_file.write_text(json.dumps(found.figures(), indent=2) + "\n", encoding="utf-8")
    if answers_file is not None:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in found.answers())
        answers_file.write_text("".join(lines), encoding="utf-8")
    if html_file is not None:
        chosen = worst(found)
        media_of = dict(zip(chosen, candidate.shown(found.outcomes[index].item for index in chosen), strict=True))
        html_file.write_text(render_html(found, media_of), encoding="utf-8")
    print(f"({seconds:.0f} s)", file=sys.stderr)
