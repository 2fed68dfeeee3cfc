"""`saccade doctor`: what this machine can do."""

from __future__ import annotations

import json
import sys

import click


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
def command(as_json: bool) -> None:
    """Say what this machine can do, what is active, and why."""
    from saccade.doctor import examine

    report = examine()
    print(json.dumps(report.as_json()) if as_json else report.render())
    if report.problems:
        sys.exit(1)
