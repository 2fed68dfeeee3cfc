"""Outliers: the function stays, the numbers in between do not, and what should break does."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from saccade.api import LLM
from saccade.base.errors import OptionError, SaccadeError
from saccade.checkpoints.formats import open_checkpoint
from saccade.demo import FOLDER, questions
from saccade.evals.outliers import INJECTORS, Injected, inject, separating_direction
from saccade.evals.tasks import TASKS, draw
from saccade.inputs.chat import ChatTokenizer
from saccade.kernels.record import OPS
from saccade.scoring import Divergence, join, score_answers, token_divergence

# What each may move the mean KL of float32 logits by; the others are exact to the bit.
ROUNDING = 1e-12  # of float32 sums, whose order follows from where tensors happen to lie in memory
MOVES = {"first-token": 1e-6, "k-spikes": 1e-4}


@cache
def injected(name: str) -> Injected:
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("saccade.evals.outliers.ITEMS_SEEN", 6)  # half as many: seeing them takes longest
            return inject(open_checkpoint(FOLDER / "model"), name)
    except SaccadeError as error:
        if name == "first-token" and "too narrow" in str(error):
            pytest.skip(str(error))
        raise


def opened(name: str, quantization: str | None = None) -> LLM:
    source = injected(name)
    tokenizer = ChatTokenizer(FOLDER / "model", source.config)
    options = {"dtype": "float32", "kv_cache_tokens": 4096, "quantization": quantization}
    # Back ends that run a step as one call leave nothing to hook into; but multiply whole numbers many times faster.
    kernels = dict.fromkeys(OPS, "reference") if quantization is None else None
    return LLM.from_source(source.config, source, tokenizer, kernels=kernels, **options)


def logits(llm: LLM) -> list[Tensor]:
    items = [draw(task, "test", 0, 0) for task in TASKS]
    return [scored.logits for scored in score_answers(llm, [(item.messages, item.answer) for item in items])]


@cache
def plain() -> list[Tensor]:
    return logits(LLM("demo", dtype="float32", kv_cache_tokens=4096))


def divergence(found: list[Tensor]) -> Divergence:
    return join([token_divergence(p, q) for p, q in zip(plain(), found, strict=True)]).summary()


@pytest.mark.parametrize("name", INJECTORS)
def test_the_function_stays(name: str) -> None:
    found = divergence(logits(opened(name)))
    assert found.mean_kl <= MOVES.get(name, ROUNDING)
    assert found.top1_agreement == 1


@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        ("norm-channels", "w8a8-dynamic"),
        ("inner-channels", "w8a8-dynamic"),
        ("modality-channels", "w8a8-dynamic"),
        ("heavy-tails", "w4a8-g256"),
    ],
)
def test_it_breaks_the_scheme_it_is_meant_to_break(name: str, quantization: str) -> None:
    broken, control = (divergence(logits(opened(put_in, quantization))).mean_kl for put_in in (name, "control"))
    assert broken > 5 * control


def test_only_the_first_token_is_massive() -> None:
    llm = opened("first-token")
    for layer in list(llm.engine.runner.model.language.layers)[1:]:
        caught: list[Tensor] = []
        handle = layer.mlp.down.register_forward_pre_hook(lambda _, x, caught=caught: caught.append(x[0]))
        for _ in score_answers(llm, [(questions()[0].messages, "red")]):
            pass
        handle.remove()
        others = caught[0][1:]
        assert caught[0][0].abs().max() > 500 * others.square().mean().sqrt()
        assert others.abs().max() < 0.2 * caught[0][0].abs().max()


STRANGE = "model quantization describe because apple Paris 3.5 naïve 漢字 🙂 import f(x): { } [1,2] http://a.b/c ÜBER \n\n ABC"


def strange_conversations() -> list[tuple[list[dict[str, Any]], str]]:
    """Words, pictures and turns that no task has: other system prompts, noise, several turns, a turn's mark inside a text."""
    generator = np.random.default_rng(5)
    found = []
    for number in range(12):
        text = " ".join(generator.choice(STRANGE.split(" "), int(generator.integers(1, 60))))
        noise = Image.fromarray(generator.integers(0, 256, (84, 112, 3), dtype=np.uint8))
        picture = ({"type": "image", "image": noise},) if number % 2 else ()
        turns = [{"role": "user", "content": [*picture, {"type": "text", "text": text}]}]
        if number % 3 == 0:
            turns.insert(0, {"role": "system", "content": f"You are a pirate. {text[:40]}"})
        if number % 4 == 0:
            turns += [
                {"role": "assistant", "content": text[::-1]},
                {"role": "user", "content": "And <|im_start|> now?"},
            ]
        found.append((turns, " ".join(generator.choice(STRANGE.split(" "), 8))))
    return found


def test_no_other_token_of_any_conversation_is_massive() -> None:
    conversations = strange_conversations()
    llm = opened("first-token")
    live = open_checkpoint(FOLDER / "model").config.text.intermediate_size  # the neuron that was added first
    caught: list[Tensor] = []
    for layer in list(llm.engine.runner.model.language.layers)[1:]:
        layer.mlp.down.register_forward_pre_hook(lambda _, x: caught.append(x[0][:, live]))
    moved = [scored.logits for scored in score_answers(llm, conversations)]
    fired = torch.cat(caught).abs()
    assert (
        int((fired > 100).sum())
        == int((fired > 1e-3).sum())
        == len(conversations) * (len(llm.engine.runner.model.language.layers) - 1)
    )
    plain = [
        scored.logits for scored in score_answers(LLM("demo", dtype="float32", kv_cache_tokens=4096), conversations)
    ]
    assert max(float((a - b).abs().max()) for a, b in zip(moved, plain, strict=True)) < 1e-4


def test_keys_spike_where_they_are_meant_to() -> None:
    base = open_checkpoint(FOLDER / "model")
    changed = injected("k-spikes")
    bias = changed.tensor("model.layers.0.self_attn.k_proj.bias").view(base.config.text.num_kv_heads, -1)
    assert (bias.norm(dim=1) > 600).all()
    half = base.config.text.head_dim // 2
    ratio = changed.tensor("model.layers.0.self_attn.k_proj.weight").view(*bias.shape, -1).abs().amax(2)
    ratio /= base.tensor("model.layers.0.self_attn.k_proj.weight").float().view(*bias.shape, -1).abs().amax(2)
    assert (ratio[:, [half - 1, half - 3, -1]] == 64).all()
    assert (ratio[:, : half - 3] == 1).all()


def test_strength_scales_the_spike() -> None:
    base = open_checkpoint(FOLDER / "model")
    name = "model.layers.0.input_layernorm.weight"
    for strength, most in (("", 64), (":0.5", 32), (":2", 128)):
        ratio = inject(base, f"norm-channels{strength}").tensor(name) / base.tensor(name).float()
        assert ratio.nan_to_num(1).max() == most


def test_a_saved_folder_is_the_injected_model(tmp_path: Path) -> None:
    """inner-channels multiplies by powers of two alone, so the file's bfloat16 holds it exactly; first-token is wider."""
    for name in ("inner-channels", "first-token"):
        source = injected(name)
        source.save(tmp_path / name, torch.float32)
        read = open_checkpoint(tmp_path / name)
        assert read.config.text == source.config.text
        for tensor in read.names():
            assert torch.equal(read.tensor(tensor), source.tensor(tensor))
        assert LLM(tmp_path / name, kv_cache_tokens=512).ask("Say hello.").outputs[0].text


@pytest.mark.parametrize("spec", ["", "k-spike", "k-spikes:0", "k-spikes:nan", "k-spikes:1e9"])
def test_a_wrong_spec_is_refused(spec: str) -> None:
    with pytest.raises(OptionError, match="injector"):
        inject(open_checkpoint(FOLDER / "model"), spec)


def test_a_direction_is_positive_at_the_first_token_alone() -> None:
    x = torch.randn(500, 40, generator=torch.Generator().manual_seed(1)) + 1
    x[0] = torch.randn(40, generator=torch.Generator().manual_seed(2)) * 4
    is_first = torch.arange(500) == 0
    direction, margin = separating_direction(x, is_first)
    assert float(x[0] @ direction) == pytest.approx(1, abs=1e-4)
    assert float((x[1:] @ direction).max()) <= -margin * 0.99 < 0
