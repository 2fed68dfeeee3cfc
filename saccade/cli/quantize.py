"""`saccade quantize`: a smaller checkpoint."""

from __future__ import annotations

from typing import Any, Literal

import click

from saccade.base.meter import gigabytes
from saccade.cli.flags import script_options
from saccade.quantize.recipe import ExactRecipe


@click.command("quantize")
@click.option("--model_path", "--model", "model", required=True, help="float checkpoint folder or hub id")
@click.option("--calib_images", "--calib-images", required=True, help="folder of calibration pictures, nothing else")
@click.option("--save_directory", "--save-directory", required=True, help="folder to make; an existing one is refused")
@click.option("--mode", type=click.Choice(["exact"]), default="exact", show_default=True, help="how weights are found")
@click.option(
    "--image_order",
    "--image-order",
    type=click.Choice(["name", "listing"]),
    default="name",
    show_default=True,
    help="order of the pictures, which results depend on; listing is the file system's, as msModelSlim takes it",
)
@click.option("--force", is_flag=True, help="replace an existing checkpoint")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="last bits depend on it")
@script_options(ExactRecipe)
def command(
    model: str,
    calib_images: str,
    save_directory: str,
    mode: str,
    image_order: Literal["name", "listing"],
    force: bool,
    threads: int,
    **values: Any,
) -> None:
    """Make a smaller checkpoint for Ascend engines and for Saccade, equal bit for bit to what msModelSlim would write.

    For example: saccade quantize --model_path Qwen2.5-VL-3B-Instruct --calib_images photos --save_directory w8a8
    """
    from saccade import api

    report = api.quantize(
        model, save_directory, calib_images, image_order=image_order, force=force, threads=threads, **values
    )
    print(
        f"quantized to {report.scheme} in {report.seconds:.0f} s, {gigabytes(report.source_bytes)} -> "
        f"{gigabytes(report.output_bytes)}, {report.num_samples} pictures, "
        f"at most {gigabytes(report.peak_memory_bytes)} of memory: {report.folder}"
    )
