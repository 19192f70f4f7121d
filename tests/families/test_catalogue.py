"""The README's table of models names what is tested, and nothing else."""

from __future__ import annotations

from benchmarks.tables import README
from tests.families.catalogue import families, rendered


def test_the_table_is_the_tested_families() -> None:
    text = README.read_text(encoding="utf-8")
    assert rendered(text) == text, "run python -m tests.families.catalogue"


def test_names_and_titles_are_unique() -> None:
    found = families()
    assert len({family.name for family in found}) == len({family.title for family in found}) == len(found) > 0
