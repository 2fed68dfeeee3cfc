"""What is recorded could be a CUDA graph: it stays on the device, never waits, and what it reads outlives it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from saccade import LLM, SamplingParams
from saccade.checkpoints.config import GenerationConfig
from saccade.engine.batch import Batch, pack
from saccade.engine.device_sampling import Draw
from saccade.engine.graphs import DecodeGraphs
from saccade.engine.runner import Runner
from saccade.engine.sampling import Sampler
from saccade.engine.scheduler import Chunk
from saccade.kernels import triton_sampling
from saccade.kernels.choose import lack_of
from saccade.kernels.record import OPS, PagedLayout
from saccade.model.layers import Embedding, Linear, Norm
from tests.engine.strict_card import CARD, Apart, StrictCard, launches_noted
from tests.engine.test_engine import conversation

pytestmark = pytest.mark.skipif(
    lack_of("triton", torch.device("cpu")) is not None, reason="Triton's launches are what is recorded here"
)
BLOCK_SIZE = 16
SCHEMES = ["w8a16", "w8a8-dynamic", "w4a16-g32", "w4a8-g32", "w4a8-float-g32", "fp8"]
CASES = [
    (None, {}, "auto"),
    (None, {}, "int8"),
    *((scheme, {}, "auto") for scheme in SCHEMES),
    *((scheme, {"linear": "reference"}, "auto") for scheme in SCHEMES),
    *(("w8a8-dynamic", {op: "reference"}, "auto") for op in ("rms_norm", "rope", "silu_mul")),
    ("w8a16", {"store_kv": "reference"}, "int8"),
]


def llm_on_card(checkpoint: Path, scheme: str | None, swapped: dict[str, str], cache: str) -> LLM:
    """The tiny model, moved to the card as it stands."""
    kernels = dict.fromkeys(OPS, "triton") | swapped
    llm = LLM(checkpoint, device="cpu", dtype="bfloat16", quantization=scheme, kernels=kernels, kv_cache_tokens=2048)
    model = llm.engine.runner.model
    for layer in model.modules():
        if isinstance(layer, Linear | Embedding):
            layer.weight = layer.weight.to(CARD, torch.bfloat16)
        elif isinstance(layer, Norm):
            layer.gain = layer.gain.to(CARD)
    llm.engine.runner = Runner(model, 64, BLOCK_SIZE, 1 << 20, cache == "int8")
    assert llm.engine.runner.model.device == CARD
    return llm


def batch_of(num_rows: int) -> Batch:
    tables = torch.arange(num_rows * 3).view(num_rows, 3)
    layout = PagedLayout((1,) * num_rows, (40,) * num_rows, tables, tables[:, 2] * BLOCK_SIZE + 7)
    ids, positions = torch.zeros(num_rows, dtype=torch.int64), torch.full((3, num_rows), 39)
    return Batch(ids, positions, layout, (), tuple(range(num_rows)))


@pytest.mark.parametrize(("scheme", "swapped", "cache"), CASES)
@torch.inference_mode()
def test_a_recording_stays_on_the_device_and_what_it_reads_stays_there(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, scheme: str | None, swapped: dict[str, str], cache: str
) -> None:
    card, runner = StrictCard(), llm_on_card(tiny_checkpoint, scheme, swapped, cache).engine.runner
    model = runner.model
    likeliest, vocab_size = triton_sampling.likeliest, model.config.text.vocab_size
    graphs = DecodeGraphs(runner.compute, model.head, vocab_size, BLOCK_SIZE, card, likeliest)
    with launches_noted(monkeypatch, card):
        for num_rows in (1, 3, 20):  # alone, filled up, and beyond what is few rows
            batch = batch_of(num_rows)
            for options in ({"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.9}):
                params = SamplingParams(**options).resolved(GenerationConfig((7,)))
                samplers = [Sampler(params, (1, 2, 3), (7,), graphs.vocab_size) for _ in range(num_rows)]
                graphs.begin(batch, samplers)
                graphs.launch(batch, [Draw(0.5, may_end=True)] * num_rows, is_first=True)
            assert graphs.run(batch).shape == (num_rows, 64)
            graphs.run(batch)
    assert len(card.watched) == 9
    assert card.num_launches > 0
    assert all(watch.read for watch in card.watched)


@pytest.mark.parametrize("scheme", [None, "w4a8-g32"])
def test_a_prompt_with_media_is_computed_where_the_model_is(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, scheme: str | None
) -> None:
    """Pictures and a clip, whole and in two chunks, through tower and decoder: host and device never meet."""
    card, llm = StrictCard(), llm_on_card(tiny_checkpoint, scheme, {}, "auto")
    params = SamplingParams().resolved(GenerationConfig((7,)))
    with launches_noted(monkeypatch, card), Apart():
        for seed in (2, 4):
            (request,) = llm.engine.add(llm.prepare(conversation(seed)), params)
            request.blocks = list(range(63))
            half = len(request.prompt) // 2
            for chunk in (Chunk(request, 0, half), Chunk(request, half, len(request.prompt) - half)):
                batch = pack([chunk], BLOCK_SIZE)
                features = llm.engine._embed_media(batch, [chunk])
                hidden = llm.engine.runner.run(batch, features)
                assert hidden.device == CARD
                assert llm.engine.runner.head(hidden, [chunk.length - 1]).device == CARD
    assert card.num_launches > 0
