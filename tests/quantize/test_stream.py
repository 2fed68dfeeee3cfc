"""What calibration multiplies: nothing that nobody reads."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from saccade.kernels import reference
from saccade.model.layers import Linear
from saccade.quantize.statistics import Tokens, Watcher
from saccade.quantize.stream import Watched
from saccade.schemes.scheme import Weight


def weight(num_outputs: int) -> Weight:
    return Weight(torch.randn(num_outputs, 24, generator=torch.Generator().manual_seed(num_outputs)).bfloat16())


def test_what_nobody_reads_is_seen_but_not_multiplied() -> None:
    multiplied = []

    def linear(x: Tensor, weight: Weight) -> Tensor:
        multiplied.append(weight)
        return reference.linear(x, weight)

    watched = Watched(replace(reference.kernels(), linear=linear))
    first, last = (_linear(watched, name, weight(18)) for name in ("a", "b"))
    watchers = {layer: Watcher(24, torch.device("cpu"), None) for layer in (first, last)}
    watched.watch(watchers, unread=last)
    watched.now(Tokens(torch.zeros(3, dtype=torch.int8), torch.full((3,), 1 / 3), torch.ones(3, dtype=torch.bool)))
    x = torch.ones(3, 24).bfloat16()
    first(x)
    assert not last(x).any()
    assert multiplied == [first.weight]
    assert all(len(watcher.seen().rows) == 3 for watcher in watchers.values())
    watched.watch({})
    assert last(x).any()


def _linear(watched: Watched, name: str, its: Weight) -> Linear:
    layer = Linear(watched.kernels, 24, {name: its.out_features}, bias=False)
    layer.weight = its
    return layer
