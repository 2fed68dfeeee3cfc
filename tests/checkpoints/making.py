"""A checkpoint small enough to write in every test, and ways to write it as other programs do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from saccade.checkpoints.config import GenerationConfig, ModelConfig
from saccade.checkpoints.formats import expected_tensors
from saccade.checkpoints.presets import PRESETS, config_json, generation_config_json, preprocessor_config_json
from saccade.checkpoints.shards import TensorInfo
from saccade.schemes.scheme import Weight

SMALL = replace(
    PRESETS["tiny"],
    text=replace(PRESETS["tiny"].text, vocab_size=40, tie_word_embeddings=False),
    generation=GenerationConfig(eos_token_ids=(31, 30), pad_token_id=30, do_sample=True, temperature=1e-6),
    vision_start_token_id=32,
    vision_end_token_id=33,
    image_token_id=34,
    video_token_id=35,
)
TIED = replace(SMALL, text=replace(SMALL.text, tie_word_embeddings=True))


def random_tensors(config: ModelConfig = SMALL, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = expected_tensors(config)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def write_configs(folder: Path, config: ModelConfig = SMALL) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config_json(config))
    write_json(folder / "generation_config.json", generation_config_json(config))
    write_json(folder / "preprocessor_config.json", preprocessor_config_json(config))
    return folder


def write_checkpoint(folder: Path, tensors: dict[str, Tensor] | None = None, config: ModelConfig = SMALL) -> Path:
    """A whole checkpoint without tokenizer, in one file written by the safetensors library."""
    write_configs(folder, config)
    save_file(random_tensors(config) if tensors is None else tensors, folder / "model.safetensors")
    return folder


def write_sharded(folder: Path, tensors: dict[str, Tensor], num_shards: int = 3) -> Path:
    """The tensors dealt out over shards in turn, so that no module is whole in any of them, and the index."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for number in range(num_shards):
        share = dict(list(tensors.items())[number::num_shards])
        file_name = f"model-{number + 1:05}-of-{num_shards:05}.safetensors"
        save_file(share, folder / file_name)
        weight_map |= dict.fromkeys(share, file_name)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return folder


def write_raw(path: Path, header: Any, body: bytes = b"") -> Path:
    """A safetensors file with any header at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


class InMemory:
    """Tensors that lie in no file."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def info(self, name: str) -> TensorInfo:
        tensor = self.tensors[name]
        return TensorInfo(name, tensor.dtype, tuple(tensor.shape), Path("memory"), 0, tensor.nbytes)


def assert_same(got: Weight | None, expected: Weight) -> None:
    assert got is not None
    assert got.scheme == expected.scheme
    for left, right in zip(got.tensors(), expected.tensors(), strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))
