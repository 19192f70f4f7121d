"""The contenders of benchmarks/speed.py are what they are called."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("torchvision")

from benchmarks.op_overhead import tiny
from benchmarks.speed import contenders, instructions
from benchmarks.tables import NAMES_OF_SPEED
from relprop import native

ISAS = native.info().get("isas_supported", [])


@pytest.fixture(scope="module")
def runs() -> dict[str, Any]:
    found = contenders(tiny(1), torch.randn(1, 3, 16, 16), None)
    for run in (*found.values(), *found.values()):
        run()
    return found


def test_the_plan_is_no_tape(runs: dict[str, Any]) -> None:
    engines = {name: (run.__defaults__ or [None])[0] for name, run in runs.items() if name.startswith("relprop")}
    assert len(engines["relprop"].recordings) == 1
    assert not engines["relprop_plan"].recordings


def test_every_contender_has_a_name(runs: dict[str, Any]) -> None:
    assert set(runs) <= {*NAMES_OF_SPEED, "forward"}


@pytest.mark.skipif("avx512" not in ISAS, reason="the CPU has no AVX-512, so nothing is left out")
def test_instructions_are_left_out_and_come_back(runs: dict[str, Any]) -> None:
    assert "relprop_avx2" in runs
    before = native.info()["isa"]
    with instructions("avx2"):
        assert native.info()["isa"] == "avx2" and not native.products_fast(torch.float32)
    assert native.info()["isa"] == before
