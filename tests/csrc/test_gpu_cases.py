"""The CUDA half of the GPU session's cases, on the host emulation: a mistake in a call would cost time on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.machine import Machine
from relprop.native_cuda import call


def test_every_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda_module: Any) -> None:
    monkeypatch.setattr(call, "_cuda", cuda_module)
    # Not above: what imports the Triton kernels first decides whether they run under the interpreter.
    from benchmarks.gpu import kernels

    machine = Machine(dry=True, out=tmp_path)
    assert kernels.usable(machine) == {"triton", "cuda"}
    monkeypatch.setattr(kernels, "usable", lambda machine: {"cuda"})
    assert kernels.check(machine), [row for row in machine.rows if not row["right"]]
    assert len({row["op"] for row in machine.rows}) == 12
    assert {row["dtype"] for row in machine.rows} >= {"bf16", "fp16", "highest", "high", "float16"}
