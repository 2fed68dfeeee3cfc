"""The Triton kernels exist for cards that are not here: their machine code is made."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOME = (
    "rms_norm",
    "silu_mul",
    "rope 128",
    "store_kv 1 of 20",
    "rope_and_store 1 of 20",
    "1 of 3000",
    "fp8, 1 rows",
    "w4a8-g128, 1 rows",
    "w8a8, 40 rows",
    "likeliest",
    "w8a16, 1 rows",
)
KERNELS = {
    "rms_norm",
    "each",
    "rope",
    "store_kv",
    "rope_and_store",
    "paged",
    "merge",
    "quantize_rows",
    "matmul",
    "one_row",
    "add_parts",
    "best_of_parts",
    "choose",
}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("capability", ["80", "90"])
def test_kernels_compile_for_cards_that_are_not_here(capability: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tools.compile_triton",
        "--capability",
        capability,
        "--only",
        *SOME,
    ]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line.split()[1] for line in done.stdout.splitlines()} == KERNELS
