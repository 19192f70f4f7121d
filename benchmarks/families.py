"""Full-size image models, random weights, one at a time: python -m benchmarks.families [--only NAME ...] [--batch N].

Each model runs in a process of its own, so that one that fails or runs out of memory costs no row but its own. A row
has the seconds that compilation and one explanation take, the latter also in forward passes, and the largest error by
which the ledger fails to close in float32, relative to the largest sum in it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import relprop
from benchmarks.numerics.rows import RESULTS, markdown, write_rows
from tests.families.catalogue import Family
from tests.families.vision_models import VISION

COLUMNS = ("compile_seconds", "explain_seconds", "forward_seconds", "ratio_to_forward", "ledger_error")


def seconds_of(run: Callable[[], Any]) -> float:
    """The faster of two calls after one for warming up."""
    run()
    found = []
    for _ in range(2):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


def measure(family: Family, batch: int, composite: str) -> dict[str, Any]:
    """One row."""
    assert family.full is not None
    torch.manual_seed(0)
    model, make = family.full()
    inputs = make(batch)
    method = "full" if family.refusal else "transformer_attribution"
    start = time.perf_counter()
    engine = relprop.compile(model, (), inputs, method=method, composite=composite, output=family.output)
    compiled = time.perf_counter() - start
    explained = seconds_of(lambda: engine(**inputs, target=family.target))
    with torch.inference_mode():
        forward = seconds_of(lambda: model(**inputs))
    books = engine(**inputs, target=family.target, ledger=True).ledger
    assert books is not None
    largest = max(1.0, *(float(entry.arriving.abs().max()) for entry in books.entries))
    error = float(books.imbalance.abs().max()) / largest
    values = (compiled, explained, forward, explained / forward, error)
    return {"method": method, **dict(zip(COLUMNS, values, strict=True))}


def in_own_process(family: Family, batch: int, composite: str) -> dict[str, Any]:
    """`measure` in a fresh interpreter; a failure becomes a row that says so."""
    command = [sys.executable, "-m", __spec__.name, "--child", family.name]
    command += ["--batch", str(batch), "--composite", composite]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        found, failure = json.loads(done.stdout.splitlines()[-1]), ""
    else:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        found, failure = dict.fromkeys(("method", *COLUMNS), ""), lines[-1]
    return {"model": family.name, "batch": batch, "composite": composite, **found, "failure": failure}


def main() -> None:
    """Measure the models asked for and write one row each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", metavar="NAME", help="families by name; all by default")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--composite", default="chefer_stable")
    parser.add_argument("--out", type=Path, default=RESULTS / "families.csv")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    known = {family.name: family for family in VISION if family.full is not None}
    if options.child:
        print(json.dumps(measure(known[options.child], options.batch, options.composite)))
        return
    unknown = sorted(set(options.only or ()) - set(known))
    if unknown:
        parser.error(f"--only: expected names among {', '.join(known)}, got {', '.join(unknown)}")
    rows = []
    for name in options.only or known:
        rows.append(in_own_process(known[name], options.batch, options.composite))
        print(markdown(rows[-1:]), flush=True)
        write_rows(options.out, rows)
    sys.exit(1 if any(row["failure"] for row in rows) else 0)


if __name__ == "__main__":
    main()
