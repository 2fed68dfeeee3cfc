"""Writes a trained run as a checkpoint folder in the published layout: python -m tools.train_demo.export --run runs/nano

Knows the files of a published Qwen2.5-VL checkpoint; knows nothing of training beyond where the weights lie.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from saccade.checkpoints.presets import config_json, generation_config_json, preprocessor_config_json
from saccade.checkpoints.stand_in import CHAT_TEMPLATE
from tools.train_demo.tokenizer import NOT_SPECIAL, SPECIAL
from tools.train_demo.train import SIZES, demo_config


def tokenizer_config_json(tokenizer: Tokenizer) -> dict[str, object]:
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token in SPECIAL,
        }
        for token in (*SPECIAL, *NOT_SPECIAL)
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL[1:]),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def averaged(new: Mapping[str, Tensor], old: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """`share` of the new weights and the rest of the old, tensor by tensor.

    What a model learned on from another keeps more of the other's skills so: WiSE-FT, Wortsman et al. (2022),
    https://arxiv.org/abs/2109.01903.
    """
    return {name: share * weight.float() + (1 - share) * old[name].float() for name, weight in new.items()}


def export(run: Path, to: Path, size: str, begun_from: Path | None = None, share: float = 1.0) -> None:
    """Weights of RUN/checkpoint.pt, averaged with those it was reopened from if told, in bfloat16, and all that belongs beside."""
    tokenizer = Tokenizer.from_file(str(run / "tokenizer.json"))
    config = demo_config(tokenizer, size)
    weights = torch.load(run / "checkpoint.pt", weights_only=True)["network"]
    if begun_from is not None:
        weights = averaged(weights, load_file(begun_from / "model.safetensors"), share)
    to.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in weights.items()}
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(to / "tokenizer.json"))
    files = {
        "config.json": config_json(config),
        "tokenizer_config.json": tokenizer_config_json(tokenizer),
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
        "preprocessor_config.json": preprocessor_config_json(config),
        "generation_config.json": generation_config_json(config),
    }
    for name, content in files.items():
        (to / name).write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/nano"))
    parser.add_argument("--to", type=Path, default=Path("saccade/demo/model"))
    parser.add_argument("--size", choices=SIZES, default="nano")
    parser.add_argument(
        "--begun-from", type=Path, help="exported model that a reopened run began from, to average with"
    )
    parser.add_argument("--share", type=float, default=1.0, help="of the run's weights in that average")
    arguments = parser.parse_args()
    export(arguments.run, arguments.to, arguments.size, arguments.begun_from, arguments.share)
    size = sum(file.stat().st_size for file in arguments.to.iterdir())
    print(f"{arguments.to}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
