"""Which part of the model a rank holds: a table of integers. Knows widths and heads; knows no tensors and no processes.

Projections into heads and gates are cut by rows, those out of them by columns, whose products are then added over the ranks
(Megatron, arXiv 1909.08053). Cuts are at whole heads, and at multiples of the largest power of two up to 256 that leaves every
rank something: no quantization group is cut.
"""

from __future__ import annotations

from dataclasses import dataclass

from saccade.base.errors import OptionError
from saccade.base.ranks import Ranks

LARGEST_UNIT = 256  # columns; no group of a quantized weight is larger


@dataclass(frozen=True)
class HeadCut:
    """A rank's query heads and the key heads they read."""

    q: slice
    kv: slice

    @property
    def num_q(self) -> int:
        return length(self.q)

    @property
    def num_kv(self) -> int:
        return length(self.kv)


def length(span: slice) -> int:
    return int(span.stop - span.start)


def scaled(span: slice, factor: int, first: int = 0) -> slice:
    """Heads to their rows, `factor` each, the first head's beginning at row `first`."""
    return slice(first + span.start * factor, first + span.stop * factor)


def cut(count: int, ranks: Ranks, what: str) -> slice:
    """This rank's share of `count` things in order; shares differ by one at most. Raises OptionError if one would be empty."""
    if count < ranks.size:
        raise OptionError(f"tensor_parallel {ranks.size} is more than the {count} {what}; use {count} or fewer")
    return slice(ranks.rank * count // ranks.size, (ranks.rank + 1) * count // ranks.size)


def cut_width(width: int, ranks: Ranks, what: str) -> slice:
    """This rank's share of `width` columns, in units that no group crosses."""
    unit = LARGEST_UNIT
    while unit > 1 and (width % unit or width // unit < ranks.size):
        unit //= 2
    return scaled(cut(width // unit, ranks, what), unit)


def cut_heads(num_heads: int, num_kv_heads: int, ranks: Ranks) -> HeadCut:
    """Whole groups of query heads with their key head; with more ranks than key heads, each of these is held by several."""
    share = num_heads // num_kv_heads
    if ranks.size <= num_kv_heads:
        kv = cut(num_kv_heads, ranks, "key heads")
        return HeadCut(scaled(kv, share), kv)
    if ranks.size % num_kv_heads:
        raise OptionError(
            f"tensor_parallel {ranks.size} shares {num_kv_heads} key heads unevenly; use a multiple of {num_kv_heads}"
        )
    holders = ranks.size // num_kv_heads
    kv_head, holder = divmod(ranks.rank, holders)
    own = cut(share, Ranks(holder, holders), f"query heads of each of {num_kv_heads} key heads")
    return HeadCut(slice(kv_head * share + own.start, kv_head * share + own.stop), slice(kv_head, kv_head + 1))
