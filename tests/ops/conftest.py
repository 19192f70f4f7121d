"""The custom ops as a GPU runs them, over the host emulation of the CUDA kernels."""

from __future__ import annotations

from typing import Any

import pytest

from relprop.native_cuda import call
from relprop.ops import on_gpu
from tests.csrc.conftest import cuda_module
from tests.ops.checks import run_as_on_a_gpu

__all__ = ["cuda_module"]


@pytest.fixture
def ops_on_gpu(monkeypatch: pytest.MonkeyPatch, cuda_module: Any) -> dict[str, int]:
    """How often each CUDA kernel ran."""
    monkeypatch.setattr(call, "_cuda", cuda_module)
    monkeypatch.setattr(on_gpu, "TRITON", {})  # its kernels need a GPU, or an interpreter
    return run_as_on_a_gpu(monkeypatch)
