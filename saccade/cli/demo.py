"""`saccade demo`: the shipped model, asked about the shipped pictures."""

from __future__ import annotations

from pathlib import Path

import click

from saccade.base.errors import SaccadeError


@click.command("demo")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo-output"),
    show_default=True,
    help="folder for drawn boxes",
)
def command(out: Path) -> None:
    """Ask the model that ships with Saccade about pictures and clips it was not trained on; exit code 1 if an answer is wrong."""
    from saccade.demo import run

    wrong = run(out)
    if wrong:
        raise SaccadeError(f"{wrong} of the demo's answers are not the expected ones")
