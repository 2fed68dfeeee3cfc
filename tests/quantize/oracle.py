"""Slow, obvious versions of exact mode's algorithms, each candidate and each row of attention whole; sums in its fixed order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.kernels import ordered
from saccade.quantize.forward import rotate_half
from saccade.quantize.objectives import DecoderAttention, GateUp, TowerAttention

EPS = 1.1920929e-07
Result = Callable[[Tensor], Tensor]  # x W^T -> what is compared


def gate_up(objective: GateUp) -> Result:
    def result(product: Tensor) -> Tensor:
        product = product if objective.bias is None else product + objective.bias
        half = product.shape[1] // 2
        return (F.silu(product[:, :half]) * product[:, half:]).float()

    return result


def decoder_attention(objective: DecoderAttention) -> Result:
    D, N, K = objective.head_dim, objective.num_heads, objective.num_kv_heads

    def result(product: Tensor) -> Tensor:
        T = len(product)
        q, k, v = (part.view(T, -1, D).transpose(0, 1) for part in torch.split(product, [N * D, K * D, K * D], dim=1))
        frequencies = objective.rope_theta ** -(torch.arange(0, D, 2).double() / D)
        angles = (objective.positions[:, None].double() * frequencies.float()).float().repeat(1, 2)
        q, k = (x * angles.cos() + rotate_half(x) * angles.sin() for x in (q, k))
        k, v = k.repeat_interleave(N // K, 0), v.repeat_interleave(N // K, 0)
        logits = (q / math.sqrt(D)) @ k.transpose(1, 2)
        future = torch.ones(T, T).triu(1).bool()
        logits = logits.masked_fill(future, torch.finfo(product.dtype).min)
        weights = ordered.softmax(logits).to(product.dtype)
        return ordered.matmul(weights, v).transpose(0, 1).reshape(T, -1).float()

    return result


def tower_attention(objective: TowerAttention) -> Result:
    def result(product: Tensor) -> Tensor:
        T = len(product)
        q, k, v = product.view(T, 3, objective.num_heads, -1).permute(1, 2, 0, 3)
        q, k = ((x.float() * objective.cos + rotate_half(x.float()) * objective.sin).to(x.dtype) for x in (q, k))
        mask = torch.full((T, T), torch.finfo(product.dtype).min, dtype=product.dtype)
        for start, end in pairwise(objective.bounds):
            mask[start:end, start:end] = 0
        logits = ordered.matmul(q, k.transpose(1, 2)) / math.sqrt(objective.scaling_head_dim) + mask
        return ordered.matmul(ordered.softmax(logits).to(product.dtype), v)

    return result


def search(x: Tensor, weight: Tensor, result: Result) -> Tensor:
    """Every candidate whole, from the largest threshold down; the first of the smallest losses wins."""
    high, low = x.max(0)[0], x.min(0)[0]
    top, bottom = max(high.max().item(), 0.0), min(low.min().item(), 0.0)
    t = max(top, -bottom)
    step = (t - 0.1) / max(100, int(top / 0.5))
    exact = result(ordered.matmul(x, weight.T))
    best, winner = None, torch.ones_like(high)
    while t >= 0.1:
        rounded_t = torch.tensor(t, dtype=x.dtype)
        up = torch.where(high > rounded_t, high / rounded_t, 1)
        down = torch.where(low < -rounded_t, low / -rounded_t, 1)
        scale = torch.maximum(up, down)
        product = ordered.matmul(rounded_x(x / scale, rounded_t), rounded_w(weight * scale).T)
        loss = ordered.row_means(ordered.row_sums((result(product) - exact).abs().pow(2)).flatten())
        if best is None or loss < best:
            best, winner = loss, scale
        t -= step
    return winner


def rounded_x(x: Tensor, t: Tensor) -> Tensor:
    s = torch.maximum((t - -t) / 255, torch.tensor(EPS, dtype=x.dtype))
    zero = torch.clamp(-torch.round(-t / s), 0, 255)
    return (torch.clamp(torch.round(x / s) + zero, 0, 255) - zero) * s


def rounded_w(weight: Tensor) -> Tensor:
    s = weight.abs().max(1, keepdim=True)[0] / 127
    s = torch.maximum(s, torch.tensor(EPS, dtype=weight.dtype))
    return torch.clamp(torch.round(weight / s), -127, 127) * s


def histogram_range(
    counts: Sequence[float], low: float, high: float, error: Callable[[int, int], float]
) -> tuple[int, int]:
    """The search over bins, a bin at a time."""
    cumulated: list[float] = torch.cumsum(torch.tensor(counts), 0).tolist()
    total = float(torch.tensor(counts).sum())
    alpha, beta, a, b, best = 0.0, 1.0, 0, len(counts) - 1, math.inf
    while alpha < beta:
        left, right = a, b
        while left < b and cumulated[left] < (alpha + 1e-5) * total:
            left += 1
        while right > a and cumulated[right] > (beta - 1e-5) * total:
            right -= 1
        if left - a > b - right:
            alpha, proposal = alpha + 1e-5, (left, b)
        else:
            beta, proposal = beta - 1e-5, (a, right)
        if proposal != (a, b):
            loss = error(*proposal)
            if loss > best:
                break
            best, (a, b) = loss, proposal
    return a, b
