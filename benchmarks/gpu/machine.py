"""The device that the GPU benchmarks run on, how they time, and the rows they write."""

from __future__ import annotations

import argparse
import csv
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from benchmarks.numerics.rows import provenance

RESULTS = Path(__file__).parents[1] / "results" / "gpu"


@dataclass
class Machine:
    """A CUDA device, or for a dry run the CPU with tiny sizes and Triton's interpreter.

    Attributes:
        dry: whether this is a dry run, whose times mean nothing.
        out: folder of the rows.
        seconds: budget of one measurement.
        points: what to measure; everything where empty.
        tiny: sizes of a dry run also on a device.
        backends: whose kernels to run; all where empty.
    """

    dry: bool
    out: Path
    seconds: float = 0.4
    points: tuple[str, ...] = ()
    tiny: bool = False
    backends: tuple[str, ...] = ()
    table: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)
    # Columns of the rows of `parity` that say what was checked.
    KEY: ClassVar[tuple[str, ...]] = ("family", "method", "composite", "backend", "graph", "dtype", "compiled")

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    def size(self, real: int, tiny: int) -> int:
        """A size, or the one of a dry run."""
        return tiny if self.dry or self.tiny else real

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
        """Normal numbers, the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(self.device, dtype)

    def time(self, run: Callable[[], Any]) -> dict[str, float]:
        """Median, 20th and 80th percentile in milliseconds, and the peak of memory in MB.

        The first run counts for the peak: a CUDA graph takes its memory in it.
        """
        if self.dry:
            start = time.perf_counter()
            run()
            once = 1e3 * (time.perf_counter() - start)
            return {"ms": once, "ms_p20": once, "ms_p80": once, "peak_mb": 0.0}
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        first = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        # Larger than the second-level cache: a kernel finds its inputs in memory, as in a pass.
        flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
        peak = max(first, torch.cuda.max_memory_allocated() - flush.numel())
        times: list[float] = []
        end = time.perf_counter() + self.seconds
        while len(times) < 10 or (time.perf_counter() < end and len(times) < 200):
            flush.zero_()
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            run()
            after.record()
            after.synchronize()
            times.append(before.elapsed_time(after))
            peak = max(peak, torch.cuda.max_memory_allocated() - flush.numel())
        low, *_, high = statistics.quantiles(times, n=5)
        return {"ms": statistics.median(times), "ms_p20": low, "ms_p80": high, "peak_mb": peak / 2**20}

    def allocated_mb(self) -> float:
        """Memory of the device that tensors hold now."""
        return 0.0 if self.dry else torch.cuda.memory_allocated() / 2**20

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def begin(self, table: str) -> None:
        """What is added from now on belongs to another table."""
        self.table, self.rows = table, []

    def add(self, **row: Any) -> None:
        """One row, shown and written as it comes: what is stopped later leaves what it had."""
        self.rows.append(row)
        self.amend()

    def amend(self, **more: Any) -> None:
        """More columns of the last row."""
        self.rows[-1].update(more)
        row = self.rows[-1]
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
        self._write()

    def relate(self, columns: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Columns that compare rows with others, added to every row there is."""
        for row in self.rows:
            row.update(columns(row))
        self._write()

    def column(self, name: str, **where: Any) -> float:
        """A number of the first row of this table that has these columns; NaN where there is none."""
        found = (row for row in self.rows if all(row.get(column) == value for column, value in where.items()))
        return float(next(found, {}).get(name, float("nan")))

    def _write(self) -> None:
        """All rows so far as a CSV file, with where they come from."""
        self.out.mkdir(parents=True, exist_ok=True)
        whole = [{**row, **self._known} for row in self.rows]
        columns = list(dict.fromkeys(key for row in whole for key in row))
        with (self.out / f"{self.table}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(whole)

    @functools.cached_property
    def _known(self) -> dict[str, str]:
        return self._provenance()

    def _provenance(self) -> dict[str, str]:
        try:
            found = provenance()
        except OSError:  # no git on the machine
            found = {"torch": torch.__version__, "commit": "unknown"}
        if not self.dry:
            found["device"] = torch.cuda.get_device_name()
        found["triton"] = _version("triton")
        found["dry_run"] = str(self.dry)
        return found

    def ceilings(self) -> dict[str, float]:
        """What `benchmarks.gpu.ceilings` measured: by name, in GB/s or TFLOP/s."""
        return {row["ceiling"]: float(row["value"]) for row in self.read("ceilings")}

    def passed(self) -> set[tuple[str, ...]]:
        """What `benchmarks.gpu.parity` found right, by the columns of `KEY`."""
        rows = [row for table in ("parity", "inductor") for row in self.read(f"end_to_end_{table}") if "right" in row]
        return {tuple(row[name] for name in self.KEY) for row in rows if row["right"] == "True"}

    def read(self, table: str) -> list[dict[str, str]]:
        """Rows that an earlier part wrote; none where it did not run."""
        path = self.out / f"{table}.csv"
        if not path.is_file():
            return []
        with path.open() as file:
            return list(csv.DictReader(file))


def told(problem: Exception) -> str:
    """A failure as a row has it."""
    return f"{type(problem).__name__}: {problem}"[:300]


def _version(package: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def machine_of(arguments: Iterable[str] | None = None) -> Machine:
    """From the command line: points to measure, --dry-run, --out FOLDER ($OUT by default)."""
    parser = argparse.ArgumentParser()
    parser.add_argument("points", nargs="*")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, under Triton's interpreter")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or RESULTS))
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the device")
    parser.add_argument(
        "--backend", nargs="*", default=[], choices=("triton", "cuda", "library"), help="whose kernels; all if none"
    )
    given = parser.parse_args(None if arguments is None else list(arguments))
    if not given.dry_run and not torch.cuda.is_available():
        raise SystemExit("expected a CUDA device, got none; --dry-run needs none")
    return Machine(given.dry_run, given.out, 0.4, tuple(given.points), given.tiny, tuple(given.backend))
