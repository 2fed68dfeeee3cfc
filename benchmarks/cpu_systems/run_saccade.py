"""The cell by this engine; option `quantization` is a scheme, made while the bfloat16 checkpoint is loaded, or absent.

Speculation is off: a random model repeats itself, so that guesses would be right more often than they are in earnest.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from cell import Cell, read_cell, reply, timed

import saccade
from saccade import LLM, SamplingParams
from saccade.api import messages_for
from saccade.model.layers import size_bytes


def conversation(cell: Cell, frames: Any) -> Any:
    return (
        messages_for(cell.question, [frames[0]])
        if cell.media == "picture"
        else messages_for(cell.question, videos=[frames])
    )


def main() -> None:
    cell = read_cell()
    torch.set_num_threads(cell.threads)
    start = time.perf_counter()
    llm = LLM(
        cell.model,
        threads=cell.threads,
        kv_cache_tokens=4096,
        prefix_cache=False,
        speculation="off",
        mmap=False,  # large pages, for bfloat16 as for what is quantized while loading
        **cell.options,
    )
    load_s = time.perf_counter() - start

    def answer(conversations: Any, count: int) -> Any:
        return llm.chat(conversations, SamplingParams(max_tokens=count, min_tokens=count, temperature=0))

    answer(conversation(cell, cell.other_frames()), 3)
    runner, kernel_s = llm.engine.runner, list[float]()
    if runner.decoder_step is not None:
        runner.decoder_step = timed(runner.decoder_step, kernel_s)
    runner.model.head = timed(runner.model.head, kernel_s)  # type: ignore[method-assign]
    messages = conversation(cell, cell.load_frames())
    start = time.perf_counter()
    output = answer(messages, cell.tokens_out)[0]
    total_s = time.perf_counter() - start
    decode_s, num_steps = output.timings.decode_s, cell.tokens_out - 1
    is_planned = runner.decoder_step is not None
    outside = 1 - sum(kernel_s[-2 * num_steps :]) / decode_s if is_planned and decode_s > 0 else None

    together = answer([messages_for(f"Tell me about the number {number}.") for number in range(8)], 24)
    slowest = max(result.timings.decode_s for result in together)

    model, text, tokens_in = runner.model, llm.config.text, len(output.prompt_token_ids)
    cache = 2 * text.num_layers * text.num_kv_heads * text.head_dim * 2 * (tokens_in + cell.tokens_out // 2)
    weights = size_bytes(model.language) - size_bytes(model.language.embed_tokens) + size_bytes(model.lm_head)
    reply(
        version=saccade.__version__,
        tokens_in=tokens_in,
        load_s=load_s,
        vision_s=output.timings.vision_s,
        prefill_s=output.timings.prefill_s,
        token_s=decode_s / num_steps,
        total_s=total_s,
        outside_kernels=outside,
        batch_tokens_per_s=8 * 23 / slowest,
        token_bytes=weights + cache,
    )


if __name__ == "__main__":
    main()
