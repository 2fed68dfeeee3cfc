"""One step's chunks of all requests as flat tensors, packed without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    """T tokens of S chunks. last_rows[s] is the row of chunk s's last token."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [3, T] int64
    layout: PagedLayout
    placements: tuple[Placement, ...]
    last_rows: tuple[int, ...]


def pack(chunks: Sequence[Chunk], block_size: int, device: torch.device) -> Batch:
    token_ids: list[int] = []
    positions: list[Tensor] = []
    slots: list[int] = []
    placements: list[Placement] = []
    last_rows: list[int] = []
    for index, chunk in enumerate(chunks):
        request = chunk.request
        row = len(token_ids)
        token_ids += request.token_ids(chunk.start, chunk.stop)
        positions.append(_positions(chunk))
        slots += [request.blocks[t // block_size] * block_size + t % block_size for t in range(chunk.start, chunk.stop)]
        for span, medium in zip(request.prompt.spans, request.prompt.media, strict=True):
            low = max(span.start, chunk.start)
            high = min(span.start + medium.receipt.num_tokens, chunk.stop)
            if low < high:
                placements.append(Placement(index, medium, low - span.start, row + low - chunk.start, high - low))
        last_rows.append(len(token_ids) - 1)
    widest = max(len(chunk.request.blocks) for chunk in chunks)
    tables = [chunk.request.blocks + [0] * (widest - len(chunk.request.blocks)) for chunk in chunks]
    layout = PagedLayout(
        query_lengths=tuple(chunk.length for chunk in chunks),
        context_lengths=tuple(chunk.stop for chunk in chunks),
        block_tables=torch.tensor(tables, device=device),
        slots=torch.tensor(slots, device=device),
    )
    return Batch(
        token_ids=torch.tensor(token_ids, device=device),
        positions=torch.cat(positions, dim=1).to(device),
        layout=layout,
        placements=tuple(placements),
        last_rows=tuple(last_rows),
    )


def _positions(chunk: Chunk) -> Tensor:
    """[3, length]: the prompt's own, then one more per generated token on all axes."""
    prompt = chunk.request.prompt
    num_prompt = len(prompt.token_ids)
    generated = (
        torch.arange(max(chunk.start, num_prompt), max(chunk.stop, num_prompt)) - num_prompt + prompt.next_position
    )
    return torch.cat([prompt.positions[:, chunk.start : chunk.stop], generated.expand(3, -1)], dim=1)
