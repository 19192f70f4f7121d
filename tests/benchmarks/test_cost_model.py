"""Rows of the cost model, and the forecast beside the peak of the GPU session's rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import relprop
from relprop.cost import H200
from tests.engine.models import vit

pytest.importorskip("timm")
pytest.importorskip("transformers")

from benchmarks import cost_model
from benchmarks.gpu.contenders import Explaining, attempt
from benchmarks.gpu.machine import Machine


def test_shapes_are_numbers() -> None:
    """Also those of a model whose number of tokens is free."""
    found = list(cost_model.rows("Llama", cost_model.llama(True, 12), H200, 1, {}, "triton"))
    shapes = {row["shape"] for row in found} - {"-"}
    assert "12x64" in shapes and all(size.isdigit() for shape in shapes for size in shape.split("x"))
    tiled = [row for row in found if row["phase"] == "reverse" and row["op"] == "attention"]
    assert tiled and all(row["executed_flop"] == 8 / 5 * row["flop"] for row in tiled)


def test_the_forecast_stands_beside_the_peak(tmp_path: Path) -> None:
    model, given = vit(), torch.randn(2, 3, 32, 32)
    engine = relprop.compile(model, (given,), tape=False)
    machine = Machine(True, tmp_path, table="tokens")
    attempt(machine, "relprop", lambda: Explaining(engine, (given,), 5), model=model)
    assert machine.rows[0]["peak_mb"] == 0.0  # a dry run measures none
    assert machine.rows[0]["predicted_mb"] == (engine.memory(2) - given.nbytes) / 2**20 > 0
