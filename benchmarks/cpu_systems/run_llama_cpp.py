"""The cell by llama.cpp through llama-cpp-python's bindings of libllama and libmtmd, as `llama-mtmd-cli` uses them.

Option `projector` is the tower's GGUF. Everything else is left at llama.cpp's defaults but the number of threads: batches of 2048
in pieces of 512, float16 cache, flash attention where it finds it useful. A video's frames are handed over two by two.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

import llama_cpp
import numpy as np
from cell import SYSTEM_PROMPT, Cell, read_cell, reply
from llama_cpp import mtmd_cpp as mtmd

CONTEXT_TOKENS, BATCH_TOKENS = 4096, 2048


class Program:
    """A model and its tower, ready to answer."""

    def __init__(self, cell: Cell) -> None:
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(cell.model.encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch = CONTEXT_TOKENS, BATCH_TOKENS
        params.n_threads = params.n_threads_batch = cell.threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        tower = mtmd.mtmd_context_params_default()
        tower.use_gpu, tower.print_timings, tower.n_threads = False, False, cell.threads
        self.tower = mtmd.mtmd_init_from_file(cell.options["projector"].encode(), self.model, tower)
        assert all((self.model, self.context, self.tower)), "llama.cpp could not load the model; see its messages above"
        self.sampler = llama_cpp.llama_sampler_init_greedy()

    def answer(self, cell: Cell, frames: np.ndarray, count: int) -> dict[str, Any]:
        """Seconds of each stage of a greedy answer of `count` tokens."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        start = time.perf_counter()
        chunks = self.tokenize(cell.question, frames)
        vision_s, position, num_chunks = 0.0, llama_cpp.llama_pos(0), mtmd.mtmd_input_chunks_size(chunks)
        prompt_start = time.perf_counter()
        for index in range(num_chunks):
            chunk = mtmd.mtmd_input_chunks_get(chunks, index)
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                done = mtmd.mtmd_helper_eval_chunk_single(
                    self.tower,
                    self.context,
                    chunk,
                    position,
                    0,
                    BATCH_TOKENS,
                    index == num_chunks - 1,
                    ctypes.byref(position),
                )
            else:
                began = time.perf_counter()
                assert mtmd.mtmd_encode_chunk(self.tower, chunk) == 0
                vision_s += time.perf_counter() - began
                rows = mtmd.mtmd_get_output_embd(self.tower)
                done = mtmd.mtmd_helper_decode_image_chunk(
                    self.tower,
                    self.context,
                    chunk,
                    rows,
                    position,
                    0,
                    BATCH_TOKENS,
                    ctypes.byref(position),
                    mtmd.mtmd_helper_post_decode_callback(),
                    None,
                )
            assert done == 0, f"llama.cpp answered {done} to part {index} of the prompt"
        token = llama_cpp.llama_sampler_sample(self.sampler, self.context, -1)
        first = time.perf_counter()
        for _ in range(count - 1):
            batch = llama_cpp.llama_batch_get_one((llama_cpp.llama_token * 1)(token), 1)
            assert llama_cpp.llama_decode(self.context, batch) == 0
            token = llama_cpp.llama_sampler_sample(self.sampler, self.context, -1)
        end = time.perf_counter()
        tokens_in = mtmd.mtmd_helper_get_n_tokens(chunks)
        mtmd.mtmd_input_chunks_free(chunks)
        return {
            "tokens_in": tokens_in,
            "vision_s": vision_s,
            "prefill_s": first - prompt_start - vision_s,
            "token_s": (end - first) / (count - 1),
            "total_s": end - start,
        }

    def tokenize(self, question: str, frames: np.ndarray) -> Any:
        """The template's text with the frames in their places; mtmd adds the tokens around a picture by itself."""
        marker = mtmd.mtmd_default_marker().decode()
        text = (
            f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n{marker * len(frames)}{question}<|im_end|>\n"
            "<|im_start|>assistant\n"
        ).encode()
        height, width = frames.shape[1:3]
        bitmaps = (ctypes.c_void_p * len(frames))()
        for index, frame in enumerate(frames):
            pixels = (ctypes.c_uint8 * frame.nbytes).from_buffer_copy(np.ascontiguousarray(frame))
            bitmaps[index] = mtmd.mtmd_bitmap_init(width, height, pixels)
            mtmd.mtmd_bitmap_set_mergeable(bitmaps[index], len(frames) > 1)
        chunks = mtmd.mtmd_input_chunks_init()
        content = mtmd.mtmd_input_text(text, len(text), False, True)
        done = mtmd.mtmd_tokenize(self.tower, chunks, ctypes.byref(content), bitmaps, len(frames))
        assert done == 0, f"llama.cpp answered {done} to the prompt"
        for bitmap in bitmaps:
            mtmd.mtmd_bitmap_free(bitmap)
        return chunks


def main() -> None:
    cell = read_cell()
    start = time.perf_counter()
    program = Program(cell)
    load_s = time.perf_counter() - start
    program.answer(cell, cell.other_frames(), 3)
    answer = program.answer(cell, cell.load_frames(), cell.tokens_out)
    model = program.model
    head_dim = llama_cpp.llama_model_n_embd(model) // llama_cpp.llama_model_n_head(model)
    positions = answer["tokens_in"] + cell.tokens_out // 2
    cache = 2 * llama_cpp.llama_model_n_layer(model) * llama_cpp.llama_model_n_head_kv(model) * head_dim * 2 * positions
    reply(
        version=llama_cpp.__version__,
        load_s=load_s,
        token_bytes=llama_cpp.llama_model_size(model) + cache,  # a tied head is the embedding's own table
        **answer,
    )


if __name__ == "__main__":
    main()
