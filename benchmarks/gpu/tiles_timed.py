"""Tiles beside those of the table, timed: what the table's rows, chosen by what compiles without spilling, leave.

    python -m benchmarks.gpu.tiles_timed [--dry-run] [--out FOLDER]

Writes tiles_timed.csv: for the products and the attention of ViT-B/16 in bfloat16 at batch 64, every configuration that
a call takes, and its neighbours: half a tile, other warps, one more or one fewer stage. A time is that of the whole
call, of which one kernel's configuration changes. The table is not written: a row that is faster is one to put there.
`compiled_first` has compiled them before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from benchmarks.gpu.case import Case
from benchmarks.gpu.cases import cases
from benchmarks.gpu.machine import Machine, machine_of, told
from relprop.kernels import configurations
from relprop.kernels.configurations import configuration, tabled_architecture
from relprop.kernels.launch import Configuration, architecture_of, recording

OPS = ("linear_alpha_beta_share_out", "linear_alpha_beta_back", "attention_relevance")
TABLES = ("linear", "attention")  # how the names begin of those that have tiles
SECONDS = 0.12
SMALLEST, MOST_WARPS = 16, 8
Key = tuple[str, str, str]


def hot(machine: Machine) -> Iterator[Case]:
    """One case of each operation, in its plain form."""
    seen: set[str] = set()
    for case in cases(machine, large=True):
        if case.op in OPS and case.dtype == "bf16" and "triton" in case.runs and case.op not in seen:
            seen.add(case.op)
            yield case
        if len(seen) == len(OPS):
            return


def asked(case: Case, architecture: int) -> list[Key]:
    """The keys of the table that a case looks up."""
    found: dict[Key, None] = {}

    class Watched(dict[Key, configurations.Rows]):
        def __getitem__(self, key: Key) -> configurations.Rows:
            found[key] = None
            return super().__getitem__(key)

    before = configurations.TABLE
    configurations.TABLE = Watched(before)
    try:
        with recording(architecture):
            case.runs["triton"]()
    finally:
        configurations.TABLE = before
    return [key for key in found if key[0].startswith(TABLES)]


def neighbours(tabled: Configuration) -> Iterator[Configuration]:
    """The tabled configuration, then those around it that need no more memory but for one stage."""
    yield tabled
    for name, size in tabled.tiles.items():
        if name.startswith("BLOCK") and size > SMALLEST:
            yield replace(tabled, tiles={**tabled.tiles, name: size // 2})
    yield replace(tabled, warps=4 if tabled.warps == MOST_WARPS else MOST_WARPS)
    for stages in (tabled.stages - 1, tabled.stages + 1):
        if stages > 0:
            yield replace(tabled, stages=stages)


@contextlib.contextmanager
def tabled_as(key: Key, architecture: int, chosen: Configuration) -> Iterator[None]:
    """The table with another row."""
    before = configurations.TABLE[key]
    configurations.TABLE[key] = {**before, tabled_architecture(architecture): chosen}
    try:
        yield
    finally:
        configurations.TABLE[key] = before


def tried(machine: Machine, architecture: int) -> Iterator[tuple[Case, Key, Configuration, bool]]:
    """Every case with a configuration of one of its keys, while the table has it, and whether it is the table's own."""
    for case in hot(machine):
        for key in asked(case, architecture):
            own = configuration(key[0], architecture, *key[1:])
            for chosen in neighbours(own):
                with tabled_as(key, architecture, chosen):
                    yield case, key, chosen, chosen == own


def main(machine: Machine) -> int:
    """Rows of tiles_timed.csv; 1 where a tabled configuration has no time."""
    machine.begin("tiles_timed")
    machine.seconds, status = SECONDS, 0
    architecture = architecture_of(machine.device)
    for case, key, chosen, own in tried(machine, architecture):
        row = {**case.row("triton"), "table": key[0], "kind": key[1], "class": key[2], "architecture": architecture}
        row |= {"tiles": " ".join(f"{name}={size}" for name, size in chosen.tiles.items())}
        row |= {"warps": chosen.warps, "stages": chosen.stages, "tabled": own}
        try:
            machine.add(**row, **machine.time(case.runs["triton"]), failed="")
        except Exception as problem:  # as of one that has no room on the device
            machine.add(**row, failed=told(problem))
            status |= own
    return int(status)


if __name__ == "__main__":
    raise SystemExit(main(machine_of()))
