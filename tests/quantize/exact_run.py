"""Quantizes a reference case in a process of its own: python -m tests.quantize.exact_run CASE OUT.

Of its own, because the arithmetic libraries choose their instructions when a process starts. The reference checkpoints were
written on a processor with AVX-512 and bfloat16 but without AMX, whose matrix units sum in another order.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click
import torch

SAME_ARITHMETIC = {
    "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
    "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    "OMP_NUM_THREADS": "1",
}


def main(case: Path, out: Path) -> None:
    from safetensors.torch import save_file

    from saccade.cli.flags import script_options
    from saccade.quantize.pipeline import quantize_exact
    from saccade.quantize.recipe import ExactRecipe

    @click.command()
    @script_options(ExactRecipe)
    def parse(**values: object) -> None:
        report = quantize_exact(case / "input", out, ExactRecipe(**values), case / "images")  # type: ignore[arg-type]
        out.with_suffix(".found").mkdir()
        save_file(report.scales, out.with_suffix(".found") / "scales.safetensors")
        save_file(report.activation_maxima, out.with_suffix(".found") / "maxima.safetensors")

    parse(args=(case / "args.txt").read_text().split(), standalone_mode=False)


if __name__ == "__main__":
    assert all(os.environ.get(name) == value for name, value in SAME_ARITHMETIC.items())
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
