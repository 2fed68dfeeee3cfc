"""Writes a checkpoint of any published size with random weights: the real shapes, files and token ids, without a download.

    python tools/random_checkpoint.py 3b /tmp/random-3b
    python tools/random_checkpoint.py 72b /tmp/random-72b --layers 4 --vision-depth 4

What it says is noise; what it costs is real, so it serves for measuring, for memory, and for files of full size.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from saccade.base.errors import SaccadeError
from saccade.base.meter import progress
from saccade.checkpoints.config import ModelConfig
from saccade.checkpoints.formats import expected_tensors
from saccade.checkpoints.noise import RandomWeights
from saccade.checkpoints.presets import (
    PRESETS,
    config_json,
    generation_config_json,
    preprocessor_config_json,
    shortened,
)
from saccade.checkpoints.shard_writer import ShardWriter
from saccade.checkpoints.stand_in import tokenizer_files

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def write_random_checkpoint(config: ModelConfig, folder: Path, seed: int = 0, *, force: bool = False) -> None:
    """Writes weights, configuration and tokenizer, in the memory of one block of noise; equal arguments give equal files."""
    dtype = getattr(torch, config.dtype)
    weights = RandomWeights(seed)
    tensors = expected_tensors(config)
    with ShardWriter(folder, force=force) as writer, progress(len(tensors), "writing") as advance:
        for name, shape in tensors.items():
            writer.add_chunks(name, dtype, shape, (piece.to(dtype) for piece in weights.pieces(name, shape)))
            advance(1)
        for file_name, content in {
            "config.json": config_json(config),
            "generation_config.json": generation_config_json(config),
            "preprocessor_config.json": preprocessor_config_json(config),
        }.items():
            writer.add_file(file_name, json.dumps(content, indent=2) + "\n")
        for file_name, text in tokenizer_files(config).items():
            writer.add_file(file_name, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=list(PRESETS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="decoder layers, in place of the preset's")
    parser.add_argument("--vision-depth", type=int, help="blocks of the vision tower, in place of the preset's")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="replace an existing checkpoint")
    options = parser.parse_args()
    if any(count is not None and count < 1 for count in (options.layers, options.vision_depth)):
        parser.error("--layers and --vision-depth start at 1")

    config = shortened(PRESETS[options.preset], options.layers, options.vision_depth)
    config = replace(config, dtype=DTYPES[options.dtype])
    start = time.perf_counter()
    try:
        write_random_checkpoint(config, options.folder, options.seed, force=options.force)
    except SaccadeError as error:
        sys.exit(str(error))
    size = sum(path.stat().st_size for path in options.folder.iterdir())
    print(f"{options.folder}: {size / 1e9:.2f} GB in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
