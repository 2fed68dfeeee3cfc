"""Weights of files in C++: what torch's operations make of them, on every instruction set."""

from __future__ import annotations

import pytest
import torch

from saccade.kernels import cpu_pack
from saccade.kernels.library import Library, load
from saccade.schemes.affine import join_group_scales, settled_scales, split_group_scales
from saccade.schemes.packing import pack

pytestmark = pytest.mark.skipif(not isinstance(load(), Library), reason="the C++ kernels are not built")


@pytest.fixture
def library(isa: str) -> Library:
    library = load()
    assert isinstance(library, Library)
    return library


@pytest.mark.parametrize("shape", [(24, 64), (1, 32), (5, 3424), (0, 32)])
def test_words_become_runs_of_32(library: Library, shape: tuple[int, int]) -> None:
    values = torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    nibbles = (values + 8).view(shape[0], shape[1] // 2, 2).to(torch.uint8)
    words = (nibbles[:, :, 0] | nibbles[:, :, 1] << 4).view(torch.int32)
    assert torch.equal(cpu_pack.repack(library, words), pack(values))


@pytest.mark.parametrize("num_groups", [1, 16, 86])
def test_scales_come_apart_as_in_torch(library: Library, num_groups: int) -> None:
    generator = torch.Generator().manual_seed(num_groups)
    group_scale = torch.randint(1, 18, (64, num_groups), generator=generator, dtype=torch.int8)
    group_scale[0], group_scale[1] = 6, 17
    product = join_group_scales(*settled_scales(torch.rand(64, generator=generator) + 0.1, group_scale))
    found, expected = cpu_pack.split_group_scales(library, product), split_group_scales(product)
    assert found is not None
    assert expected is not None
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize(
    "product", [[[1.0, 18.0]], [[0.0, 0.0]], [[-1.0, 2.0]], [[1.0, 2.0], [1.0, 1.37]], [[1.0, float("nan")]]]
)
def test_what_is_no_multiple_is_told(library: Library, product: list[list[float]]) -> None:
    assert cpu_pack.split_group_scales(library, torch.tensor(product)) is None
