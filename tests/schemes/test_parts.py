"""Parts of a weight: put together again they are the whole, scheme by scheme."""

from __future__ import annotations

import pytest
import torch

from saccade.base.errors import OptionError
from saccade.kernels.reference import linear
from saccade.schemes.affine import quantize_weight
from saccade.schemes.parts import pad_columns, pad_rows, take_columns, take_rows
from saccade.schemes.scheme import SCHEMES, W8A8, Scheme, Static, Weight

COLUMNS = [slice(0, 256), slice(256, 512), slice(512, 768)]
ALL = list(SCHEMES.values())


def make(scheme: Scheme) -> Weight:
    generator = torch.Generator().manual_seed(0)
    dense = Weight(torch.randn(48, 768, generator=generator), bias=torch.randn(48, generator=generator))
    if scheme.is_dense:
        return dense
    if scheme != W8A8:
        return quantize_weight(dense, scheme)
    values = torch.randint(-127, 128, (48, 768), generator=generator, dtype=torch.int8)
    deq_scale = torch.full((48,), 2e-4)
    quant_bias = (dense.bias / deq_scale - 5 * values.float().sum(1)).round().to(torch.int32)  # type: ignore[operator]
    static = Static(torch.tensor([0.05]), torch.tensor([5.0]), quant_bias, deq_scale)
    return Weight(values, deq_scale / 0.05, dense.bias, W8A8, static=static)


@pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: scheme.name)
def test_rows_are_computed_apart_as_together(scheme: Scheme) -> None:
    weight, x = make(scheme), torch.randn(5, 768, generator=torch.Generator().manual_seed(1))
    part = take_rows(weight, [slice(40, 48), slice(3, 10)])
    whole = linear(x, weight)
    apart = linear(x, part)  # a product of another shape may sum in another order
    torch.testing.assert_close(apart, torch.cat([whole[:, 40:48], whole[:, 3:10]], dim=1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: scheme.name)
def test_products_of_columns_add_up_and_the_bias_counts_once(scheme: Scheme) -> None:
    weight, x = make(scheme), torch.randn(5, 768, generator=torch.Generator().manual_seed(1))
    for columns in COLUMNS[
        1:
    ]:  # so that activations with a scale of their own for each row get the same one in all parts
        x[:, columns.start] = x[:, 0]
    x[:, 0], x[:, 256], x[:, 512] = 6, 6, 6
    parts = [take_columns(weight, columns, "down", keep_bias=not i) for i, columns in enumerate(COLUMNS)]
    total = sum(linear(x[:, columns], part) for columns, part in zip(COLUMNS, parts, strict=True))
    assert isinstance(total, torch.Tensor)
    torch.testing.assert_close(total, linear(x, weight), rtol=1e-4, atol=1e-4)


def test_a_group_is_not_cut() -> None:
    weight = make(SCHEMES["w4a8-g128"])
    with pytest.raises(OptionError, match="columns 0 to 64 of down cut groups of 128; use fewer ranks"):
        take_columns(weight, slice(0, 64), "down", keep_bias=True)


@pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: scheme.name)
def test_rows_and_columns_of_zeros_change_no_output(scheme: Scheme) -> None:
    weight, x = make(scheme), torch.randn(5, 768, generator=torch.Generator().manual_seed(1))
    whole = linear(x, weight).unflatten(1, (2, 24))
    padded = linear(x, pad_rows(weight, 2, 8)).unflatten(1, (2, 32))
    torch.testing.assert_close(padded[..., :24], whole, rtol=1e-5, atol=1e-4)
    assert not padded[..., 24:].any()
    if scheme.group_size is None:
        wide = torch.nn.functional.pad(x, (0, 32))
        torch.testing.assert_close(linear(wide, pad_columns(weight, 32)), whole.flatten(1), rtol=1e-5, atol=1e-4)
