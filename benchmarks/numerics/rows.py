"""Rows of results: what was measured, on what, with which versions."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parents[1] / "results"


def provenance() -> dict[str, str]:
    """Device, versions, commit and date; the commit ends in "-dirty" where tracked files differ from it."""
    folder = Path(__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True, check=False
    ).stdout.strip()
    dirty = subprocess.run(
        ["git", "diff", "--quiet", "HEAD", "--", "relprop", "kernels", "csrc"], cwd=folder.parents[1], check=False
    ).returncode
    return {
        "device": _processor(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "commit": f"{commit or 'unknown'}{'-dirty' if commit and dirty else ''}",
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write_rows(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    kept: Sequence[Mapping[str, str]] = (),
    device: str | None = None,
) -> None:
    """Write rows with their provenance; numbers keep six digits.

    Args:
        kept: rows of an earlier file, with the provenance they had; they come first.
        device: what was measured on, where that is not this machine's processor.
    Raises:
        ValueError: no rows, or rows with different columns.
    """
    made = provenance()
    made["device"] = device or made["device"]
    table = [*kept, *({**{k: _text(v) for k, v in row.items()}, **made} for row in rows)]
    if not table or any(list(row) != list(table[0]) for row in table):
        raise ValueError(f"expected rows with the same columns, got {sorted({tuple(row) for row in table})}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows as written."""
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def kept_rows(path: Path, only: str | None) -> list[dict[str, str]]:
    """What stays of a file when `only` "random" or "trained" models are measured anew; None keeps nothing."""
    if only is None or not path.is_file():
        return []
    return [row for row in read_rows(path) if row["trained"] == ("1" if only == "random" else "0")]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a markdown table."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = (f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
