"""Outputs of every kernel are NaN before it writes them, so that what it leaves out fails its test."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.case import Case
from benchmarks.gpu.cases import cases
from benchmarks.gpu.machine import Machine
from relprop.kernels.launch import recording


def tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, Iterable):
        for part in found:
            yield from tensors(part)


def test_however_it_is_allocated() -> None:
    given = torch.ones(3)
    made = [torch.empty(3), torch.empty((2, 3)), torch.empty_like(given), given.new_empty(3), given.new_empty((2, 3))]
    made += [torch.empty(3, dtype=dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64)]
    assert all(tensor.isnan().all() for tensor in made)


def test_every_kernel(tmp_path: Path) -> None:
    """Launches are written down and not run: what a launcher gives back is as it was allocated."""
    ops: dict[str, Case] = {}
    for case in cases(Machine(dry=True, out=tmp_path), large=False):
        ops.setdefault(f"{case.op} {case.variant}", case)
    assert len(ops) > 30
    for name, case in ops.items():
        if "triton" not in case.runs:
            continue
        with recording(80) as launches:
            found = list(tensors(case.runs["triton"]()))
        written = [part for part in found if not part.isnan().all()]
        assert found and launches and not written, f"{name}: expected NaN, got {written}"


@pytest.mark.parametrize("name", ["passed", "gradient_out"])
def test_both_results_of_the_way_back(name: str) -> None:
    from relprop.kernels.linear_back import linear_back

    shares, x, w = torch.ones(1, 3, 4), torch.ones(3, 5), torch.ones(4, 5)
    with recording(80):
        found = linear_back(shares, None, x, w, shares)
    part = found[name == "gradient_out"]
    assert part is not None and part.isnan().all()
