"""`saccade inspect`: what a checkpoint holds, and what is wrong with it."""

from __future__ import annotations

import sys
from typing import Literal

import click


@click.command("inspect")
@click.argument("model", default="demo")
@click.option("--check", is_flag=True, help="also read every weight, looking for NaN and infinity")
@click.option(
    "--source",
    default="huggingface",
    show_default=True,
    help="where hub ids are looked up: huggingface or modelscope",
)
def command(model: str, check: bool, source: Literal["huggingface", "modelscope"]) -> None:
    """Say what a checkpoint holds, and what is wrong with it; exit code 1 if anything is."""
    from saccade.checkpoints.describe import describe
    from saccade.checkpoints.formats import open_checkpoint
    from saccade.checkpoints.hub import resolve

    folder = resolve(model, source=source)
    description = describe(folder)
    print("\n".join(description.render()))
    if check and not description.problems:
        open_checkpoint(folder).check_finite()
        print("every weight is finite")
    if description.problems:
        sys.exit(1)
