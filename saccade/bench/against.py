"""The same answer by another library, in the same run: what is faster, and how many times.

Both are given the same token ids and patch rows; reading and preparing media is left out for both. The other library is
imported only here, and only when asked for.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saccade.api import LLM
from saccade.base.errors import OptionError
from saccade.base.meter import progress
from saccade.inputs.pixels import patches
from saccade.inputs.prompt import Prompt


@dataclass(frozen=True)
class Comparison:
    """Seconds of the other library, and how many times ours is faster (below 1: slower)."""

    library: str
    first_token_s: tuple[float, ...]  # vision and prefill
    decoded_token_s: tuple[float, ...]
    first_token_ratio: float
    decoded_token_ratio: float

    def headline(self) -> str:
        return (
            f"{self.library}: first token {statistics.median(self.first_token_s):.2f} s, then "
            f"{1 / statistics.median(self.decoded_token_s):.1f} tokens/s; saccade is {self.first_token_ratio:.2f} times as fast "
            f"to the first token, {self.decoded_token_ratio:.2f} times while decoding"
        )


def require_transformers() -> None:
    """Raises OptionError where transformers is missing: before the long measurement, not after it."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise OptionError("--against transformers needs it installed: pip install 'transformers>=5.6,<6'") from error


def against_transformers(
    llm: LLM,
    folder: Path,
    prompt: Prompt,
    tokens_out: int,
    warmup: int,
    repeat: int,
    first_token_s: float,
    decoded_token_s: float,
) -> Comparison:
    """generate() of transformers over `folder`, greedy, SDPA, same device, type and threads; the last two are our medians.

    Both models are in memory at once.
    """
    import transformers

    model = llm.engine.runner.model
    other: Any = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=model.dtype, attn_implementation="sdpa"
    )
    other = other.to(model.device).eval()
    inputs = _inputs(llm, prompt)
    first: list[float] = []
    token: list[float] = []
    with progress(warmup + repeat, "measuring transformers") as advance:
        for _ in range(warmup + repeat):
            one_s, all_s = (_generate_s(other, inputs, count) for count in (1, tokens_out))
            first.append(one_s)
            token.append((all_s - one_s) / (tokens_out - 1))
            advance(1)
    first, token = first[warmup:], token[warmup:]
    return Comparison(
        library=f"transformers {transformers.__version__}",
        first_token_s=tuple(first),
        decoded_token_s=tuple(token),
        first_token_ratio=statistics.median(first) / first_token_s,
        decoded_token_ratio=statistics.median(token) / decoded_token_s,
    )


def _inputs(llm: LLM, prompt: Prompt) -> dict[str, Any]:
    """Our prompt under the names that transformers gives its parts."""
    device = llm.engine.runner.model.device
    ids = torch.tensor([prompt.token_ids])
    kinds = (ids == llm.config.image_token_id).long() + 2 * (ids == llm.config.video_token_id).long()
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds}
    for kind, rows, grids in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        media = [medium for medium in prompt.media if medium.receipt.kind == kind]
        if media:
            inputs[rows] = torch.cat([patches(medium.frames, llm.config) for medium in media])
            inputs[grids] = torch.tensor([[m.receipt.grid.t, m.receipt.grid.h, m.receipt.grid.w] for m in media])
            if kind == "video":
                inputs["second_per_grid_ts"] = torch.tensor([m.receipt.second_per_grid for m in media])
    return {name: value.to(device) for name, value in inputs.items()}


def _generate_s(model: Any, inputs: dict[str, Any], num_tokens: int) -> float:
    model.model.rope_deltas = None  # kept between calls otherwise
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False)
    length = out[0, inputs["input_ids"].shape[1] :].tolist()  # waits for the device
    assert len(length) == num_tokens, f"{len(length)} tokens instead of {num_tokens}"
    return time.perf_counter() - start
