"""Tiles of 64 rows, which Hopper's large products want, where no table has them: what the compiler makes of each.

    python -m benchmarks.gpu.tiles [--out FILE]

The kernels are the attention sides that sum both parts of z+ shares, with bfloat16 heads of 256 channels and no mask.
No GPU is needed.
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

ARCHITECTURES = (90, 100)


def launches(architecture: int) -> list[Launch]:
    """Those in question."""
    run = dict(attention_cases())["attention_relevance/plain/bf16/alpha_beta/d256"]
    with recording(architecture) as recorded:
        run()
    return [launch for launch in recorded if signed_shares(launch)]


def rows() -> Iterator[dict[str, Any]]:
    """One per launch and configuration."""
    for architecture in ARCHITECTURES:
        for launch, stages in itertools.product(launches(architecture), (1, 2)):
            side = "keys" if "keys" in launch.kernel.__name__ else "queries"
            own, other = ("BLOCK_K", "BLOCK_Q") if side == "keys" else ("BLOCK_Q", "BLOCK_K")
            tiles = {own: 64, other: 16}
            chosen = Configuration(tiles, 8, stages)
            tried = replace(launch, configuration=chosen, constants={**launch.constants, **tiles})
            built = compile_launch(tried, architecture)
            found = {"registers": built.registers, "spilled_bytes": built.stack, "shared_bytes": built.shared}
            used = [name for name in ("wgmma", "tcgen05") if f"{name}.mma" in built.ptx]
            made = {"architecture": f"sm_{architecture}", "side": side, "rows": 64, "other": 16, "warps": 8}
            yield {**made, "stages": stages, **found, "instruction": "".join(used) or "-"}


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=RESULTS / "attention_tiles.csv")
    write_rows(parser.parse_args().out, list(rows()))


if __name__ == "__main__":
    main()
