"""The CUDA kernels as the host emulation runs them, behind relprop.native_cuda."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from relprop.native_cuda import call
from tests.csrc import emulated

ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}
GUARD = 64  # elements on both sides of every result


@pytest.fixture(scope="session")
def cuda_module() -> Any:
    """relprop._cuda built with the host emulation."""
    if emulated.reason_against():
        pytest.skip(emulated.reason_against())
    sanitize = bool(os.environ.get(emulated.SANITIZE_KERNELS))
    return emulated.load("_cuda", emulated.build_cuda_module(sanitize))


class Results:
    """Where kernels write: memory full of NaN with guard zones, which nothing may touch."""

    def __init__(self) -> None:
        self.rooms: list[tuple[Tensor, int]] = []
        self.shift = 0  # in elements; with 1 no result is aligned for more than one element

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        count = torch.Size(shape).numel()
        room = torch.full((count + 2 * GUARD + self.shift,), float("nan"), dtype=dtype, device=device)
        self.rooms.append((room, count))
        return room[GUARD + self.shift :][:count].view(tuple(shape))

    def check(self) -> None:
        for room, count in self.rooms:
            first = GUARD + self.shift
            assert room[:first].isnan().all() and room[first + count :].isnan().all(), "a write next to a result"


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, cuda_module: Any) -> Iterator[Results]:
    """native_cuda over the emulation; writes next to a result fail the test."""
    made = Results()
    monkeypatch.setattr(call, "_cuda", cuda_module)
    for module in (call, importlib.import_module("relprop.native_cuda.attention_relevance")):
        monkeypatch.setattr(module, "empty", made.empty)
    yield made
    made.check()


@pytest.fixture
def little_memory(cuda_module: Any) -> Iterator[None]:
    """The shared memory that a block has on GPUs of compute capability 8.6, 8.9 and 12.x."""
    cuda_module.set_most_shared(99 * 1024)
    yield
    cuda_module.set_most_shared(163 * 1024)


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest, cuda_module: Any) -> Iterator[str]:
    """The order in which the emulation gives threads their turns: a missing barrier shows in one of them."""
    cuda_module.set_order(ORDERS[request.param])
    yield request.param
    cuda_module.set_order(0)
