"""The cell by vLLM's CPU build, engine and worker in this one process; bfloat16, or what the checkpoint says; compiled, as by default.

Its documentation wants Intel's OpenMP (and tcmalloc, where there is one) loaded before all else: the program starts itself anew so.
No cache of pictures or prefixes, so that each answer pays for its picture.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from cell import SYSTEM_PROMPT, Cell, read_cell, reply, timed

CACHE_GIB = 1


def prepare_environment(cell: Cell) -> None:
    """Starts this program anew with the libraries and settings that are read only when a process begins."""
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":
        return
    root = Path(sys.prefix)
    found = [next(root.glob(pattern), None) for pattern in ("lib/libiomp5.so", "lib/libtcmalloc*.so*")]
    os.environ |= {
        "LD_PRELOAD": ":".join(str(path) for path in found if path),
        "OMP_NUM_THREADS": str(cell.threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # apply_model takes a function of this file
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }
    os.execv(sys.executable, [sys.executable, *sys.argv])


def prompt_of(cell: Cell, frames: np.ndarray) -> dict[str, Any]:
    pad = "image" if cell.media == "picture" else "video"
    text = (
        f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n<|vision_start|><|{pad}_pad|><|vision_end|>"
        f"{cell.question}<|im_end|>\n<|im_start|>assistant\n"
    )
    if cell.media == "picture":
        from PIL import Image

        return {"prompt": text, "multi_modal_data": {"image": Image.fromarray(frames[0])}}
    return {"prompt": text, "multi_modal_data": {"video": frames}, "mm_processor_kwargs": {"do_sample_frames": False}}


def main() -> None:
    cell = read_cell()
    prepare_environment(cell)
    import torch
    import vllm

    torch.set_num_threads(cell.threads)
    start = time.perf_counter()
    llm = vllm.LLM(
        cell.model,
        dtype="bfloat16",
        max_model_len=4096,
        limit_mm_per_prompt={"image": 1, "video": 1},
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        disable_log_stats=False,
        **cell.options,
    )
    load_s = time.perf_counter() - start
    vision_times: list[float] = []

    def watch(model: Any) -> int:
        """Times the tower; returns the bytes of weights that a token reads."""
        model.visual.forward = timed(model.visual.forward, vision_times)
        return sum(tensor.nbytes for tensor in model.language_model.parameters())

    weights = llm.apply_model(watch)[0]

    def answer(frames: np.ndarray, count: int) -> tuple[Any, float]:
        params = vllm.SamplingParams(temperature=0, max_tokens=count, min_tokens=count, ignore_eos=True)
        start = time.perf_counter()
        output = llm.generate(prompt_of(cell, frames), params, use_tqdm=False)[0]
        return output, time.perf_counter() - start

    answer(cell.other_frames(), 3)
    vision_times.clear()
    output, total_s = answer(cell.load_frames(), cell.tokens_out)
    times, tokens_in = output.metrics, len(output.prompt_token_ids)
    vision_s = sum(vision_times)
    text = llm.llm_engine.model_config.hf_config.get_text_config()
    head_dim = text.hidden_size // text.num_attention_heads
    positions = tokens_in + cell.tokens_out // 2
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * 2 * positions
    decode_s = times.last_token_ts - times.first_token_ts
    reply(
        version=vllm.__version__,
        tokens_in=tokens_in,
        load_s=load_s,
        vision_s=vision_s,
        prefill_s=times.first_token_ts - times.scheduled_ts - vision_s,
        token_s=decode_s / (cell.tokens_out - 1),
        total_s=total_s,
        token_bytes=weights + cache,
    )


if __name__ == "__main__":
    main()
