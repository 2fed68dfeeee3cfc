"""A checkpoint folder as one thing: its config, its tensors under canonical names, and whether the two agree.

Knows the layouts tensors are named in, which tensors a Qwen2.5-VL has (spec, section 3) and which formats its linears may
be quantized in; behind this door only the published ("hub") names and `Weight` exist. Knows nothing of how weights are used.

The formats: plain tensors; those of Ascend's tools in both dialects (`ascend.py`), told by their description file; and what
quantization_config of config.json names: compressed-tensors (`compressed_tensors.py`), AWQ and GPTQ (`awq_gptq.py`).
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade.base.errors import CheckpointError
from saccade.checkpoints import ascend, awq_gptq, compressed_tensors
from saccade.checkpoints.config import ModelConfig, TextConfig, VisionConfig, read_config
from saccade.checkpoints.json_file import printable
from saccade.checkpoints.shards import Shards, TensorInfo
from saccade.checkpoints.stored import FLOATS, Stored
from saccade.schemes.scheme import DENSE, Scheme, Weight

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"

# (prefix in the file, canonical prefix, name of the layout), the first match counts. Anything else is the hub layout.
_LAYOUTS = (
    ("model.language_model.", "model.", "nested"),  # transformers >= 4.52 in memory, and some re-saved files
    ("model.visual.", "visual.", "nested"),
    ("language_model.model.", "model.", "wrapped"),  # re-saved by tools that wrap the language model whole
    ("language_model.lm_head.", "lm_head.", "wrapped"),
)
_METHODS = (compressed_tensors.METHOD, *awq_gptq.METHODS)  # of quantization_config
_SHOWN_PROBLEMS = 5
_MAX_CANDIDATES = 2000  # for a nearest name: more than any published file has, few enough to compare in a moment


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by canonical name, whatever the file calls them. Safe to read from several threads."""

    folder: Path
    config: ModelConfig
    shards: Shards
    layout: str  # "hub", "nested" or "wrapped"
    file_names: Mapping[str, str]  # canonical name -> name in the file
    stored: Stored | None = None  # of a quantized checkpoint

    def __contains__(self, name: object) -> bool:
        return name in self.file_names

    def names(self) -> list[str]:
        return list(self.file_names)

    def info(self, name: str) -> TensorInfo:
        return self.shards.info(self.in_file(name))

    def tensor(self, name: str) -> Tensor:
        return self.shards.read(self.in_file(name))

    def read_into(self, name: str, out: Tensor, rows: slice | None = None, columns: slice | None = None) -> None:
        """See `Shards.read_into`."""
        self.shards.read_into(self.in_file(name), out, rows, columns)

    def is_quantized(self, module: str) -> bool:
        return self.stored is not None and self.stored.is_quantized(module)

    def scheme(self, module: str) -> Scheme:
        """How the weight of `module` is stored."""
        stored = self.stored
        return DENSE if stored is None or not stored.is_quantized(module) else stored.scheme(self, module)

    def weight(self, module: str) -> Weight | None:
        """The quantized weight of a linear, its bias in the file's type; None if it is stored dense."""
        stored = self.stored
        return None if stored is None or not stored.is_quantized(module) else stored.read(self, module)

    @property
    def quantization(self) -> str | None:
        """How the checkpoint is quantized, in a few words; None when it is not."""
        if self.stored is None:
            return None
        modules = linears(self.config)
        count = sum(self.is_quantized(module) for module in modules)
        return (
            f"{self.stored.summary}, {count} of {len(modules)} linear layers "
            f"({self.stored.format_name} format, {self.stored.source})"
        )

    def check_finite(self, names: Iterable[str] | None = None) -> None:
        """Reads these tensors (all by default). Raises CheckpointError for the first that holds NaN or an infinity."""
        for name in self.file_names if names is None else names:
            self.shards.check_finite(self.in_file(name))

    def in_file(self, name: str) -> str:
        """What the file calls it."""
        if name not in self.file_names:
            raise CheckpointError(f"{self.folder} holds no {name}{_nearest(name, self.file_names)}")
        return self.file_names[name]


MAPPED_BYTES = 1 << 16  # smaller tensors (scales, biases) are read: other numbers are made of them


@dataclass(frozen=True)
class MappedCheckpoint:
    """A checkpoint's large tensors where they lie in its files, mapped into memory, for a model that uses them as they are."""

    checkpoint: Checkpoint

    def __contains__(self, name: object) -> bool:
        return name in self.checkpoint

    def info(self, name: str) -> TensorInfo:
        return self.checkpoint.info(name)

    def tensor(self, name: str) -> Tensor:
        is_large = self.info(name).nbytes >= MAPPED_BYTES and self._lie_together([name])
        return self._rows([name]) if is_large else self.checkpoint.tensor(name)

    def rows(self, names: Sequence[str], dtype: torch.dtype) -> Tensor | None:
        """The rows of these tensors one after the other, None if they do not lie so, or are of another type."""
        is_there = self.info(names[0]).dtype == dtype and self._lie_together(names)
        return self._rows(names) if is_there else None

    def weights(self, modules: Sequence[str]) -> dict[str, Weight] | None:
        """The quantized weights of linears whose values lie so; None if they do not, or are not held as the file has them (4 bits)."""
        checkpoint, names = self.checkpoint, [f"{module}.weight" for module in modules]
        stored = checkpoint.stored
        if stored is None or any(checkpoint.scheme(module).weight_bits != 8 for module in modules):
            return None
        if not all(name in self for name in names) or not self._lie_together(names):
            return None
        return {module: stored.read(self, module) for module in modules}

    def _lie_together(self, names: Sequence[str]) -> bool:
        return self.checkpoint.shards.lie_together([self.checkpoint.in_file(name) for name in names])

    def _rows(self, names: Sequence[str]) -> Tensor:
        return self.checkpoint.shards.mapped([self.checkpoint.in_file(name) for name in names])


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads config and headers and compares them; no weight is read.

    Raises CheckpointError, naming file and tensor, for anything damaged, of another architecture, or quantized in a way
    this version does not read.
    """
    checkpoint = open_unverified(folder)
    verify(checkpoint)
    return checkpoint


def open_unverified(folder: Path) -> Checkpoint:
    """As `open_checkpoint`, without comparing the tensors with the config."""
    config = read_config(folder)
    description = ascend.read_description(folder, lambda name: _canonical(name)[0])
    _require_one_set_of_weights(folder, description)
    if description is None:
        _require_known_method(folder, config)
    shards = Shards(folder)
    layout, file_names = canonical_names(shards)
    stored = description or _stored(config, file_names)
    return Checkpoint(folder, config, shards, layout, file_names, stored)


def _require_known_method(folder: Path, config: ModelConfig) -> None:
    if config.quantization is not None and _method(config.quantization) not in _METHODS:
        raise CheckpointError(
            f"{folder} is quantized ({foreign_quantization(config)}), which Saccade does not read; it reads "
            f"{', '.join(_METHODS)} and Ascend's formats: use one of these, or the bf16 checkpoint it was made from"
        )


def _stored(config: ModelConfig, names: Collection[str]) -> Stored | None:
    """What config.json says of how the weights are quantized, None if nothing."""
    if config.quantization is None:
        return None
    if _method(config.quantization) == compressed_tensors.METHOD:
        return compressed_tensors.parse(config.quantization)
    return awq_gptq.parse(config.quantization, names)


def _require_one_set_of_weights(folder: Path, description: ascend.Description | None) -> None:
    """Beside quantized weights, a left-over `model.safetensors` or its index would be taken for them, by other engines too."""
    left_over = [name for name in ("model.safetensors", "model.safetensors.index.json") if (folder / name).exists()]
    ours = sorted(folder.glob("quant_model_weight*.safetensors"))
    if description is not None and left_over and ours:
        raise CheckpointError(
            f"{folder} holds {left_over[0]} beside {ours[0].name}; {description.file.name} describes the latter, "
            f"remove the former"
        )


def foreign_quantization(config: ModelConfig) -> str | None:
    """How config.json says the checkpoint is quantized, None if it does not: only a description file makes it ours to read."""
    if config.quantization is None:
        return None
    return f"{_method(config.quantization) or 'unnamed method'}, quantization_config of config.json"


def _method(section: Mapping[str, Any]) -> str | None:
    method = section.get("quant_method", section.get("format"))
    return method if isinstance(method, str) else None


def canonical_names(shards: Shards) -> tuple[str, dict[str, str]]:
    """The layout and the map from canonical to file names. Raises CheckpointError if two tensors claim one place."""
    layout = "hub"
    file_names: dict[str, str] = {}
    for name in shards.names():
        canonical, its_layout = _canonical(name)
        layout = its_layout or layout
        if (other := file_names.get(canonical)) is not None:
            files = f"{shards.info(other).file} and {shards.info(name).file}"
            raise CheckpointError(
                f"{printable(other)} and {printable(name)} in {files} are the same weight in two layouts; keep one"
            )
        file_names[canonical] = name
    return layout, file_names


def _canonical(name: str) -> tuple[str, str | None]:
    """The canonical name, and the layout that gave it another one."""
    for prefix, replacement, layout in _LAYOUTS:
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix), layout
    return name, None


def verify(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError when a tensor of the model is missing, misshaped or not of a plain floating type."""
    problems = find_problems(checkpoint)
    if problems:
        more = f"; and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
        raise CheckpointError("; ".join(problems[:_SHOWN_PROBLEMS]) + more)


def find_problems(checkpoint: Checkpoint) -> list[str]:
    """What keeps the checkpoint from being loaded, a line each: from headers alone, and what a quantized one adds to norms."""
    expected = expected_tensors(checkpoint.config)
    stored = checkpoint.stored
    quantized: list[str] = []
    strangers = [name for name in checkpoint.file_names if name not in expected]
    missing, misshaped = [], []
    for name, shape in expected.items():
        module = name.removesuffix(".weight")
        if stored is not None and name.endswith(".weight") and stored.is_quantized(module):
            quantized += stored.find_problems(checkpoint, module, shape)
            continue
        if name not in checkpoint:
            missing.append(name)
            continue
        info = checkpoint.info(name)
        if info.shape != shape:
            remedy = "config.json and the weights belong to different models, or one is damaged"
            misshaped.append(
                f"{info.name} in {info.file} has shape {list(info.shape)}, config.json implies {list(shape)}; {remedy}"
            )
        elif info.dtype not in FLOATS:
            kind = str(info.dtype).removeprefix("torch.")
            hint = f" of a layer that {stored.source} does not list as quantized" if stored else ""
            misshaped.append(f"{info.name} in {info.file} is {kind}; bfloat16, float16 or float32 is expected{hint}")
    files = [path.name for path in checkpoint.shards.files]
    where = checkpoint.folder / files[0] if len(files) == 1 else f"the {len(files)} shards of {checkpoint.folder}"
    absent = [
        f"{name} is missing from {where}" + (_nearest(name, strangers) if number < _SHOWN_PROBLEMS else "")
        for number, name in enumerate(missing)
    ]
    if missing == [HEAD]:
        absent = [
            f"{HEAD} is missing from {where}; if the head is the embedding, set tie_word_embeddings to true in config.json"
        ]
    norms = ascend.find_norm_problems(checkpoint, _norms(expected)) if stored is not None else []
    return absent + misshaped + quantized + norms


def find_strangers(checkpoint: Checkpoint) -> list[str]:
    """Canonical names of tensors the model does not have, harmless; a tied model's head, a copy of its embedding, is none."""
    expected = expected_tensors(checkpoint.config)
    strangers = [name for name in checkpoint.file_names if name not in expected and name != HEAD]
    if checkpoint.stored is not None:  # what belongs to a layer the model has: scales, and what norms carry
        modules = {name.removesuffix(".weight") for name in expected}
        strangers = [name for name in strangers if name.rpartition(".")[0].removesuffix(".module") not in modules]
    return strangers


def _norms(expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    return [
        name.removesuffix(".weight") for name, shape in expected.items() if len(shape) == 1 and name.endswith(".weight")
    ]


def require_tokenizer(folder: Path) -> None:
    """Raises CheckpointError naming what is missing when the folder holds no tokenizer."""
    if (folder / "tokenizer.json").is_file():
        return
    absent = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{folder} holds no tokenizer: tokenizer.json is missing, and so is {' and '.join(absent)}; "
            "copy tokenizer.json from the model's page"
        )


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model (spec, section 3). The head is absent when tied."""
    text = config.text
    shapes = {f"visual.{name}": shape for name, shape in _tower_shapes(config.vision).items()}
    shapes[EMBEDDING] = (text.vocab_size, text.hidden_size)
    layer = _layer_shapes(text)
    for index in range(text.num_layers):
        shapes.update({f"model.layers.{index}.{name}": shape for name, shape in layer.items()})
    shapes["model.norm.weight"] = (text.hidden_size,)
    if not text.tie_word_embeddings:
        shapes[HEAD] = (text.vocab_size, text.hidden_size)
    return shapes


def linears(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Every linear of the model by module, with its rows and columns."""
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in expected_tensors(config).items()
        if len(shape) == 2 and name != EMBEDDING
    }


def _tower_shapes(vision: VisionConfig) -> dict[str, tuple[int, ...]]:
    """H: tower width, I: MLP width, M: width of a merged unit."""
    H, I, M = vision.hidden_size, vision.intermediate_size, vision.hidden_size * vision.merge_unit  # noqa: E741
    patch = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    block: dict[str, tuple[int, ...]] = {"norm1.weight": (H,), "norm2.weight": (H,)}
    for name, rows, columns in (
        ("attn.qkv", 3 * H, H),
        ("attn.proj", H, H),
        ("mlp.gate_proj", I, H),
        ("mlp.up_proj", I, H),
        ("mlp.down_proj", H, I),
    ):
        block |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj.weight": (H, *patch)}
    for index in range(vision.depth):
        shapes.update({f"blocks.{index}.{name}": shape for name, shape in block.items()})
    return shapes | {
        "merger.ln_q.weight": (H,),
        "merger.mlp.0.weight": (M, M),
        "merger.mlp.0.bias": (M,),
        "merger.mlp.2.weight": (vision.out_hidden_size, M),
        "merger.mlp.2.bias": (vision.out_hidden_size,),
    }


def _layer_shapes(text: TextConfig) -> dict[str, tuple[int, ...]]:
    """H: model width, I: MLP width, Q and K: widths of all query and all key heads."""
    H, I = text.hidden_size, text.intermediate_size  # noqa: E741
    Q, K = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    return {
        "input_layernorm.weight": (H,),
        "self_attn.q_proj.weight": (Q, H),
        "self_attn.q_proj.bias": (Q,),
        "self_attn.k_proj.weight": (K, H),
        "self_attn.k_proj.bias": (K,),
        "self_attn.v_proj.weight": (K, H),
        "self_attn.v_proj.bias": (K,),
        "self_attn.o_proj.weight": (H, Q),
        "post_attention_layernorm.weight": (H,),
        "mlp.gate_proj.weight": (I, H),
        "mlp.up_proj.weight": (I, H),
        "mlp.down_proj.weight": (H, I),
    }


def _nearest(name: str, candidates: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(islice(candidates, _MAX_CANDIDATES)), n=1, cutoff=0.8)
    return f"; the nearest name in the files is {printable(close[0])}" if close else ""
