"""Scales moved from the keys to the queries, so that keys of every element are of one size and int8 serves them all.

Some models have key biases tens of times larger in a few elements than in the rest (Qwen2.5's first and last layers): a token's
int8 scale follows those, and little is left for the others. Rotary embedding turns elements j and j + D/2 of a head into each
other, so a factor they share may be divided out of the keys and multiplied into the queries: q.k stays what it was. It costs
nothing at run time. Factors are powers of two: nothing is rounded.
Letters: N query heads, K key heads, D head size, H width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.schemes.affine import dequantize, scaled_rows
from saccade.schemes.scheme import Weight

MAX_EXPONENT = 12


def fold_keys(qkv: Weight, gain: Tensor, num_heads: int, num_kv_heads: int) -> Weight:
    """qkv: the stacked projection, rows of N query heads, K key heads, K value heads; gain: [H] of the norm before it.

    Dense or of any scheme: only the scales of rows change, and the biases.
    """
    head_dim = qkv.out_features // (num_heads + 2 * num_kv_heads)
    first, last = num_heads * head_dim, (num_heads + num_kv_heads) * head_dim
    factor = key_factors(qkv, slice(first, last), gain, num_kv_heads)
    rows = torch.ones(qkv.out_features, device=factor.device)
    rows[:first] = factor.repeat_interleave(num_heads // num_kv_heads, dim=0).flatten()
    rows[first:last] = 1 / factor.flatten()
    return scaled_rows(qkv, rows)


def key_factors(qkv: Weight, keys: slice, gain: Tensor, num_kv_heads: int) -> Tensor:
    """[K, D] powers of two, one for each rotary pair: its root mean square over its head's median.

    A key element's mean square is that of its bias and of its row, for inputs of mean square 1 before the gain.
    """
    square = (dequantize(qkv, keys) * gain.float()).square().sum(dim=1)
    if qkv.bias is not None:
        square = square + qkv.bias[keys].float().square()
    pairs = square.view(num_kv_heads, 2, -1).sum(dim=1)  # [K, D/2]
    ratio = (pairs / pairs.median(dim=1, keepdim=True).values).sqrt()
    exponent = torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0).log2().round()
    return torch.exp2(exponent.clamp(-MAX_EXPONENT, MAX_EXPONENT)).repeat(1, 2)
