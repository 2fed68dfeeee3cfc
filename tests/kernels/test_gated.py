"""A product that goes through its gate in its own launch gives what the product, then the gate, then what the next one takes do."""

from __future__ import annotations

import pytest
import torch

from saccade.kernels import triton_linear, triton_rows
from saccade.kernels.choose import lack_of
from saccade.kernels.triton_cuts import FEW_ROWS, cut_of, has_one_row_kernel
from tests.kernels.test_decoder import weight

CPU = torch.device("cpu")
WHOLE = ("w8a8", "w8a8-dynamic", "w4a8-g64")  # whose sums are whole numbers
SCHEMES = [*WHOLE, "dense", "w8a16", "w4a16-g32", "w4a8-float-g64", "fp8"]

pytestmark = pytest.mark.skipif(lack_of("triton", CPU) is not None, reason=str(lack_of("triton", CPU)))


@pytest.mark.parametrize("num_columns", [64, 1088])  # the latter split among programs
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("next_scheme", ["w8a16", "w8a8"])
def test_the_gate_gives_what_three_steps_do(scheme: str, next_scheme: str, num_columns: int) -> None:
    """Odd numbers of outputs, a NaN among the rows."""
    torch.manual_seed(2)
    for dtype, width, num_rows in ((torch.bfloat16, 37, 1), (torch.float32, 32, 5), (torch.float16, 16, FEW_ROWS + 1)):
        gate_up, down = weight(scheme, 2 * width, num_columns, dtype), weight(next_scheme, 8, 32, dtype)
        x = torch.randn(num_rows, num_columns).to(dtype)
        x[num_rows // 2, 3] = torch.nan if num_rows > 1 else 1.0
        rows = triton_rows.rows_for(x, gate_up)
        got = triton_linear.gated_rows(rows, gate_up, down, dtype)
        expected = triton_rows.rows_for(triton_linear.product(rows, gate_up, dtype), down, is_gated=True)
        assert got.values.dtype == expected.values.dtype
        assert got.values.shape == (num_rows, width)
        if scheme in WHOLE:
            assert torch.equal(got.values.nan_to_num(7.0), expected.values.nan_to_num(7.0))
        else:  # floats may be summed in another order, as a tile holds other rows of the weight
            unit = 1.01 if got.values.dtype == torch.int8 else 16 * torch.finfo(got.values.dtype).eps
            torch.testing.assert_close(
                got.values.float(), expected.values.float(), rtol=unit, atol=unit, equal_nan=True
            )
        if num_columns > 1000 and num_rows == 1 and not has_one_row_kernel(gate_up):
            assert cut_of(num_rows, gate_up, rows.values.element_size(), CPU).splits > 1, "nothing is split"


@pytest.mark.parametrize(
    ("scheme", "next_scheme", "num_launches"),
    [("w8a16", "w8a16", 1), ("w8a8", "w8a8", 1), ("w8a8-dynamic", "w8a8-dynamic", 2)],
)
def test_the_gate_costs_a_launch_only_where_a_rows_scale_is_to_be_found(
    monkeypatch: pytest.MonkeyPatch, scheme: str, next_scheme: str, num_launches: int
) -> None:
    counts = {"product": 0, "gate": 0}
    multiply, rows_for = triton_linear.multiply, triton_linear.rows_for

    def counted_product(*args: object) -> None:
        counts["product"] += 1
        multiply(*args)  # type: ignore[arg-type]

    def counted_gate(*args: object, is_gated: bool) -> object:
        counts["gate"] += 1
        return rows_for(*args, is_gated=is_gated)  # type: ignore[arg-type]

    gate_up, down = weight(scheme, 64, 64, torch.float32), weight(next_scheme, 64, 32, torch.float32)
    rows = triton_rows.rows_for(torch.randn(3, 64), gate_up)
    monkeypatch.setattr(triton_linear, "multiply", counted_product)
    monkeypatch.setattr(triton_linear, "rows_for", counted_gate)
    triton_linear.gated_rows(rows, gate_up, down, torch.float32)
    assert sum(counts.values()) == num_launches
