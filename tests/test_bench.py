"""The benchmark: the work of every stage as published, random models that are no zeros, and a measured answer end to end."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from saccade.api import LLM, messages_for
from saccade.base.errors import OptionError
from saccade.bench import machine as machine_module
from saccade.bench.machine import MachineLimits, measure_machine
from saccade.bench.measure import STAGES, BenchResult, bench
from saccade.bench.model import random_llm
from saccade.bench.options import BenchOptions
from saccade.bench.work import (
    Storage,
    cache_bytes_per_token,
    decode_all_work,
    decode_work,
    layer_weights,
    prefill_attention_operations,
    prefill_work,
    vision_work,
    weights_per_token,
)
from saccade.checkpoints.noise import RandomWeights
from saccade.checkpoints.presets import PRESETS
from saccade.engine.options import EngineOptions, SamplingParams
from saccade.geometry import Grid
from saccade.kernels.library import load
from saccade.schemes.scheme import W8A8_DYNAMIC
from tests.quantized_folder import write_quantized

# --- work: the table of the model's description, section 14, to its printed digits --------------------------------------

BF16 = Storage(2, 2)
INT8_LINEARS = Storage(1, 2)
IMAGE, VIDEO = (Grid(1, 54, 72), 997), (Grid(15, 36, 20), 2725)  # grid, prompt tokens

# vision TFLOP: all, linears, full attention, window attention | prefill TFLOP: all, attention | decode: GFLOP and GB per
# token mid-way, MB of them cache, GB with int8 linears | TB of 127 steps | cache at the end, MB
TABLE = {
    ("3b", IMAGE): "5.33 4.90 0.310 0.035 5.68 0.15 6.48 6.21 39 3.44 0.789 41.5",
    ("3b", VIDEO): "14.08 13.61 0.159 0.084 16.22 1.10 6.99 6.27 103 3.50 0.797 105",
    ("7b", IMAGE): "5.34 4.90 0.310 0.035 13.21 0.20 14.57 14.20 61 7.68 1.804 64.5",
    ("7b", VIDEO): "14.12 13.61 0.159 0.084 37.05 1.49 15.26 14.30 160 7.78 1.816 164",
    ("32b", IMAGE): "5.39 4.93 0.310 0.035 62.9 0.65 65.4 64.2 278 33.0 8.16 295",
    ("32b", VIDEO): "14.26 13.70 0.159 0.084 174.9 4.87 67.6 64.7 731 33.5 8.22 748",
    ("72b", IMAGE): "5.42 4.93 0.310 0.035 141.3 1.30 145.7 143.3 348 73.1 18.2 369",
    ("72b", VIDEO): "14.35 13.70 0.159 0.084 392.4 9.74 150.2 143.8 914 73.6 18.3 935",
}


@pytest.mark.parametrize(("size", "inputs"), TABLE)
def test_work_is_that_of_the_published_table(size: str, inputs: tuple[Grid, int]) -> None:
    config, (grid, num_prompt) = PRESETS[size], inputs
    vision = vision_work(config, [grid], BF16)
    prefill = prefill_work(config, num_prompt, BF16)
    midway = num_prompt + 64
    decode = decode_work(config, midway, BF16)
    computed = [
        vision.total.operations / 1e12,
        vision.linears / 1e12,
        vision.full_attention / 1e12,
        vision.window_attention / 1e12,
        prefill.operations / 1e12,
        prefill_attention_operations(config, num_prompt) / 1e12,
        decode.operations / 1e9,
        decode.bytes / 1e9,
        midway * cache_bytes_per_token(config, BF16) / 1e6,
        decode_work(config, midway, INT8_LINEARS).bytes / 1e9,
        decode_all_work(config, num_prompt, 128, BF16).bytes / 1e12,
        (num_prompt + 128) * cache_bytes_per_token(config, BF16) / 1e6,
    ]
    printed = TABLE[size, inputs].split()
    digits = [len(number.partition(".")[2]) for number in printed]
    assert [f"{value:.{places}f}" for value, places in zip(computed, digits, strict=True)] == printed


def test_weights_are_counted_as_measured_on_the_published_models() -> None:
    layers = [round(layer_weights(PRESETS[size]) / 1e6, 2) for size in ("3b", "7b", "32b", "72b")]
    assert layers == [77.07, 233.05, 487.59, 877.66]
    per_token = [f"{weights_per_token(PRESETS[size]) / 1e9:.3f}" for size in ("3b", "7b")]
    assert per_token == ["3.086", "7.070"]
    towers = [
        vision_work(PRESETS[size], [Grid(1, 4, 4)], Storage(1, 1)).weight_bytes for size in ("3b", "7b", "32b", "72b")
    ]
    assert towers == [668_684_288, 676_550_144, 688_841_984, 704_573_696]


def test_decoding_all_tokens_is_the_sum_of_its_steps() -> None:
    config = PRESETS["7b"]
    steps = [decode_work(config, 100 + step, INT8_LINEARS) for step in range(1, 20)]
    whole = decode_all_work(config, 100, 20, INT8_LINEARS)
    assert whole.bytes == pytest.approx(sum(step.bytes for step in steps), rel=1e-12)
    assert whole.operations == pytest.approx(sum(step.operations for step in steps), rel=1e-12)


def test_a_quantized_head_is_read_as_it_is_stored() -> None:
    config = PRESETS["3b"]
    steps = [decode_work(config, 100, Storage(0.5, 2, head)).bytes for head in (2, 1)]
    assert steps[0] - steps[1] == 151_936 * 2048
    options = {"layers": 1, "vision_depth": 1, "device": "cpu", "kv_cache_tokens": 256}
    llm = random_llm("tiny", quantization="w8a16", head_quantization="w4a8-g32", **options)
    assert llm.engine.runner.model.lm_head.bytes_per_value == pytest.approx(0.5 + 1 / 32)
    assert llm.quantization == "w8a16, head w4a8-g32"


def test_a_limit_is_the_slower_of_arithmetic_and_memory() -> None:
    machine = limits(bytes_per_s=10.0, operations_per_s=100.0)
    assert machine.limit_s(operations=1000, num_bytes=50) == 10
    assert machine.limit_s(operations=100, num_bytes=50) == 5


# --- random models ---------------------------------------------------------------------------------------------------


def test_random_weights_are_noise_and_gains_are_one() -> None:
    weights = RandomWeights(seed=1, num_values=100_003)
    matrix, gain = torch.empty(512, 300), torch.empty(300)
    weights.read_into("model.layers.0.mlp.up_proj.weight", matrix)
    weights.read_into("model.norm.weight", gain)
    assert matrix.std() == pytest.approx(0.02, rel=0.02)
    assert abs(matrix.mean()) < 0.001
    assert matrix.unique(dim=0).shape == matrix.shape  # round and round the block, yet no row twice
    assert (gain == 1).all()


def test_random_weights_are_the_seed_s_and_the_name_s() -> None:
    def read(seed: int, name: str) -> torch.Tensor:
        out = torch.empty(8, 16, dtype=torch.bfloat16)
        RandomWeights(seed, num_values=100_003).read_into(name, out)
        return out

    assert torch.equal(read(0, "a.weight"), read(0, "a.weight"))
    assert not torch.equal(read(0, "a.weight"), read(1, "a.weight"))
    assert not torch.equal(read(0, "a.weight"), read(0, "b.weight"))


def test_a_random_model_can_be_shortened_and_takes_every_engine_option() -> None:
    options = dataclasses.asdict(EngineOptions(kv_cache_tokens=64))
    llm = random_llm("tiny", layers=1, vision_depth=1, **options)
    assert len(llm.engine.runner.model.language.layers) == 1
    assert len(llm.engine.runner.model.visual.layers) == 1


def test_an_unknown_size_names_the_nearest() -> None:
    with pytest.raises(OptionError, match="did you mean '72b'"):
        random_llm("72")


# --- the measurement -------------------------------------------------------------------------------------------------


def limits(bytes_per_s: float = 1e9, operations_per_s: float = 1e11) -> MachineLimits:
    return MachineLimits(
        "cpu", "a test", 1, 1, 1, "bfloat16", bytes_per_s, "given", operations_per_s, "bfloat16", 1, {"torch": "0"}
    )


@pytest.fixture(scope="module")
def llm() -> LLM:
    return random_llm("tiny", kv_cache_tokens=512)


QUESTION = messages_for("What is this?", [np.random.default_rng(0).integers(0, 256, (100, 140, 3), dtype=np.uint8)])
EIGHT_TOKENS = SamplingParams(min_tokens=8, max_tokens=8)


@pytest.fixture(scope="module")
def result(llm: LLM) -> BenchResult:
    options = BenchOptions(warmup=1, repeat=3, random="tiny")
    return bench(llm, QUESTION, EIGHT_TOKENS, options, machine=limits())


def test_every_stage_is_measured_in_every_repeat(result: BenchResult) -> None:
    assert tuple(stage.name for stage in result.stages) == STAGES
    for stage in result.stages:
        assert len(stage.seconds) == 3
        assert min(stage.seconds) > 0
        assert stage.limit_s > 0
        assert stage.quartiles_s[0] <= stage.median_s <= stage.quartiles_s[1]
    assert result.tokens_out == 8
    assert result.tokens_in > result.media[0].num_tokens > 0
    assert result.peak_memory_bytes > 50e6


def test_what_happens_once_is_told_apart(llm: LLM, result: BenchResult) -> None:
    assert result.load_s == llm.load_s > 0
    assert result.first_answer_s > 0
    shown = dataclasses.replace(result, load_s=1.25, first_answer_s=3.5).conditions()
    assert shown.startswith("ready in 1.25 s, first answer in 3.50 s\n")


def test_a_quantized_decoder_is_not_held_against_the_bytes_of_a_float_tower(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    write_quantized(tiny_checkpoint, tmp_path / "w8a8", "compressed-tensors", W8A8_DYNAMIC)
    options, told = BenchOptions(warmup=0, repeat=1), []
    for folder in (tiny_checkpoint, tmp_path / "w8a8"):
        llm = LLM(folder, device="cpu", dtype="float32", kv_cache_tokens=512)
        told.append(bench(llm, QUESTION, EIGHT_TOKENS, options, machine=limits()))
    dense, quantized = told
    assert quantized.stage("vision").work.bytes == dense.stage("vision").work.bytes
    saved = dense.stage("decoded token").work.bytes - quantized.stage("decoded token").work.bytes
    layers = dense.config.text.num_layers * layer_weights(dense.config)
    assert saved == pytest.approx(3 * layers, rel=0.1)  # of four bytes; scales take some


def test_stages_account_for_the_total(result: BenchResult) -> None:
    once = [stage.seconds for stage in result.stages if stage.name not in ("decoded token", "total")]
    tokens, totals = result.stage("decoded token").seconds, result.stage("total").seconds
    for *parts, token, total in zip(*once, tokens, totals, strict=True):
        assert sum(parts) + 7 * token <= total


def test_no_repeat_is_served_from_a_cache(llm: LLM) -> None:
    llm.chat(QUESTION, EIGHT_TOKENS)  # fills prefix and encoder cache
    before = llm.engine.runner.num_encoded
    bench(llm, QUESTION, EIGHT_TOKENS, BenchOptions(warmup=1, repeat=2), machine=limits())
    assert llm.engine.runner.num_encoded - before == 3
    assert llm.engine.scheduler.prefix_cache  # as it was


def test_the_json_holds_every_time_the_machine_and_the_command(result: BenchResult, tmp_path: Path) -> None:
    result.write(tmp_path / "out.json")
    written = json.loads((tmp_path / "out.json").read_text())
    assert list(written["stages"]) == list(STAGES)
    vision = written["stages"]["vision"]
    assert vision["repeats_s"] == list(result.stage("vision").seconds)
    assert set(vision) == {
        *("median_s", "quartiles_s", "min_s", "max_s", "operations", "bytes", "limit_s", "reached", "repeats_s")
    }
    assert written["machine"]["bytes_per_s"] == 1e9
    assert written["config"]["text"]["hidden_size"] == 64
    assert written["kernels"]["linear"] in ("cpu", "reference")
    assert written["command"]
    assert (written["tokens_in"], written["tokens_out"]) == (result.tokens_in, 8)


@pytest.mark.skipif(isinstance(load(), str), reason=str(load()))
def test_tokens_a_step_are_told_where_guesses_were_right() -> None:
    llm = LLM("demo", device="cpu", kv_cache_tokens=512)
    copied = bench(
        llm, messages_for("Copy: 4 K 7 P 2"), EIGHT_TOKENS, BenchOptions(0, 1), name="demo", machine=limits()
    )
    assert 1 < copied.tokens_per_step < 8
    assert f"; {copied.tokens_per_step:.2f} tokens a step; " in copied.headline()


def test_the_table_leads_with_the_result(result: BenchResult, capsys: pytest.CaptureFixture[str]) -> None:
    result.show()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"random tiny: {result.tokens_in} tokens in, 8 out in ")
    assert all(any(line.strip().startswith(name) for line in lines) for name in STAGES)


def test_answers_without_a_fixed_length_are_refused(llm: LLM) -> None:
    with pytest.raises(OptionError, match="--min-tokens 128"):
        bench(llm, QUESTION, SamplingParams(max_tokens=1), BenchOptions(warmup=0, repeat=1), machine=limits())


def test_a_question_without_media_has_no_vision(llm: LLM) -> None:
    result = bench(llm, messages_for("Hello"), EIGHT_TOKENS, BenchOptions(warmup=0, repeat=1), machine=limits())
    assert result.stage("vision").seconds == (0.0,)
    assert result.stage("vision").reached == 0


def test_the_machine_is_measured() -> None:
    machine = measure_machine(torch.device("cpu"), torch.float32, buffer_bytes=8 << 20, matrices=(64, 128))
    assert machine.bytes_per_s > 1e6
    assert machine.operations_per_s > 1e6
    assert machine.matrix_size in (64, 128)
    assert {"torch", "saccade", "python"} <= set(machine.versions)


@pytest.mark.parametrize(("slow", "chosen"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_type_the_processor_is_slow_in_is_not_multiplied_at_length(
    monkeypatch: pytest.MonkeyPatch, slow: str, chosen: str
) -> None:
    asked: list[tuple[str, int]] = []

    def matmul(device: torch.device, dtype: torch.dtype, size: int) -> tuple[float, int]:
        asked.append((str(dtype).removeprefix("torch."), size))
        return (1e9 if asked[-1][0] == slow else 1e11), size

    monkeypatch.setattr(machine_module, "_matmul", matmul)
    machine = measure_machine(torch.device("cpu"), torch.bfloat16, buffer_bytes=8 << 20)
    assert machine.matrix_dtype == chosen
    assert machine.operations_per_s == 1e11
    assert (slow, machine.matrix_size) not in asked


def test_options_of_a_random_model_need_one() -> None:
    with pytest.raises(OptionError, match="--random"):
        BenchOptions(layers=4)


def test_transformers_answers_the_same_question_in_the_same_run(tiny_checkpoint: Path) -> None:
    pytest.importorskip("transformers")
    llm = LLM(tiny_checkpoint, device="cpu", kv_cache_tokens=512)
    options = BenchOptions(warmup=0, repeat=2, against="transformers")
    result = bench(llm, QUESTION, EIGHT_TOKENS, options, name=str(tiny_checkpoint), machine=limits())
    assert result.against is not None
    assert len(result.against.first_token_s) == len(result.against.decoded_token_s) == 2
    ours = result.stage("vision").median_s + result.stage("prefill").median_s
    theirs = sum(result.against.first_token_s) / 2
    assert result.against.first_token_ratio == pytest.approx(theirs / ours)
    assert "times as fast" in result.against.headline()
    assert json.loads(json.dumps(result.as_json()))["against"]["library"].startswith("transformers")
