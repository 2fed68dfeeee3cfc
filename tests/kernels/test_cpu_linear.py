"""Linear layers in C++, on every instruction set this machine has: whole numbers equal the reference, sums of floats within bounds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from saccade.base.errors import OptionError
from saccade.kernels import cpu, reference
from saccade.kernels.choose import back_ends, choose
from saccade.kernels.cpu_linear import describe
from saccade.kernels.library import Library, load
from saccade.kernels.record import Kernels
from saccade.schemes.affine import dequantize, quantize_rows_fp8, quantize_weight
from saccade.schemes.packing import pack
from saccade.schemes.scheme import (
    DENSE,
    FP8,
    W4A8,
    W4A8_FLOAT,
    W4A16,
    W4A16_ASYM,
    W8A8,
    W8A8_DYNAMIC,
    W8A16,
    Scheme,
    Static,
    Weight,
)

LIBRARY = load()
if isinstance(LIBRARY, str):
    pytest.skip(LIBRARY, allow_module_level=True)

INTEGER = [W8A8, W8A8_DYNAMIC, W4A8[32], W4A8[64], W4A8[128], W4A8[256]]
FLOATING = [DENSE, W8A16, W4A16[32], W4A16[128], W4A16_ASYM[32], W4A16_ASYM[128], FP8, W4A8_FLOAT[32]]
ROWS = [1, 3, 4, 7, 9, 129]
BY_ROW = [(1, 1), (33, 65), (12, 3420), (130, 128)]  # outputs and columns, odd ones among them
BY_GROUP = [(33, 256), (130, 512), (3, 2816)]


@pytest.fixture(params=LIBRARY.supported)
def library(request: pytest.FixtureRequest) -> Iterator[Library]:
    assert isinstance(LIBRARY, Library)
    before = LIBRARY.isa
    LIBRARY.use(request.param)
    yield LIBRARY
    LIBRARY.use(before)


@pytest.fixture
def kernels(library: Library) -> Kernels:
    return cpu.kernels(library)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_weight(scheme: Scheme, outputs: int, columns: int, dtype: torch.dtype, bias: bool = True) -> Weight:
    dense = Weight(
        random(outputs, columns, seed=outputs) * 0.05,
        bias=random(outputs, seed=1).to(dtype) if bias else None,
    )
    if scheme.is_dense:
        return dense.to(torch.device("cpu"), dtype)
    if scheme.activation == "static":
        whole = quantize_weight(dense, W8A16)
        assert whole.scale is not None
        quant_bias = (random(outputs, seed=2) * 1000).to(torch.int32)
        static = Static(torch.tensor([0.021]), torch.tensor([-17.0]), quant_bias, whole.scale * 0.021)
        return Weight(whole.values, whole.scale, whole.bias, W8A8, static=static)
    return quantize_weight(dense, scheme)


def as_multiplied(x: Tensor, scheme: Scheme) -> Tensor:
    """What a linear with floating-point scales multiplies instead of x, in float64."""
    if scheme.activation == "none":
        return x.double()
    values, scale = (quantize_rows_fp8 if scheme.is_float else reference.quantize_rows)(x)
    return values.double() * scale[:, None].double()


def cases(schemes: list[Scheme]) -> list[tuple[Scheme, int, int]]:
    return [(s, n, k) for s in schemes for n, k in (BY_GROUP if s.group_size else BY_ROW)]


def name(value: object) -> str | None:
    return value.name if isinstance(value, Scheme) else None


@pytest.mark.parametrize(("scheme", "outputs", "columns"), cases(INTEGER), ids=name)
def test_whole_numbers_equal_the_reference(kernels: Kernels, scheme: Scheme, outputs: int, columns: int) -> None:
    for dtype, bias in ((torch.bfloat16, True), (torch.float32, False), (torch.float16, True)):
        weight = random_weight(scheme, outputs, columns, dtype, bias)
        for rows in ROWS:
            x = random(rows, columns, seed=rows).to(dtype)
            assert torch.equal(kernels.linear(x, weight), reference.linear(x, weight)), (dtype, rows)


@pytest.mark.parametrize(("scheme", "outputs", "columns"), cases(FLOATING), ids=name)
def test_sums_of_floats_are_near_exact_ones(kernels: Kernels, scheme: Scheme, outputs: int, columns: int) -> None:
    """The result is rounded once, the sum is in float32, and of groups the dequantized value may be rounded to bfloat16."""
    for dtype, bias in ((torch.bfloat16, True), (torch.float32, False), (torch.float16, True)):
        weight = random_weight(scheme, outputs, columns, dtype, bias)
        is_known = not (scheme.is_dense and dtype != torch.bfloat16)
        assert (describe(weight, dtype) is not None) == is_known
        wide = dequantize(weight).double()
        for rows in ROWS:
            x = random(rows, columns, seed=rows).to(dtype)
            taken = as_multiplied(x, scheme)
            exact = taken @ wide.t()
            if weight.bias is not None:
                exact += weight.bias.double()
            error = (kernels.linear(x, weight).double() - exact).abs()
            magnitude = taken.abs() @ wide.abs().t()
            of_sum = {W8A16: 2**-14}.get(
                scheme, 2**-9 if scheme.group_size else 2**-19
            )  # x in fixed point, or w rounded
            of_sum = of_sum if dtype == torch.bfloat16 else 2**-19
            bound = magnitude * of_sum + exact.abs() * torch.finfo(dtype).eps / 2 + 1e-6
            assert (error <= bound).all(), (dtype, rows, (error / bound).max())


@pytest.mark.parametrize("scheme", [W8A16, W4A16[32], W4A16_ASYM[128]], ids=name)
def test_a_huge_column_leaves_the_others_their_digits(kernels: Kernels, scheme: Scheme) -> None:
    """Activations of a few columns can be thousands of times as large as all others, and meet weights of zero."""
    dense = random(40, 256, seed=3) * 0.05
    dense[:, 9] = 0
    weight = quantize_weight(Weight(dense), scheme)
    x = random(4, 256).bfloat16()
    x[1, 9] = x[3, 9] = 5000
    wide = dequantize(weight).double()
    exact, magnitude = x.double() @ wide.t(), x.double().abs() @ wide.abs().t()
    got = kernels.linear(x, weight)
    assert ((got.double() - exact).abs() <= magnitude * 2**-9 + exact.abs() * 2**-9 + 1e-6).all()
    for row in range(4):
        assert torch.equal(kernels.linear(x[row : row + 1], weight), got[row : row + 1])


@pytest.mark.parametrize("scheme", [DENSE, W8A16, W8A8_DYNAMIC, W4A8[32]], ids=name)
def test_no_rows_and_rows_that_lie_apart(kernels: Kernels, scheme: Scheme) -> None:
    weight = random_weight(scheme, 24, 96, torch.bfloat16)
    assert kernels.linear(torch.empty(0, 96, dtype=torch.bfloat16), weight).shape == (0, 24)
    wide = random(6, 200).bfloat16()
    for x in (wide[:, 7:103], wide[::2, :96], wide[:, :192:2]):
        assert torch.equal(kernels.linear(x, weight), kernels.linear(x.contiguous(), weight))


@pytest.mark.parametrize(("low", "group_size"), [(-128, None), (-8, 32), (-8, 64), (-8, 128), (-8, 256), (7, 256)])
def test_the_extremes_are_exact(kernels: Kernels, low: int, group_size: int | None) -> None:
    """29,568 columns is the widest layer of the published models; -8 times a group scale of 16 is -128."""
    columns = 29_568 if group_size in (None, 32) else 29_696
    whole = torch.full((18, columns), low, dtype=torch.int8)
    scheme, scale = W8A8, None
    if group_size is not None:
        scheme, scale = W4A8[group_size], torch.full((18, columns // group_size), 16, dtype=torch.int8)
    static = Static(torch.ones(1), torch.zeros(1), torch.zeros(18, dtype=torch.int32), torch.ones(18))
    for value, rows in itertools.product((-128.0, 127.0), (1, 3, 8, 17)):
        x = torch.full((rows, columns), value)
        if scheme is W8A8:
            got = kernels.linear(x, Weight(whole, torch.ones(18), None, scheme, static=static))
            assert (got == columns * value * -128).all()
        else:
            got = kernels.linear(x, Weight(pack(whole), torch.ones(18), None, scheme, scale))
            assert torch.equal(got, reference.linear(x, Weight(pack(whole), torch.ones(18), None, scheme, scale)))


@pytest.mark.parametrize("zero", [0.0, -16.0, 40.0])
@pytest.mark.parametrize("columns", [7, 130, 3420, 8200])
def test_loud_numbers_are_exact_wherever_they_meet(kernels: Kernels, columns: int, zero: float) -> None:
    """Quiet rows, loud ones and all between in one block: without VNNI, loud numbers are taken from a row, or the row as it is."""
    generator = torch.Generator().manual_seed(columns)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)

    rows, outputs = 43, 37
    quiet = (random(rows, columns) * 20).round().clamp(-128, 127).to(torch.int8)
    words = (columns + 3) // 4
    is_loud = torch.rand(rows, words, generator=generator) < torch.linspace(0, 1, rows)[:, None]
    x = torch.where(is_loud.repeat_interleave(4, 1)[:, :columns], whole(rows, columns), quiet)
    x[1], x[2], x[6] = -128, 127, quiet[6]
    x[6, -5:] = 127  # loud at the end alone
    x[11, ::2], x[11, 1::2] = 127, -128
    values = whole(outputs, columns)
    values[0], values[1] = -128, 127
    static = Static(torch.ones(1), torch.tensor([zero]), torch.zeros(outputs, dtype=torch.int32), torch.ones(outputs))
    weight = Weight(values, torch.ones(outputs), None, W8A8, static=static)
    got = kernels.linear(x.float() - zero, weight)
    assert torch.equal(got, (x.long() @ values.long().t()).float())


@pytest.mark.parametrize("rows", [1, 40])
def test_a_row_that_is_not_finite_spoils_no_other(kernels: Kernels, rows: int) -> None:
    for scheme in (W8A8_DYNAMIC, W4A8[64], W8A16, DENSE, FP8, W4A8_FLOAT[64]):
        weight = random_weight(scheme, 40, 128, torch.bfloat16)
        x = random(rows + 2, 128).bfloat16()
        good = kernels.linear(x, weight)
        x[0, 5], x[1, 7] = float("nan"), float("inf")
        got = kernels.linear(x, weight)
        assert got[0].isnan().all()
        assert not got[1].isfinite().any()
        assert torch.equal(got[2:], good[2:])


def test_a_weight_that_is_gone_is_forgotten(kernels: Kernels) -> None:
    """Ids return: a new weight of another scheme must not be taken for the one that had its id."""
    x = random(2, 64).bfloat16()
    for turn in range(20):
        weight = random_weight((W8A8_DYNAMIC, W4A8[32])[turn % 2], 16, 64, torch.bfloat16)
        assert torch.equal(kernels.linear(x, weight), reference.linear(x, weight))
        del weight


def test_gradients_flow_through_the_reference(kernels: Kernels) -> None:
    x = random(3, 64).bfloat16().requires_grad_()
    kernels.linear(x, random_weight(DENSE, 16, 64, torch.bfloat16)).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [5, 70])
def test_the_number_of_threads_changes_no_result(kernels: Kernels, library: Library, threads: int, rows: int) -> None:
    weight = random_weight(DENSE, 300, 256, torch.bfloat16)
    x = random(rows, 256).bfloat16()
    before = library.num_threads
    expected = kernels.linear(x, weight)
    library.set_num_threads(threads)
    assert torch.equal(kernels.linear(x, weight), expected)
    library.set_num_threads(before)


@pytest.mark.parametrize("scheme", [DENSE, W8A16, W4A16[64], W8A8_DYNAMIC, W4A8[64], FP8, W4A8_FLOAT[64]], ids=name)
def test_of_many_rows_each_has_the_bits_it_has_among_others(kernels: Kernels, scheme: Scheme) -> None:
    """4,608 columns are staged in several turns, and 400 rows are more than the sums kept meanwhile."""
    for columns, rows in ((192, 75), (4608, 400)):
        weight = random_weight(scheme, 50, columns, torch.bfloat16)
        x = random(rows, columns).bfloat16()
        whole = kernels.linear(x, weight)
        for first, last in ((0, 9), (3, 40), (rows - 30, rows)):
            assert torch.equal(kernels.linear(x[first:last], weight), whole[first:last]), (columns, first, last)


@pytest.mark.parametrize("scheme", [DENSE, W8A8_DYNAMIC, W4A8[64], W4A8[256]], ids=name)
def test_of_few_rows_each_has_the_bits_it_has_alone(kernels: Kernels, scheme: Scheme) -> None:
    """8 rows of 6,656 columns fit no first-level cache, 3 of 768 do."""
    for columns in (768, 6656):
        weight = random_weight(scheme, 600, columns, torch.bfloat16)
        x = random(8, columns).bfloat16()
        alone = torch.cat([kernels.linear(x[row : row + 1], weight) for row in range(8)])
        for rows in range(2, 9):
            assert torch.equal(kernels.linear(x[:rows], weight), alone[:rows]), (columns, rows)


def test_an_op_can_be_given_back_to_the_reference() -> None:
    chosen = choose(torch.device("cpu"), {"linear": "reference"})
    assert chosen.linear is reference.linear
    assert chosen.sources["linear"] == "reference"
    assert choose(torch.device("cpu")).sources["linear"] == "cpu"


def test_an_instruction_set_this_machine_lacks_is_refused(library: Library) -> None:
    with pytest.raises(OptionError, match="is unknown; choose one of portable"):
        library.use("mmx")


def test_the_doctor_says_which_instruction_set_serves_and_why(library: Library) -> None:
    line = next(line for line in back_ends() if line.name == "cpu")
    assert line.is_active
    assert f"C++ with {library.isa} (" in line.reason
    assert ("forced" in line.reason) == (library.isa != library.supported[-1])
