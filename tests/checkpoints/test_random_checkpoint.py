"""The tool that writes checkpoints of the published sizes: its files are the real thing but for what the weights say."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from saccade.checkpoints.describe import describe
from saccade.checkpoints.formats import open_checkpoint, require_tokenizer
from saccade.checkpoints.presets import PRESETS

TOOL = Path(__file__).parents[2] / "tools" / "random_checkpoint.py"
IMAGE_PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|>{}<|vision_end|>Describe this image.<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("random_checkpoint", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "tiny"
    subprocess.run([sys.executable, TOOL, "tiny", folder, "--layers", "3", "--dtype", "fp32"], check=True)
    return folder


def test_the_result_is_whole_and_as_asked_for(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    require_tokenizer(folder)
    checkpoint.check_finite()
    tiny = PRESETS["tiny"]
    assert checkpoint.config == replace(tiny, text=replace(tiny.text, num_layers=3), dtype="float32")
    assert describe(folder).problems == ()
    assert bool((checkpoint.tensor("model.norm.weight") == 1).all())
    weight = checkpoint.tensor("model.layers.2.mlp.up_proj.weight")
    assert 0.018 < float(weight.std()) < 0.022
    assert not torch.equal(weight, checkpoint.tensor("model.layers.1.mlp.up_proj.weight"))


def test_equal_seeds_give_equal_files(tool: ModuleType, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tool.write_random_checkpoint(PRESETS["tiny"], tmp_path / name, seed)
    first, second, third = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert first == second
    assert first != third


def test_the_tokenizer_has_the_published_ids_and_prompt_lengths(folder: Path) -> None:
    """15 tokens before the media and 10 after it, so that examples_image1 of 972 tokens makes a prompt of 997."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size(with_added_tokens=False) == 151_643
    assert tokenizer.token_to_id("<|endoftext|>") == 151_643
    assert tokenizer.token_to_id("<|image_pad|>") == 151_655
    assert tokenizer.token_to_id("<|file_sep|>") == 151_664
    ids = tokenizer.encode(IMAGE_PROMPT.format("<|image_pad|>")).ids
    assert ids.index(151_655) == 15
    assert len(tokenizer.encode(IMAGE_PROMPT.format("<|image_pad|>" * 972)).ids) == 997
    assert len(tokenizer.encode("Describe this image.").ids) == 4


@pytest.mark.parametrize(
    "text", ["Grüße, 漢字! 🐼\n\n\tend ", "it's 2026", "a picture of two cats", "e\u0301 is normalised"]
)
def test_the_tokenizer_gives_every_text_back(folder: Path, text: str) -> None:
    import unicodedata

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids) == unicodedata.normalize("NFC", text)


def test_transformers_loads_tokenizer_template_and_model(folder: Path) -> None:
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe this image."}]},
    ]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == IMAGE_PROMPT.format("<|image_pad|>")
    assert len(tokenizer.encode(prompt)) == 26
    assert tokenizer.decode([151_644, 151_657, 151_645], skip_special_tokens=True) == "<tool_call>"

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    theirs = model.model.language_model.layers[2].self_attn.q_proj.bias
    assert torch.equal(open_checkpoint(folder).tensor("model.layers.2.self_attn.q_proj.bias"), theirs)
    logits = model(input_ids=torch.tensor([tokenizer.encode("Describe this image.")])).logits
    assert bool(torch.isfinite(logits).all())


def test_an_existing_folder_is_refused_in_one_line(folder: Path) -> None:
    run = subprocess.run([sys.executable, TOOL, "tiny", folder], check=False, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith(f"{folder} exists and is not empty")
    assert "Traceback" not in run.stderr
