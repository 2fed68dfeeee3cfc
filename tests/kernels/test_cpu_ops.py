"""The C++ ops besides linear, on every instruction set of this machine, against the reference in wider types."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from saccade.kernels import cpu, library, reference
from saccade.kernels.library import Library
from saccade.kernels.record import Kernels, PagedLayout, Segments

LOADED = library.load()
ISAS = () if isinstance(LOADED, str) else LOADED.supported
if not ISAS:
    pytest.skip(str(LOADED), allow_module_level=True)

# Half precision keeps 11 or 8 bits; a result may be the neighbour of the right one where it is rounded twice.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(params=ISAS)
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    assert isinstance(LOADED, Library)
    before = LOADED.isa
    LOADED.use(request.param)
    yield cpu.kernels(LOADED)
    LOADED.use(before)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(got: Tensor, wide: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), wide.double(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_every_op_but_linear_is_ours(kernels: Kernels) -> None:
    assert set(kernels.sources.values()) == {"cpu"}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "columns"), [(0, 64), (1, 1), (3, 37), (129, 80), (40, 3420)])
def test_norm_and_gate(kernels: Kernels, dtype: torch.dtype, rows: int, columns: int) -> None:
    x, residual, gain = (randn(*s, dtype=dtype, seed=i) for i, s in enumerate([(rows, columns)] * 2 + [(columns,)]))
    y, total = kernels.rms_norm(x, gain, 1e-6, residual)
    assert torch.equal(total, x + residual)
    assert_close(y, reference.rms_norm(total.double(), gain.double(), 1e-6)[0], dtype)
    assert torch.equal(kernels.rms_norm(total, gain, 1e-6)[0], y)
    gate_up = randn(rows, 2 * columns, dtype=dtype, seed=3) * 8
    assert_close(kernels.silu_mul(gate_up) / 64, reference.silu_mul(gate_up.double()) / 64, dtype)


def test_the_gate_of_large_numbers_is_a_number_and_nan_stays(kernels: Kernels) -> None:
    gate = torch.tensor([-3e38, -200.0, 200.0, 3e38, math.nan])
    y = kernels.silu_mul(torch.cat([gate, torch.ones(5)])[None])[0]
    torch.testing.assert_close(y[:4], torch.tensor([0.0, 0.0, 200.0, 3e38]), atol=1e-30, rtol=1e-6)
    assert y[4].isnan()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", [2, 16, 80, 128])
def test_rotary_has_the_references_bits_and_leaves_its_input(
    kernels: Kernels, dtype: torch.dtype, head_dim: int
) -> None:
    stacked = randn(129, 3, 4, head_dim, dtype=dtype)  # q, k, v of a tower: heads of a token together, tokens apart
    before = stacked.clone()
    cos, sin = randn(129, head_dim // 2, seed=1), randn(129, head_dim // 2, seed=2)
    got = kernels.rope(stacked[:, 0], stacked[:, 1], cos, sin)
    expected = reference.rope(stacked[:, 0], stacked[:, 1], cos, sin)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert torch.equal(stacked, before)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "head_dim"),
    [((64, 64, 16), 4, 4, 80), ((1, 7, 300), 6, 2, 16), ((129,), 2, 1, 37), ((600, 33), 2, 2, 128)],
)
@pytest.mark.parametrize("causal", [False, True])
def test_attention_over_segments(
    kernels: Kernels,
    dtype: torch.dtype,
    lengths: tuple[int, ...],
    heads: int,
    kv_heads: int,
    head_dim: int,
    causal: bool,
) -> None:
    stacked = randn(sum(lengths), heads + 2 * kv_heads, head_dim, dtype=dtype)
    q, k, v = stacked.split([heads, kv_heads, kv_heads], dim=1)
    got = kernels.attention_varlen(q, k, v, Segments(lengths), head_dim**-0.5, causal)
    wide = (x.double() for x in (q, k, v))
    assert_close(got, reference.attention_varlen(*wide, Segments(lengths), head_dim**-0.5, causal), dtype)


def test_attention_over_nothing_is_nothing(kernels: Kernels) -> None:
    empty = torch.empty(0, 2, 16)
    assert kernels.attention_varlen(empty, empty, empty, Segments(()), 1.0).shape == (0, 2, 16)


def paged(
    context: int, dtype: torch.dtype, head_dim: int = 128, kv_heads: int = 2
) -> tuple[Tensor, Tensor, PagedLayout]:
    """A sequence in shuffled blocks of 32 among NaN, and the layout of a step that computes its last token."""
    blocks = torch.randperm(64, generator=torch.Generator().manual_seed(1))[: -(-context // 32)]
    caches = torch.full((2, 64, 32, kv_heads, head_dim), math.nan, dtype=dtype)
    slots = (blocks[:, None] * 32 + torch.arange(32)).flatten()[:context]
    layout = PagedLayout((1,), (context,), blocks[None], slots)
    k, v = randn(2, context, kv_heads, head_dim, dtype=dtype, seed=5)
    reference.store_kv(k, v, *caches, layout)
    return *caches, layout


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("queries", "context"), [(1, 1), (1, 31), (1, 1300), (5, 1300), (40, 1300), (520, 520)])
def test_attention_over_the_cache(kernels: Kernels, dtype: torch.dtype, queries: int, context: int) -> None:
    k_cache, v_cache, layout = paged(context, dtype)
    layout = replace(layout, query_lengths=(queries,))
    q = randn(queries, 16, 128, dtype=dtype)
    wide = (x.double() for x in (q, k_cache, v_cache))
    expected = reference.attention_paged(*wide, layout, 128**-0.5)
    assert_close(kernels.attention_paged(q, k_cache, v_cache, layout, 128**-0.5), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("context", [90, 511, 514, 1300])
def test_a_token_among_others_has_the_bits_of_one_alone(kernels: Kernels, dtype: torch.dtype, context: int) -> None:
    """Tokens verified together, and sequences decoded together, give what they would give one by one."""
    k_cache, v_cache, layout = paged(context, dtype)
    q = randn(5, 16, 128, dtype=dtype)
    together = kernels.attention_paged(q, k_cache, v_cache, replace(layout, query_lengths=(5,)), 0.1)
    for row in range(5):
        alone = replace(layout, context_lengths=(context - 4 + row,))
        assert torch.equal(
            kernels.attention_paged(q[row : row + 1], k_cache, v_cache, alone, 0.1), together[row : row + 1]
        )
    sequences = PagedLayout((1, 1), (40, context), layout.block_tables.repeat(2, 1), layout.slots)
    assert torch.equal(kernels.attention_paged(q[3:], k_cache, v_cache, sequences, 0.1)[1:], together[4:])


def test_the_number_of_threads_changes_no_bit(kernels: Kernels) -> None:
    assert isinstance(LOADED, Library)
    k_cache, v_cache, layout = paged(1300, torch.bfloat16)
    layout = replace(layout, query_lengths=(300,))
    q, x = randn(300, 16, 128, dtype=torch.bfloat16), randn(300, 512, dtype=torch.bfloat16)
    before = LOADED.num_threads
    results = []
    for count in (1, 2):
        LOADED.set_num_threads(count)
        attended = kernels.attention_paged(q, k_cache, v_cache, layout, 0.1)
        results.append((attended, kernels.silu_mul(x), kernels.rms_norm(x, x[0], 1e-6)[0]))
    LOADED.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_stored_keys_lie_in_their_slots_and_nowhere_else(kernels: Kernels) -> None:
    caches = torch.zeros(2, 4, 8, 2, 16)
    stacked = randn(3, 6, 16)
    layout = PagedLayout((3,), (3,), torch.zeros(1, 1, dtype=torch.int64), torch.tensor([9, 31, 0]))
    kernels.store_kv(stacked[:, 2:4], stacked[:, 4:], *caches, layout)
    expected = torch.zeros(2, 32, 2, 16)
    expected[0, layout.slots], expected[1, layout.slots] = stacked[:, 2:4], stacked[:, 4:]
    assert torch.equal(caches, expected.view_as(caches))
