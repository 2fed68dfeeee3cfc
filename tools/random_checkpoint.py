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
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade.base.errors import SaccadeError
from saccade.base.meter import progress
from saccade.checkpoints.config import ModelConfig
from saccade.checkpoints.formats import expected_tensors
from saccade.checkpoints.presets import PRESETS, config_json, generation_config_json, preprocessor_config_json
from saccade.checkpoints.shards import ShardWriter

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
WEIGHT_STD = 0.02  # the published initializer_range: keeps activations of any depth finite
BLOCK_BYTES = 64 << 20
BLOCK_STRIDE = 1_000_003  # values, a prime: moves the start of every tensor, so that no two are equal

NUM_ORDINARY_TOKENS = 151_643
ADDED_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
]
NUM_SPECIAL_TOKENS = 14  # the first 14 vanish under "skip special tokens" (spec, section 4)

# Words that are one token, bare and after a space. The first line makes the reference prompts come out at their published
# lengths (997 tokens for examples_image1); the rest keeps ordinary questions near their usual length.
WORDS = """
system You are a helpful assistant user Describe this image video
what is the in of and to on it that for with as at by from or an be was were has have had not but they he she we his her
their its who how many when where why which there here all some any one two three four five left right top bottom front
back side middle between behind under over near color red green blue yellow black white small large big people person man
woman child cat dog bird car bus street house tree sky water table chair text number picture photo frame scene object
objects read list count find show tell give answer question yes no true false first last next before after Picture
Video What Where Who How Is Are The Read List Count Find json JSON bbox label point
"""
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_random_checkpoint(config: ModelConfig, folder: Path, seed: int = 0, *, force: bool = False) -> None:
    """Writes weights, configuration and tokenizer. Memory stays near BLOCK_BYTES; equal arguments give equal files.

    Norms are 1; every other value comes out of one normal block that the tensors walk through in turn, starting again at
    its end, which is as good as fresh noise for every purpose but statistics and many times faster.
    """
    dtype = getattr(torch, config.dtype)
    generator = torch.Generator().manual_seed(seed)
    block = torch.empty(BLOCK_BYTES // dtype.itemsize, dtype=dtype)
    for first in range(0, len(block), 1 << 22):  # in float32 pieces, so that the block is never in memory twice
        piece = block[first : first + (1 << 22)]
        piece.copy_(torch.randn(len(piece), generator=generator) * WEIGHT_STD)
    ones = torch.ones(max(config.text.hidden_size, config.vision.hidden_size), dtype=dtype)
    tensors = expected_tensors(config)
    start = 0
    with ShardWriter(folder, force=force) as writer, progress(len(tensors), "writing") as advance:
        for name, shape in tensors.items():
            numel = int(torch.Size(shape).numel())
            if len(shape) == 1 and name.endswith(".weight"):
                writer.add(name, ones[:numel])
            else:
                writer.add_chunks(name, dtype, shape, _walk(block, start, numel))
                start = (start + numel + BLOCK_STRIDE) % len(block)
            advance(1)
        for file_name, content in {
            "config.json": config_json(config),
            "generation_config.json": generation_config_json(config),
            "preprocessor_config.json": preprocessor_config_json(config),
            "chat_template.json": {"chat_template": CHAT_TEMPLATE},
            "tokenizer_config.json": tokenizer_config_json(),
        }.items():
            writer.add_file(file_name, json.dumps(content, indent=2) + "\n")
        vocabulary, merges = build_vocabulary()
        writer.add_file("tokenizer.json", json.dumps(tokenizer_json(vocabulary, merges), ensure_ascii=False))
        writer.add_file("vocab.json", json.dumps(vocabulary, ensure_ascii=False))
        writer.add_file("merges.txt", "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges))


def _walk(block: Tensor, start: int, numel: int) -> Iterator[Tensor]:
    """`numel` values of the block from `start`, round and round."""
    while numel > 0:
        piece = block[start : start + numel]
        yield piece
        numel -= len(piece)
        start = 0


def build_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level vocabulary of 151,643 entries, so that the added tokens get their published ids, and its merges.

    256 bytes, then the merges of WORDS, then filler that no merge reaches: the tokenizer never produces it, and a random
    model that does is still decodable.
    """
    vocabulary = {character: index for index, character in enumerate(sorted(byte_characters()))}
    merges: dict[tuple[str, str], int] = {}
    for word in WORDS.split():
        for spelling in (word, "Ġ" + word):
            # A merge appended last cannot disturb the words before it: they are whole by earlier merges alone.
            while len(pieces := _apply(merges, list(spelling))) > 1:
                merges[pieces[0], pieces[1]] = len(merges)
                vocabulary.setdefault(pieces[0] + pieces[1], len(vocabulary))
    for number in range(NUM_ORDINARY_TOKENS - len(vocabulary)):
        vocabulary[f"Ġ~{number}"] = len(vocabulary)
    return vocabulary, list(merges)


def _apply(merges: dict[tuple[str, str], int], pieces: list[str]) -> list[str]:
    """Byte-pair encoding of one word, the plain way: the earliest merge first, its leftmost place first."""
    while True:
        ranked = [(merges[pair], at) for at, pair in enumerate(pairwise(pieces)) if pair in merges]
        if not ranked:
            return pieces
        _, at = min(ranked)
        pieces = [*pieces[:at], pieces[at] + pieces[at + 1], *pieces[at + 2 :]]


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(256 + others.index(byte)) if byte in others else chr(byte) for byte in range(256)]


def tokenizer_json(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> dict[str, Any]:
    """The file of the `tokenizers` library, in the form Qwen2.5 publishes."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PIECES}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, **token} for number, token in added_tokens().items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [f"{left} {right}" for left, right in merges],
        },
    }


def tokenizer_config_json() -> dict[str, Any]:
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(number): token for number, token in added_tokens().items()},
        "additional_special_tokens": ADDED_TOKENS[1:NUM_SPECIAL_TOKENS],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131_072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def added_tokens() -> dict[int, dict[str, Any]]:
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        NUM_ORDINARY_TOKENS + index: {"content": content, **plain, "special": index < NUM_SPECIAL_TOKENS}
        for index, content in enumerate(ADDED_TOKENS)
    }


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

    config = PRESETS[options.preset]
    depth = config.vision.depth if options.vision_depth is None else options.vision_depth
    layers = config.text.num_layers if options.layers is None else options.layers
    if min(depth, layers) < 1:
        parser.error("--layers and --vision-depth start at 1")
    full = tuple(index for index in config.vision.fullatt_block_indexes if index < depth)
    config = replace(
        config,
        text=replace(config.text, num_layers=layers),
        vision=replace(config.vision, depth=depth, fullatt_block_indexes=full),
        dtype=DTYPES[options.dtype],
    )
    start = time.perf_counter()
    try:
        write_random_checkpoint(config, options.folder, options.seed, force=options.force)
    except SaccadeError as error:
        sys.exit(str(error))
    size = sum(path.stat().st_size for path in options.folder.iterdir())
    print(f"{options.folder}: {size / 1e9:.2f} GB in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
