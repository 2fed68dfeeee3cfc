"""The cell by OpenVINO GenAI's VLMPipeline over a folder that optimum-cli exported; its own defaults but the number of threads."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
from cell import Cell, read_cell, reply


def generate(pipe: Any, cell: Cell, frames: np.ndarray, count: int) -> tuple[Any, float]:
    """The library's own metrics, and seconds of the whole call."""
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = count
    config.ignore_eos, config.do_sample = True, False
    is_picture = cell.media == "picture"
    media = {"images": [openvino.Tensor(frames)]} if is_picture else {"videos": [openvino.Tensor(frames)]}
    start = time.perf_counter()
    result = pipe.generate(cell.question, generation_config=config, **media)
    return result.perf_metrics, time.perf_counter() - start


def main() -> None:
    cell = read_cell()
    start = time.perf_counter()
    pipe = openvino_genai.VLMPipeline(cell.model, "CPU", INFERENCE_NUM_THREADS=cell.threads)
    load_s = time.perf_counter() - start
    generate(pipe, cell, cell.other_frames(), 3)
    metrics, total_s = generate(pipe, cell, cell.load_frames(), cell.tokens_out)
    assert metrics.get_num_generated_tokens() == cell.tokens_out, f"{metrics.get_num_generated_tokens()} tokens"
    # Its "vision encoding" ends with the patches' embedding; the tower runs while the decoder's inputs are prepared.
    vision_s = metrics.get_prepare_embeddings_duration().mean / 1e3
    config = json.loads(Path(cell.model, "config.json").read_text())
    text = config.get("text_config", config)
    head_dim = text["hidden_size"] // text["num_attention_heads"]
    tokens_in = metrics.get_num_input_tokens()
    positions = tokens_in + cell.tokens_out // 2
    cache = 2 * text["num_hidden_layers"] * text["num_key_value_heads"] * head_dim * positions  # of int8, its default
    reply(
        version=openvino_genai.__version__,
        tokens_in=tokens_in,
        load_s=load_s,
        vision_s=vision_s,
        prefill_s=metrics.get_ttft().mean / 1e3 - vision_s,
        token_s=metrics.get_tpot().mean / 1e3,
        total_s=total_s,
        token_bytes=Path(cell.model, "openvino_language_model.bin").stat().st_size + cache,
    )


if __name__ == "__main__":
    main()
