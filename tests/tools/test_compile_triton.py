"""The Triton kernels exist for cards that are not here: their machine code is made."""

from __future__ import annotations

import ast
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


PROMPTS = """
import torch
from tools.compile_triton import *
from tools.compile_triton import _weight
compiled = Compiled(90)
weight, cache = _weight("w8a8-dynamic"), torch.zeros(200, 16, 2, 128, dtype=torch.bfloat16)
for rows in (65, 80, 203):
    x, angles = torch.zeros(rows, 1280, dtype=torch.bfloat16), torch.zeros(rows, 64)
    layout = PagedLayout((rows,), (rows,), torch.zeros(1, rows // 16 + 1, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64))
    triton_rows.rms_norm(x, x[0], 1e-6, x)
    triton_linear.linear(x, weight)
    q = triton_heads.rope_and_store(x, angles, angles, cache, cache, layout, 6)
    triton_attention.attention_paged(q, cache, cache, layout, 0.1)
print({name: len(hashes) for name, hashes in compiled.variants.items()})
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_a_prompt_of_another_length_compiles_nothing_anew() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", PROMPTS]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ast.literal_eval(done.stdout) == dict.fromkeys(
        ("_rms_norm", "_quantize_rows", "_matmul", "_rope_and_store", "_paged"), 1
    )
