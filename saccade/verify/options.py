"""What a verification may be told."""

from __future__ import annotations

from dataclasses import dataclass

from saccade.base.options import check_values, option


@dataclass(frozen=True)
class VerifyOptions:
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    threads: int | None = option(None, "CPU threads; default: as many as this process may use", low=1, high=4096)
    answer_tokens: int = option(32, "tokens of each answer that logits are compared over", low=1, high=4096)
    sample_pixels: int = option(
        400_000, "pictures of samples are made no larger than this area", low=3136, high=100_000_000
    )
    max_kl: float = option(0.5, "mean KL in nats from the float model above which the check fails", low=0)
    blockwise: bool = option(
        False, "never open a whole model: all is compared with one block of each in memory, over given answers"
    )
    sensitivity: bool = option(False, "rank the linears by the KL that quantizing each alone causes; needs --against")
    target_kl: float | None = option(
        None, "choose linears to store better until the mean KL in nats is at most this; needs --against", low=0
    )
    hashes: bool = option(True, "write the SHA-256 of every file into the report")

    def __post_init__(self) -> None:
        check_values(self)
