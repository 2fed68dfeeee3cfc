"""Decoding as recorded CUDA graphs: all launches of a step, recorded once for a batch size, then replayed as one.

A step of a 3B model is some 400 launches, and the host needs longer to make them than the card to run them. Recordings are
made when a size first comes up. What changes from step to step lies in buffers that the recording reads: tokens, positions,
contexts, block tables, slots. A batch between two sizes is filled up with copies of its first row, which compute and store
what that row does. Knows tensors and layouts; knows no model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.engine.batch import Batch
from saccade.kernels.record import PagedLayout

SIZES = (1, 2, 4, 8, 16, 32, 64)  # rows; larger batches are launched one by one, which their longer kernels hide
NARROWEST_TABLE = 16  # blocks; tables grow by doubling, and with them the number of parts attention is split into

Compute = Callable[[Tensor, Tensor, PagedLayout], Tensor]  # token ids [B], positions [3, B] -> hidden rows [B, H]
Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]  # a computation -> replay, its output


@dataclass(frozen=True)
class Recording:
    token_ids: Tensor  # [B]
    positions: Tensor  # [3, B]
    layout: PagedLayout
    replay: Callable[[], object]
    hidden: Tensor  # [B, H]


class DecodeGraphs:
    """Recordings by (batch size, width of the block tables)."""

    def __init__(self, compute: Compute, block_size: int, record: Recorder) -> None:
        self.compute = compute
        self.block_size = block_size
        self.record = record
        self.recordings: dict[tuple[int, int], Recording] = {}

    def takes(self, batch: Batch) -> bool:
        """Whether every chunk is one token that is decoded, and not too many."""
        lengths = batch.layout.query_lengths
        return len(lengths) <= SIZES[-1] and not batch.placements and max(lengths) == 1

    def run(self, batch: Batch) -> Tensor:
        """The hidden rows [S, H] of a batch it takes; they are overwritten by the next step of this size."""
        num_rows, width = batch.layout.block_tables.shape
        size = next(size for size in SIZES if size >= num_rows)
        widest = NARROWEST_TABLE
        while widest < width:
            widest *= 2
        recording = self.recordings.get((size, widest))
        if recording is None:
            recording = self._make(size, widest, batch)
            self.recordings[size, widest] = recording
        else:
            _fill(recording.token_ids, recording.positions, recording.layout, batch)
        recording.replay()
        return recording.hidden[:num_rows]

    def _make(self, size: int, width: int, batch: Batch) -> Recording:
        device = batch.token_ids.device
        token_ids = torch.zeros(size, dtype=torch.int64, device=device)
        positions = torch.zeros(3, size, dtype=torch.int64, device=device)
        layout = PagedLayout(
            query_lengths=(1,) * size,
            context_lengths=(width * self.block_size,) * size,  # the longest; the real ones are in layout.contexts
            block_tables=torch.zeros(size, width, dtype=torch.int64, device=device),
            slots=torch.zeros(size, dtype=torch.int64, device=device),
        )
        _fill(token_ids, positions, layout, batch)
        replay, hidden = self.record(lambda: self.compute(token_ids, positions, layout))
        return Recording(token_ids, positions, layout, replay, hidden)


def _fill(token_ids: Tensor, positions: Tensor, layout: PagedLayout, batch: Batch) -> None:
    """Writes the batch into a recording's buffers, the first row again and again where there are more rows than it has."""
    num_rows, width = batch.layout.block_tables.shape
    for target, source in (
        (token_ids, batch.token_ids),
        (layout.slots, batch.layout.slots),
        (layout.contexts, batch.layout.contexts),
        (layout.block_tables[:, :width], batch.layout.block_tables),
    ):
        target[:num_rows] = source
        target[num_rows:] = source[:1]
    positions[:, :num_rows] = batch.positions
    positions[:, num_rows:] = batch.positions[:, :1]


def record_cuda(compute: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """A recorder for NVIDIA GPUs. Computes twice before: what is compiled or allocated on first use must not be recorded."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            compute()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hidden = compute()
    return graph.replay, hidden
