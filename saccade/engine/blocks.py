"""The key/value cache's blocks: who holds which, and which known content can be shared. Knows blocks and hashes; knows no tensors."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence


def block_key(previous: bytes, token_ids: Sequence[int], media: Sequence[tuple[int, bytes]]) -> bytes:
    """Digest of a full block: everything before it, its token ids, and the media it lies in (offset of each, its content key).

    Placeholder ids are the same for all pictures, so ids alone would mistake one picture for another.
    """
    digest = hashlib.sha256(previous)
    digest.update(array("q", token_ids).tobytes())
    for offset, key in media:
        digest.update(offset.to_bytes(8, "little", signed=True) + key)
    return digest.digest()


class BlockPool:
    """A fixed number of blocks, counted references, and an index of full blocks by content.

    A released block keeps its content and stays findable until it is handed out again, oldest first.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._references = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._by_key: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def capacity_tokens(self) -> int:
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self) -> int:
        """A block with no content. The caller has made sure that one is free."""
        block, _ = self._free.popitem(last=False)
        key = self._keys[block]
        if key is not None:
            del self._by_key[key]
            self._keys[block] = None
        self._references[block] = 1
        return block

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks that hold the longest known prefix of `keys`; not yet held by the caller."""
        found = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def hold(self, block: int) -> None:
        self._references[block] += 1
        self._free.pop(block, None)

    def num_free_among(self, blocks: Sequence[int]) -> int:
        """How many of `blocks` are free now, and would no longer be once held."""
        return sum(block in self._free for block in blocks)

    def release(self, blocks: Sequence[int]) -> None:
        """Gives up one reference to each; the last of a sequence are reused first, so prefixes live longest."""
        for block in reversed(blocks):
            self._references[block] -= 1
            assert self._references[block] >= 0, f"block {block} released more often than held"
            if self._references[block] == 0:
                self._free[block] = None

    def publish(self, block: int, key: bytes) -> None:
        """Makes a full block findable; the first block of some content stays the one that is found."""
        if key not in self._by_key:
            self._by_key[key] = block
            self._keys[block] = key
