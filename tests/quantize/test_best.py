"""Best mode from checkpoint to checkpoint: what it writes runs, is what was planned, and is the same after a kill."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from saccade import LLM
from saccade.api import quantization_job, quantize
from saccade.base.errors import CheckpointError, MediaError, OptionError, SaccadeError
from saccade.checkpoints.formats import EMBEDDING, HEAD, open_checkpoint
from saccade.inputs.chat import ChatTokenizer
from saccade.quantize import best, job, state
from saccade.quantize import run as running
from saccade.quantize.best import quantize_best
from saccade.quantize.best_recipe import FORMATS, SCHEME_NAMES, BestRecipe, Rule, parse_rule, read_recipe
from saccade.quantize.drawn_samples import drawn
from saccade.quantize.plan import make_plan
from saccade.quantize.samples import load_samples
from saccade.quantize.source import Block, Source
from saccade.scoring import join, score_answers, token_divergence
from tests.test_cli import Run, run

__all__ = ["run"]

PAIRS = [
    (
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": drawn(77).picture}, {"type": "text", "text": "What is it?"}],
            }
        ],
        "A red box.",
    ),
    ([{"role": "user", "content": "Count to three."}], "1, 2, 3"),
]
FAST = {"samples": 4, "threads": 1}
PLAIN = {"scheme": "w8a16", "smooth": "none", "rounding": "mse", "threads": 1}  # needs no samples
STATIC = {"scheme": "w8a8", "format": "vllm-ascend", "smooth": "none", "rounding": "mse", "samples": 2, "threads": 1}


def kl(one: Path, other: Path) -> float:
    logits = [
        [
            answer.logits
            for answer in score_answers(LLM(folder, device="cpu", dtype="float32", kv_cache_tokens=4096), PAIRS)
        ]
        for folder in (one, other)
    ]
    return join([token_divergence(p, q) for p, q in zip(*logits, strict=True)]).summary().mean_kl


def hashes(folder: Path) -> dict[str, str]:
    """Of all files but the report, which holds times."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != "report.json"
    }


# --- every scheme and format -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_what_is_written_runs_and_is_what_was_planned(small: Path, tmp_path: Path, scheme: Any, format_: Any) -> None:
    options = {"scheme": scheme, "format": format_, "group_size": 32 if scheme.startswith("w4") else None}
    if format_ != "compressed-tensors" and scheme in ("w4a16", "fp8"):
        with pytest.raises(OptionError, match=f"{format_} has no {scheme}"):
            BestRecipe(**options)
        return
    report = quantize(small, tmp_path / "out", **options, **FAST)
    checkpoint = open_checkpoint(tmp_path / "out")
    for layer in report.plan.layers:
        assert checkpoint.scheme(layer.module) == layer.scheme, layer.module
    assert any(not layer.scheme.is_dense for layer in report.plan.layers)
    assert kl(small, tmp_path / "out") < {"w4a8": 0.06, "w4a16": 0.06, "fp8": 0.02}.get(scheme, 2e-3)
    assert not (tmp_path / "out.partial").exists()
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("smooth", "rounding"), [("none", "gptq"), ("m2", "rtn"), ("m4", "mse"), ("awq", "gptq"), ("search", "rtn")]
)
def test_methods_go_together(small: Path, tmp_path: Path, smooth: Any, rounding: Any) -> None:
    report = quantize(small, tmp_path / "out", scheme="w8a8-dynamic", smooth=smooth, rounding=rounding, **FAST)
    assert kl(small, tmp_path / "out") < 2e-3
    for layer in report.layers:
        assert set(layer.output_db) == (
            {"picture"} if layer.module.startswith("visual.") else {"text", "picture", "first"}
        )
        assert all(db > 25 for db in layer.output_db.values())


@pytest.mark.parametrize("smooth", ["none", "m4"])
def test_rotation_and_smoothing_leave_the_function_as_it_is(small: Path, tmp_path: Path, smooth: Any) -> None:
    """With every linear but one left float, what remains is the folding alone. Pictures would show an unturned merger."""
    options = {"rotate": True, "smooth": smooth, "scheme": "w8a16", "rounding": "gptq"}
    rules = (Rule("model.layers.0.self_attn.o_proj", "w8a16"), Rule("model.*", "float"))
    quantize(small, tmp_path / "out", **options, rules=rules, **FAST)
    assert kl(small, tmp_path / "out") < 2e-4  # bfloat16 rounds the turned weights anew


def test_a_rotated_model_computes_the_same_in_float32(small: Path) -> None:
    """Stream, values and the merger's output turned, keys folded, nothing rounded. Unturned, the merger's rows would be noise."""
    checkpoint = open_checkpoint(small)
    turned = Source(checkpoint, BestRecipe(scheme="w8a16", rotate=True), torch.device("cpu"))
    tensors: dict[str, Tensor] = {}
    for name in turned.shapes:
        if name in (EMBEDDING, HEAD):
            tensors[name] = turned.table_rows(name, slice(None))
        elif name not in tensors:
            parts = name.split(".")
            depth = (
                next(i for i, part in enumerate(parts) if part.isdigit()) + 1 if ".layers." in name else len(parts) - 1
            )
            tensors |= turned.block(".".join(parts[:depth])).tensors
    tensors |= turned.block("visual.merger").tensors
    assert not torch.equal(tensors["visual.merger.mlp.2.bias"], checkpoint.tensor("visual.merger.mlp.2.bias").float())
    tokenizer = ChatTokenizer(small, turned.config)
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "kv_cache_tokens": 4096}
    rotated = LLM.from_source(turned.config, Block(tensors), tokenizer, **options)
    said, expected = (list(score_answers(llm, PAIRS)) for llm in (rotated, LLM(small, **options)))
    for ours, theirs in zip(said, expected, strict=True):
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-3, atol=2e-4)


def test_a_rotated_model_has_a_head_of_its_own(tmp_path: Path) -> None:
    from tests.parity.oracle import Shape, build

    build(tmp_path / "tied", Shape("tied", tied=True), seed=3, dtype=torch.bfloat16)
    quantize(tmp_path / "tied", tmp_path / "out", scheme="w8a16", rotate=True, rounding="mse", **FAST)
    assert "lm_head.weight" in open_checkpoint(tmp_path / "out")
    assert kl(tmp_path / "tied", tmp_path / "out") < 1e-3


def test_weights_alone_need_no_samples(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "load_samples", None)
    report = quantize(small, tmp_path / "out", **PLAIN)
    assert report.samples is None
    assert all(layer.weight_db is not None and layer.weight_db > 35 for layer in report.layers)


def test_hidden_rows_in_a_mapped_file_change_nothing(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(small, tmp_path / "one", **STATIC)
    monkeypatch.setattr(state, "MAX_MEMORY_BYTES", 0)
    quantize(small, tmp_path / "other", **STATIC)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "other")


def test_the_seed_and_the_samples_decide(small: Path, tmp_path: Path) -> None:
    for name, options in {"a": {}, "b": {}, "c": {"seed": 1}}.items():
        quantize(small, tmp_path / name, **STATIC, **options)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert hashes(tmp_path / "a") != hashes(tmp_path / "c")


# --- killed ----------------------------------------------------------------------------------------------------------


def test_killed_at_twenty_random_moments_it_ends_with_the_same_bytes(small: Path, tmp_path: Path) -> None:
    """Real processes, killed by the system. Forked, as imports would take the time.

    One that comes through before its kill is held against the uninterrupted run, and the next begins anew.
    """
    fork = multiprocessing.get_context("fork")
    began = time.monotonic()
    process = fork.Process(target=quantize, args=(small, tmp_path / "whole"), kwargs=STATIC)
    process.start()
    process.join()
    whole = time.monotonic() - began
    generator, killed, kills = random.Random(0), tmp_path / "killed", 0
    while kills < 20:
        process = fork.Process(target=quantize, args=(small, killed), kwargs=STATIC)
        process.start()
        process.join(generator.random() * whole)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        kills += process.exitcode != 0
        if killed.exists():
            assert hashes(killed) == hashes(tmp_path / "whole")
            shutil.rmtree(killed)
    quantize(small, killed, **STATIC)
    assert hashes(killed) == hashes(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]  # hidden folders, too, are gone


class _Stop(BaseException):
    pass


def test_interrupted_after_every_block_it_ends_with_the_same_bytes(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In process: stopped right before and right after the record of each block is replaced."""
    quantize(small, tmp_path / "whole", **STATIC)
    write = state.State._write_progress
    budget = {"left": 0, "before": False}

    def counted(self: state.State) -> None:
        if budget["left"] == 0 and budget["before"]:
            raise _Stop
        write(self)
        if budget["left"] == 0:
            raise _Stop
        budget["left"] -= 1

    monkeypatch.setattr(state.State, "_write_progress", counted)
    for attempt in range(100):
        budget.update(left=1, before=attempt % 2 == 0)
        try:
            quantize(small, tmp_path / "stopped", **STATIC)
            break
        except _Stop:
            assert not (tmp_path / "stopped").exists()
    assert attempt > 4
    assert hashes(tmp_path / "stopped") == hashes(tmp_path / "whole")


def test_another_recipe_starts_anew(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise _Stop

    with monkeypatch.context() as patch:
        patch.setattr(running.Run, "embedding", stop)
        with pytest.raises(_Stop):
            quantize(small, tmp_path / "out", **PLAIN)
    assert json.loads((tmp_path / "out.partial" / "progress.json").read_text())["done"] > 0
    quantize(small, tmp_path / "out", scheme="w8a8-dynamic", smooth="none", rounding="rtn", threads=1)
    quantize(small, tmp_path / "fresh", scheme="w8a8-dynamic", smooth="none", rounding="rtn", threads=1)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "fresh")


def test_a_strangers_folder_is_left_alone(small: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="was not made by saccade quantize"):
        quantize(small, tmp_path / "out", **PLAIN)
    assert (tmp_path / "out.partial" / "thesis.txt").exists()


# --- refused at once -------------------------------------------------------------------------------------------------


def test_an_existing_folder_is_replaced_only_by_force(small: Path, tmp_path: Path) -> None:
    quantize(small, tmp_path / "out", **PLAIN)
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        quantize(small, tmp_path / "out", **PLAIN)
    quantize(small, tmp_path / "out", **PLAIN, force=True)


@pytest.mark.parametrize("place", ["model", ".", "link"])
def test_the_model_is_not_taken_away_even_by_force(small: Path, tmp_path: Path, place: str, run: Run) -> None:
    model = tmp_path / "model"
    shutil.copytree(small, model)
    (tmp_path / "config.json").write_text("{}")  # as if all of it were a checkpoint
    (tmp_path / "link").symlink_to(model)
    pictures = str(Path(__file__).parent)
    exact = ["--model_path", str(model), "--save_directory", str(tmp_path / place), "--calib_images", pictures]
    for arguments in ([str(model), str(tmp_path / place)], exact):
        code, _, stderr = run("quantize", *arguments, "--force")
        assert (code, "is or holds the checkpoint that is to be read" in stderr) == (2, True)


def test_a_full_disk_is_noticed_before_the_work(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"0.0 MB free; quantizing takes"):
        quantize(small, tmp_path / "out", **PLAIN)
    assert not list(tmp_path.iterdir())


def test_a_quantized_checkpoint_is_refused(small: Path, tmp_path: Path) -> None:
    quantize(small, tmp_path / "out", **PLAIN)
    with pytest.raises(CheckpointError, match="quantized already"):
        quantization_job(tmp_path / "out", tmp_path / "again")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "w3a3"}, "scheme is 'w3a3'; use one of w8a8"),
        ({"scheme": "w8a8", "group_size": 64}, "needs a 4-bit scheme"),
        ({"scheme": "w4a8", "group_size": 48}, "group_size is 48"),
        ({"smooth": "m3"}, "smooth is 'm3'"),
        ({"format": "gguf"}, "format is 'gguf'"),
        ({"percentile": 120.0}, "percentile is 120"),
        ({"rules": (Rule("*", "int5"),)}, "int5"),
        ({"scheme": "w4a8", "visual_scales": True}, "w4a8 has none: use --scheme w8a8"),
        ({"scheme": "fp8", "activation_range": "histogram"}, "histogram is of static ranges; fp8 has none"),
        ({"scheme": "w8a8", "percentile": 99.0}, "percentile 99 is of --activation-range percentile, and that is mse"),
        ({"rules": (Rule("*", "w4a16-asym-g32"),)}, "made while loading, but not by quantize; use w4a16"),
        ({"rules": (Rule("*", "float"),)}, "nothing would be quantized"),
        ({"scheme": "w8a8", "visual_scales": True, "format": "mindie"}, "mindie files have one input scale"),
        ({"schem": "w8a8"}, "did you mean 'scheme'"),
        ({"calibration": "/nowhere"}, "does not exist"),
        ({"rules": (Rule("model.layer.*.up_proj", "float"),)}, "matches no linear; the nearest names are"),
        ({"rules": (Rule("*.layers.0.self_attn.q_proj", "float"),)}, "give them one scheme"),
    ],
)
def test_what_cannot_be_is_refused(small: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message.replace("(", r"\(")):
        quantization_job(small, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


# --- recipes and plans -----------------------------------------------------------------------------------------------


def test_a_recipe_is_read_and_flags_take_its_place(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "scheme: w4a8\ngroup-size: 64\nsmooth: awq\nrules:\n"
        "- {match: 'model.layers.0.*', scheme: float}\n- {match: '*', scheme: w8a8-dynamic}\n"
    )
    recipe = read_recipe(path, {"smooth": "m4"})
    assert (recipe.scheme, recipe.group_size, recipe.smooth) == ("w4a8", 64, "m4")
    assert recipe.rules == (Rule("model.layers.0.*", "float"), Rule("*", "w8a8-dynamic"))
    for text, message in {
        "[1, 2]": "no mapping",
        "a: b: c": "cannot be read as YAML",
        "rules: 3": "a list of",
        "rules: [{match: x}]": "needs match and scheme",
        "shceme: w8a8": "did you mean 'scheme'",
    }.items():
        path.write_text(text)
        with pytest.raises(OptionError, match=message):
            read_recipe(path, {})
    with pytest.raises(OptionError, match="PATTERN=SCHEME"):
        parse_rule("float")


def test_of_rules_the_first_that_matches_counts(small: Path) -> None:
    config = open_checkpoint(small).config
    rules = (
        Rule("model.layers.0.*", "float"),
        Rule("model.layers.*.mlp.down_proj", "w8a8-dynamic"),
        Rule("model.*", "w8a16"),
    )
    plan = make_plan(config, BestRecipe(scheme="fp8", rules=rules))
    found = {name: scheme.name for name, scheme in plan.assignment.items()}
    assert found["model.layers.0.mlp.down_proj"] == "dense"
    assert found["model.layers.1.mlp.down_proj"] == "w8a8-dynamic"
    assert found["model.layers.1.mlp.up_proj"] == "w8a16"
    assert found["visual.blocks.0.attn.qkv"] == "dense"
    assert found["lm_head"] == "dense"


def test_vision_and_layers_choose_what_is_quantized(small: Path) -> None:
    config = open_checkpoint(small).config

    def quantized(**options: Any) -> set[str]:
        plan = make_plan(config, BestRecipe(scheme="w8a8-dynamic", **options))
        return {layer.module for layer in plan.layers if not layer.scheme.is_dense}

    assert not any(name.startswith("visual.") for name in quantized())
    assert "model.layers.0.mlp.down_proj" in quantized()
    ascend = quantized(format="mindie")
    assert {"visual.blocks.0.attn.proj", "visual.blocks.0.mlp.up_proj"} <= ascend
    assert not any(name.endswith("down_proj") or "merger" in name for name in ascend)
    assert {"visual.merger.mlp.2", "visual.blocks.0.mlp.down_proj"} <= quantized(vision="all")


def test_columns_that_groups_do_not_divide_take_what_fits_and_the_plan_says_so() -> None:
    from saccade.checkpoints.presets import PRESETS

    plan = make_plan(PRESETS["72b"], BestRecipe(scheme="w4a8", group_size=256, vision="all"))
    schemes = {layer.module: layer.scheme.name for layer in plan.layers}
    assert schemes["model.layers.79.mlp.down_proj"] == "w4a8-g128"
    assert schemes["model.layers.79.mlp.up_proj"] == "w4a8-g256"
    assert schemes["visual.blocks.0.mlp.down_proj"] == "w4a8-g128"
    tower = make_plan(PRESETS["7b"], BestRecipe(scheme="w4a8", group_size=256, vision="all")).assignment
    assert tower["visual.blocks.0.mlp.down_proj"].name == "w8a8-dynamic"  # 3420 columns
    text = "\n".join(plan.render())
    assert "80 x model.layers.*.mlp.down_proj: groups of 256 do not divide its 29568 columns" in text


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8-dynamic"])
def test_the_plan_knows_the_size(small: Path, tmp_path: Path, scheme: Any) -> None:
    report = quantize(small, tmp_path / "out", scheme=scheme, smooth="none", rounding="rtn", threads=1)
    assert report.output_bytes == pytest.approx(report.plan.output_bytes, rel=0.03)


# --- samples ---------------------------------------------------------------------------------------------------------


def test_a_folder_of_pictures_may_hold_other_things(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    drawn(1).picture.save(folder / "b.png")
    drawn(2).picture.save(folder / "a picture.jpg")
    Image.new("LA", (60, 60)).save(folder / "c.png")
    Image.new("RGB", (60, 60)).save(folder / "d.ppm")
    (folder / "notes.txt").write_text("hello")
    job = quantization_job(small, tmp_path / "out", calibration=str(folder), smooth="m4")
    assert job.samples is not None
    sources = [medium.receipt.source for prompt in job.samples.prompts for medium in prompt.media]
    assert [Path(source).name for source in sources] == ["a picture.jpg", "b.png", "c.png"]
    assert sorted(job.notes) == [
        "d.ppm is a picture of a kind that is not read, PPM: passed over; save it as PNG or JPEG",
        "more is not a file: passed over",
        "notes.txt is not a picture: passed over",
    ]
    assert any(not prompt.media for prompt in job.samples.prompts)  # a text among them
    (folder / "broken.jpg").write_bytes(b"\xff\xd8nonsense")
    with pytest.raises(MediaError, match=r"broken.jpg is not a picture"):
        quantization_job(small, tmp_path / "out", calibration=str(folder), smooth="m4")


def test_calibration_that_is_not_read_is_said_and_samples_are_called_samples(
    small: Path, tmp_path: Path, run: Run
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    weights = [
        "quantize",
        str(small),
        str(tmp_path / "out"),
        "--scheme",
        "w8a16",
        "--smooth",
        "none",
        "--rounding",
        "rtn",
        "--dry-run",
    ]
    code, _, stderr = run(*weights, "--calibration", str(photos))
    assert (code, f"calibration '{photos}' is not read" in stderr) == (0, True)
    assert "is not read" not in run(*weights)[2]
    code, _, stderr = run("verify", str(small), "--against", str(small), "--samples", str(tmp_path / "nothing"))
    assert (code, f"samples '{tmp_path / 'nothing'}' does not exist" in stderr) == (2, True), stderr


def test_conversations_are_taken_with_their_answers(small: Path, tmp_path: Path) -> None:
    drawn(1).picture.save(tmp_path / "p.png")
    lines: list[Any] = [
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "p.png"}, {"type": "text", "text": "What?"}]},
                      {"role": "assistant", "content": "A drawing of boxes."}]},
        [{"role": "user", "content": "Hello"}],
    ]  # fmt: skip
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    job = quantization_job(small, tmp_path / "out", calibration=str(path), smooth="m4")
    assert job.samples is not None
    answered, asked = job.samples.prompts
    assert len(answered.media) == 1
    llm = LLM(small, device="cpu", kv_cache_tokens=1024)
    assert "A drawing of boxes." in llm.tokenizer.decode(answered.token_ids)
    assert llm.tokenizer.decode(asked.token_ids, skip_special=False).endswith("<|im_start|>assistant\n")
    path.write_text("{}")
    with pytest.raises(Exception, match=r"line 1 holds no \"messages\""):
        quantization_job(small, tmp_path / "out", calibration=str(path), smooth="m4")


def test_conversations_as_other_tools_write_them(small: Path, tmp_path: Path) -> None:
    """A mark at the file's start, ends of lines inside a text, media by every key, none of them lost."""
    drawn(1).picture.save(tmp_path / "p.png")
    parts = [
        {"type": "image_url", "image_url": {"url": "p.png"}},
        {"type": "image", "path": "p.png"},
        {"type": "video", "video": ["p.png", "p.png"]},
        {"type": "text", "text": "one\u2028two\x85three"},
    ]
    path = tmp_path / "c.jsonl"
    line = json.dumps([{"role": "user", "content": parts}], ensure_ascii=False)
    path.write_text(f"\ufeff{line}\r\n\r\n{line}", encoding="utf-8", newline="")
    samples = load_samples(str(path), ChatTokenizer(small, open_checkpoint(small).config), None, 0, 50_000)
    assert [len(prompt.media) for prompt in samples.prompts] == [3, 3]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": [{"role": "user", "content": "<image>What?"}], "images": ["p.png"]}, "has 'images' beside"),
        ([{"role": "human", "content": "What?"}], "message 0 has the role 'human'"),
        ([{"role": "user", "content": [{"type": "image", "image": "no.png"}]}], "cannot open"),
        ([{"role": "user", "content": [{"type": "image", "image": "strip.png"}]}], r"strip\.png: picture of 700 x 1"),
    ],
)
def test_what_is_wrong_with_a_conversation_names_its_line(small: Path, tmp_path: Path, line: Any, message: str) -> None:
    Image.new("RGB", (700, 1)).save(tmp_path / "strip.png")
    path = tmp_path / "c.jsonl"
    path.write_text("\n" + json.dumps([{"role": "user", "content": "Hello"}]) + "\n" + json.dumps(line))
    with pytest.raises(SaccadeError, match=rf"c\.jsonl, line 3.*{message}"):
        quantization_job(small, tmp_path / "out", calibration=str(path), smooth="m4")


def test_a_drawn_picture_is_drawn_again() -> None:
    assert drawn(5).picture.tobytes() == drawn(5).picture.tobytes()
    assert drawn(5).picture.size != drawn(6).picture.size or drawn(5).picture.tobytes() != drawn(6).picture.tobytes()


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_quantizes_and_says_what_came_of_it(small: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    code, stdout, _ = run("quantize", str(small), str(out), "--scheme", "w8a8-dynamic", "--samples", "3", "--threads", "1",
                          "--layer", "model.layers.0.*=float")  # fmt: skip
    assert code == 0
    assert "quantized 7 linears to w8a8-dynamic" in stdout
    assert open_checkpoint(out).scheme("model.layers.0.mlp.up_proj").is_dense


def test_a_dry_run_prints_the_plan_and_writes_nothing(small: Path, tmp_path: Path, run: Run) -> None:
    code, stdout, _ = run(
        "quantize", str(small), str(tmp_path / "out"), "--scheme", "w8a8", "--format", "mindie", "--dry-run"
    )
    assert code == 0
    assert "as mindie" in stdout
    assert "float as in msModelSlim" in stdout
    assert not list(tmp_path.iterdir())


def test_the_references_options_mean_exact_mode_unless_best_is_asked_for(small: Path, tmp_path: Path, run: Run) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    drawn(3).picture.resize((84, 84)).save(pictures / "one.png")
    reference = ["quantize", "--model_path", str(small), "--calib_images", str(pictures), "--is_dynamic", "True"]
    code, stdout, _ = run(*reference, "--save_directory", str(tmp_path / "exact"))
    assert (code, "quantized to W8A8_DYNAMIC" in stdout) == (0, True)
    code, stdout, _ = run(*reference, "--save_directory", str(tmp_path / "best"), "--mode", "best", "--threads", "1")
    assert (code, "linears to w8a8-dynamic" in stdout) == (0, True)
    assert list((tmp_path / "best").glob("quant_model_weight_w8a8_dynamic*.safetensors"))
    code, _, stderr = run(*reference, "--save_directory", str(tmp_path / "no"), "--scheme", "w8a8")
    assert (code, "--scheme belongs to --mode best" in stderr) == (2, True)
    # What is given twice would be taken once; a device that is not there, found only by the verification.
    code, _, stderr = run(*reference, "--save_directory", str(tmp_path / "no"), "--mindie_format", "True")
    assert (code, "model is given twice, as True and as --model_path" in stderr) == (2, True)
    code, _, stderr = run(*reference, "--save_directory", str(tmp_path / "no"), "--device", "cuda:9")
    assert (code, "'cuda:9'" in stderr, (tmp_path / "no").exists()) == (1, True, False)


def test_shards_are_as_large_as_asked_for_in_best_mode_too(
    small: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = quantization_job(small, tmp_path / "out", **PLAIN)
    report = quantize_best(job, max_shard_bytes=100_000)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    open_checkpoint(tmp_path / "out")
    asked: dict[str, Any] = {}
    monkeypatch.setattr(best, "quantize_best", lambda job, **given: asked.update(given) or report)
    run("quantize", str(small), str(tmp_path / "again"), "--mode", "best", "--part_file_size", "3", "--no-verify")
    assert asked["max_shard_bytes"] == 3 << 30
