"""The GPU session's dry run: the whole script on the CPU, under Triton's interpreter; and its clock."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.machine import Machine

ROOT = Path(__file__).parents[2]
# What every point of the measurement has a row for.
POINTS = {
    "parity": {"error"},
    "vit": {
        "reference",
        "forward_compiled",
        "forward_backward_compiled",
        "relprop_triton_chefer_graph",
        "relprop_triton_chefer_stable",
        "relprop_torch_chefer",
    },
    "latency": {"relprop_triton_graph"},
    "tokens": {"forward", "relprop_triton_chefer", "reference"},
    "llama": {
        "forward_compiled",
        "forward_backward_compiled",
        "relprop_triton_attnlrp",
        "relprop_triton_attnlrp_graph",
        "lxt",
    },
    "several": {"forward_compiled", "relprop_triton_transformer_attribution", "relprop_triton_attnlrp"},
    "inductor": {"error", "relprop_triton_chefer_stable_compiled_graph", "relprop_triton_attnlrp_compiled_graph"},
}
# Columns that hold what a point asks for.
COLUMNS = {
    "parity": {"error", "bound", "error_torch_own_streams", "replay_difference", "inputs_apart"},
    "vit": {"predicted_mb", "share_of_matrix_rate", "explanations_s", "over_forward", "over_reference"},
    "latency": {"ms", "ms_p99", "p99_over_p50"},
    "tokens": {"beyond_weights_mb", "predicted_mb"},
    "llama": {"over_forward", "over_relprop", "beyond_weights_mb", "predicted_mb"},
    "several": {"forwards_per_target"},
    "inductor": {"error", "bound", "over_not_compiled"},
}
ELSEWHERE = {"reference", "lxt"}  # other people's code, which may not be at hand


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def session(out: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "benchmarks/gpu_session.sh", "--dry-run"],
        cwd=ROOT,
        env={**os.environ, "OUT": str(out), "PYTHON": sys.executable, **more},
        capture_output=True,
        text=True,
    )


@pytest.mark.full
def test_dry_run(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = session(tmp_path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    checks, kernels = rows_of(tmp_path / "checks.csv"), rows_of(tmp_path / "kernels.csv")
    assert all(row["right"] == "True" for row in checks)
    assert {row["op"] for row in checks} == {row["op"] for row in kernels}
    assert all(float(row["ms"]) > 0 for row in kernels)
    dtypes = {row["dtype"] for row in checks if row["op"].startswith("linear")}
    assert dtypes == {"bf16", "fp16", "highest", "high", "ieee", "medium"}
    assert {row["ceiling"] for row in rows_of(tmp_path / "ceilings.csv")} == {
        "copy_gb_s",
        "bf16_tflop_s",
        "tf32_tflop_s",
        "fp32_tflop_s",
    }
    for point, expected in POINTS.items():
        rows = rows_of(tmp_path / f"end_to_end_{point}.csv")
        assert expected <= {row["run"] for row in rows}
        assert COLUMNS[point] <= set(rows[0])
        assert not [row for row in rows if row.get("failed") and row["run"] not in ELSEWHERE]
    steps = rows_of(tmp_path / "steps.csv")
    assert {row["backend"] for row in steps} == {"torch", "triton"} and not [row for row in steps if row["failed"]]
    assert {("linear", "gradient + alpha_beta"), ("attention", "gradient + composed")} <= {
        (row["kind"], row["rules"]) for row in steps
    }
    swept = {(row["model"], row["dtype"], row["batch"], row["method"], row["fused"]) for row in steps}
    assert {
        ("llama", "bfloat16", "1", "attnlrp", "yes"),
        ("vit", "float32", "1", "transformer_attribution", ""),
    } <= swept
    assert any(", " in row["kind"] for row in steps if row["fused"]) and len(swept) == 9
    timed = rows_of(tmp_path / "tiles_timed.csv")
    assert {row["table"] for row in timed} >= {"linear_share_out", "linear_back", "attention_keys_values"}
    assert {row["tabled"] for row in timed} == {"True", "False"} and not [row for row in timed if row["failed"]]
    assert "kernels=" in (tmp_path / "compiled.log").read_text()
    assert all(row["bound"] in ("rate", "bandwidth", "-") and float(row["ms"]) > 0 for row in steps)
    assert {"predicted_ms", "tflop_s", "gb_s", "share_of_matrix_rate", "share_of_bandwidth"} <= set(steps[0])
    ours = [row for row in rows_of(tmp_path / "end_to_end_parity.csv") if row["backend"] == "triton"]
    ways = {(row["family"], row["method"], row["graph"]) for row in ours}
    assert ways == {
        (family, method, graph)
        for family, method in (("vit", "transformer_attribution"), ("vit", "attnlrp"), ("llama", "attnlrp"))
        for graph in ("False", "True")
    }
    examined = [(row["tool"], row["backend"]) for row in rows_of(tmp_path / "sanitizer.csv")]
    assert examined[:2] == [("memcheck", "cuda"), ("racecheck", "cuda")] and len(examined) == 4
    budget = rows_of(tmp_path / "budget.csv")
    assert {row["state"] for row in budget} == {"done"} and budget[0]["part"] == "compiled"
    assert all(row["dry_run"] == "True" for row in kernels)
    race = {(row["model"], row["contender"]): row for row in rows_of(tmp_path / "peers_cuda.csv")}
    for model in ("small vit", "small llama"):
        for name in ("forward", "relprop", "relprop_stable", "relprop_attnlrp"):
            decoder = model == "small llama" and name in ("relprop", "relprop_stable")
            assert bool(race[model, name]["ms_median"]) != decoder, race[model, name]


def test_a_part_that_fails_hides_no_other(tmp_path: Path) -> None:
    """Every part fails, none hides the next, and what there is of them is packed."""
    done = session(tmp_path, PARTS="info ceilings", PACK="1", PYTHON="false")
    assert done.returncode == 1
    assert "== ceilings failed" in done.stderr and "== ceilings took" in done.stdout
    with tarfile.open(tmp_path / "session.tar.gz") as packed:
        assert {"./info.log", "./ceilings.log"} <= set(packed.getnames())


def test_what_a_crash_of_the_compiler_said_is_kept(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\ncase "$*" in *compiled_first*) echo "ptxas died" >&2; exit 3;; esac\n')
    broken.chmod(0o755)
    done = session(tmp_path, PARTS="compiled", PYTHON=str(broken))
    assert done.returncode == 1 and "== compiled failed" in done.stderr
    assert "ptxas died" in (tmp_path / "compiled.log").read_text()


def test_verdict_of_parity() -> None:
    """bfloat16: the median error against twice the plain rules' median. float32: 1e-3, or that where they lose more."""
    pytest.importorskip("timm")
    from benchmarks.gpu.parity import bound_of, is_right

    half, lost = bound_of(torch.bfloat16, "chefer", [0.01, 0.9, 0.02, 0.015, 0.03]), [0.02] * 5
    assert half == pytest.approx(0.04)
    assert is_right([2.0 * x for x in lost], half) and not is_right([2.1 * x for x in lost], half)
    assert not is_right([3.9 * x for x in lost], half)
    assert is_right([0.9, 0.01, 0.01, 0.01, 0.9], half)  # as plain rules have it, some inputs lose far more
    for broken in (float("inf"), float("nan")):
        assert not is_right([0.01, 0.01, 0.01, 0.01, broken], half)
    for composite, bound in (("attnlrp", 1e-3), ("chefer_stable", 1e-3), ("chefer", 4e-3)):
        assert bound_of(torch.float32, composite, [2e-3] * 5) == pytest.approx(bound)
    assert bound_of(torch.float32, "chefer", [1e-5] * 5) == 1e-3


def test_rows_are_written_as_they_come(tmp_path: Path) -> None:
    machine = Machine(dry=True, out=tmp_path)
    machine.begin("table")
    machine.add(run="first", ms=1.0)
    assert [row["run"] for row in rows_of(tmp_path / "table.csv")] == ["first"]
    machine.add(run="second", failed="no")
    machine.amend(more=2.0)
    rows = rows_of(tmp_path / "table.csv")
    assert [(row["run"], row["more"], row["failed"]) for row in rows] == [("first", "", ""), ("second", "2.0", "no")]


def test_a_kernel_that_fails_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not above: what imports the kernels first decides whether they run under the interpreter.
    from benchmarks.gpu import kernels
    from benchmarks.gpu.case import Case

    def broken() -> object:
        raise RuntimeError("no such instruction")

    tensor = torch.ones(2)
    made = [
        Case("first", "bf16", "2", {"triton": broken}, lambda: (tensor,), 0.0, 8.0, 1e-3),
        Case("second", "bf16", "2", {"triton": lambda: (tensor,)}, lambda: (tensor,), 0.0, 8.0, 1e-3),
    ]
    other = Case("second", "bf16", "2", {"triton": lambda: (tensor,)}, lambda: (tensor,), 0.0, 8.0, 1e-3, "unchecked")
    monkeypatch.setattr(kernels, "cases", lambda machine, large: [*made, other] if large else made)
    assert kernels.main(Machine(dry=True, out=tmp_path)) == 1
    checks, timed = rows_of(tmp_path / "checks.csv"), rows_of(tmp_path / "kernels.csv")
    assert [row["right"] for row in checks] == ["False", "True"]
    assert checks[0]["failed"] == "RuntimeError: no such instruction"
    assert [bool(row["gb_s"]) for row in timed] == [False, True, False]
    assert timed[0]["failed"] == timed[2]["failed"] == "no check of it passed"


def test_what_no_check_passed_is_not_timed(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    from benchmarks.gpu.contenders import attempt, key_of

    machine = Machine(dry=True, out=tmp_path)
    keys = [key_of("vit", "attnlrp", "attnlrp", "triton", graph, torch.bfloat16) for graph in (False, True)]
    machine.begin("end_to_end_parity")
    machine.add(**dict(zip(machine.KEY, keys[0], strict=True)), right=True)
    machine.add(**dict(zip(machine.KEY, keys[1], strict=True)), right=False)
    machine.begin("end_to_end_vit")
    assert attempt(machine, "right", lambda: lambda: None, checked=keys[0]) >= 0.0
    for name, key in (("wrong", keys[1]), ("unknown", ("vit", *keys[0][1:5], "float16"))):
        ms = attempt(machine, name, lambda: lambda: None, checked=key)
        assert ms != ms and "ms" not in machine.rows[-1] and machine.rows[-1]["failed"] == "no check of it passed"


def test_patches_are_undone() -> None:
    pytest.importorskip("timm")
    from benchmarks.gpu.contenders import unpatched_after

    module: Any = __import__("torch.nn.modules.activation", fromlist=["GELU"])
    own, length = module.GELU.forward, len(vars(module))
    with unpatched_after("torch.nn.modules.activation"):
        module.GELU.forward = torch.nn.Dropout.forward = lambda *_: None  # type: ignore[method-assign]
        module.torch, module.added = None, 1
    assert module.GELU.forward is own and module.torch is torch and len(vars(module)) == length
    assert torch.nn.Dropout(0.0)(torch.ones(1)) == 1


def test_what_runs_under_a_sanitizer_ends_with_it(tmp_path: Path) -> None:
    """It has the GPU: its output would stay open for as long as it lives."""
    from benchmarks.gpu.sanitized import _watched

    start = time.monotonic()
    said, failed = _watched(["bash", "-c", "sleep 300 & echo begun; wait"], "cuda", str(tmp_path), 1)
    assert (said, failed) == ("begun\n", "not done in 1 s")
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    ("tool", "failed"),
    [
        (None, "compute-sanitizer is not installed"),
        ("sleep 9", "not done in 1 s"),
        ("echo Device not supported; exit 3", "exit status 3"),
        ("echo ERROR SUMMARY: 0 errors", "no kernel ran"),
        ('echo "op,\nfirst," > "$LAST/runs.csv"; echo "ERROR SUMMARY: 2 errors"', ""),
        ('echo "op,\nfirst," > "$LAST/runs.csv"; echo "ERROR SUMMARY: 0 errors"', ""),
    ],
    ids=["missing", "late", "refused", "nothing ran", "errors", "clean"],
)
def test_a_sanitizer_that_finds_nothing_out_has_failed(tmp_path: Path, tool: str | None, failed: str) -> None:
    from benchmarks.gpu.sanitized import examine

    machine = Machine(dry=False, out=tmp_path)
    machine.__dict__["_known"] = {}  # there is no device to be named
    machine.begin("sanitizer")
    path = None
    if tool is not None:
        path = str(tmp_path / "tool")
        Path(path).write_text(f"#!/bin/sh\nfor LAST; do :; done\n{tool}\n")
        Path(path).chmod(0o755)
    right = examine(machine, path, "memcheck", "cuda", 1.0)
    assert right == bool(tool and tool.endswith('0 errors"')) and machine.rows[-1]["failed"] == failed


def test_no_part_starts_when_the_time_is_over(tmp_path: Path) -> None:
    done = session(tmp_path, PARTS="info ceilings", TOTAL="4", PYTHON="true")
    assert done.returncode == 1
    assert [row["state"] for row in rows_of(tmp_path / "budget.csv")] == ["no time left"] * 2


def test_a_late_part_ends_with_the_total(tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.write_text('#!/bin/sh\ncase "$*" in *info*) sleep 30;; esac\n')
    slow.chmod(0o755)
    done = session(tmp_path, PARTS="info ceilings", TOTAL="7", PYTHON=str(slow))
    assert done.returncode == 1
    assert [row["state"] for row in rows_of(tmp_path / "budget.csv")] == ["late", "no time left"]


def test_expected_times_add_up_to_less_than_the_total() -> None:
    script = (ROOT / "benchmarks" / "gpu_session.sh").read_text()
    expected = [int(seconds) for seconds in re.findall(r"^(?:budget=')?\w+ (\d+) \d+'?$", script, re.M)]
    total = int(re.findall(r"^TOTAL=.*:-(\d+)", script, re.M)[0])
    assert len(expected) == len(re.findall(r"^ *run \w+ ", script, re.M)) == 17
    assert sum(expected) <= total <= 590
