"""Backends chosen by measurement: from rows to the table, and from the table to the plan. The rows are made up."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import choose
from relprop.backends import choices, choose_kernels
from relprop.composites import find_composite
from relprop.rules import make_rule
from tests.engine.models import vit
from tests.rules.rule_checks import Op, random

CUDA = torch.device("cuda")


def row(backend: str, kind: str, rules: str, ms: float, method: str = "a", **more: object) -> dict[str, object]:
    return {
        "capability": "9.0", "model": "m", "method": method, "composite": "c", "kind": kind, "rules": rules,
        "dtype": "float32", "batch": "64", "fused": "", "backend": backend, "ms": ms, "failed": "", "dry_run": "False",
        **more,
    }  # fmt: skip


ROWS = [
    *(row(b, "linear", "gradient + alpha_beta", ms) for b, ms in (("torch", 9.0), ("triton", 2.0), ("cuda", 3.0))),
    *(row(b, "add", "gradient + normalised", ms) for b, ms in (("torch", 1.0), ("triton", 2.0), ("cuda", 3.0))),
    *(row(b, "norm", "gradient", ms) for b, ms in (("torch", 3.0), ("triton", 2.0), ("cuda", 1.0))),
    row("triton", "norm", "gradient", 0.1, method="b"),  # torch and cuda were not timed on it
    *(row(b, "linear", "alpha_beta", ms, dtype="bfloat16") for b, ms in (("triton", 2.0), ("cuda", 1.0))),
    *(row(b, "linear", "alpha_beta", ms, batch="1") for b, ms in (("triton", 2.0), ("torch", 1.0))),
    row("triton", "linear", "gradient + alpha_beta", 99.0, fused="yes"),  # no other backend has it
]


def written(path: Path, rows: list[dict[str, object]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_rows_become_the_table(tmp_path: Path) -> None:
    out = tmp_path / "choices.json"
    out.write_text(json.dumps({"8.0": {"linear alpha_beta": "cuda"}, "9.0": {"gone": "cuda"}}))
    failed = row("triton", "", "", 0.0, failed="RuntimeError")
    choose.main([str(written(tmp_path / "steps.csv", [*ROWS, failed])), "--out", str(out)])
    # Triton alone was timed on all of "norm gradient".
    expected = {
        "linear gradient float32 many": "triton", "linear alpha_beta float32 many": "triton",
        "add gradient float32 many": "torch", "add normalised float32 many": "torch",
        "norm gradient float32 many": "triton", "linear alpha_beta bfloat16 many": "cuda",
        "linear alpha_beta float32 one": "torch",
    }  # fmt: skip
    assert json.loads(out.read_text()) == {"8.0": {"linear alpha_beta": "cuda"}, "9.0": expected}


def test_dry_rows_choose_nothing(tmp_path: Path) -> None:
    dry = written(tmp_path / "steps.csv", [{**ROWS[0], "dry_run": "True"}])
    with pytest.raises(SystemExit, match="expected measured steps of a GPU, got none"):
        choose.main([str(dry), "--out", str(tmp_path / "choices.json")])


def test_the_plan_takes_what_the_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    exact = [{**row, "dtype": "float64"} if row["dtype"] == "float32" else row for row in ROWS]  # as the model is
    monkeypatch.setattr(choices, "table", lambda: choices.fastest(exact))  # type: ignore[arg-type]
    kernels, single = (choose_kernels("auto", torch.float32, CUDA, batch=batch) for batch in (2, 1))
    graph = Op(vit(depth=1), random(2, 3, 32, 32), kind="conv").graph
    rules, gradient = find_composite("chefer").assign(graph), make_rule("any", "gradient")
    seen = {(node.kind, kernels.rule(node, rule)[0]) for node, rule in rules.items()}
    assert {("linear", "triton"), ("add", "torch"), ("fanout", "torch")} <= seen
    assert all(single.rule(node, rule)[0] == "torch" for node, rule in rules.items())  # timed with many samples
    for node, rule in rules.items():
        found = kernels.joint(node, {"gradient": gradient, "relevance": rule}, None)
        assert (found is not None and found[0] == "triton (joint)") == (node.kind == "linear")
    monkeypatch.setattr(choices, "table", lambda: choices.fastest(ROWS))  # type: ignore[arg-type]
    other = choose_kernels("auto", torch.float32, CUDA, batch=2)  # timed in other dtypes
    assert all(other.rule(node, rule)[0] == "torch" for node, rule in rules.items())


def test_without_a_measurement_it_is_torch(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    with caplog.at_level("INFO", logger="relprop"):
        kernels = choose_kernels("auto", torch.float32, CUDA)
    graph = Op(vit(depth=1), random(2, 3, 32, 32), kind="conv").graph
    assert all(kernels.rule(n, r)[0] == "torch" for n, r in find_composite("chefer").assign(graph).items())
    assert "no kernel was timed on compute capability 12.0; ask for one by backend=" in caplog.text
