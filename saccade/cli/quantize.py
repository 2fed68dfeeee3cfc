"""`saccade quantize`: a smaller checkpoint."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from saccade.base.meter import gigabytes
from saccade.cli.flags import flags, script_options
from saccade.quantize.best_recipe import BestRecipe, best_options, parse_rule, read_recipe
from saccade.quantize.recipe import ExactRecipe
from saccade.quantize.report import QuantizationReport, Verify
from saccade.quantize.report_page import PAGE_NAME

_SHARED = "group_size"  # the one option of both modes
EXACT_ONLY = {field.name for field in dataclasses.fields(ExactRecipe)} - {_SHARED}
BEST_ONLY = {field.name for field in dataclasses.fields(BestRecipe)} - {_SHARED, "rules"} | {
    "layer",
    "recipe",
    "dry_run",
    "statistics",
}
_REFERENCE_SPELLINGS = EXACT_ONLY | {"model_path", "calib_images", "save_directory", "image_order"}


@click.command("quantize")
@click.argument("model", required=False)
@click.argument("out", required=False, type=click.Path(file_okay=False))
@flags(BestRecipe, without=("rules", _SHARED))
@click.option("--group-size", "--group_size", _SHARED, type=int, help="columns that share a 4-bit scale (128)")
@click.option("--layer", multiple=True, help="PATTERN=SCHEME for some linears, or =float; the first match counts")
@click.option("--recipe", type=click.Path(exists=True, dir_okay=False), help="YAML file with any of these options")
@click.option("--dry-run", is_flag=True, help="print the plan: layers, sizes, memory, time; write nothing")
@click.option(
    "--statistics",
    type=click.Path(file_okay=False),
    help="keep what the float model sees there; other schemes reuse it",
)
@click.option("--verify/--no-verify", default=True, help="compare the result with the model before it appears")
@click.option("--force", is_flag=True, help="replace an existing checkpoint")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda")
@click.option("--threads", type=click.IntRange(1), help="last bits depend on it (all processors; exact mode: 1)")
@click.option(
    "--mode",
    type=click.Choice(["best", "exact"]),
    help="exact: msModelSlim's result bit for bit, also chosen by its own option spellings below",
)
@click.option("--model_path", "--model-path", help="as msModelSlim spells MODEL")
@click.option("--save_directory", "--save-directory", help="as msModelSlim spells OUT")
@click.option("--calib_images", "--calib-images", help="as msModelSlim spells --calibration: a folder of pictures")
@click.option(
    "--image_order",
    "--image-order",
    type=click.Choice(["name", "listing"]),
    default="name",
    show_default=True,
    help="exact mode: order of the pictures; listing is the file system's, as msModelSlim takes it",
)
@script_options(ExactRecipe, without=(_SHARED,))
@click.pass_context
def command(context: click.Context, /, **values: Any) -> None:
    """Make a smaller checkpoint: int8, int4 or fp8, for Saccade, vLLM, SGLang, transformers, vLLM Ascend or MindIE.

    \b
    Works as typed, offline:
      saccade quantize demo /tmp/demo-w4a8 --scheme w4a8
      saccade quantize demo /tmp/x --scheme w8a8 --format vllm-ascend --dry-run
    msModelSlim's command lines work too, and give its result bit for bit:
      saccade quantize --model_path Qwen2.5-VL-3B-Instruct --calib_images photos --save_directory w8a8
    """
    given = {name for name in values if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    mode = values["mode"] or ("exact" if given & _REFERENCE_SPELLINGS else "best")
    for name, spelling in (("model", "model_path"), ("out", "save_directory"), ("calibration", "calib_images")):
        if {name, spelling} <= given:
            first, second = values[name], values[spelling]
            raise click.UsageError(f"{name} is given twice, as {first} and as --{spelling} {second}; give one")
    model, out = values["model"] or values["model_path"], values["out"] or values["save_directory"]
    if model is None or (out is None and not values["dry_run"]):
        raise click.UsageError("give a model and a folder to make: saccade quantize MODEL OUT --scheme w8a8-dynamic")
    if mode == "exact":
        _exact(model, out, values, given)
    else:
        _best(model, out or os.devnull, values, given)


def _exact(model: str, out: str, values: dict[str, Any], given: set[str]) -> None:
    if foreign := sorted(given & BEST_ONLY):
        raise click.UsageError(
            f"--{foreign[0].replace('_', '-')} belongs to --mode best; leave it out, or add --mode best"
        )
    if values["calib_images"] is None:
        raise click.UsageError("exact mode needs --calib_images, a folder of pictures and nothing else")

    from saccade import api
    from saccade.kernels.choose import choose_device

    choose_device(values["device"])  # the verification's, at the end of it all
    options = {name: values[name] for name in EXACT_ONLY}
    if values[_SHARED] is not None:
        options[_SHARED] = values[_SHARED]
    if options["device_type"] == "npu":
        click.echo("note: --device_type npu is computed on the CPU, with the result msModelSlim has there", err=True)
    report = api.quantize_exactly(
        model,
        out,
        values["calib_images"],
        image_order=values["image_order"],
        force=values["force"],
        threads=values["threads"],
        verify=_verifier(model, values),
        **options,
    )
    print(
        f"quantized to {report.scheme} in {report.seconds:.0f} s, {gigabytes(report.source_bytes)} -> "
        f"{gigabytes(report.output_bytes)}, {report.num_samples} pictures, "
        f"at most {gigabytes(report.peak_memory_bytes)} of memory: {report.folder}"
    )
    _say(report.verified)


def _best(model: str, out: str, values: dict[str, Any], given: set[str]) -> None:
    options = {
        name: values[name] for name in given & (BEST_ONLY | {_SHARED}) - {"layer", "recipe", "dry_run", "statistics"}
    }
    if given & EXACT_ONLY:
        exact = {name: values[name] for name in EXACT_ONLY | {_SHARED} if values[name] is not None}
        options = best_options(ExactRecipe(**exact), _SHARED in given) | options
    if values["calib_images"] is not None:
        options.setdefault("calibration", values["calib_images"])
    if values["layer"]:
        options["rules"] = tuple(parse_rule(text) for text in values["layer"])
    recipe = read_recipe(Path(values["recipe"]), options) if values["recipe"] else BestRecipe(**options)

    from saccade import api

    job = api.quantization_job(
        model, out, recipe=recipe, device=values["device"], threads=values["threads"], statistics=values["statistics"]
    )
    for note in job.notes:
        click.echo(f"note: {note}", err=True)
    if values["dry_run"]:
        print("\n".join(job.plan.render()))
        return
    from saccade.checkpoints.shard_writer import DEFAULT_SHARD_BYTES
    from saccade.quantize.best import quantize_best

    size = values["part_file_size"]
    report = quantize_best(
        job,
        force=values["force"],
        verify=_verifier(model, values),
        max_shard_bytes=DEFAULT_SHARD_BYTES if size is None else size << 30,
    )
    worst = report.worst
    print(
        f"quantized {len(report.layers)} linears to {recipe.scheme} in {report.seconds:.0f} s, "
        f"{gigabytes(job.plan.source_bytes)} -> {gigabytes(report.output_bytes)}"
        + (f", worst {worst.module} at {worst.worst_db:.1f} dB" if worst else "")
        + f", at most {gigabytes(report.peak_memory_bytes)} of memory: {report.folder}"
    )
    _say(report.verified)


def _verifier(model: str, values: dict[str, Any]) -> Verify | None:
    if not values["verify"]:
        return None
    from saccade.checkpoints.hub import resolve
    from saccade.cli.held_out import shipped
    from saccade.verify.after import verifier

    return verifier(resolve(model), shipped, values["device"], values["threads"])


def _say(verified: QuantizationReport | None) -> None:
    """One line when all is well, else the checks that say why; a failed one is the exit code 1."""
    if verified is None:
        return
    for check in verified.checks:
        if check.verdict != "pass" or check.name == "logits":
            print(f"{check.verdict:<5} {check.name:<8} {check.facts}")
        for detail in check.details if check.verdict != "pass" else ():
            print(f"      {detail}")
    print(f"verified: {verified.verdict}, see {PAGE_NAME} there")
    if verified.verdict == "fail":
        sys.exit(1)
