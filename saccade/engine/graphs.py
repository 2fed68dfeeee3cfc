"""Decoding as recorded CUDA graphs: all launches of a step, recorded once for a batch size, then replayed as one.

A step of a 3B model is hundreds of launches, and the host needs longer to make them than the card to run them. Recordings are
made when a size first comes up. What changes from step to step lies in buffers that the recording reads: positions, contexts,
block tables, slots, and where the next tokens are chosen on the card, too, the random numbers; all of it the host knows before the
step's tokens. Those the card leaves where the next step reads them, so a step can be launched before the host has seen what the
last one said. A batch between two sizes is filled up with copies of its first row, which compute and store what that row does.
Where a recording fails, for lack of memory say, steps of its kind are launched op by op, and no other is tried.
Knows tensors and layouts; knows no model and no requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from saccade.base.meter import logger
from saccade.engine.batch import Batch
from saccade.engine.device_sampling import DeviceSampler, Draw
from saccade.engine.sampling import Sampler
from saccade.kernels.record import Likeliest, PagedLayout

SIZES = (1, 2, 4, 8, 16, 32, 64)  # rows; larger batches are launched one by one, which their longer kernels hide
NARROWEST_TABLE = 16  # blocks; tables grow by doubling, and with them the number of parts attention is split into
LINE = 16  # words of 8 bytes after which each input begins, so that kernels may read it in vectors

Compute = Callable[[Tensor, Tensor, PagedLayout], Tensor]  # token ids [B], positions [3, B] -> hidden rows [B, H]
Head = Callable[[Tensor], Tensor]  # hidden rows [B, H] -> logits [B, V]
What = Literal["hidden rows", "likeliest tokens", "drawn tokens"]  # a step's outcome; drawing sorts the vocabulary


class Card(Protocol):
    """A device as recordings use it: what is asked for is queued, in this order; only what `mark` returns waits."""

    device: torch.device

    def record(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """Computes at least once, waiting for it. Returns what queues the computation again, and the output, overwritten each time.

        Raises RuntimeError if it cannot; then all is as before, but for what the computation did.
        """

    def host_words(self, count: int) -> Tensor:
        """[count] int64 on the host, zeros, which `copy` can read and write without the host waiting."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Within the device, or to or from `host_words`, which are to be left alone until it is done."""

    def mark(self) -> Callable[[], object]:
        """What waits until all that is queued now is done."""


class StepInputs:
    """What a step of B rows reads that the host knows: parts of one run of words, which travels as a whole."""

    def __init__(self, allocate: Callable[[int], Tensor], num_rows: int, width: int) -> None:
        """`allocate`: a number -> as many zeros, int64; width: of the block tables."""
        counts = [num_rows] * 4 + [3 * num_rows, num_rows * width, -(-num_rows // 2), -(-num_rows // 8)]
        self.words = allocate(sum(_lines(count) for count in counts))
        parts = torch.split_with_sizes(self.words, [_lines(count) for count in counts])
        views = [part[:count] for part, count in zip(parts, counts, strict=True)]
        self.token_ids, self.slots = views[:2]  # [B]
        self.numbers = views[2].view(torch.float64)  # [B]
        self.positions = views[4].view(3, num_rows)
        self.block_tables = views[5].view(num_rows, width)
        self.contexts = views[6].view(torch.int32)[:num_rows]
        self.may_end = views[7].view(torch.bool)[:num_rows]

    def fill(self, batch: Batch, draws: Sequence[Draw]) -> None:
        """Takes the batch, its first row again and again where there are more rows than it has."""
        num_rows, width = batch.layout.block_tables.shape
        for target, source in (
            (self.token_ids, batch.token_ids),
            (self.slots, batch.layout.slots),
            (self.contexts, batch.layout.contexts),
            (self.block_tables[:, :width], batch.layout.block_tables),
            (self.positions.T, batch.positions.T),
            (self.numbers, torch.tensor([draw.number for draw in draws], dtype=torch.float64)),
            (self.may_end, torch.tensor([draw.may_end for draw in draws], dtype=torch.bool)),
        ):
            if len(source):
                target[:num_rows] = source
                target[num_rows:] = source[:1]


def _lines(count: int) -> int:
    return -(-count // LINE) * LINE


class Lane:
    """What of one step on its way the host must leave alone; two of them take turns."""

    def __init__(self, card: Card, num_rows: int, width: int) -> None:
        self.inputs = StepInputs(card.host_words, num_rows, width)
        self.token_ids = card.host_words(num_rows)
        self.wait: Callable[[], object] = lambda: None  # until the step that used it last is done


class Seats:
    """The tokens of B rows that are computed next, and what sampling knows of the rows; shared by all recordings of B rows."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device, likeliest: Likeliest | None) -> None:
        self.token_ids = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.origins = torch.zeros_like(self.token_ids)  # the row each is a copy of, itself or the first
        self.sampler = DeviceSampler(num_rows, vocab_size, device, likeliest)

    def begin(self, samplers: Sequence[Sampler]) -> None:
        rows = [*range(len(samplers)), *[0] * (len(self.origins) - len(samplers))]
        self.origins.copy_(torch.tensor(rows))
        self.sampler.begin([samplers[row] for row in rows])


@dataclass
class Recording:
    inputs: StepInputs  # on the device
    step: Callable[
        [], Tensor
    ]  # what was recorded: kept, for it holds what is read at every replay, the layout's tiles among it
    replay: Callable[[], object]
    output: Tensor  # hidden rows [B, H], or token ids [B] as DeviceSampler tells them
    lanes: tuple[Lane, Lane]  # the next one first


class DecodeGraphs:
    """Recordings by (their outcome, number of rows, width of the block tables)."""

    def __init__(
        self,
        compute: Compute,
        head: Head | None,
        vocab_size: int,
        block_size: int,
        card: Card,
        likeliest: Likeliest | None = None,
    ) -> None:
        """`head`: None where tokens are to be chosen elsewhere. `likeliest`: see DeviceSampler."""
        self.compute = compute
        self.head = head
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.card = card
        self.likeliest = likeliest
        self.recordings: dict[tuple[What, int, int], Recording] = {}
        self.failure: str | None = None  # why there will be no more
        self._seats: dict[int, Seats] = {}
        self._drawing: What = "likeliest tokens"  # by those who have begun

    def takes(self, batch: Batch) -> bool:
        """Whether every chunk is one token that is decoded, and not too many."""
        lengths = batch.layout.query_lengths
        return len(lengths) <= SIZES[-1] and not batch.placements and max(lengths) == 1

    def run(self, batch: Batch) -> Tensor | None:
        """The hidden rows [S, H] of a batch it takes; they are overwritten by the next step of this size. None if not recorded."""
        recording = self._recording("hidden rows", batch)
        if recording is None:
            return None
        lane = self._send(recording, batch)
        recording.replay()
        lane.wait = self.card.mark()
        return recording.output[: len(batch.last_rows)]

    def begin(self, batch: Batch, samplers: Sequence[Sampler]) -> bool:
        """From now on `launch` chooses the tokens of these answers, which are the rows of a batch it takes. Waits for the device.

        Returns False where that is not recorded: nothing has begun.
        """
        is_greedy = all(sampler.params.is_greedy for sampler in samplers)
        self._drawing = "likeliest tokens" if is_greedy else "drawn tokens"
        if self._recording(self._drawing, batch) is None:
            return False
        self._seats[_size(batch)].begin(samplers)  # after recording, which would change what is noted
        return True

    def is_recorded(self, batch: Batch) -> bool:
        """Whether `launch` need not record first, which computes and would note tokens that nobody says."""
        return (self._drawing, *_shape(batch)) in self.recordings

    def launch(self, batch: Batch, draws: Sequence[Draw], *, is_first: bool) -> Callable[[], list[int]]:
        """Queues a step of the answers that have begun. `is_first`: its tokens are the batch's, later ones what the last step chose.

        Returns what waits for the tokens, NOT_FINITE where logits were no numbers. At most two launches may be waited for at a time.
        """
        recording = self._recording(self._drawing, batch)
        assert recording is not None, "a step is launched that nobody could begin"
        lane = self._send(recording, batch, draws)
        if is_first:
            self.card.copy(self._seats[_size(batch)].token_ids, recording.inputs.token_ids)
        recording.replay()
        self.card.copy(lane.token_ids, recording.output)
        lane.wait = wait = self.card.mark()

        def token_ids() -> list[int]:
            wait()
            return lane.token_ids[: len(draws)].tolist()

        return token_ids

    def _send(self, recording: Recording, batch: Batch, draws: Sequence[Draw] = ()) -> Lane:
        """Queues the inputs' way to the device."""
        lane, other = recording.lanes
        recording.lanes = other, lane
        lane.wait()
        lane.inputs.fill(batch, draws)
        self.card.copy(recording.inputs.words, lane.inputs.words)
        return lane

    def _recording(self, what: What, batch: Batch) -> Recording | None:
        key = (what, *_shape(batch))
        if key not in self.recordings and self.failure is None:
            try:
                self.recordings[key] = self._record(*key, batch)
            except RuntimeError as error:  # memory, or an operation that cannot be recorded
                self.failure = _first_of(error)
                logger.warning(
                    "decoding steps of %d answers could not be recorded as a CUDA graph (%s); what is not recorded yet is "
                    "launched op by op, which is slower",
                    _size(batch),
                    self.failure,
                )
        return self.recordings.get(key)

    def _record(self, what: What, size: int, width: int, batch: Batch) -> Recording:
        device = self.card.device
        inputs = StepInputs(lambda count: torch.zeros(count, dtype=torch.int64, device=device), size, width)
        lanes = Lane(self.card, size, width), Lane(self.card, size, width)
        layout = PagedLayout(
            query_lengths=(1,) * size,
            context_lengths=(width * self.block_size,) * size,  # the longest; the real ones are in layout.contexts
            block_tables=inputs.block_tables,
            slots=inputs.slots,
        )
        vars(layout)["contexts"] = inputs.contexts  # instead of those it would make of the longest
        lanes[0].inputs.fill(batch, ())  # so that only these rows are stored
        self.card.copy(inputs.words, lanes[0].inputs.words)
        lanes[0].wait = self.card.mark()
        step = self._step(what, size, inputs, layout)
        replay, output = self.card.record(step)
        return Recording(inputs, step, replay, output, lanes)

    def _step(self, what: What, size: int, inputs: StepInputs, layout: PagedLayout) -> Callable[[], Tensor]:
        if what == "hidden rows":
            return lambda: self.compute(inputs.token_ids, inputs.positions, layout)
        assert self.head is not None, "tokens are chosen elsewhere"
        if size not in self._seats:
            self._seats[size] = Seats(size, self.vocab_size, self.card.device, self.likeliest)
        head, seats = self.head, self._seats[size]

        def step() -> Tensor:
            hidden = self.compute(seats.token_ids, inputs.positions, layout)
            token_ids, told = seats.sampler.next_tokens(
                head(hidden), inputs.numbers, inputs.may_end, draws=what == "drawn tokens"
            )
            torch.index_select(token_ids, 0, seats.origins, out=seats.token_ids)
            return told

        return step


def _first_of(error: BaseException) -> str:
    """The first line of what went wrong first: to end a recording that failed is an error of its own, which says nothing."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).partition("\n")[0]


def _size(batch: Batch) -> int:
    return next(size for size in SIZES if size >= len(batch.last_rows))


def _shape(batch: Batch) -> tuple[int, int]:
    """Rows and width of the recording that takes the batch."""
    width = NARROWEST_TABLE
    while width < batch.layout.block_tables.shape[1]:
        width *= 2
    return _size(batch), width


class Cuda:
    """An NVIDIA GPU. Everything is queued on the current stream; recordings share memory, as no two ever run together."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """Computes twice before: what is compiled or allocated on first use must not be recorded."""
        caller = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(caller)
        graph = torch.cuda.CUDAGraph()
        # Left by `stream`, too: `graph` itself stays on its stream where a recording has failed.
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            try:
                for _ in range(2):
                    compute()
                # thread_local: what other threads ask of the card meanwhile spoils nothing.
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    output = compute()
            except BaseException:
                # Where `graph` could not end the recording, the allocator still waits for its end; where it could, this is refused.
                with suppress(RuntimeError, AttributeError):  # torch before 2.7 has it under another name
                    torch._C._cuda_endAllocateToPool(self.device.index, self._pool)
                raise
            finally:
                caller.wait_stream(self._stream)
        return graph.replay, output

    def host_words(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int64, pin_memory=True)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def mark(self) -> Callable[[], object]:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event.synchronize
