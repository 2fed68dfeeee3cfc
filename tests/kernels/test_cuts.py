"""How products are cut on a card: what was measured there is kept and taken, and every candidate computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from saccade.kernels import triton_cuts, triton_linear
from saccade.kernels.choose import lack_of
from saccade.kernels.reference import linear
from saccade.kernels.triton_cuts import Cut, cut_of, key_of, read, tuned_cut, write
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
    assert tuned_cut(3, layer, device) == ODD
    torch.testing.assert_close(triton_linear.linear(x, layer), linear(x, layer), rtol=1e-4, atol=1e-4)
    assert taken == [ODD]
    monkeypatch.undo()
    monkeypatch.setattr(triton_cuts, "FOLDER", triton_cuts.FOLDER / "of nobody")
    triton_cuts._table.cache_clear()
    assert tuned_cut(3, layer, device) is None
    triton_cuts._table.cache_clear()


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
