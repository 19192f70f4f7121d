"""What measured steps say: writes the table that `backend="auto"` reads on a GPU.

    python -m benchmarks.gpu.choose FOLDER/steps.csv... [--out FILE]

Compute capabilities that the rows do not have keep what the table says of them.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterable
from pathlib import Path

from relprop.backends import choices


def main(arguments: Iterable[str] | None = None) -> None:
    """Write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=choices.PATH)
    given = parser.parse_args(None if arguments is None else list(arguments))
    rows: list[dict[str, str]] = []
    for path in given.rows:
        with path.open() as file:
            rows += [row for row in csv.DictReader(file) if not row["failed"] and row["dry_run"] != "True"]
    if not rows:
        raise SystemExit("rows: expected measured steps of a GPU, got none")
    found = json.loads(given.out.read_text()) if given.out.is_file() else {}
    given.out.write_text(json.dumps({**found, **choices.fastest(rows)}, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
