"""AWQ and GPTQ checkpoints, packed here number by number, against the dense weights they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saccade import LLM, SamplingParams
from saccade.base.errors import CheckpointError
from saccade.checkpoints.awq_gptq import parse
from saccade.checkpoints.describe import describe
from saccade.checkpoints.formats import open_checkpoint
from saccade.schemes.affine import dequantize
from tests.checkpoints.making import InMemory

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
NAME = "model.layers.0.mlp.up_proj"


def word(numbers: list[int]) -> int:
    """Eight numbers from 0 to 15 as a signed 32-bit word, the first in the lowest bits."""
    total = sum(number << (4 * place) for place, number in enumerate(numbers))
    return total - (1 << 32) if total >= 1 << 31 else total


def words_along_rows(table: list[list[int]], order: list[int]) -> Tensor:
    """table: rows of numbers. Each row's eights become words, the nth number of a word taken from place order[n] of its eight."""
    rows = [[word([row[start + place] for place in order]) for start in range(0, len(row), 8)] for row in table]
    return torch.tensor(rows, dtype=torch.int32)


def numbers(rows: int, columns: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 16, (rows, columns), generator=generator).tolist()


def packed(
    method: str,
    rows: int,
    columns: int,
    size: int,
    *,
    zeros: bool = True,
    version: int = 1,
    seed: int = 0,
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a linear, by suffix, and the dense weight [O, H] they stand for, formed one number at a time."""
    groups = columns // size
    q, zero = numbers(columns, rows, seed), numbers(groups, rows, seed + 1)
    if not zeros:
        zero = [[8] * rows for _ in range(groups)]
    elif method == "gptq" and version == 1:
        zero = [[max(1, number) for number in row] for row in zero]  # what is stored is one less
    scale = (torch.rand(groups, rows, generator=torch.Generator().manual_seed(seed)) + 0.1).half()
    dense = torch.tensor(
        [[(q[h][o] - zero[h // size][o]) * float(scale[h // size, o]) for h in range(columns)] for o in range(rows)]
    )
    if method == "awq":
        return {
            "qweight": words_along_rows(q, AWQ_ORDER),
            "qzeros": words_along_rows(zero, AWQ_ORDER),
            "scales": scale,
        }, dense
    stored = [[number - (version == 1) for number in row] for row in zero]
    by_output = [[q[h][o] for h in range(columns)] for o in range(rows)]
    return {
        "qweight": words_along_rows(by_output, list(range(8))).t().contiguous(),
        "qzeros": words_along_rows(stored, list(range(8))),
        "scales": scale,
        "g_idx": torch.arange(columns, dtype=torch.int32) // size,
    }, dense


def settings(method: str, size: int = 32, **more: Any) -> dict[str, Any]:
    return {"quant_method": method, "bits": 4, "group_size": size, **more}


def in_memory(tensors: dict[str, Tensor]) -> InMemory:
    return InMemory({f"{NAME}.{suffix}": tensor for suffix, tensor in tensors.items()})


CASES = [
    ("awq", {"version": "gemm", "zero_point": True}, {}),
    ("awq", {"version": "GEMM", "zero_point": False}, {"zeros": False}),
    ("gptq", {"sym": False, "desc_act": False}, {}),
    ("gptq", {"sym": False, "checkpoint_format": "gptq_v2"}, {"version": 2}),
    ("gptq", {"sym": True}, {"zeros": False}),
]


@pytest.mark.parametrize(("method", "config", "how"), CASES)
@pytest.mark.parametrize(("rows", "columns", "size"), [(8, 32, 32), (24, 128, 64), (16, 192, 96), (40, 96, 96)])
def test_every_number_stands_for_what_the_format_says(
    method: str, config: dict[str, Any], how: dict[str, Any], rows: int, columns: int, size: int
) -> None:
    tensors, dense = packed(method, rows, columns, size, **how)
    found = in_memory(tensors)
    stored = parse(settings(method, size if size < columns else -1, **config), [f"{NAME}.qweight"])
    assert stored.find_problems(found, NAME, (rows, columns)) == []
    weight = stored.read(found, NAME)
    assert weight.scheme == stored.scheme(found, NAME)
    assert weight.scheme.is_asymmetric == how.get("zeros", True)
    assert torch.equal(dequantize(weight), dense)


def test_wide_layers_are_unpacked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from saccade.checkpoints import awq_gptq

    tensors, dense = packed("awq", 72, 64, 32)
    monkeypatch.setattr(awq_gptq, "_WORDS_AT_A_TIME", 2)
    assert torch.equal(dequantize(parse(settings("awq"), [f"{NAME}.qweight"]).read(in_memory(tensors), NAME)), dense)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_folder_answers_as_the_dense_one_it_stands_for(tiny_checkpoint: Path, tmp_path: Path, method: str) -> None:
    """The decoder's linears packed, the tower and the head plain, as published; the float copy holds the dequantized weights."""
    plain, tensors = {}, {}
    for seed, (name, tensor) in enumerate(load_file(tiny_checkpoint / "model.safetensors").items()):
        plain[name] = tensors[name] = tensor
        if name.startswith("model.layers.") and tensor.ndim == 2 and name.endswith(".weight"):
            parts, dense = packed(method, *tensor.shape, 32, seed=seed)
            del tensors[name]
            parts["scales"] = parts["scales"] / 256  # a power of two: exact
            tensors |= {name.replace("weight", "") + suffix: part for suffix, part in parts.items()}
            plain[name] = dense / 256
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    section = settings(method, sym=False) | {"modules_to_not_convert": ["visual"]}
    for folder, content, its_config in (
        (tmp_path / "packed", tensors, config | {"quantization_config": section}),
        (tmp_path / "plain", plain, config),
    ):
        folder.mkdir()
        for file in tiny_checkpoint.iterdir():
            if file.name not in ("model.safetensors", "config.json"):
                (folder / file.name).write_bytes(file.read_bytes())
        (folder / "config.json").write_text(json.dumps(its_config))
        save_file(content, folder / "model.safetensors")
    answers = []
    for folder in ("packed", "plain"):
        llm = LLM(tmp_path / folder, device="cpu", kv_cache_tokens=256)
        (answer,) = llm.chat([[{"role": "user", "content": "hello"}]], GREEDY)
        answers.append(answer.outputs[0].token_ids)
    assert answers[0] == answers[1]
    described = describe(tmp_path / "packed")
    assert described.problems == described.notes == ()
    assert described.quantization == (
        f"int4 with zero points in groups of 32, 14 of 32 linear layers ({method.upper()} format, "
        "quantization_config of config.json)"
    )


def test_inputs_sorted_into_groups_are_refused() -> None:
    tensors, _ = packed("gptq", 8, 64, 32)
    tensors["g_idx"] = tensors["g_idx"].flip(0)
    config = parse(settings("gptq", sym=False), [f"{NAME}.qweight"])
    with pytest.raises(CheckpointError, match=r"up_proj\.g_idx in memory sorts inputs .*desc_act false"):
        config.read(in_memory(tensors), NAME)
    (problem,) = config.find_problems(
        in_memory(tensors), NAME, (8, 64)
    )  # told before anything is loaded, by inspect, too
    assert "sorts inputs" in problem


def test_zero_points_that_contradict_the_config_are_refused() -> None:
    tensors, _ = packed("gptq", 8, 64, 32)
    with pytest.raises(CheckpointError, match=r"holds zero points other than 8; .* says symmetric"):
        parse(settings("gptq", sym=True), [f"{NAME}.qweight"]).read(in_memory(tensors), NAME)
    tensors["qzeros"].fill_(-1)
    with pytest.raises(CheckpointError, match="holds the zero point 16"):
        parse(settings("gptq", sym=False), [f"{NAME}.qweight"]).read(in_memory(tensors), NAME)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (settings("awq") | {"bits": 8}, "has 8 bits; AWQ is read with 4"),
        (settings("gptq", 48), "has groups of 48 columns"),
        (settings("awq", version="gemv"), "has the layout gemv; read are gemm"),
        (settings("gptq", checkpoint_format="marlin"), "has the layout marlin; read are gptq and gptq_v2"),
    ],
)
def test_other_variants_are_refused_by_value(config: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        parse(config, [f"{NAME}.qweight"])


def test_what_is_absent_or_misshaped_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="says awq, and no tensor is called qweight"):
        parse(settings("awq"), ["model.norm.weight"])
    stored = parse(settings("awq"), [f"{NAME}.qweight"])
    tensors, _ = packed("awq", 8, 64, 32)
    del tensors["qzeros"]
    tensors["scales"] = tensors["scales"].int()
    problems = stored.find_problems(in_memory(tensors), NAME, (8, 64))
    assert [problem.split(";")[0] for problem in problems] == [
        f"{NAME}.scales in memory is int32",
        f"{NAME}.qzeros is missing from memory",
    ]
    (problem,) = stored.find_problems(in_memory(tensors), NAME, (8, 80))
    assert "of shape [8, 80] cannot hold int4" in problem
    assert "has shape [64, 1]" in stored.find_problems(in_memory(tensors), NAME, (16, 64))[0]


def test_checkpoint_without_config_section_is_not_taken_for_one(tiny_checkpoint: Path) -> None:
    assert open_checkpoint(tiny_checkpoint).stored is None
