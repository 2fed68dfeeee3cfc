"""The cell by transformers' generate(): SDPA, greedy; bfloat16, or what option `dtype` says.

Option `onednn_decode` false switches oneDNN off while single tokens are decoded, which on some processors is its best setting.
Pixels are prepared by this engine before the clock starts, since both cut pictures alike.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from cell import Cell, peak_memory_bytes, read_cell, reply, timed

from saccade.api import messages_for
from saccade.checkpoints.config import read_config
from saccade.inputs.chat import ChatTokenizer
from saccade.inputs.options import MediaLimits, MediaOptions
from saccade.inputs.pixels import patches


def inputs_of(cell: Cell, frames: Any) -> dict[str, Any]:
    config = read_config(Path(cell.model))
    is_picture = cell.media == "picture"
    messages = messages_for(cell.question, [frames[0]]) if is_picture else messages_for(cell.question, [], [frames])
    prompt = ChatTokenizer(cell.model, config).build(messages, defaults=MediaOptions(), limits=MediaLimits())
    medium, ids = prompt.media[0], torch.tensor([prompt.token_ids])
    grid = medium.receipt.grid
    grids = torch.tensor([[grid.t, grid.h, grid.w]])
    kinds = (ids == config.image_token_id).long() + 2 * (ids == config.video_token_id).long()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds}
    rows = patches(medium.frames, config)
    if is_picture:
        return inputs | {"pixel_values": rows, "image_grid_thw": grids}
    seconds = torch.tensor([medium.receipt.second_per_grid])
    return inputs | {"pixel_values_videos": rows, "video_grid_thw": grids, "second_per_grid_ts": seconds}


def without_onednn_in_decode(forward: Any) -> Any:
    @functools.wraps(forward)  # generate() reads its signature
    def call(*args: Any, **keywords: Any) -> Any:
        ids = keywords.get("input_ids")
        if ids is None or ids.shape[1] > 1:
            return forward(*args, **keywords)
        with torch.backends.mkldnn.flags(enabled=False):
            return forward(*args, **keywords)

    return call


def main() -> None:
    cell = read_cell()
    torch.set_num_threads(cell.threads)
    dtype = getattr(torch, cell.options.get("dtype", "bfloat16"))
    start = time.perf_counter()
    model: Any = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        cell.model, dtype=dtype, attn_implementation="sdpa"
    ).eval()
    load_s = time.perf_counter() - start
    if not cell.options.get("onednn_decode", True):
        model.forward = without_onednn_in_decode(model.forward)
    inputs = inputs_of(cell, cell.load_frames())

    def answer_s(count: int) -> float:
        model.model.rope_deltas = None  # kept between calls otherwise
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        num_new = out.shape[1] - inputs["input_ids"].shape[1]
        assert num_new == count, f"{num_new} tokens instead of {count}"
        return time.perf_counter() - start

    vision_times: list[float] = []
    model.model.visual.forward = timed(model.model.visual.forward, vision_times)
    first_s, total_s = answer_s(1), answer_s(cell.tokens_out)
    peak = peak_memory_bytes()
    text = model.config.get_text_config()
    head_dim = text.hidden_size // text.num_attention_heads
    positions = inputs["input_ids"].shape[1] + cell.tokens_out // 2
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * dtype.itemsize * positions
    weights = sum(p.nbytes for p in model.model.language_model.parameters())  # a tied head is the embedding's own table
    reply(
        version=transformers.__version__,
        tokens_in=inputs["input_ids"].shape[1],
        load_s=load_s,
        vision_s=vision_times[0],
        prefill_s=first_s - vision_times[0],
        token_s=(total_s - first_s) / (cell.tokens_out - 1),
        total_s=total_s,
        token_bytes=weights + cache,
        peak_memory_bytes=peak,
    )


if __name__ == "__main__":
    main()
