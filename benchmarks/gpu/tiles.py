"""Tiles of 64 rows, which Hopper's large products want, where no table has them: what the compiler makes of each.

    python -m benchmarks.gpu.tiles [--out FILE]

The kernels are the attention sides that sum both parts of z+ shares, with bfloat16 heads of 128 and 256 channels, on
sm_90. No GPU is needed.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.numerics.rows import RESULTS, write_rows
from relprop.kernels.ahead_of_time import compile_launch
from relprop.kernels.launch import Configuration, Launch, recording
from tests.kernels.compile_cases import attention_cases, signed_shares

ARCHITECTURE = 90


def launches() -> Iterator[tuple[str, Launch]]:
    """Those in question, with their case."""
    for name, run in attention_cases():
        _, label, dtype, rule, channels = name.split("/")
        if (dtype, rule) != ("bf16", "alpha_beta") or channels == "d64":
            continue
        with recording(ARCHITECTURE) as recorded:
            run()
        yield from ((f"{label} {channels}", launch) for launch in recorded if signed_shares(launch))


def rows() -> Iterator[dict[str, Any]]:
    """One per launch and configuration."""
    for case, launch in launches():
        side = "keys" if "keys" in launch.kernel.__name__ else "queries"
        own, other = ("BLOCK_K", "BLOCK_Q") if side == "keys" else ("BLOCK_Q", "BLOCK_K")
        for size, stages in itertools.product((16, 32), (1, 2, 3)):
            tiles = {own: 64, other: size}
            chosen = Configuration(tiles, 8, stages)
            tried = replace(launch, configuration=chosen, constants={**launch.constants, **tiles})
            built = compile_launch(tried, ARCHITECTURE)
            found = {"registers": built.registers, "spilled_bytes": built.stack, "shared_bytes": built.shared}
            instruction = "wgmma" if "wgmma.mma_async" in built.ptx else "-"
            yield {"case": case, "side": side, "rows": 64, "other": size, "warps": 8, "stages": stages, **found} | {
                "instruction": instruction
            }


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=RESULTS / "attention_tiles.csv")
    write_rows(parser.parse_args().out, list(rows()))


if __name__ == "__main__":
    main()
