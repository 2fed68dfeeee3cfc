"""Smoothing scales learned channel by channel: the expected rounding error as a function of them, and its steepest descent.

SmoothQuant, AWQ and Outlier Suppression+ search a family of one parameter. What roundings cost has a closed form, though: a
value that is rounded to steps of size d is wrong by d^2 / 12 on average, and by its own square where it is far smaller than a
step, and d is set by the largest value of its token, row or group. So the output's expected error

    sum_t v_t sum_c noise(x_tc / s_c) s_c^2 |W_c|^2  +  sum_o d_o^2 / 12 sum_c m_c / s_c^2

(inputs' roundings, then weights') is minimised over log s directly, with the gradient written out. The idea of learning
equivalent scales is OmniQuant's (arXiv:2308.13137, section 3.2), which passes gradients through the roundings of a whole block
instead. Knows tensors; knows no model. Letters: n tokens, H channels, S scales, O outputs, G columns of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.quantize.steps import largest_multiple
from saccade.schemes.scheme import Scheme

NUM_STEPS = 60
RATE = 0.08  # of log s in a step, falling to zero in a straight line
MOMENTUM, SQUARES, TINY = 0.9, 0.99, 1e-30  # Adam's (arXiv:1412.6980)
LEVELS = 127.0  # steps from zero to the largest input
STATIC_POWER = (
    4.0  # a fixed range follows the largest tokens, softly: the norm of this power over tokens' squared maxima
)
COMPENSATED = 0.6  # of a weight's rounding error that searched steps and GPTQ leave


def learned_scale(
    rows: Tensor, shares: Tensor, weight: Tensor, scheme: Scheme, columns: Tensor, start: Tensor
) -> Tensor:
    """rows: [n, H] inputs; shares: [n], how much each token's error weighs; weight: [O, H]; columns: [H], the scale each
    column takes; start: [S]. Returns [S] float32 with a geometric mean of 1.
    """
    log_scale = start.log()
    mean, square = torch.zeros_like(log_scale), torch.zeros_like(log_scale)
    energy = weight.square().sum(0)
    second = shares @ rows.square()
    rows_square, weight_square = rows.square(), weight.square()
    for step in range(1, NUM_STEPS + 1):
        scale_square = (2 * log_scale)[columns].exp()
        slope = _weight_slope(weight_square * scale_square, second / scale_square, scheme)
        if scheme.activation != "none":
            slope += _input_slope(rows_square / scale_square, shares, energy * scale_square, scheme)
        gradient = torch.zeros_like(log_scale).index_add_(0, columns, slope)
        mean.lerp_(gradient, 1 - MOMENTUM)
        square.lerp_(gradient.square(), 1 - SQUARES)
        direction = (mean / (1 - MOMENTUM**step)) / (square / (1 - SQUARES**step)).sqrt().clamp_(min=TINY)
        log_scale -= RATE * (1 - (step - 1) / NUM_STEPS) * direction
    return (log_scale - log_scale.mean()).exp()


def _input_slope(x: Tensor, shares: Tensor, energy: Tensor, scheme: Scheme) -> Tensor:
    """Of the first sum, by log s: [H]. x: [n, H], the squares of the divided inputs; energy: [H] of the multiplied columns.

    With a token's noise x d / (x + d), d its squared step over 12, a channel's scale raises its share of the noise and, where
    the channel is the largest of a token, lowers the step of all.
    """
    if scheme.is_float:  # a float's error is a share of the number itself: no scale changes it
        return torch.zeros_like(energy)
    largest, where = x.max(1)
    floor = largest.max() * 1e-12 + TINY
    if scheme.activation == "static":
        relative = largest / largest.max().clamp(min=TINY)
        total = relative.pow(STATIC_POWER).mean()
        step = (largest.max() * total ** (1 / STATIC_POWER) / (12 * LEVELS**2) + floor).expand_as(largest)
        lowers = relative.pow(STATIC_POWER) / (total * len(x))
    else:
        step, lowers = largest / (12 * LEVELS**2) + floor, None
    ratio = x / (x + step[:, None])
    cost = ratio.square_().mul_((shares * step)[:, None]).mul_(energy)
    by_token = cost.sum(1)
    slope = 2 * cost.sum(0)
    return slope.index_add_(0, where, by_token if lowers is None else lowers * by_token.sum(), alpha=-2)


def _weight_slope(w: Tensor, second: Tensor, scheme: Scheme) -> Tensor:
    """Of the second sum, by log s: [H]. w: [O, H], the squares of the multiplied weight; second: [H] of the divided inputs."""
    if scheme.is_float:
        return torch.zeros_like(second)
    size = scheme.group_size or w.shape[1]
    largest, where = w.view(len(w), -1, size).max(2)  # [O, groups]
    step = largest * (COMPENSATED / (12 * largest_multiple(scheme) ** 2))
    by_group = second.view(-1, size).sum(1)
    slope = (-2 * step.sum(0)[:, None] * second.view(-1, size)).flatten()
    place = where + torch.arange(len(by_group), device=w.device) * size
    return slope.index_add_(0, place.flatten(), (step * by_group).flatten(), alpha=2)
