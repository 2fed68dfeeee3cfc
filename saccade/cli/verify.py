"""`saccade verify`: is a quantized checkpoint sound, and how far is it from the model it was made from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from saccade.base.errors import CheckpointError
from saccade.cli.flags import flags, gather, require_places
from saccade.verify.options import VerifyOptions


@click.command("verify")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--against", metavar="MODEL", help="the float model it was made from: folder, hub id, or demo")
@click.option("--image", "images", multiple=True, help="a picture to ask about instead of the shipped ones; repeatable")
@click.option("--samples", help="what to ask instead: a .jsonl of conversations, a folder of pictures, or builtin")
@click.option("--question", default="Please describe this picture in detail.", show_default=True, help="about --image")
@click.option(
    "--report",
    "report_folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="write report.html and .json there",
)
@click.option(
    "--write-recipe",
    type=click.Path(dir_okay=False, path_type=Path),
    help="with --target-kl: YAML for `saccade quantize --recipe`",
)
@click.option("--json", "as_json", is_flag=True, help="print the report as JSON")
@click.option("--strict", is_flag=True, help="exit with 1 for warnings, too")
@flags(VerifyOptions)
def command(
    folder: Path,
    against: str | None,
    images: tuple[str, ...],
    samples: str | None,
    question: str,
    report_folder: Path | None,
    write_recipe: Path | None,
    as_json: bool,
    strict: bool,
    **values: Any,
) -> None:
    """Say whether a quantized checkpoint is sound, whatever tool made it, Ascend's included; exit code 1 if it is not.

    For example: saccade verify w8a8 --against Qwen2.5-VL-3B-Instruct --report w8a8-report
    """
    options = gather(VerifyOptions, values)
    if write_recipe is not None and options.target_kl is None:
        raise click.UsageError("--write-recipe writes what --target-kl chooses; give both")
    if not folder.exists():
        raise CheckpointError(f"{folder} does not exist; pass the folder of a quantized checkpoint")
    require_places(write_recipe)
    if report_folder is not None:
        report_folder.mkdir(parents=True, exist_ok=True)

    from saccade.checkpoints.hub import resolve
    from saccade.cli.held_out import chosen
    from saccade.quantize.report import to_json
    from saccade.quantize.report_page import write_report
    from saccade.verify.sensitivity import recipe_text
    from saccade.verify.verification import render, verify

    if images and samples is not None:
        raise click.UsageError("--image and --samples both say what is asked; give one")
    conversations = chosen(images, question, samples, options.blockwise)
    report = verify(folder, None if against is None else resolve(against), conversations, options)
    if report_folder is not None:
        write_report(report, report_folder)
    if write_recipe is not None and report.mixed is not None:
        write_recipe.write_text(recipe_text(report.mixed, report.recipe, report.sensitivity), encoding="utf-8")
    if as_json:
        print(to_json(report))
    else:
        render(report, print)
    if report.verdict == "fail" or (strict and report.verdict == "warn"):
        sys.exit(1)
