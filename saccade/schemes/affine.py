"""Numbers to integers and back: scales from ranges, round to nearest."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.schemes.scheme import W8A16, Weight


def quantize_rows_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per row, round to nearest even. values: [O, H]. Returns ([O, H] int8, scale [O] float32)."""
    wide = values.float()
    scale = wide.abs().amax(dim=1).clamp_(min=torch.finfo(torch.float32).tiny) / 127
    return (wide / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


def quantize_weight(weight: Weight, rows_at_a_time: int = 4096) -> Weight:
    """A dense weight as W8A16, in memory bounded by `rows_at_a_time` float32 rows beyond the result."""
    pieces = [quantize_rows_int8(rows) for rows in torch.split(weight.values, rows_at_a_time)]
    values, scale = torch.cat([piece[0] for piece in pieces]), torch.cat([piece[1] for piece in pieces])
    return Weight(values, scale, weight.bias, W8A16)
