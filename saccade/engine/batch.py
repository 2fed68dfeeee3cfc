"""One step's chunks of all requests as flat tensors, packed without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from saccade.engine.scheduler import Chunk
from saccade.inputs.prompt import Medium
from saccade.kernels.record import PagedLayout


@dataclass(frozen=True)
class Placement:
    """Rows first..first+count of a medium's features stand at rows row..row+count of the batch, in chunk number `chunk`."""

    chunk: int
    medium: Medium
    first: int
    row: int
    count: int


@dataclass(frozen=True)
class Batch:
    """T tokens of S chunks. last_rows[s] is the row of chunk s's last token, draft or not."""

    token_ids: Tensor  # [T] int64; 0 where the step before has not told it yet
    positions: Tensor  # [3, T] int64
    layout: PagedLayout
    placements: tuple[Placement, ...]
    last_rows: tuple[int, ...]

    def to(self, device: torch.device) -> Batch:
        if self.token_ids.device == device:
            return self
        layout = replace(
            self.layout, block_tables=self.layout.block_tables.to(device), slots=self.layout.slots.to(device)
        )
        return replace(self, token_ids=self.token_ids.to(device), positions=self.positions.to(device), layout=layout)


def pack(chunks: Sequence[Chunk], block_size: int) -> Batch:
    """The chunks' batch, on the host.

    Arrays are numpy's until they are whole: for a token or two, each of torch's calls takes longer than all of numpy's.
    """
    num_tokens = sum(chunk.length for chunk in chunks)
    token_ids: list[int] = []
    positions = np.empty((3, num_tokens), dtype=np.int64)
    slots: list[int] = []
    placements: list[Placement] = []
    last_rows: list[int] = []
    for index, chunk in enumerate(chunks):
        request = chunk.request
        row = len(token_ids)
        token_ids += request.token_ids(chunk.start, chunk.known_stop)
        token_ids += chunk.drafts
        token_ids += [0] * (row + chunk.length - len(token_ids))  # on its way
        _place_positions(chunk, positions[:, row : row + chunk.length])
        slots += [request.blocks[t // block_size] * block_size + t % block_size for t in range(chunk.start, chunk.stop)]
        for span, medium in zip(request.prompt.spans, request.prompt.media, strict=True):
            low = max(span.start, chunk.start)
            high = min(span.start + medium.receipt.num_tokens, chunk.stop)
            if low < high:
                placements.append(Placement(index, medium, low - span.start, row + low - chunk.start, high - low))
        last_rows.append(len(token_ids) - 1)
    tables = np.zeros((len(chunks), max(len(chunk.request.blocks) for chunk in chunks)), dtype=np.int64)
    for table, chunk in zip(tables, chunks, strict=True):
        table[: len(chunk.request.blocks)] = chunk.request.blocks
    layout = PagedLayout(
        query_lengths=tuple(chunk.length for chunk in chunks),
        context_lengths=tuple(chunk.stop for chunk in chunks),
        block_tables=torch.from_numpy(tables),
        slots=torch.from_numpy(np.array(slots, dtype=np.int64)),
    )
    return Batch(
        token_ids=torch.from_numpy(np.array(token_ids, dtype=np.int64)),
        positions=torch.from_numpy(positions),
        layout=layout,
        placements=tuple(placements),
        last_rows=tuple(last_rows),
    )


def _place_positions(chunk: Chunk, out: np.ndarray[tuple[int, int], np.dtype[np.int64]]) -> None:
    """out: [3, length]. The prompt's own, then one more per generated token on all axes."""
    prompt = chunk.request.prompt
    num_prompt = len(prompt.token_ids)
    if chunk.start < num_prompt:
        out[:, : num_prompt - chunk.start] = prompt.positions[:, chunk.start : chunk.stop]
    if chunk.stop > num_prompt:
        first = max(chunk.start, num_prompt)
        out[:, first - chunk.start :] = np.arange(first, chunk.stop) + (prompt.next_position - num_prompt)
