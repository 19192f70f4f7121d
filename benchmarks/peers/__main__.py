"""relprop and the packages that people use, on the same models, inputs and machine, in the same run.

    python -m benchmarks.peers [--reference CHECKOUT] [--quick | --all] [--models ...] [--batches ...] [--tokens ...]
                               [--dtypes ...] [--contenders ...] [--device cuda] [--budget 30] [--memory 5]
                               [--minutes 40] [--out FILE]

Six points in at most 40 minutes by default. A contender runs as many rounds as the budget of its point has, `rounds`
says how many. `--all` has every point and no limit, `--models` with `--batches`, `--tokens` and `--dtypes` the
combinations of them, `--quick` two tiny models.

Every contender's answer is checked first, on two layers of the model, and the timed answers themselves in the end: the
first and the last sample of the first and of the last run, each held to its truth, computed alone in float64, or
`check` says why that was not affordable. What is wrong gets no time (`check`, `error`). Each runs in a fresh process,
in turn with the others: times are medians of interleaved rounds, ratios are to the forward pass of the same round,
`peak_bytes` is what its first two runs took beyond what its process held before them (the model is loaded and its
weights are read), `process_bytes` the process's own peak. Contenders that are not installed, cannot explain a model, or
run out of the budget of time or memory are rows that say so. Rows of other points in the file stay, and those of a
point that has more contenders there than this run had time for. Pictures are made with `python -m
benchmarks.peers.pictures`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.numerics.rows import RESULTS, read_rows, write_rows
from benchmarks.peers.cases import ALL, DEFAULT, MODELS, QUICK, Point
from benchmarks.peers.contenders import CONTENDERS, Options
from benchmarks.peers.race import Out, compete, without_a_time

POINT = tuple(field.name for field in dataclasses.fields(Point))
DTYPES = ("float32", "bfloat16")
MINUTES = 40


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference", type=Path, help="a checkout of the authors' code, hila-chefer's repository")
    parser.add_argument("--quick", action="store_true", help="tiny models: does everything run?")
    parser.add_argument("--all", action="store_true", help="every point of the plan, which takes hours")
    parser.add_argument("--models", nargs="+", choices=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--budget", type=float, default=30.0, help="seconds of a contender's runs of one point")
    parser.add_argument("--memory", type=float, default=5.0, help="GiB that a contender's process may allocate")
    parser.add_argument("--minutes", type=float, help=f"of the whole run; {MINUTES} by default, no limit with --all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="peers_DEVICE.csv among the results by default")
    return parser.parse_args(arguments)


def points(given: argparse.Namespace) -> list[Point]:
    """The points asked for: all combinations where models are named, else those of the plan that fit."""
    if given.models:
        sizes = (given.models, given.batches or [1], given.tokens or [197], given.dtypes or ["float32"])
        return [Point(*found) for found in itertools.product(*sizes)]
    return [
        point
        for point in (QUICK if given.quick else ALL if given.all else DEFAULT)
        if (not given.batches or point.batch in given.batches)
        and (not given.tokens or point.tokens in given.tokens)
        and (not given.dtypes or point.dtype in given.dtypes)
    ]


def merged(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Rows of an earlier file at other points: those of one point are always of one run."""
    return [row for row in _earlier(path) if not _shared(row, rows)]


def lacking(path: Path, rows: list[dict[str, Any]]) -> list[str]:
    """Contenders that an earlier file has at the point of `rows` and these have not."""
    found = {row["contender"] for row in rows}
    return [row["contender"] for row in _earlier(path) if _shared(row, rows) and row["contender"] not in found]


def _earlier(path: Path) -> list[dict[str, str]]:
    return read_rows(path) if path.is_file() else []


def _shared(row: dict[str, str], rows: list[dict[str, Any]]) -> bool:
    return any(all(row[key] == str(new[key]) for key in POINT) for new in rows)


def main(arguments: list[str] | None = None) -> int:
    """Race, print and write the rows; 1 where a point has no time at all."""
    given, status = parsed(arguments), 0
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: expected a CUDA device, got none")
    named = {field.name: getattr(given, field.name) for field in dataclasses.fields(Options)}
    out = given.out or RESULTS / f"peers_{given.device}.csv"
    device = torch.cuda.get_device_name() if given.device == "cuda" else None
    minutes = given.minutes or (math.inf if given.all else MINUTES)
    until = time.monotonic() + 60 * minutes
    asked_for = points(given)
    if not asked_for:
        sizes = ", ".join(f"--{name}" for name in ("batches", "tokens", "dtypes") if getattr(given, name))
        raise SystemExit(f"{sizes}: expected sizes of the plan's points, got others; --all has more, --models any")
    for point in asked_for:
        print(point, flush=True)
        asked = [{**dataclasses.asdict(point), "contender": name} for name in ("forward", *given.contenders)]
        if missing := lacking(out, asked):
            print(f"  not started: {out} has {', '.join(missing)} at this point too (--contenders, --out)", flush=True)
            status = 1
            continue
        if time.monotonic() > until:
            print(f"  not started: the {minutes:g} minutes are over (--minutes)", flush=True)
            continue
        try:
            rows = compete(point, given.contenders, Options(**named), until=until)
        except Out as problem:
            print(f"  forward: {problem}", flush=True)
            rows, status = without_a_time(point, problem), 1
        except ValueError as problem:
            print(f"  no rows: {problem}", flush=True)
            status = 1
            continue
        for row in rows:
            if not row["error"]:
                print(
                    f"  {row['contender']:<22} {row['ms_median']:>10} ms  x{row['ratio_to_forward']:<7}"
                    f" {row['peak_bytes'] / 2**20:>7.0f} MiB",
                    flush=True,
                )
        if missing := lacking(out, rows):
            print(f"  not written: {out} has {', '.join(missing)} at this point, this run has not (--out)", flush=True)
            continue
        write_rows(out, rows, merged(out, rows), device=device)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
