"""How a quantizer verifies what it has just written, before it appears: against its source, in memory that stays bounded.

Knows which way of comparing a model's size allows; every measurement is elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from saccade.checkpoints.formats import open_checkpoint
from saccade.quantize.report import QuantizationReport, Verify
from saccade.verify.options import VerifyOptions
from saccade.verify.samples import Conversation
from saccade.verify.verification import verify

WHOLE_BYTES = 1_000_000_000  # a float model up to this size is opened whole and answers as if it were served


def verifier(
    source: Path,
    conversations: Callable[[bool], Sequence[Conversation]],
    device: str = "auto",
    threads: int | None = None,
) -> Verify:
    """Compares a folder with `source`. `conversations`: held-out ones, ending with answers where True is passed."""
    checkpoint = open_checkpoint(source)
    size = sum(checkpoint.info(name).nbytes for name in checkpoint.names())
    options = VerifyOptions(device=device, threads=threads, blockwise=size > WHOLE_BYTES)

    def look(folder: Path) -> QuantizationReport:
        return verify(folder, source, conversations(options.blockwise), options)

    return look
