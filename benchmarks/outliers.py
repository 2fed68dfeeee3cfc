"""Which outliers break which scheme: python -m benchmarks.outliers [--limit 2] [--calibrated] [--to docs/outliers.md]

For each injector the mean KL of the right answers' tokens, the model as it was in float32 against the model with outliers as each
scheme holds it; beside it how far the injector alone moves the function. Prints a table, and writes it between the marks of
the page named by --to.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from saccade.api import LLM, quantize
from saccade.base.meter import progress
from saccade.checkpoints.formats import open_checkpoint
from saccade.checkpoints.hub import resolve
from saccade.evals import tasks
from saccade.evals.item import Item
from saccade.evals.outliers import INJECTORS, Injected, inject
from saccade.inputs.chat import ChatTokenizer
from saccade.kernels.record import OPS, PagedLayout
from saccade.model.layers import Linear
from saccade.scoring import Divergence, join, score_answers, token_divergence

BEGIN, END = "<!-- python -m benchmarks.outliers -->", "<!-- end of the table -->"
SCHEMES = (None, "w8a16", "w8a8-dynamic", "w4a8-g256")  # while loading


def logits(llm: LLM, items: Sequence[Item]) -> Iterator[Tensor]:
    return (scored.logits for scored in score_answers(llm, ((item.messages, item.answer) for item in items)))


def divergence(reference: Sequence[Tensor], llm: LLM, items: Sequence[Item]) -> Divergence:
    return join([token_divergence(p, q) for p, q in zip(reference, logits(llm, items), strict=True)]).summary()


def with_rounded_cache(llm: LLM) -> LLM:
    """Keys and values rounded to eight bits as they are stored, one scale for each token and head, no scale moved to the queries."""
    kernels = llm.engine.runner.cache.kernels

    def store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, layout: PagedLayout) -> None:
        kernels.store_kv(rounded(k), rounded(v), k_cache, v_cache, layout)

    llm.engine.runner.cache.kernels = dataclasses.replace(kernels, store_kv=store)
    return llm


def rounded(x: Tensor) -> Tensor:
    """x: [T, K, D]."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return (x / scale).round() * scale


@torch.inference_mode()
def with_static_ranges(llm: LLM, items: Sequence[Item]) -> LLM:
    """The inputs of all decoder linears rounded to eight bits, one scale for each: the largest magnitude of any token of `items`."""
    linears = [module for module in llm.engine.runner.model.language.modules() if isinstance(module, Linear)]
    largest: dict[int, float] = {}

    def note(module: torch.nn.Module, arguments: tuple[Tensor]) -> None:
        largest[id(module)] = max(largest.get(id(module), 0.0), arguments[0].abs().max().item())

    def round_off(module: torch.nn.Module, arguments: tuple[Tensor]) -> Tensor:
        scale = largest[id(module)] / 127
        return (arguments[0] / scale).round().clamp(-128, 127) * scale

    hooks = [linear.register_forward_pre_hook(note) for linear in linears]
    for _ in logits(llm, items):
        pass
    for hook in hooks:
        hook.remove()
    for linear in linears:
        linear.register_forward_pre_hook(round_off)
    return llm


def static_w8a8(source: Injected, folder: Path) -> LLM:
    """All decoder linears in eight bits, weights to nearest, static ranges by this project's calibration, nothing smoothed."""
    source.save(folder / "source")
    plain = {"smooth": "none", "rounding": "rtn", "rotate": False, "activation_range": "minmax", "layers": "all"}
    quantize(folder / "source", folder / "w8a8", scheme="w8a8", vision="float", **plain)
    return LLM(folder / "w8a8")


def measure(model: str, items: Sequence[Item], injectors: Sequence[str], calibrated: bool) -> list[list[str]]:
    reference = list(logits(LLM(model, dtype="float32"), items))
    caches = ["int8 cache, keys as they are", "int8 cache"]
    rows = [
        ["injector", "float32 itself", "bf16", *SCHEMES[1:], "static, every token", *caches, *["w8a8"] * calibrated]
    ]
    calibration = [tasks.draw(task, "train", 0, index) for task in tasks.TASKS for index in range(2)]
    slow_but_open = dict.fromkeys(OPS, "reference")  # back ends that run a step as one call leave nothing to hook into
    with progress(len(injectors), "measuring") as advance:
        for name in injectors:
            source = inject(open_checkpoint(resolve(model)), name)
            tokenizer = ChatTokenizer(resolve(model), source.config)

            opened = partial(LLM.from_source, source.config, source, tokenizer)

            llms = [opened(dtype="float32"), *(opened(quantization=scheme) for scheme in SCHEMES)]
            llms.append(with_static_ranges(opened(dtype="float32", kernels=slow_but_open), calibration))
            llms.append(with_rounded_cache(opened(dtype="float32", kernels=slow_but_open)))
            llms.append(opened(dtype="float32", kv_cache_dtype="int8"))
            if calibrated:
                with tempfile.TemporaryDirectory() as folder:
                    llms.append(static_w8a8(source, Path(folder)))
            found = [divergence(reference, llm, items) for llm in llms]
            rows.append([name, *(f"{divergence.mean_kl:.1e}" if divergence.mean_kl else "0" for divergence in found)])
            advance(1)
    return rows


def table(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--limit", type=int, default=2, help="items of each task")
    parser.add_argument("--injectors", nargs="+", choices=list(INJECTORS), default=list(INJECTORS))
    parser.add_argument(
        "--calibrated", action="store_true", help="also quantize to static w8a8, which takes a while for each"
    )
    parser.add_argument("--to", type=Path, help="page whose table is replaced")
    options = parser.parse_args()
    items = [tasks.draw(task, "test", 0, index) for task in tasks.TASKS for index in range(options.limit)]
    rows = measure(options.model, items, options.injectors, options.calibrated)
    text = f"{table(rows)}\n\nModel {options.model}, {len(items)} items."
    print(text)
    if options.to is not None:
        page = options.to.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        _, _, after = rest.partition(END)
        options.to.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
