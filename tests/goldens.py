"""Checkpoints written by the reference quantizer, where this machine has them: they are too large to ship."""

from __future__ import annotations

from pathlib import Path

import pytest

GOLDENS = Path(__file__).parents[2] / "shared" / "goldens"
CASES = ("w8a8_m2_vllm", "w8a8_m4_mindie", "w8a8dyn_m2_vllm", "w4a8_m4_vllm")
needs_goldens = pytest.mark.skipif(not GOLDENS.is_dir(), reason=f"no reference checkpoints in {GOLDENS}")
