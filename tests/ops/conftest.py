"""The custom ops as a GPU runs them, over the host emulation of the CUDA kernels."""

from __future__ import annotations

from typing import Any

import pytest

from relprop.native_cuda import call
from relprop.ops import on_gpu, registry
from tests.csrc.conftest import cuda_module

__all__ = ["cuda_module"]


@pytest.fixture
def ops_on_gpu(monkeypatch: pytest.MonkeyPatch, cuda_module: Any) -> dict[str, int]:
    """What is registered for the GPU runs on the CPU's tensors; how often each kernel was taken."""
    taken: dict[str, int] = {}

    def launcher(name: str, arguments: dict[str, Any]) -> Any:
        found = choose(name, arguments)
        taken[name] = taken.get(name, 0) + (found is not None)
        return found

    choose = on_gpu.launcher
    monkeypatch.setattr(call, "_cuda", cuda_module)
    monkeypatch.setattr(on_gpu, "TRITON", {})  # its kernels need a GPU, or an interpreter
    monkeypatch.setattr(on_gpu, "launcher", launcher)
    monkeypatch.setattr(registry, "run_on_cpu", registry.run_on_gpu)
    return taken
