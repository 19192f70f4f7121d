"""The CUDA half of the GPU session's cases, on the host emulation: a mistake in a call would cost time on a GPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.machine import Machine
from relprop.native_cuda import call

CSRC = Path(__file__).parents[2] / "csrc"


def test_every_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda_module: Any) -> None:
    monkeypatch.setattr(call, "_cuda", cuda_module)
    # Not above: what imports the Triton kernels first decides whether they run under the interpreter.
    from benchmarks.gpu import kernels

    machine = Machine(dry=True, out=tmp_path)
    assert kernels.usable(machine) == {"triton", "cuda", "library"}
    machine.backends = ("cuda",)
    launched, run = set(), call.Call.run

    def noted(given: call.Call, kernel: str, *arguments: Any) -> None:
        launched.add(kernel)
        run(given, kernel, *arguments)

    monkeypatch.setattr(call.Call, "run", noted)
    assert kernels.check(machine), [row for row in machine.rows if row["right"] is not True]
    written = {name for path in CSRC.glob("*.cu") for name in re.findall(r"^void (\w+)_cuda\(", path.read_text(), re.M)}
    assert launched == written
    assert {row["dtype"] for row in machine.rows} >= {"bf16", "fp16", "highest", "high", "medium", "float16"}
