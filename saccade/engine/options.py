"""What a caller may choose: how an answer is generated, and how a model is held and run.

Declared once; flags, checks and docs follow from the fields. Imports nothing heavy, so that help is instant.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from saccade.base.errors import OptionError
from saccade.base.options import check_values, option
from saccade.checkpoints.config import GenerationConfig

GREEDY_TEMPERATURE = 1e-5  # below this, sampling is argmax: published checkpoints say 1e-6 and mean greedy


@dataclass(frozen=True)
class SamplingParams:
    """How an answer is generated. None means: as the checkpoint's generation_config.json says."""

    max_tokens: int = option(1024, "most tokens to generate", low=1)
    min_tokens: int = option(0, "no end of text before this many tokens", low=0)
    temperature: float | None = option(None, "0 is greedy", low=0, high=100)
    top_k: int | None = option(None, "keep the k likeliest tokens; 0 keeps all", low=0)
    top_p: float | None = option(None, "keep the likeliest tokens up to this probability", low=0, high=1)
    min_p: float | None = option(None, "drop tokens below this share of the likeliest one's probability", low=0, high=1)
    repetition_penalty: float | None = option(
        None, "divides the logits of every token seen, prompt included", low=1e-3, high=100
    )
    presence_penalty: float = option(0.0, "subtracted from the logits of every token generated", low=-100, high=100)
    frequency_penalty: float = option(0.0, "the same, times how often it was generated", low=-100, high=100)
    seed: int | None = option(None, "makes sampling repeatable", low=-(2**63), high=2**63 - 1)
    stop: tuple[str, ...] = option((), "ends before this text; may be given several times")
    stop_token_ids: tuple[int, ...] = option((), "ends at this token id; may be given several times")
    ignore_eos: bool = option(False, "goes on past the end-of-text token")
    n: int = option(1, "answers to generate", low=1, high=64)
    logprobs: int | None = option(
        None, "log probabilities of this many likeliest tokens, besides the chosen one's", low=0, high=100
    )
    prompt_logprobs: int | None = option(None, "the same for the prompt's tokens", low=0, high=100)
    detect_repetition: bool = option(True, "ends an answer that repeats itself without end")
    skip_special_tokens: bool = option(True, "leaves special tokens out of the text")

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            if isinstance(value := getattr(self, name), list | set | frozenset | None):
                object.__setattr__(self, name, tuple(value or ()))
        check_values(self)
        if not all(self.stop):
            raise OptionError(f"stop is {self.stop!r}; it must be non-empty strings")
        if self.min_tokens > self.max_tokens:
            raise OptionError(f"min_tokens {self.min_tokens} is larger than max_tokens {self.max_tokens}")

    def resolved(self, defaults: GenerationConfig) -> SamplingParams:
        """The same with every None replaced by the checkpoint's value; a checkpoint that does not sample is greedy."""
        checkpoint = {
            "temperature": defaults.temperature if defaults.do_sample else 0.0,
            "top_k": defaults.top_k,
            "top_p": defaults.top_p,
            "min_p": defaults.min_p,
            "repetition_penalty": defaults.repetition_penalty,
        }
        absent = {name: value for name, value in checkpoint.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **absent)  # type: ignore[arg-type]

    @property
    def is_greedy(self) -> bool:
        return self.temperature is not None and self.temperature < GREEDY_TEMPERATURE


@dataclass(frozen=True)
class EngineOptions:
    """How a model is held and run. Everything has a default that works."""

    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = option("auto", "auto (the checkpoint's), float32, bfloat16 or float16")
    quantization: str | None = option(
        None,
        "quantize the linear layers while loading: w8a16, w4a16-g128, w8a8-dynamic, w4a8-g128, fp8; groups: 32 to 256",
    )
    vision_quantization: str | None = option(
        None,
        "of the vision tower, if it is another: float, w8a8-dynamic, ...; by default 8 bits where quantization says 4",
    )
    head_quantization: str | None = option(
        None,
        "quantize the output head while loading, too: w8a8-dynamic, say; every token reads all of it, and it stays float",
    )
    source: Literal["huggingface", "modelscope"] = option("huggingface", "where hub ids are looked up")
    revision: str | None = option(None, "branch, tag or commit of a hub id")
    threads: int | None = option(
        None, "CPU threads; default: OMP_NUM_THREADS, or as many as this process may use", low=1, high=4096
    )
    kv_cache_tokens: int | None = option(None, "tokens the key/value cache holds; default: what memory allows", low=1)
    kv_cache_dtype: Literal["auto", "model", "int8"] = option(
        "auto",
        "model (the working type), int8 (half of 16 bits; scales move from keys to queries while loading), or auto: int8 where "
        "the checkpoint asks for it",
    )
    block_size: int = option(32, "tokens in a block of the cache", low=1, high=4096)
    max_tokens_per_step: int = option(2048, "tokens computed in a step; longer prompts are prefilled in chunks", low=1)
    max_running: int = option(256, "requests computed together", low=1, high=65536)
    speculation: Literal["auto", "lookup", "off"] = option(
        "auto",
        "guess the next tokens from what the prompt and the answer said before; same answers, fewer steps; "
        "auto: where a step of a few tokens costs little more than of one",
    )
    num_speculative_tokens: int = option(7, "most tokens guessed in a step, fewer while guesses fail", low=1, high=15)
    prompt_lookup_max: int = option(3, "longest run of tokens that is looked for", low=1, high=32)
    prompt_lookup_min: int = option(1, "shortest run of tokens that is looked for", low=1, high=32)
    prefix_cache: bool = option(True, "reuses what is known of a prompt's beginning, pictures included")
    encoder_cache_bytes: int = option(512 * 2**20, "bytes of vision features kept for media seen before", low=0)
    tensor_parallel: int = option(1, "processes that share the model, each with a GPU of its own", low=1, high=64)
    mmap: bool = option(
        True,
        "on the CPU, uses weights where they lie in the system's cache of the files: ready at once; off: reads a copy, into large "
        "pages where there are any",
    )
    check_weights: bool = option(False, "looks for NaN and infinity in every weight before loading")

    def quantizations(self, stored: str | None = None) -> list[str]:
        """How the model is quantized, part by part, in a few words; `stored`: as the checkpoint is."""
        parts = {"": self.quantization or stored, "tower ": self.vision_quantization, "head ": self.head_quantization}
        return [part + words for part, words in parts.items() if words]

    def __post_init__(self) -> None:
        for name in ("device", "dtype"):  # torch's own spellings
            object.__setattr__(self, name, str(getattr(self, name)).removeprefix("torch."))
        check_values(self)
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise OptionError(
                f"prompt_lookup_min {self.prompt_lookup_min} is larger than prompt_lookup_max {self.prompt_lookup_max}"
            )
