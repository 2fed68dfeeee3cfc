"""Every back end this machine has, for the same tests. Without a GPU, Triton's interpreter runs its kernels on the CPU."""

from __future__ import annotations

import pytest
import torch

from saccade.kernels.choose import BACK_ENDS, choose, lack_of
from saccade.kernels.record import OPS, Kernels

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=BACK_ENDS)
def kernels(request: pytest.FixtureRequest, device: torch.device) -> Kernels:
    """Every op from one back end."""
    if (lack := lack_of(request.param, device)) is not None:
        pytest.skip(lack)
    return choose(device, dict.fromkeys(OPS, request.param))
