"""A tokenizer with a model's ids that stands in for the published one: for random models, without a download.

Knows the byte-level format and the added tokens (spec, section 4); its words are few. Text costs about as many tokens as it
would with the real one, and the template costs exactly as many.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

from saccade.checkpoints.config import ModelConfig

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


def tokenizer_files(config: ModelConfig) -> dict[str, str]:
    """The files of a checkpoint folder that make its tokenizer, by name."""
    vocabulary, merges = build_vocabulary(config.image_token_id - ADDED_TOKENS.index("<|image_pad|>"))
    return {
        "chat_template.json": json.dumps({"chat_template": CHAT_TEMPLATE}, indent=2) + "\n",
        "tokenizer_config.json": json.dumps(tokenizer_config_json(len(vocabulary)), indent=2) + "\n",
        "tokenizer.json": json.dumps(tokenizer_json(vocabulary, merges), ensure_ascii=False),
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges),
    }


def build_vocabulary(size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level vocabulary of `size` entries (151,643 in the published one), after which the added tokens come, and its merges.

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
    for number in range(size - len(vocabulary)):
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
        "added_tokens": [{"id": number, **token} for number, token in added_tokens(len(vocabulary)).items()],
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


def tokenizer_config_json(num_ordinary: int) -> dict[str, Any]:
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(number): token for number, token in added_tokens(num_ordinary).items()},
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


def added_tokens(num_ordinary: int) -> dict[int, dict[str, Any]]:
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        num_ordinary + index: {"content": content, **plain, "special": index < NUM_SPECIAL_TOKENS}
        for index, content in enumerate(ADDED_TOKENS)
    }
