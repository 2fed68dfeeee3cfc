"""What runs next: a few loops over two queues. Knows requests, tokens and blocks as numbers; knows no tensors.

Every request wants tokens num_computed..num_tokens computed. A step gives each as many as the budget allows: a prompt in
chunks, a token being decoded as a chunk of one. A request that finds no block sends the youngest back to wait; what was
computed for it is found again in the prefix cache or computed again, and nothing is lost. Where few tokens are computed
together, guesses of the next ones follow a request's last: they take blocks that are free, never another's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from saccade.base.errors import PromptError
from saccade.engine.blocks import BlockPool
from saccade.engine.lookup import Speculation
from saccade.engine.request import Request


@dataclass(frozen=True)
class Chunk:
    """Tokens start..start+length of a request, to be computed in this step; the last of them are guesses, the drafts."""

    request: Request
    start: int
    length: int
    drafts: tuple[int, ...] = ()

    @property
    def stop(self) -> int:
        return self.start + self.length

    @property
    def known_stop(self) -> int:
        """Where the tokens that are drawn end and the drafts begin."""
        return self.stop - len(self.drafts)

    @property
    def reaches_end(self) -> bool:
        """Whether the step yields the request's next token."""
        return self.known_stop == self.request.num_tokens


class Scheduler:
    def __init__(
        self,
        pool: BlockPool,
        max_tokens_per_step: int,
        max_running: int,
        prefix_cache: bool = True,
        speculation: Speculation | None = None,
    ) -> None:
        self.pool = pool
        self.speculation = speculation
        self.max_tokens_per_step = max_tokens_per_step
        self.max_running = max_running
        self.prefix_cache = prefix_cache
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Raises PromptError when the request could never run, whatever else ends."""
        if request.num_tokens + 1 > self.pool.capacity_tokens:
            raise PromptError(
                f"prompt of {request.num_tokens} tokens does not fit the key/value cache of {self.pool.capacity_tokens}; "
                "give it more (kv_cache_tokens) or make the pictures smaller (max_pixels)"
            )
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Takes a request out, wherever it is, and frees its blocks."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self._release(request)

    def schedule(self) -> list[Chunk]:
        """This step's chunks; at least one while there is work."""
        chunks: list[Chunk] = []
        budget = self.max_tokens_per_step
        # A request of this step may lose its blocks to an older one only before its chunk is made: oldest first.
        for request in list(self.running):
            if budget == 0:
                break
            if request not in self.running:  # preempted below
                continue
            length = min(request.num_tokens - request.num_computed, budget)
            while not self._grow(request, request.num_computed + length):
                youngest = self.running[-1]
                self._preempt(youngest)
                if youngest is request:
                    break
            else:
                chunks.append(Chunk(request, request.num_computed, length))
                budget -= length
        while self.waiting and budget and len(self.running) < self.max_running:
            chunk = self._admit(self.waiting[0], budget)
            if chunk is None:
                break
            self.running.append(self.waiting.popleft())
            chunks.append(chunk)
            budget -= chunk.length
        assert chunks or not self.has_work, "requests wait although the cache is empty"
        if self.speculation is not None:
            budget = min(budget, self.speculation.max_rows - sum(chunk.length for chunk in chunks))
            for index, chunk in enumerate(chunks):
                chunks[index] = self._with_drafts(chunk, budget // (len(chunks) - index), self.speculation.max_tokens)
                budget -= len(chunks[index].drafts)
        return chunks

    def ahead(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """The step behind `chunks`, which were scheduled last and yield tokens that nobody has seen yet: each request's next token.

        Empty where more is to be decided than that: who runs, who ends by length, whose blocks another gets.
        """
        if [chunk.request for chunk in chunks] != self.running:
            return []
        if any(len(chunk.request.output_ids) + 1 >= chunk.request.max_tokens for chunk in chunks):
            return []
        if self.waiting and len(self.running) < self.max_running and self._admissible(self.waiting[0]) is not None:
            return []
        num_missing = sum(self.pool.blocks_for(chunk.stop + 1) - len(chunk.request.blocks) for chunk in chunks)
        if num_missing > self.pool.num_free:
            return []
        for chunk in chunks:
            self._grow(chunk.request, chunk.stop + 1)
        return [Chunk(chunk.request, chunk.stop, 1) for chunk in chunks]

    def computed(self, chunk: Chunk) -> None:
        """Notes that the chunk is in the cache, of its drafts those that are the answer's tokens now.

        Blocks that became full can be found by others; those that only wrong drafts needed are given back.
        """
        request = chunk.request
        request.num_computed = min(chunk.stop, max(chunk.known_stop, request.num_tokens - 1))
        if chunk.drafts:
            num_needed = self.pool.blocks_for(request.num_tokens)
            self.pool.release(request.blocks[num_needed:])
            del request.blocks[num_needed:]
        if self.prefix_cache:
            first, last = chunk.start // self.pool.block_size, request.num_computed // self.pool.block_size
            keys = request.block_keys(last, self.pool.block_size)
            for index in range(first, last):
                self.pool.publish(request.blocks[index], keys[index])

    def _with_drafts(self, chunk: Chunk, room: int, most: int) -> Chunk:
        """The chunk with guesses behind it: at most `room` and `most`, none where there is no block for them."""
        request = chunk.request
        if room <= 0 or not chunk.reaches_end:
            return chunk
        drafts = request.guess(min(room, most))
        if not drafts or not self._grow(request, chunk.stop + len(drafts)):
            return chunk
        return Chunk(request, chunk.start, chunk.length + len(drafts), tuple(drafts))

    def _admit(self, request: Request, budget: int) -> Chunk | None:
        """The request's first chunk, blocks for all its tokens held, or None while there is no room for them."""
        known = self._admissible(request)
        if known is None:
            return None
        start = len(known) * self.pool.block_size
        for block in known:
            self.pool.hold(block)
        request.blocks = known
        request.num_computed = request.num_cached = start
        self._grow(request, request.num_tokens)
        return Chunk(request, start, min(request.num_tokens - start, budget))

    def _admissible(self, request: Request) -> list[int] | None:
        """The blocks that hold the beginning of the request already; None where there is no room to admit it."""
        known = self._known_prefix(request)
        needed = self.pool.blocks_for(request.num_tokens) - len(known) + self.pool.num_free_among(known)
        # Leave a block for each running request to grow into, lest admission and preemption chase each other.
        reserve = len(self.running)
        fits = needed + reserve <= self.pool.num_free or (not self.running and needed <= self.pool.num_free)
        return known if fits else None

    def _known_prefix(self, request: Request) -> list[int]:
        # Logits of prompt tokens are wanted, or the last token's: those must be computed.
        if not self.prefix_cache or request.params.prompt_logprobs is not None:
            return []
        num_blocks = (request.num_tokens - 1) // self.pool.block_size
        return self.pool.find(request.block_keys(num_blocks, self.pool.block_size))

    def _grow(self, request: Request, num_tokens: int) -> bool:
        """Gives the request blocks for `num_tokens`, all or none."""
        missing = self.pool.blocks_for(num_tokens) - len(request.blocks)
        if missing > self.pool.num_free:
            return False
        request.blocks.extend(self.pool.allocate() for _ in range(missing))
        return True

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        self.waiting.appendleft(request)
        self.num_preemptions += 1

    def _release(self, request: Request) -> None:
        self.pool.release(request.blocks)
        request.blocks = []
        request.num_computed = 0
