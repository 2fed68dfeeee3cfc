"""What runs next: a few loops over two queues. Knows requests, tokens and blocks as numbers; knows no tensors.

Every request wants tokens num_computed..num_tokens computed. A step gives each as many as the budget allows: a prompt in
chunks, a token being decoded as a chunk of one. A request that finds no block sends the youngest back to wait; what was
computed for it is found again in the prefix cache or computed again, and nothing is lost.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from saccade.base.errors import PromptError
from saccade.engine.blocks import BlockPool
from saccade.engine.request import Request


@dataclass(frozen=True)
class Chunk:
    """Tokens start..start+length of a request, to be computed in this step."""

    request: Request
    start: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length

    @property
    def reaches_end(self) -> bool:
        """Whether the step yields the request's next token."""
        return self.stop == self.request.num_tokens


class Scheduler:
    def __init__(self, pool: BlockPool, max_tokens_per_step: int, max_running: int, prefix_cache: bool = True) -> None:
        self.pool = pool
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
        return chunks

    def computed(self, chunk: Chunk) -> None:
        """Notes that the chunk is in the cache; blocks that became full can be found by others."""
        request = chunk.request
        request.num_computed = chunk.stop
        if self.prefix_cache:
            first, last = chunk.start // self.pool.block_size, chunk.stop // self.pool.block_size
            keys = request.block_keys(last, self.pool.block_size)
            for index in range(first, last):
                self.pool.publish(request.blocks[index], keys[index])

    def _admit(self, request: Request, budget: int) -> Chunk | None:
        """The request's first chunk, blocks for all its tokens held, or None while there is no room for them."""
        known = self._known_prefix(request)
        start = len(known) * self.pool.block_size
        needed = self.pool.blocks_for(request.num_tokens) - len(known) + self.pool.num_free_among(known)
        # Leave a block for each running request to grow into, lest admission and preemption chase each other.
        reserve = len(self.running)
        if needed + reserve > self.pool.num_free and (self.running or needed > self.pool.num_free):
            return None
        for block in known:
            self.pool.hold(block)
        request.blocks = known
        request.num_computed = request.num_cached = start
        self._grow(request, request.num_tokens)
        return Chunk(request, start, min(request.num_tokens - start, budget))

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
