"""The README's table of models names what is tested, and nothing else."""

from __future__ import annotations

from benchmarks.tables import README
from tests.families.catalogue import rendered, rows


def test_the_table_is_the_tested_families() -> None:
    text = README.read_text(encoding="utf-8")
    assert rendered(text) == text, "run python -m tests.families.catalogue"


def test_titles_are_unique() -> None:
    titles = [row.title for row in rows().values()]
    assert len(set(titles)) == len(titles) > 0
