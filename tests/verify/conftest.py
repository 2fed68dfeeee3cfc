"""A tiny float model, sound quantized folders made from it, and a way to damage copies of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from saccade import LLM
from saccade.api import messages_for
from saccade.quantize.pipeline import quantize_exact
from saccade.quantize.recipe import ExactRecipe
from saccade.verify.samples import Sample
from saccade.verify.verification import answer
from tests.test_quantized_model import write_quantized

Edit = Callable[[dict[str, Tensor]], Any]
PICTURE = Image.linear_gradient("L").convert("RGB").resize((84, 56))
CONVERSATIONS = [messages_for("What is it?", [PICTURE]), messages_for("Say hello.")]


@pytest.fixture(scope="session")
def dynamic(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """W8A8 dynamic by rounding to nearest, every linear but merger and head."""
    return write_quantized(tiny_checkpoint, tmp_path_factory.mktemp("verify") / "dynamic")


@pytest.fixture(scope="session")
def static(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """W8A8 static as the reference quantizer makes it: smoothed through norms."""
    folder = tmp_path_factory.mktemp("verify-static")
    (folder / "pictures").mkdir()
    for number, size in enumerate([(84, 56), (112, 112)]):
        Image.effect_noise(size, 60).convert("RGB").save(folder / "pictures" / f"{number}.png")
    quantize_exact(tiny_checkpoint, folder / "static", ExactRecipe(act_method=1), folder / "pictures")
    return folder / "static"


@pytest.fixture(scope="session")
def samples(tiny_checkpoint: Path) -> list[Sample]:
    return answer(LLM(tiny_checkpoint, device="cpu", kv_cache_tokens=2048), CONVERSATIONS, 6)


def edited(folder: Path, copy: Path, edit: Edit) -> Path:
    """A copy of `folder` whose tensors `edit` has changed."""
    shutil.copytree(folder, copy)
    (file,) = copy.glob("*.safetensors")
    file.chmod(0o600)
    tensors = load_file(file)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return copy


def edit_description(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    (file,) = folder.glob("quant_model_description*.json")
    file.chmod(0o600)
    entries = json.loads(file.read_text())
    edit(entries)
    file.write_text(json.dumps(entries))


def changed(tensor: Tensor, rows: Any, value: Any) -> Tensor:
    """A copy of `tensor` with `value` in `rows`."""
    tensor = tensor.clone()
    tensor[rows] = value if not isinstance(value, Tensor) else value.to(tensor.dtype)
    return tensor


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
