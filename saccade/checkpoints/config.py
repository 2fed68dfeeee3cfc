"""What a checkpoint says about itself, as frozen values.

Knows config.json (flat and nested), preprocessor_config.json and generation_config.json and the defaults of absent fields;
knows no tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saccade.base.errors import CheckpointError
from saccade.checkpoints.json_file import read_json

ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
MODEL_TYPE = "qwen2_5_vl"
DTYPES = ("bfloat16", "float16", "float32")

# The published class's values, which some writers leave out of the file. A field lost by accident shows when the tensors'
# shapes are compared with the config.
_CLASS_DEFAULTS = {
    "vocab_size": 152_064,
    "hidden_size": 8192,
    "intermediate_size": 29_568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32_768,
}
_DEFAULT_RMS_NORM_EPS = 1e-5
_DEFAULT_OUT_HIDDEN_SIZE = 3584

# Bounds on what a file may claim: far above every published model, low enough that no claim alone exhausts a machine.
MAX_DEPTH = 10_000
MAX_VOCABULARY = 10_000_000
MAX_TOKENIZER_BYTES = 64 << 20  # tokenizer.json as published has 7 MB, indented by other tools 11 MB


@dataclass(frozen=True)
class VisionConfig:
    """The tower. Defaults are those of the published class, which the 3B and 72B files leave out."""

    hidden_size: int
    out_hidden_size: int
    depth: int = 32
    num_heads: int = 16
    intermediate_size: int = 3420
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112  # pixels
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    tokens_per_second: float = 4.0
    in_channels: int = 3

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def merge_unit(self) -> int:
        """Patches per language-model token (4)."""
        return self.spatial_merge_size**2

    @property
    def patch_values(self) -> int:
        """Values in one patch row (1176)."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def factor(self) -> int:
        """Pixels per merged unit side (28); picture sides are multiples of it."""
        return self.patch_size * self.spatial_merge_size


@dataclass(frozen=True)
class TextConfig:
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    max_position_embeddings: int
    tie_word_embeddings: bool


@dataclass(frozen=True)
class PreprocessingConfig:
    """Limits are areas in pixels; mean and std are per RGB channel of values in 0..1."""

    min_pixels: int = 3136
    max_pixels: int = 12_845_056
    video_min_pixels: int | None = None  # of one frame, for models that see videos small; None: the published rule
    video_max_pixels: int | None = None
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class GenerationConfig:
    """Defaults of generation as transformers would apply them (absent top_k with sampling is 50)."""

    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def is_int8(scheme: Mapping[str, Any]) -> bool:
    """Whether a quantization scheme of config.json has integers of 8 bits."""
    return scheme.get("num_bits") == 8 and scheme.get("type", "int") == "int"


@dataclass(frozen=True)
class ModelConfig:
    vision: VisionConfig
    text: TextConfig
    preprocessing: PreprocessingConfig
    generation: GenerationConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    dtype: str  # "bfloat16" | "float16" | "float32": what the file declares
    quantization: dict[str, Any] | None = None  # quantization_config as it stands in config.json

    @property
    def has_int8_cache(self) -> bool:
        """Whether the checkpoint asks for keys and values to be kept as int8."""
        cache = (self.quantization or {}).get("kv_cache_scheme")
        return isinstance(cache, dict) and is_int8(cache)


def read_config(folder: Path) -> ModelConfig:
    """Reads config.json, generation_config.json and the processor's file of `folder` (spec, sections 1, 4, 5.1, 12).

    Raises CheckpointError naming file, field, value and remedy for anything that is not a Qwen2.5-VL this engine can run.
    """
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(f"{folder} holds no config.json; pass the folder of a Qwen2.5-VL checkpoint")
    top = Fields(read_json(path), path)
    _require_architecture(top)
    nested = top.object("text_config").values if top.has("text_config") else {}
    flat = Fields({**top.values, **nested}, path)
    text = _read_text(flat, top)
    vision = _read_vision(top.object("vision_config"), text)

    def token(name: str, default: int) -> int:
        return top.integer(name, default, at_least=0, below=text.vocab_size)

    image = token("image_token_id", 151655)
    video = token("video_token_id", 151656)
    if image == video:
        raise top.refusal("video_token_id", f"equals image_token_id ({image})", "they must differ")
    return ModelConfig(
        vision=vision,
        text=text,
        preprocessing=_read_preprocessing(folder, vision),
        generation=_read_generation(folder, top, text.vocab_size),
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=token("vision_start_token_id", 151652),
        vision_end_token_id=token("vision_end_token_id", 151653),
        dtype=_read_dtype(flat),
        quantization=_read_quantization(top),
    )


class Fields:
    """One JSON object of one file, read field by field; null counts as absent. Every getter raises CheckpointError."""

    def __init__(self, values: dict[str, Any], path: Path, prefix: str = "") -> None:
        self.values = {name: value for name, value in values.items() if value is not None}
        self.path = path
        self.prefix = prefix

    def refusal(self, name: str, fact: str, remedy: str = "") -> CheckpointError:
        return CheckpointError(f"{self.path}: {self.prefix}{name} {fact}" + (f"; {remedy}" if remedy else ""))

    def has(self, name: str) -> bool:
        return name in self.values

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name, default)
        if value is None:
            raise self.refusal(name, "is absent", "copy the file again from the model's page")
        return value

    def object(self, name: str) -> Fields:
        value = self.get(name)
        if not isinstance(value, dict):
            raise self.refusal(name, f"is {_show(value)}", "an object is expected")
        return Fields(value, self.path, f"{self.prefix}{name}.")

    def integer(self, name: str, default: int | None = None, *, at_least: int = 1, below: int = 1 << 31) -> int:
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not at_least <= value < below:
            absent = "" if self.has(name) else " (its default)"
            raise self.refusal(
                name, f"is {_show(value)}{absent}", f"an integer from {at_least} to {below - 1} is expected"
            )
        return value

    def number(self, name: str, default: float | None = None, *, at_least: float, at_most: float) -> float:
        """A finite number in the closed range."""
        value = self.get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not at_least <= value <= at_most:
            raise self.refusal(name, f"is {_show(value)}", f"a number from {at_least:g} to {at_most:g} is expected")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.refusal(name, f"is {_show(value)}", "true or false is expected")
        return value

    def string(self, name: str, default: str | None = None) -> str:
        value = self.get(name, default)
        if not isinstance(value, str):
            raise self.refusal(name, f"is {_show(value)}", "a string is expected")
        return value

    def integers(self, name: str, default: tuple[int, ...] | None = None, *, below: int, most: int) -> tuple[int, ...]:
        value = self.get(name, default)
        good = isinstance(value, (list, tuple)) and len(value) <= most
        if not good or not all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < below for v in value):
            raise self.refusal(name, f"is {_show(value)}", f"a list of integers from 0 to {below - 1} is expected")
        return tuple(value)

    def rgb(self, name: str, default: tuple[float, float, float], at_least: float) -> tuple[float, float, float]:
        value = self.get(name, default)
        good = isinstance(value, (list, tuple)) and len(value) == 3
        if not good or not all(isinstance(v, (int, float)) and at_least <= v <= 1e3 for v in value):
            raise self.refusal(name, f"is {_show(value)}", f"three numbers from {at_least:g} to 1000 are expected")
        return (float(value[0]), float(value[1]), float(value[2]))

    def always(self, name: str, expected: Any) -> None:
        """A field whose only supported value is `expected`, which is also what its absence means."""
        value = self.get(name, expected)
        if value != expected or isinstance(value, bool) != isinstance(expected, bool):
            raise self.refusal(name, f"is {_show(value)}", f"Saccade supports only {expected!r}")


def _show(value: object) -> str:
    """A value for an error line: short, one line, ASCII."""
    text = ascii(value) if not isinstance(value, dict) else f"an object with the keys {', '.join(map(ascii, value))}"
    return text if len(text) <= 80 else text[:77] + "..."


def _require_architecture(top: Fields) -> None:
    """Raises CheckpointError saying what the checkpoint is when it is no Qwen2.5-VL."""
    model_type = top.values.get("model_type")
    architectures = top.values.get("architectures", [ARCHITECTURE] if model_type == MODEL_TYPE else [])
    names = architectures if isinstance(architectures, list) else [architectures]
    if names != [ARCHITECTURE] or model_type not in (MODEL_TYPE, None):
        found = ", ".join(_show(name).strip("'") for name in names[:4]) or "of no stated architecture"
        kind = "" if model_type is None else f" (model_type {_show(model_type)})"
        raise CheckpointError(
            f"{top.path}: this checkpoint is {found}{kind}; Saccade runs Qwen2.5-VL ({ARCHITECTURE}), "
            "for example Qwen/Qwen2.5-VL-3B-Instruct"
        )


def _read_text(text: Fields, top: Fields) -> TextConfig:
    text.always("hidden_act", "silu")

    def size(name: str, below: int) -> int:
        return text.integer(name, _CLASS_DEFAULTS[name], below=below)

    if text.boolean("use_sliding_window", False):
        raise text.refusal(
            "use_sliding_window", "is true", "sliding windows are not supported; published files have false"
        )
    hidden_size = size("hidden_size", below=1 << 20)
    num_heads = size("num_attention_heads", below=1 << 14)
    num_kv_heads = size("num_key_value_heads", below=1 << 14)
    if num_heads % num_kv_heads:
        raise text.refusal(
            "num_key_value_heads", f"is {num_kv_heads}", f"it must divide num_attention_heads, {num_heads}"
        )
    if not text.has("head_dim") and hidden_size % num_heads:
        raise text.refusal("num_attention_heads", f"is {num_heads}", f"it must divide hidden_size, {hidden_size}")
    head_dim = text.integer("head_dim", hidden_size // num_heads, below=1 << 13)
    rope_theta, mrope_section = _read_rope(text, head_dim)
    return TextConfig(
        vocab_size=size("vocab_size", below=MAX_VOCABULARY + 1),
        hidden_size=hidden_size,
        num_layers=size("num_hidden_layers", below=MAX_DEPTH + 1),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=size("intermediate_size", below=1 << 22),
        rms_norm_eps=text.number("rms_norm_eps", _DEFAULT_RMS_NORM_EPS, at_least=1e-12, at_most=1.0),
        rope_theta=rope_theta,
        mrope_section=mrope_section,
        max_position_embeddings=size("max_position_embeddings", below=1 << 30),
        tie_word_embeddings=top.boolean("tie_word_embeddings", False) or text.boolean("tie_word_embeddings", False),
    )


def _read_rope(text: Fields, head_dim: int) -> tuple[float, tuple[int, int, int]]:
    """Base and sections from `rope_scaling` (published) or `rope_parameters` (transformers 5), the latter with rope_theta inside."""
    name = "rope_parameters" if text.has("rope_parameters") else "rope_scaling"
    if not text.has(name):
        raise text.refusal(name, "is absent", 'expected {"type": "mrope", "mrope_section": [16, 24, 24]} or its like')
    rope = text.object(name)
    for spelling in ("rope_type", "type"):
        kind = rope.string(spelling, "default")
        if kind == "yarn":
            raise rope.refusal(
                spelling, "is 'yarn'", "YaRN is not supported yet; remove the yarn entries and stay within 32768 tokens"
            )
        if kind not in ("default", "mrope"):
            raise rope.refusal(spelling, f"is {_show(kind)}", "Saccade supports 'mrope' and 'default'")
    theta = rope if rope.has("rope_theta") else text
    sections = rope.integers("mrope_section", below=1 << 13, most=3)
    if len(sections) != 3 or 2 * sum(sections) != head_dim:
        fact = f"is {list(sections)}"
        raise rope.refusal(
            "mrope_section", fact, f"three numbers with the sum {head_dim / 2:g} (half of head_dim) are expected"
        )
    rope_theta = theta.number("rope_theta", 1e6, at_least=1.0, at_most=1e12)
    return rope_theta, (sections[0], sections[1], sections[2])


def _read_vision(vision: Fields, text: TextConfig) -> VisionConfig:
    vision.always("hidden_act", "silu")
    vision.always("in_channels", 3)
    config = VisionConfig(
        hidden_size=vision.integer("hidden_size", below=1 << 17),
        out_hidden_size=vision.integer("out_hidden_size", _DEFAULT_OUT_HIDDEN_SIZE, below=1 << 20),
        depth=vision.integer("depth", VisionConfig.depth, below=MAX_DEPTH + 1),
        num_heads=vision.integer("num_heads", VisionConfig.num_heads, below=1 << 14),
        intermediate_size=vision.integer("intermediate_size", VisionConfig.intermediate_size, below=1 << 20),
        patch_size=vision.integer("patch_size", VisionConfig.patch_size, below=257),
        temporal_patch_size=vision.integer("temporal_patch_size", VisionConfig.temporal_patch_size, below=17),
        spatial_merge_size=vision.integer("spatial_merge_size", VisionConfig.spatial_merge_size, below=17),
        window_size=vision.integer("window_size", VisionConfig.window_size, below=1 << 16),
        fullatt_block_indexes=vision.integers(
            "fullatt_block_indexes", VisionConfig.fullatt_block_indexes, below=MAX_DEPTH, most=MAX_DEPTH
        ),
        tokens_per_second=vision.number(
            "tokens_per_second", VisionConfig.tokens_per_second, at_least=1e-3, at_most=1e6
        ),
    )
    if config.hidden_size % (4 * config.num_heads):  # rotary halves for height and width, each of pairs
        fact = f"is {config.num_heads}"
        raise vision.refusal("num_heads", fact, f"4 * num_heads must divide hidden_size, {config.hidden_size}")
    if config.out_hidden_size != text.hidden_size:
        fact = f"is {config.out_hidden_size}"
        raise vision.refusal(
            "out_hidden_size", fact, f"it must equal the language model's hidden_size, {text.hidden_size}"
        )
    if config.window_size < config.factor:
        fact = f"is {config.window_size}"
        raise vision.refusal(
            "window_size", fact, f"at least patch_size * spatial_merge_size = {config.factor} is expected"
        )
    return config


def _read_dtype(flat: Fields) -> str:
    name = "torch_dtype" if flat.has("torch_dtype") else "dtype"
    dtype = flat.string(name, "bfloat16").removeprefix("torch.")
    if dtype not in DTYPES:
        raise flat.refusal(name, f"is {_show(dtype)}", f"one of {', '.join(DTYPES)} is expected")
    return dtype


def _read_quantization(top: Fields) -> dict[str, Any] | None:
    for name in ("quantization_config", "compression_config"):
        if top.has(name):
            return top.object(name).values
    return None


def _read_preprocessing(folder: Path, vision: VisionConfig) -> PreprocessingConfig:
    """preprocessor_config.json, else the `image_processor` of processor_config.json (transformers 5), else the published values."""
    fields = Fields({}, folder / "preprocessor_config.json")
    if fields.path.exists():
        fields = Fields(read_json(fields.path), fields.path)
    elif (path := folder / "processor_config.json").exists():
        processor = Fields(read_json(path), path)
        fields = processor.object("image_processor") if processor.has("image_processor") else fields
    for name, size in (
        ("patch_size", vision.patch_size),
        ("temporal_patch_size", vision.temporal_patch_size),
        ("merge_size", vision.spatial_merge_size),
    ):
        found = fields.integer(name, size)
        if found != size:
            raise fields.refusal(
                name, f"is {found}", f"config.json's vision_config implies {size}; one of the two files is wrong"
            )
    for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        fields.always(name, True)
    sizes = fields.object("size") if fields.has("size") else Fields({}, fields.path)
    default = PreprocessingConfig()

    def area(name: str, side_spelling: str, absent: int) -> int:
        """A limit in any of its three spellings; the sides are areas in spite of their names."""
        if fields.has(name):
            return fields.integer(name)
        return sizes.integer(name) if sizes.has(name) else sizes.integer(side_spelling, absent)

    min_pixels = area("min_pixels", "shortest_edge", default.min_pixels)
    max_pixels = area("max_pixels", "longest_edge", default.max_pixels)
    if not max(min_pixels, vision.factor**2) <= max_pixels:
        remedy = f"at least min_pixels ({min_pixels}) and one merged patch ({vision.factor**2}) is expected"
        raise fields.refusal("max_pixels", f"is {max_pixels}", remedy)
    return PreprocessingConfig(
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        image_mean=fields.rgb("image_mean", default.image_mean, at_least=-1e3),
        image_std=fields.rgb("image_std", default.image_std, at_least=1e-6),
        video_min_pixels=fields.integer("video_min_pixels") if fields.has("video_min_pixels") else None,
        video_max_pixels=fields.integer("video_max_pixels") if fields.has("video_max_pixels") else None,
    )


def _read_generation(folder: Path, top: Fields, vocab_size: int) -> GenerationConfig:
    path = folder / "generation_config.json"
    fields = Fields(read_json(path) if path.exists() else {}, path)
    default = GenerationConfig(eos_token_ids=())
    return GenerationConfig(
        eos_token_ids=_read_eos(folder, fields, top, vocab_size),
        pad_token_id=fields.integer("pad_token_id", at_least=0, below=vocab_size)
        if fields.has("pad_token_id")
        else None,
        do_sample=fields.boolean("do_sample", default.do_sample),
        temperature=fields.number("temperature", default.temperature, at_least=0, at_most=1e3),
        top_k=fields.integer("top_k", default.top_k, at_least=0),
        top_p=fields.number("top_p", default.top_p, at_least=0, at_most=1),
        min_p=fields.number("min_p", default.min_p, at_least=0, at_most=1),
        repetition_penalty=fields.number("repetition_penalty", default.repetition_penalty, at_least=1e-3, at_most=1e3),
    )


def _read_eos(folder: Path, generation: Fields, top: Fields, vocab_size: int) -> tuple[int, ...]:
    """End-of-answer ids from generation_config.json, else config.json, else the tokenizer's files."""
    text = top.object("text_config") if top.has("text_config") else top
    name = "eos_token_id"
    for fields in (generation, top, text):
        if fields.has(name):
            if not isinstance(fields.get(name), list):
                return (fields.integer(name, at_least=0, below=vocab_size),)
            ids = fields.integers(name, below=vocab_size, most=1000)
            if not ids:
                raise fields.refusal(name, "is an empty list", "name at least one id that ends an answer")
            return ids
    token_id = _tokenizer_eos(folder)
    if token_id is None or not 0 <= token_id < vocab_size:
        raise generation.refusal(
            name,
            "is absent, also from config.json and the tokenizer",
            "copy generation_config.json from the model's page",
        )
    return (token_id,)


def _tokenizer_eos(folder: Path) -> int | None:
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return None
    fields = Fields(read_json(path), path)
    if not fields.has("eos_token"):
        return None
    eos = fields.get("eos_token")
    content = eos.get("content") if isinstance(eos, dict) else eos
    decoder = fields.object("added_tokens_decoder") if fields.has("added_tokens_decoder") else Fields({}, path)
    for digits, token in decoder.values.items():
        if isinstance(token, dict) and token.get("content") == content and digits.isascii() and digits.isdigit():
            return int(digits[:20])
    path = folder / "tokenizer.json"
    added = read_json(path, MAX_TOKENIZER_BYTES).get("added_tokens") if path.exists() else None
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and token.get("content") == content and type(token.get("id")) is int:
            return int(token["id"])
    return None
