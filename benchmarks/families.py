"""Full-size models, random weights, one at a time: python -m benchmarks.families [--only NAME ...] [--batch N].

Texts have 64 tokens. Large decoders keep their width and are cut to a few layers: column `layers_left_out`.

Each model runs in a process of its own, so that one that fails or runs out of memory costs no row but its own. A row
says that the model runs at this size, how long it takes and how well its books close. Columns:

- compile_core_s, explain_core_s, forward_core_s: seconds of the processor, summed over its cores, and not of the clock:
  these rows are taken beside other work. The smaller of two calls that explanation and forward pass make in turn,
  after one each that does not count.
- ratio_to_forward: explain_core_s over forward_core_s.
- peak_mb: the process's memory at its highest, weights, libraries and the building of the model included: transformers
  first makes the output layer of a decoder, then throws it away where it is the embedding once more.
- ledger_error: the largest error by which the ledger fails to close in float32, relative to the largest sum in it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import relprop
from benchmarks.numerics.rows import RESULTS, markdown, read_rows, write_rows
from benchmarks.timing import in_turn
from tests.families import text_models
from tests.families.catalogue import Family, Inputs
from tests.families.vision_models import VISION

LENGTH = 64
ROUNDS = 2
COLUMNS = (
    *("method", "parameters", "compile_core_s", "explain_core_s", "forward_core_s"),
    *("ratio_to_forward", "peak_mb", "ledger_error"),
)


def text_family(name: str) -> Family:
    """A text or multimodal family at its published size, as the image families are given."""
    family = text_models.FAMILIES[name]
    sizes = family.full
    assert sizes is not None
    inputs = family.full_inputs or family.inputs

    def full() -> tuple[nn.Module, Callable[[int], Inputs]]:
        return text_models.made(family, sizes), lambda batch: inputs(batch, LENGTH, torch.Generator().manual_seed(0))

    return Family(
        name,
        family.title,
        family.model,
        lambda: text_models.build(name),
        lambda batch: text_models.inputs(name, batch),
        family.refusal,
        full=full,
        output=family.output,
        target=family.target(LENGTH),
    )


def families() -> dict[str, Family]:
    """Every family that has a published size, by name."""
    image = {family.name: family for family in VISION if family.full is not None}
    text = {name: text_family(name) for name, family in text_models.FAMILIES.items() if family.full is not None}
    return {**image, **text}


def left_out(name: str) -> int:
    """Layers of the published model that are not built."""
    family = text_models.FAMILIES.get(name)
    return family.cut - family.full["num_hidden_layers"] if family is not None and family.cut and family.full else 0


def measure(family: Family, batch: int, composite: str) -> dict[str, Any]:
    """One row."""
    assert family.full is not None
    torch.manual_seed(0)
    model, make = family.full()
    inputs = make(batch)
    method = "full" if family.refusal else "transformer_attribution"
    start = time.process_time()
    engine = relprop.compile(model, (), inputs, method=method, composite=composite, output=family.output)
    compiled = time.process_time() - start
    with torch.no_grad():
        runs = {"explain": lambda: engine(**inputs, target=family.target), "forward": lambda: model(**inputs)}
        times = in_turn(runs, ROUNDS, time.process_time)
    books = engine(**inputs, target=family.target, ledger=True).ledger
    assert books is not None
    largest = max(float(entry.arriving.abs().max()) for entry in books.entries)
    return {
        "method": method,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "compile_core_s": compiled,
        "explain_core_s": min(times["explain"]),
        "forward_core_s": min(times["forward"]),
        "ratio_to_forward": min(times["explain"]) / min(times["forward"]),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10),
        "ledger_error": float(books.imbalance.abs().max()) / largest,
    }


def in_own_process(family: Family, batch: int, composite: str) -> dict[str, Any]:
    """`measure` in a fresh interpreter; a failure becomes a row that says so."""
    command = [sys.executable, "-m", __spec__.name, "--child", family.name]
    command += ["--batch", str(batch), "--composite", composite]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        found, failure = json.loads(done.stdout.splitlines()[-1]), ""
    else:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        found, failure = dict.fromkeys(COLUMNS, ""), lines[-1]
    head = {"model": family.name, "layers_left_out": left_out(family.name), "batch": batch, "composite": composite}
    return {**head, **found, "failure": failure}


def main() -> None:
    """Measure the models asked for and write one row each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", metavar="NAME", help="families by name; all by default")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--composite", default="chefer_stable")
    parser.add_argument("--out", type=Path, default=RESULTS / "families_cpu.csv")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    known = families()
    if options.child:
        print(json.dumps(measure(known[options.child], options.batch, options.composite)))
        return
    unknown = sorted(set(options.only or ()) - set(known))
    if unknown:
        parser.error(f"--only: expected names among {', '.join(known)}, got {', '.join(unknown)}")
    rows: list[dict[str, Any]] = []
    before = read_rows(options.out) if options.only and options.out.is_file() else []
    kept = [row for row in before if row["model"] not in options.only]
    for name in options.only or known:
        rows.append(in_own_process(known[name], options.batch, options.composite))
        print(markdown(rows[-1:]), flush=True)
        write_rows(options.out, rows, kept)
        order = list(known)
        write_rows(options.out, (), sorted(read_rows(options.out), key=lambda row: order.index(row["model"])))
    sys.exit(1 if any(row["failure"] for row in rows) else 0)


if __name__ == "__main__":
    main()
