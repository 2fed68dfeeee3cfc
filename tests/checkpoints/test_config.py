"""config.json, generation_config.json and the processor's file, in every spelling, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from saccade.base.errors import CheckpointError
from saccade.checkpoints.config import VisionConfig, read_config
from saccade.checkpoints.json_file import MAX_JSON_BYTES
from saccade.checkpoints.presets import PRESETS, config_json

from .making import SMALL, write_configs, write_json


def flat(**changes: Any) -> dict[str, Any]:
    return {**config_json(SMALL), **changes}


def nested(**changes: Any) -> dict[str, Any]:
    """As transformers 4.52 to 5 write it: everything of the language model inside text_config."""
    outside = {"architectures", "model_type", "vision_config", "torch_dtype", "image_token_id", "video_token_id"}
    outside |= {"vision_start_token_id", "vision_end_token_id"}
    top = {name: value for name, value in flat().items() if name in outside}
    text = {name: value for name, value in flat().items() if name not in outside}
    return {**top, "text_config": {**text, "model_type": "qwen2_5_vl_text", **changes}}


def read(folder: Path, config: dict[str, Any]) -> Any:
    write_configs(folder)
    write_json(folder / "config.json", config)
    return read_config(folder)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_config_is_read_as_it_was_written(tmp_path: Path, preset: str) -> None:
    assert read_config(write_configs(tmp_path, PRESETS[preset])) == PRESETS[preset]


def test_the_nested_spelling_means_the_same_as_the_flat_one(tmp_path: Path) -> None:
    assert read(tmp_path, nested()) == read(tmp_path, flat()) == SMALL


@pytest.mark.parametrize("tied", [True, False])
def test_what_transformers_saves_is_read_as_transformers_reads_it(tmp_path: Path, tied: bool) -> None:
    from transformers import Qwen2_5_VLConfig

    write_configs(tmp_path, replace(SMALL, text=replace(SMALL.text, tie_word_embeddings=tied)))
    theirs = Qwen2_5_VLConfig.from_pretrained(tmp_path)
    before = read_config(tmp_path)
    theirs.save_pretrained(tmp_path)
    assert read_config(tmp_path) == before
    text, vision = theirs.text_config, theirs.vision_config
    assert before.text.num_layers == text.num_hidden_layers
    assert before.text.head_dim == text.hidden_size // text.num_attention_heads
    assert list(before.text.mrope_section) == text.rope_parameters["mrope_section"]
    assert before.text.rope_theta == text.rope_parameters["rope_theta"]
    assert before.text.tie_word_embeddings == theirs.tie_word_embeddings == tied
    assert before.vision.tokens_per_second == vision.tokens_per_second
    assert before.vision.fullatt_block_indexes == tuple(vision.fullatt_block_indexes)


def test_a_config_saved_without_its_defaults_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    """Writers may leave out whatever equals the published class's default, as the 72B file leaves out its tower."""
    from transformers import Qwen2_5_VLConfig

    bare = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {"hidden_size": 1280, "out_hidden_size": 8192},
    }
    ours = read(tmp_path, bare)
    (tmp_path / "generation_config.json").unlink()
    theirs = Qwen2_5_VLConfig.from_pretrained(tmp_path)
    for name in ("vocab_size", "hidden_size", "intermediate_size", "rms_norm_eps", "max_position_embeddings"):
        assert getattr(ours.text, name) == getattr(theirs.text_config, name)
    assert ours.text.num_layers == theirs.text_config.num_hidden_layers
    assert ours.text.num_kv_heads == theirs.text_config.num_key_value_heads
    assert ours.text.rope_theta == theirs.text_config.rope_parameters["rope_theta"]
    assert ours.vision == VisionConfig(hidden_size=1280, out_hidden_size=8192)
    for name in ("depth", "num_heads", "intermediate_size", "patch_size", "window_size", "tokens_per_second"):
        assert getattr(ours.vision, name) == getattr(theirs.vision_config, name)
    assert ours.dtype == "bfloat16"


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
        {"rope_scaling": {"rope_type": "default", "type": "default", "mrope_section": [2, 3, 3]}},
        {
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        },
    ],
)
def test_every_spelling_of_the_rotary_section_is_read(tmp_path: Path, rope: dict[str, Any]) -> None:
    assert read(tmp_path, flat(**rope)).text == SMALL.text


def test_the_rotary_base_inside_rope_parameters_counts(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [2, 3, 3]}
    assert read(tmp_path, nested(rope_scaling=None, rope_parameters=rope)).text.rope_theta == 5e5


def test_tied_anywhere_is_tied(tmp_path: Path) -> None:
    assert read(tmp_path, flat(tie_word_embeddings=True)).text.tie_word_embeddings
    assert read(tmp_path, nested(tie_word_embeddings=True)).text.tie_word_embeddings
    assert read(tmp_path, {**nested(tie_word_embeddings=False), "tie_word_embeddings": True}).text.tie_word_embeddings
    assert not read(tmp_path, nested(tie_word_embeddings=False)).text.tie_word_embeddings


@pytest.mark.parametrize("spelling", [{"torch_dtype": "float16"}, {"torch_dtype": None, "dtype": "float16"}])
def test_the_type_is_read_in_both_spellings(tmp_path: Path, spelling: dict[str, Any]) -> None:
    assert read(tmp_path, flat(**spelling)).dtype == "float16"


@pytest.mark.parametrize(
    "limits",
    [
        {"min_pixels": 6272, "max_pixels": 50_176},
        {"size": {"shortest_edge": 6272, "longest_edge": 50_176}},
        {"size": {"min_pixels": 6272, "max_pixels": 50_176}},
        {"min_pixels": 6272, "max_pixels": 50_176, "size": {"shortest_edge": 3136, "longest_edge": 12_845_056}},
    ],
)
def test_pixel_limits_are_areas_in_every_spelling(tmp_path: Path, limits: dict[str, Any]) -> None:
    write_json(write_configs(tmp_path) / "preprocessor_config.json", limits)
    preprocessing = read_config(tmp_path).preprocessing
    assert (preprocessing.min_pixels, preprocessing.max_pixels) == (6272, 50_176)


def test_limits_may_lie_in_the_file_of_transformers_5(tmp_path: Path) -> None:
    (write_configs(tmp_path) / "preprocessor_config.json").unlink()
    write_json(tmp_path / "processor_config.json", {"image_processor": {"size": {"longest_edge": 50_176}}})
    assert read_config(tmp_path).preprocessing.max_pixels == 50_176


def test_without_a_processor_file_the_published_limits_hold(tmp_path: Path) -> None:
    (write_configs(tmp_path) / "preprocessor_config.json").unlink()
    preprocessing = read_config(tmp_path).preprocessing
    assert (preprocessing.min_pixels, preprocessing.max_pixels) == (3136, 12_845_056)


def test_generation_defaults_are_those_of_the_file(tmp_path: Path) -> None:
    early = {"do_sample": True, "temperature": 0.1, "top_k": 1, "top_p": 0.001, "repetition_penalty": 1.05}
    write_json(write_configs(tmp_path) / "generation_config.json", {**early, "eos_token_id": [31, 30]})
    generation = read_config(tmp_path).generation
    assert {name: getattr(generation, name) for name in early} == early


def test_an_absent_top_k_is_fifty(tmp_path: Path) -> None:
    write_json(write_configs(tmp_path) / "generation_config.json", {"do_sample": True, "eos_token_id": 31})
    generation = read_config(tmp_path).generation
    assert (generation.top_k, generation.top_p, generation.eos_token_ids) == (50, 1.0, (31,))


def test_without_a_generation_file_the_end_comes_from_the_config_and_then_from_the_tokenizer(tmp_path: Path) -> None:
    (write_configs(tmp_path) / "generation_config.json").unlink()
    write_json(tmp_path / "config.json", flat(eos_token_id=7))
    assert read_config(tmp_path).generation.eos_token_ids == (7,)
    write_json(tmp_path / "config.json", nested(eos_token_id=8))
    assert read_config(tmp_path).generation.eos_token_ids == (8,)

    write_json(tmp_path / "config.json", flat(eos_token_id=None))
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id is absent"):
        read_config(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": {"content": "<end>"}})
    write_json(tmp_path / "tokenizer.json", {"added_tokens": [{"id": 9, "content": "<end>"}]})
    assert read_config(tmp_path).generation.eos_token_ids == (9,)
    write_json(
        tmp_path / "tokenizer_config.json", {"eos_token": "<end>", "added_tokens_decoder": {"10": {"content": "<end>"}}}
    )
    assert read_config(tmp_path).generation.eos_token_ids == (10,)


@pytest.mark.parametrize(
    ("architecture", "model_type"),
    [
        ("Qwen2VLForConditionalGeneration", "qwen2_vl"),
        ("LlamaForCausalLM", "llama"),
        ("Qwen3VLForConditionalGeneration", "qwen3_vl"),
        ("Qwen2_5_VLForConditionalGeneration", "qwen3_vl"),
    ],
)
def test_another_architecture_is_named_and_refused(tmp_path: Path, architecture: str, model_type: str) -> None:
    with pytest.raises(CheckpointError, match=f"is {architecture} .*{model_type}.*Saccade runs Qwen2.5-VL"):
        read(tmp_path, flat(architectures=[architecture], model_type=model_type))


def test_yarn_is_refused_by_name(tmp_path: Path) -> None:
    rope = {"type": "yarn", "mrope_section": [2, 3, 3], "factor": 4, "original_max_position_embeddings": 32768}
    with pytest.raises(CheckpointError, match=r"config\.json: rope_scaling\.type is 'yarn'; YaRN is not supported yet"):
        read(tmp_path, flat(rope_scaling=rope))


def test_sliding_windows_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"config\.json: use_sliding_window is true; sliding windows are not supported"
    ):
        read(tmp_path, flat(use_sliding_window=True))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 0),
        ("hidden_size", -64),
        ("hidden_size", "64"),
        ("hidden_size", 64.0),
        ("hidden_size", True),
        ("hidden_size", 1 << 40),
        ("num_hidden_layers", 10_001),
        ("vocab_size", 10_000_001),
        ("num_attention_heads", 6),
        ("num_key_value_heads", 3),
        ("rms_norm_eps", 0),
        ("rope_theta", -1.0),
        ("hidden_act", "gelu"),
        ("tie_word_embeddings", "yes"),
        ("torch_dtype", "float64"),
        ("image_token_id", 40),
        ("video_token_id", 34),
        ("vision_config", [1]),
        ("rope_scaling", None),
        ("rope_scaling", {"type": "mrope", "mrope_section": [2, 3, 4]}),
        ("rope_scaling", {"type": "linear", "mrope_section": [2, 3, 3]}),
    ],
)
def test_a_wrong_value_is_named_with_its_file_and_field(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: {field}\b"):
        read(tmp_path, flat(**{field: value}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("depth", 10_001),
        ("num_heads", 3),
        ("patch_size", 0),
        ("window_size", 14),
        ("out_hidden_size", 65),
        ("fullatt_block_indexes", [-1]),
        ("fullatt_block_indexes", "7"),
        ("tokens_per_second", 0),
        ("in_channels", 1),
    ],
)
def test_a_wrong_value_of_the_tower_is_named_with_its_file_and_field(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: vision_config\.{field} is "):
        read(tmp_path, flat(vision_config={**config_json(SMALL)["vision_config"], field: value}))


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("preprocessor_config.json", "max_pixels", 0),
        ("preprocessor_config.json", "max_pixels", 100),
        ("preprocessor_config.json", "min_pixels", 0),
        ("preprocessor_config.json", "patch_size", 16),
        ("preprocessor_config.json", "image_std", [0, 1, 1]),
        ("preprocessor_config.json", "image_mean", [0.5, 0.5]),
        ("preprocessor_config.json", "do_normalize", False),
        ("generation_config.json", "temperature", -1),
        ("generation_config.json", "top_p", 1.5),
        ("generation_config.json", "eos_token_id", 40),
        ("generation_config.json", "eos_token_id", []),
        ("generation_config.json", "eos_token_id", [31, "30"]),
        ("generation_config.json", "repetition_penalty", 0),
    ],
)
def test_a_wrong_value_of_the_other_files_is_named(tmp_path: Path, file: str, field: str, value: object) -> None:
    path = write_configs(tmp_path) / file
    write_json(path, {**json.loads(path.read_text()), field: value})
    with pytest.raises(CheckpointError, match=rf"{file}: {field} is "):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[]", "holds a list where an object is expected"),
        ('{"hidden_size": NaN}', "holds NaN"),
        ('{"hidden_size": -Infinity}', "holds -Infinity"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"a":' * 100_000, "is nested too deeply"),
        ('{"a": 1, "a": 2}', "holds the key 'a' twice"),
        ('{"\\ud800": 1}', r"holds the key '\\ud800', which is not Unicode"),
        ('{"a": ' + "9" * 5000 + "}", "holds a number of 5000 digits"),
    ],
)
def test_what_is_no_strict_json_object_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"config\.json.* {message}"):
        read_config(tmp_path)


def test_an_infinite_number_is_refused_however_it_is_written(tmp_path: Path) -> None:
    (write_configs(tmp_path) / "config.json").write_text(json.dumps(flat()).replace("1e-06", "1e999"))
    with pytest.raises(CheckpointError, match="rms_norm_eps is inf"):
        read_config(tmp_path)


def test_a_huge_config_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(CheckpointError, match=f"has {MAX_JSON_BYTES + 1} bytes; at most"):
        read_config(tmp_path)


def test_an_empty_folder_is_told_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        read_config(tmp_path)
