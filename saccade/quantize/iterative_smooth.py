"""anti_method m4: scales from the largest activations and weights, without a search (section 6).

The idea of SmoothQuant (arXiv:2211.10438, equation 4) with alpha fixed at 0.9. Knows tensors; knows no model and no policy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALPHA = 0.9
FLOOR = 1e-5  # of the weights' maxima and of the scale


def smooth_scale(activation_maxima: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """activation_maxima: [H] in T; weights: [O, H] each. Returns the scale [H] in T: A^0.9 / B^0.1, rounded after each step.

    torch rounds the exponents, too, to T: in bfloat16 the first is 0.8984375.
    """
    dtype = activation_maxima.dtype
    maxima = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    maxima = maxima.float().clamp(min=FLOOR).to(dtype)
    scale = activation_maxima.pow(ALPHA) / maxima.pow(1 - ALPHA)
    return scale.float().clamp(min=FLOOR).to(dtype)


def grouped_scales(scale: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor]:
    """For v -> o with grouped heads. scale: [num_heads * D] at o_proj's input.

    Returns (scale of v's rows [num_kv_heads * D], scale of o's columns [num_heads * D]): the mean over a group's query heads, in T.
    """
    groups = num_heads // num_kv_heads
    if groups == 1:
        return scale, scale
    mean = torch.stack([part.mean(0) for part in scale.view(num_kv_heads, groups, -1)])  # [K, D]
    return mean.flatten(), mean[:, None].expand(-1, groups, -1).flatten()
