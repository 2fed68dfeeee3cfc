"""A linear layer with few rows takes another way through torch; the numbers stay those of many rows."""

from __future__ import annotations

import pytest
import torch

from saccade.kernels.reference import FEW_ROWS, linear
from saccade.schemes.scheme import Weight

# The largest distance from float64 of one rounding of a result of magnitude below 8: half a unit of the type's last place.
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 2**-6 * 1.05, torch.float16: 2**-9 * 1.05}


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 7, FEW_ROWS, FEW_ROWS + 1, 129])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_any_number_of_rows_is_as_near_to_float64_as_the_type_allows(
    dtype: torch.dtype, num_rows: int, has_bias: bool
) -> None:
    torch.manual_seed(num_rows)
    x = torch.randn(num_rows, 129).to(dtype)
    weight = Weight((torch.randn(257, 129) * 0.1).to(dtype), bias=torch.randn(257).to(dtype) if has_bias else None)
    exact = x.double() @ weight.values.double().T + (weight.bias.double() if weight.bias is not None else 0)

    y = linear(x, weight)

    assert y.shape == (num_rows, 257)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert (y.double() - exact).abs().max() <= ROUNDING[dtype]


@pytest.mark.parametrize("num_rows", [1, 7, 129])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_strided_input_gives_what_its_copy_gives(dtype: torch.dtype, num_rows: int) -> None:
    x = torch.randn(num_rows * 2, 130).to(dtype)[::2, 1:]
    weight = Weight(torch.randn(33, 129).to(dtype))
    torch.testing.assert_close(linear(x, weight), linear(x.contiguous(), weight))


def test_no_rows_give_no_rows() -> None:
    assert linear(torch.empty(0, 8, dtype=torch.bfloat16), Weight(torch.ones(3, 8, dtype=torch.bfloat16))).shape == (
        0,
        3,
    )


@pytest.mark.parametrize("num_rows", [1, 7])
def test_gradients_pass_through_few_rows(num_rows: int) -> None:
    values = torch.randn(5, 8).bfloat16().requires_grad_()
    bias = torch.zeros(5).bfloat16().requires_grad_()
    x = torch.randn(num_rows, 8).bfloat16().requires_grad_()
    linear(x, Weight(values, bias=bias)).float().sum().backward()
    assert values.grad is not None
    assert bias.grad is not None
    assert x.grad is not None
    torch.testing.assert_close(bias.grad, torch.full_like(bias, num_rows))
    torch.testing.assert_close(x.grad, values.detach().float().sum(0).bfloat16().expand_as(x), rtol=2e-2, atol=2e-2)
