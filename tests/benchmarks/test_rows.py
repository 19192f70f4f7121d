"""Every committed row says which commit it was measured at, and that commit can be looked up."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks.numerics.rows import RESULTS, read_rows

FILES = sorted(RESULTS.rglob("*.csv"))


def git(*arguments: str) -> str:
    """What git prints; skips where there is no history to look into."""
    try:
        done = subprocess.run(["git", *arguments], cwd=RESULTS, capture_output=True, text=True, check=False)
    except OSError:
        pytest.skip("no git")
    if done.returncode != 0:
        pytest.skip(f"no checkout: {done.stderr.strip()}")
    return done.stdout.strip()


@pytest.fixture(scope="module")
def history() -> list[str]:
    """Every commit that led here."""
    if git("rev-parse", "--is-shallow-repository") == "true":
        pytest.skip("a shallow clone")
    return git("rev-list", "HEAD").splitlines()


def unknown(stamps: set[str], history: list[str]) -> set[str]:
    """Stamps that name no commit of a history; a working tree that differed from its commit has none."""
    lengths = {len(stamp) for stamp in stamps}
    known = {commit[:length] for commit in history for length in lengths if length >= 7}
    return stamps - known


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(RESULTS).as_posix())
def test_rows_are_of_commits_in_history(path: Path, history: list[str]) -> None:
    stamps = {row["commit"] for row in read_rows(path)}
    assert unknown(stamps, history) == set()


def test_a_stamp_that_names_no_commit_is_found() -> None:
    history = ["0123456789" * 4, "a" * 40]
    assert unknown({"0123456", "a" * 40}, history) == set()
    stamps = {"0123456-dirty", "unknown", "bbbbbbb", ""}
    assert unknown(stamps, history) == stamps
