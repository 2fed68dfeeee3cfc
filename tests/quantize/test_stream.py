"""How calibration multiplies: in float32 where the processor has no bfloat16, and nothing that nobody reads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from saccade.kernels import reference
from saccade.model.layers import Linear
from saccade.quantize import stream
from saccade.quantize.statistics import Tokens, Watcher
from saccade.quantize.stream import Watched, widened
from saccade.schemes.affine import quantize_rows_int8
from saccade.schemes.scheme import W8A8_DYNAMIC, Weight


def weight(num_outputs: int, *, has_bias: bool = False) -> Weight:
    generator = torch.Generator().manual_seed(num_outputs)
    bias = torch.randn(num_outputs, generator=generator).bfloat16() if has_bias else None
    return Weight(torch.randn(num_outputs, 24, generator=generator).bfloat16(), bias=bias)


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_widened_product_is_float32s_rounded_once(has_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "VALUES_AT_ONCE", 5 * 24)  # 5 outputs at a time, and 3 at the end
    its, x = weight(18, has_bias=has_bias), torch.randn(7, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x.double() @ its.values.double().t() + (0 if its.bias is None else its.bias.double())
    assert torch.equal(widened(reference.linear)(x, its), exact.float().bfloat16())


def test_only_bfloat16_is_widened() -> None:
    def not_here(x: Tensor, weight: Weight) -> Tensor:
        return torch.full((len(x), weight.out_features), 3.0)

    values, scale = quantize_rows_int8(torch.ones(4, 24))
    for x, other in (
        (torch.ones(2, 24).bfloat16(), Weight(values, scale, scheme=W8A8_DYNAMIC)),
        (torch.ones(2, 24), Weight(torch.ones(4, 24))),
    ):
        assert bool((widened(not_here)(x, other) == 3).all())


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
