"""Kernels compiled without a GPU for sm_80, sm_90 and sm_100: nothing spills, shared memory fits, wgmma is used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from relprop.kernels.configurations import SHARED_MEMORY, tabled_architecture

ROOT = Path(__file__).parents[2]


def compiled(architectures: str, pattern: str, what: str = "compiled", **environment: str) -> list[dict[str, Any]]:
    """Rows of `compile_cases`, whose process has no interpreter."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_cases", architectures, pattern, what],
        cwd=ROOT,
        env=clean,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows
    return rows


def check(rows: list[dict[str, Any]]) -> None:
    # A kernel that was compiled to nothing has a handful of registers.
    empty = [row for row in rows if row["registers"] < 12]
    assert not empty, empty
    spilled = [row for row in rows if row["stack"]]
    assert not spilled, spilled
    check_fit(rows)


def check_fit(rows: list[dict[str, Any]]) -> None:
    too_large = [row for row in rows if row["shared"] > SHARED_MEMORY[tabled_architecture(row["architecture"])]]
    assert not too_large, too_large


def large_products(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Kernels shaped like a matrix product, with 16-bit operands and tiles that the large instructions take.

    Left out are layers of few rows, and heads that cannot have large tiles (docs/design.md): z+ shares of q k with 256
    channels; float16 with 256 channels, and with 128 on sm_90.
    """
    multiplied = [row for row in rows if "scales" not in row["kernel"]]  # which only adds up
    narrow = {"bf16", "fp16", "medium"}
    return [row for row in multiplied if narrow & set(row["case"].split("/")) and not small_tiles(row)]


def small_tiles(row: dict[str, Any]) -> bool:
    parts = row["case"].split("/")
    if parts[0] != "attention_relevance":
        return "few" in parts
    if "fp16" in parts and "statistics" not in row["kernel"]:
        return int(parts[-1][1:]) > (64 if row["architecture"] == 90 else 128)
    return parts[-1] == "d256" and row["signed"]


def test_every_case_has_tiles() -> None:
    """On every architecture, for every kind of product: no call asks for what the table does not have."""
    rows = compiled("80,86,90,100", "*", "launches")
    cases = {at: {row["case"] for row in rows if row["architecture"] == at} for at in (80, 100)}
    assert cases[80] == cases[100] and len(cases[80]) > 200


def test_every_configuration_is_compiled() -> None:
    """No row of the table that no case reaches."""
    assert compiled("80,90,100", "*", "unreached") == [[]]


def test_masks_of_every_kind_are_compiled() -> None:
    """Heads that share keys, boolean masks and one stream alone, each with and without the others."""
    labels = {row["case"].split("/")[1] for row in compiled("90", "attention_relevance/*", "launches")}
    assert labels >= {"plain", "bias_causal", "masked_causal_grouped", "causal", "padding", "grouped", "gradient"}


def test_a_few_on_hopper() -> None:
    rows = compiled("90", "linear_alpha_beta/*/bf16/many/even")
    check(rows)
    assert len(large_products(rows)) == 8 and all(row["wgmma"] for row in large_products(rows))


def test_boolean_mask_and_shared_keys_on_hopper() -> None:
    """float16, whose shares are tf32: the tiles with least registers to spare."""
    rows = compiled("90", "attention_relevance/masked_causal_grouped/fp16/half/d64")
    check(rows)
    assert len(large_products(rows)) == 3 and all(row["wgmma"] for row in large_products(rows))


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    """What the first one made is in Triton's cache, and nothing is tuned."""
    seen = []
    for _ in range(2):
        compiled("90", "add_gamma/few/fp32", TRITON_CACHE_DIR=str(tmp_path))
        seen.append({path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()})
    assert any(path.suffix == ".cubin" for path in seen[0])
    assert seen[1] == seen[0]
    assert not [path for path in (ROOT / "kernels").glob("*.py") if "autotune" in path.read_text()]


@pytest.mark.full
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_all(architecture: int) -> None:
    rows = compiled(str(architecture), "*")
    check(rows)
    used = {90: "wgmma", 100: "tcgen05"}.get(architecture)
    if used:
        large = large_products(rows)
        assert {row["kernel"] for row in large} >= {"_linear_back_kernel", "_attention_relevance_keys_kernel"}
        missing = [row for row in large if not row[used] and "from_y" not in row["case"]]
        assert not missing, missing


@pytest.mark.full
def test_smaller_chips() -> None:
    """What has less shared memory runs the tiles of sm_80 and some smaller ones. That they fit is all that is said."""
    check_fit(compiled("86", "*"))
