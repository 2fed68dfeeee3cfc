"""How products are cut on a card: what was measured there is kept and taken, and every candidate computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from saccade.kernels import triton_cuts, triton_linear
from saccade.kernels.choose import lack_of
from saccade.kernels.reference import linear
from saccade.kernels.triton_cuts import Cut, cut_for, cut_of, key_of, read, write
from saccade.schemes.affine import quantize_weight
from saccade.schemes.scheme import SCHEMES, Weight

CPU = torch.device("cpu")
ODD = Cut(16, 16, 32, 2, 4, 2)  # nothing a rule would choose


def weight(scheme: str) -> Weight:
    dense = Weight(torch.randn(24, 128))
    return dense if scheme == "dense" else quantize_weight(dense, SCHEMES[scheme])


def test_what_was_measured_is_added_to_what_was_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_cuts, "FOLDER", tmp_path / "tuned")
    assert read("A Card") == {}
    one, other = Cut(16, 32, 64, 2, 4, 3), Cut(16, 64, 64, 1, 4, 3)
    write("A Card", {"one": one, "other": other})
    path = write("A Card", {"one": other})
    assert path.name == "A_Card.json"
    assert read("A Card") == {"one": other, "other": other}
    assert read("Another Card") == {}


@pytest.mark.parametrize(("num_rows", "tuned_for"), [(1, 1), (2, 16), (16, 16), (17, 64), (65, 1024), (5000, 1024)])
def test_rows_take_the_cut_of_the_next_larger_measured_number(num_rows: int, tuned_for: int) -> None:
    assert key_of(num_rows, weight("w8a16")) == f"w8a16, {tuned_for} x 128 -> 24"


@pytest.mark.parametrize("scheme", ["dense", "w8a16", "w8a8-dynamic", "w4a16-g32"])
def test_a_measured_cut_is_taken(monkeypatch: pytest.MonkeyPatch, device: torch.device, scheme: str) -> None:
    if (lack := lack_of("triton", device)) is not None:
        pytest.skip(lack)
    torch.manual_seed(0)
    layer, x = weight(scheme).to(device, torch.float32), torch.randn(3, 128, device=device)
    taken: list[Cut] = []
    multiply = triton_linear.multiply

    def noted(*args: object) -> None:
        taken.append(args[-1])  # type: ignore[arg-type]
        multiply(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(triton_linear, "multiply", noted)
    monkeypatch.setattr(triton_cuts, "_table", lambda device: {key_of(3, layer): ODD})
    assert cut_for(3, layer, 4, device) == ODD
    torch.testing.assert_close(triton_linear.linear(x, layer), linear(x, layer), rtol=1e-4, atol=1e-4)
    assert taken == [ODD]
    monkeypatch.undo()
    monkeypatch.setattr(triton_cuts, "FOLDER", triton_cuts.FOLDER / "of nobody")
    triton_cuts._table.cache_clear()
    assert cut_for(3, layer, 4, device) == (None if scheme == "dense" else cut_of(3, layer, 4, device))
    triton_cuts._table.cache_clear()


def test_torch_multiplies_what_it_was_measured_to_be_fastest_at(monkeypatch: pytest.MonkeyPatch) -> None:
    if (lack := lack_of("triton", CPU)) is not None:
        pytest.skip(lack)
    layer, x = weight("dense"), torch.randn(1, 128)
    assert cut_for(1, layer, 4, CPU) is not None, "one row is ours unless measured"
    monkeypatch.setattr(triton_cuts, "_table", lambda device: {key_of(1, layer): None})
    monkeypatch.setattr(triton_linear, "multiply", lambda *_: pytest.fail("by our kernel"))
    assert torch.equal(triton_linear.linear(x, layer), linear(x, layer))


@pytest.mark.parametrize("columns", [16, 64, 200, 256])  # less than a tile, tiles, and tiles with a rest
@pytest.mark.parametrize("scheme", ["dense", "w8a16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_row_is_multiplied_tile_by_tile(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, scheme: str, columns: int, dtype: torch.dtype
) -> None:
    """Outputs that fill no tile; of int8 every number there is."""
    if (lack := lack_of("triton", device)) is not None:
        pytest.skip(lack)
    monkeypatch.setattr(triton_cuts, "ONE_ROW_TILE", (4, 64))
    torch.manual_seed(0)
    layer = Weight(torch.randn(259, columns).to(dtype), bias=torch.randn(259).to(dtype))
    if scheme != "dense":
        layer = quantize_weight(layer, SCHEMES[scheme])
        layer.values[:, 0] = torch.arange(259).sub(128).to(torch.int8)  # wraps
    layer, x = layer.to(device, dtype), torch.randn(1, columns).to(device, dtype)
    cut = cut_for(1, layer, x.element_size(), device)
    assert cut is not None
    assert cut.is_for_one_row
    expected = x.double() @ layer.values.double().t()
    expected = (expected if layer.scale is None else expected * layer.scale) + layer.bias.double()  # type: ignore[union-attr]
    tolerance = 64 * torch.finfo(dtype).eps
    got = triton_linear.linear(x, layer)
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def test_where_torch_does_not_multiply_e4m3_our_kernel_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that should, and a build of torch that does not."""
    if (lack := lack_of("triton", CPU)) is not None:
        pytest.skip(lack)
    tried: list[int] = []

    def refuse(x: torch.Tensor, *_: object, **__: object) -> None:
        tried.append(len(x))
        raise RuntimeError("Invalid scaling configuration")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton_linear, "IS_INTERPRETED", False)
    triton_linear._torch_multiplies_e4m3.cache_clear()
    layer = quantize_weight(Weight(torch.randn(32, 128)), SCHEMES["fp8"]).to(CPU, torch.bfloat16)
    x = torch.randn(20, 128).bfloat16()
    try:
        got = [triton_linear.linear(x, layer) for _ in range(2)]
    finally:
        triton_linear._torch_multiplies_e4m3.cache_clear()
    assert len(tried) == 1
    torch.testing.assert_close(got[1], linear(x, layer), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("scheme", ["w4a8-g64", "w4a16-g64"])
def test_the_rule_gives_cuts_that_fit_and_others_are_refused(scheme: str) -> None:
    layer = weight(scheme)
    for num_rows in (1, 40, 300):
        for itemsize in (1, 2, 4):
            assert cut_of(num_rows, layer, itemsize, CPU).fits(layer)
    assert not Cut(16, 32, 48, 1, 4, 3).fits(layer)
    assert Cut(16, 32, 128, 1, 4, 3).fits(layer) == layer.scheme.is_two_stage
    assert not Cut(1, 4, 64, 1, 4, 1).fits(layer)
    assert Cut(1, 4, 64, 1, 4, 1).fits(weight("w8a16"))
