"""Every op of every back end this machine has, against slow and obvious formulas in float64."""

from __future__ import annotations

import contextlib
import itertools
import math

import pytest
import torch
from torch import Tensor

from saccade.base.errors import DeviceError, OptionError
from saccade.kernels import reference
from saccade.kernels.choose import _trial, choose, choose_device, lack_of
from saccade.kernels.record import Kernels, PagedLayout, Segments
from saccade.schemes.affine import quantize_rows_int8, quantize_weight
from saccade.schemes.scheme import Weight

# Half precision keeps 11 (fp16) or 8 (bf16) bits of each result; sums are carried wider.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def randn(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    torch.testing.assert_close(
        got.double().cpu(), expected.double().cpu(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """[L, N, D] x [C, K, D], in float64, heads repeated, the queries being the last of the context."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).double()
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1).double()
    scores = torch.einsum("lnd,cnd->nlc", q.double(), k) * scale
    if causal:
        seen = torch.arange(k.shape[0]) <= torch.arange(k.shape[0] - q.shape[0], k.shape[0])[:, None]
        scores = scores.masked_fill(~seen.to(scores.device), -math.inf)
    return torch.einsum("nlc,cnd->lnd", scores.softmax(-1), v)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "bias"), itertools.product([0, 1, 2, 7, 129], [True, False]))
def test_linear(kernels: Kernels, device: torch.device, dtype: torch.dtype, rows: int, bias: bool) -> None:
    x = randn(rows, 129, dtype=dtype, device=device)
    w = randn(65, 129, dtype=dtype, device=device, seed=1) / 11
    b = randn(65, dtype=dtype, device=device, seed=2) if bias else None
    expected = x.double() @ w.double().T + (0 if b is None else b.double())
    assert_close(kernels.linear(x, Weight(w, bias=b)), expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 7, 129])
def test_linear_with_int8_weights(kernels: Kernels, device: torch.device, dtype: torch.dtype, rows: int) -> None:
    x = randn(rows, 128, dtype=dtype, device=device)
    weight = quantize_weight(Weight(randn(64, 128, dtype=dtype, device=device, seed=1) / 11))
    assert weight.values.dtype == torch.int8
    assert weight.scale is not None
    expected = x.double() @ (weight.values.double() * weight.scale.double()[:, None]).T
    assert_close(kernels.linear(x, weight), expected, dtype)


def test_linear_takes_a_strided_view(kernels: Kernels, device: torch.device) -> None:
    x = randn(9, 64, dtype=torch.float32, device=device)[::2, ::2]
    w = randn(5, 32, dtype=torch.float32, device=device, seed=1)
    assert_close(kernels.linear(x, Weight(w)), x.double() @ w.double().T, torch.float32)


def test_int8_rows_are_within_half_a_step() -> None:
    w = torch.randn(33, 100) * torch.logspace(-6, 3, 33)[:, None]
    w[5] = 0
    values, scale = quantize_rows_int8(w)
    assert ((values * scale[:, None] - w).abs() <= scale[:, None] * 0.5001).all()
    assert (values[5] == 0).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [0, 1, 7, 129])
def test_rms_norm_carries_the_residual(kernels: Kernels, device: torch.device, dtype: torch.dtype, rows: int) -> None:
    x, residual = (randn(rows, 80, dtype=dtype, device=device, seed=s) for s in (0, 1))
    gain = randn(80, dtype=dtype, device=device, seed=2)
    y, total = kernels.rms_norm(x, gain, 1e-6, residual)
    assert torch.equal(total, x + residual)
    wide = total.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain.double()
    assert_close(y, expected, dtype)
    alone, same = kernels.rms_norm(total, gain, 1e-6)
    assert torch.equal(alone, y)
    assert torch.equal(same, total)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", [16, 80, 128])
def test_rope_turns_pairs_half_a_head_apart(
    kernels: Kernels, device: torch.device, dtype: torch.dtype, head_dim: int
) -> None:
    q, k = randn(7, 4, head_dim, dtype=dtype, device=device), randn(7, 2, head_dim, dtype=dtype, device=device, seed=1)
    angles = randn(7, head_dim // 2, dtype=torch.float32, device=device, seed=2)
    for x, y in zip((q, k), kernels.rope(q, k, angles.cos(), angles.sin()), strict=True):
        pairs = torch.complex(*x.double().chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)[:, None]
        assert_close(y, torch.cat([pairs.real, pairs.imag], dim=-1), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_silu_mul_takes_the_gate_first(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> None:
    x = randn(7, 2 * 129, dtype=dtype, device=device)
    gate, up = x.double().chunk(2, dim=-1)
    assert_close(kernels.silu_mul(x), gate * gate.sigmoid() * up, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lengths", [(64, 64), (1,), (7, 64, 1, 64, 129), (16, 8, 16)])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_stays_within_its_segment(
    kernels: Kernels, device: torch.device, dtype: torch.dtype, lengths: tuple[int, ...], causal: bool
) -> None:
    total = sum(lengths)
    q = randn(total, 6, 80, dtype=dtype, device=device)
    k, v = (randn(total, 2, 80, dtype=dtype, device=device, seed=s) for s in (1, 2))
    out = kernels.attention_varlen(q, k, v, Segments(lengths), 80**-0.5, causal)
    pieces = zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True)
    assert_close(out, torch.cat([dense_attention(a, b, c, 80**-0.5, causal) for a, b, c in pieces]), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("queries", "contexts"),
    [
        ((1, 1, 1), (33, 7, 64)),  # decode, unequal
        ((1, 1), (40, 40)),  # decode, equal
        ((30,), (30,)),  # a whole prompt
        ((13, 1, 20, 5), (45, 9, 20, 37)),  # chunks of prompts and a decode together
        ((600,), (700,)),  # longer than a tile of queries
    ],
)
def test_paged_attention_reads_what_was_stored(
    kernels: Kernels, device: torch.device, dtype: torch.dtype, queries: tuple[int, ...], contexts: tuple[int, ...]
) -> None:
    """Keys lie in shuffled blocks among NaN; dense attention over each whole sequence is the oracle."""
    if max(queries) > 512 and device.type == "cpu" and kernels.sources["attention_paged"] == "triton":
        pytest.skip("interpreted, 29 tiles of queries take 20 s; Triton's tiles end within the other cases")
    block_size, num_heads, num_kv_heads, head_dim = 8, 6, 2, 16
    shuffled = torch.randperm(200, generator=torch.Generator().manual_seed(3)).tolist()
    tables = [[shuffled.pop() for _ in range(-(-context // block_size))] for context in contexts]
    widest = max(map(len, tables))
    block_tables = torch.tensor([table + [0] * (widest - len(table)) for table in tables], device=device)
    k_cache, v_cache = torch.full((2, 200, block_size, num_kv_heads, head_dim), math.nan, dtype=dtype, device=device)
    expected, all_queries = [], []
    for s, (num_queries, context, table) in enumerate(zip(queries, contexts, tables, strict=True)):
        k, v = (randn(context, num_kv_heads, head_dim, dtype=dtype, device=device, seed=10 * s + i) for i in (1, 2))
        q = randn(num_queries, num_heads, head_dim, dtype=dtype, device=device, seed=10 * s + 3)
        slots = torch.tensor(
            [table[t // block_size] * block_size + t % block_size for t in range(context)], device=device
        )
        kernels.store_kv(k, v, k_cache, v_cache, PagedLayout((context,), (context,), block_tables, slots))
        all_queries.append(q)
        expected.append(dense_attention(q, k, v, head_dim**-0.5, causal=True))
    layout = PagedLayout(queries, contexts, block_tables, torch.empty(0, dtype=torch.int64, device=device))
    out = kernels.attention_paged(torch.cat(all_queries), k_cache, v_cache, layout, head_dim**-0.5)
    assert_close(out, torch.cat(expected), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_an_int8_cache_holds_the_references_bytes_and_is_read_as_they_mean(
    kernels: Kernels, device: torch.device, dtype: torch.dtype
) -> None:
    queries, contexts, block_size, head_dim = (5, 1), (37, 20), 8, 16
    tables = torch.tensor([[3, 0, 5, 2, 9], [1, 4, 7, 0, 0]], device=device)
    caches = [torch.zeros(2, 10, block_size, 2, head_dim + 4, dtype=torch.int8, device=device) for _ in range(2)]
    for s, context in enumerate(contexts):
        k, v = (randn(context, 2, head_dim, dtype=dtype, device=device, seed=10 * s + i) for i in (1, 2))
        k[0], v[1, 1] = 0, 100
        places = torch.arange(context, device=device)
        slots = tables[s, places // block_size] * block_size + places % block_size
        layout = PagedLayout((context,), (context,), tables[s : s + 1], slots)
        kernels.store_kv(k, v, *caches[0], layout)
        reference.store_kv(k, v, *caches[1], layout)
    assert torch.equal(caches[0], caches[1])
    q = randn(6, 4, head_dim, dtype=dtype, device=device, seed=3)
    layout = PagedLayout(queries, contexts, tables, torch.empty(0, dtype=torch.int64, device=device))
    got = kernels.attention_paged(q, *caches[0], layout, head_dim**-0.5)
    wide = reference.attention_paged(q.float(), *caches[0], layout, head_dim**-0.5)
    assert_close(got, wide, dtype)


def test_an_unknown_device_or_kernel_is_refused_by_name() -> None:
    with pytest.raises(OptionError, match="'tpux'"):
        choose_device("tpux")
    with pytest.raises(OptionError, match="'linaer'"):
        choose(torch.device("cpu"), {"linaer": "reference"})
    with pytest.raises(OptionError, match="'fortran'"):
        choose(torch.device("cpu"), {"linear": "fortran"})


def test_one_op_can_be_swapped_and_the_record_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernels = choose(torch.device("cpu"), {"rope": "triton"})
    from saccade.kernels import triton_heads

    assert kernels.rope is triton_heads.rope
    assert kernels.sources == {**choose(torch.device("cpu")).sources, "rope": "triton"}
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(OptionError, match=r"'triton' of kernel 'rope' does not serve cpu here: .*NVIDIA"):
        choose(torch.device("cpu"), {"rope": "triton"})


def test_a_cuda_device_comes_with_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.set_device and several GPUs ask for it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 1)
    assert choose_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(DeviceError, match="only 2"):
        choose_device("cuda:2")


@pytest.mark.parametrize("card", [torch.device("cuda", 1), torch.device("cuda")])
def test_a_card_that_triton_does_not_serve_is_served_by_torch_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, card: torch.device
) -> None:
    """A missing C compiler shows at the first launch; it must not show in the first answer."""
    current: list[torch.device] = []

    def fail(device: torch.device) -> Tensor:
        raise RuntimeError("Failed to find C compiler.\nPlease specify one.")

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    triton_common = pytest.importorskip("saccade.kernels.triton_common")
    monkeypatch.setattr(triton_common, "mark", fail)
    _trial.cache_clear()
    try:
        kernels = choose(card)
    finally:
        _trial.cache_clear()
    assert current == ([] if card.index is None else [card])  # torch refuses one without a number
    assert set(kernels.sources.values()) == {"reference"}
    (message,) = caplog.messages
    assert f"does not serve {card}: its smallest kernel fails: RuntimeError: Failed to find C compiler.;" in message


def test_a_triton_whose_compiler_breaks_off_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr("saccade.kernels.choose.version", lambda name: "3.2.0")
    assert "triton 3.2 is too old" in str(lack_of("triton", torch.device("cpu")))


@pytest.mark.skipif(lack_of("triton", torch.device("cpu")) is not None, reason="interpreted, here")
def test_the_smallest_kernel_runs() -> None:
    from saccade.kernels.triton_common import mark

    assert mark(torch.device("cpu")).tolist() == [1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_the_machine_lacks_is_refused_with_the_remedy() -> None:
    with pytest.raises(DeviceError, match="--device cpu"):
        choose_device("cuda")
