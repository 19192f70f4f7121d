"""The README's tables are the committed rows."""

from __future__ import annotations

from benchmarks.tables import README, rendered


def test_tables_come_from_rows() -> None:
    text = README.read_text(encoding="utf-8")
    assert rendered(text) == text
