"""Two 4-bit integers in a byte: the one layout used in memory, and the one Ascend files use.

Letters: O rows, H columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

RUN = 32  # columns that share 16 bytes; divides every group size


def pack(values: Tensor) -> Tensor:
    """values: [O, H] int8 from -8 to 7, H a multiple of 32. Returns [O, H/2] uint8.

    Of every 32 columns the first 16 lie in the low nibbles of 16 bytes and the last 16 in their high nibbles, so that a
    kernel widens a run of bytes into two runs of neighbouring columns without shuffling. Rows stay whole: packed weights
    are stacked and split by rows like any other.
    """
    num_rows, num_columns = values.shape
    assert num_columns % RUN == 0, f"{num_columns} columns are no multiple of {RUN}"
    runs = values.view(torch.uint8).view(num_rows, num_columns // RUN, 2, RUN // 2)
    return ((runs[:, :, 1] << 4) | (runs[:, :, 0] & 15)).view(num_rows, num_columns // 2)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`. packed: [O, H/2] uint8, contiguous. Returns [O, H] int8.

    Eight bytes at a time: a nibble n gets its sign as ((n ^ 0x88) - 0x08) ^ 0x80, which never borrows from the next byte.
    """
    num_rows, num_bytes = packed.shape
    words = packed.view(torch.int64).view(num_rows, num_bytes // 16, 2)
    out = words.new_empty(num_rows, num_bytes // 16, 2, 2)
    torch.bitwise_and(words, _each_byte(0x0F), out=out[:, :, 0])
    torch.bitwise_and(words >> 4, _each_byte(0x0F), out=out[:, :, 1])
    out.bitwise_xor_(_each_byte(0x88)).sub_(_each_byte(0x08)).bitwise_xor_(_each_byte(0x80))
    return out.view(num_rows, -1).view(torch.int8) if num_rows else packed.new_empty(0, 2 * num_bytes).view(torch.int8)


def _each_byte(value: int) -> int:
    """The int64 all of whose bytes are `value`."""
    return int.from_bytes(bytes([value] * 8), "little", signed=True)


def pack_row_pairs(values: Tensor) -> Tensor:
    """Ascend's packing. values: [O, H] int8 from -8 to 7, O even. Returns [O/2, H] int8: row 2r in the low nibbles."""
    assert len(values) % 2 == 0, f"{len(values)} rows cannot be packed in pairs"
    return (values[1::2] << 4) | (values[0::2] & 15)


def unpack_row_pairs(packed: Tensor) -> Tensor:
    """The inverse of `pack_row_pairs`. packed: [O/2, H] int8. Returns [O, H] int8."""
    return torch.stack([_low(packed), packed >> 4], dim=1).flatten(0, 1)


def _low(packed: Tensor) -> Tensor:
    """The low nibble of each int8, with its sign: the right shift of a signed integer copies the sign bit."""
    return (packed << 4) >> 4
