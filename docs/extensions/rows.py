"""Tables from committed rows: `{rows} file.csv` shows columns of a file, `{readme-table} name` one of the README's."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from benchmarks.numerics.rows import RESULTS, read_rows
from benchmarks.tables import NOT_YET, ON_PAGES, table

MACHINE = ("device", "threads", "torch", "commit", "date")  # the same for the rows of one run: named once, below


def shown(text: str) -> str:
    """A cell: numbers with three digits that count, names as they are."""
    try:
        number = float(text)
    except ValueError:
        return text
    if abs(number) < 1e6 and number == int(number):
        return str(int(number))
    return f"{number:.3g}" if not 1000 <= abs(number) < 1e12 else f"{number:.0f}"


def chosen(rows: list[dict[str, str]], conditions: str) -> list[dict[str, str]]:
    """Rows with these values: "dtype=float32; part=check"."""
    for condition in filter(None, conditions.split(";")):
        column, _, wanted = condition.strip().partition("=")
        rows = [row for row in rows if row[column] == wanted]
    return rows


def ran_on(rows: list[dict[str, str]], count: int, name: str) -> str:
    """The line below a table: how many of the rows it has, where they are, the machine and the versions."""
    parts = {column: sorted({row[column] for row in rows if row.get(column)}) for column in MACHINE}
    said = [", ".join(parts["device"]), f"{', '.join(parts['threads'])} thread(s)" if parts["threads"] else ""]
    said += [f"torch {', '.join(parts['torch'])}" if parts["torch"] else "", ", ".join(parts["date"])]
    number = f"{count} of {len(rows)}" if count < len(rows) else str(count)
    return f"{number} rows of `benchmarks/results/{name}`: {', '.join(part for part in said if part)}."


class Rows(SphinxDirective):
    """Rows of a file in `benchmarks/results/`.

    Options:
        columns: "column" or "column as its heading", separated by commas; all but the machine's without it.
        where: which rows; see `chosen`.
        largest: a column of numbers; rows are sorted by it, the largest first.
        limit: how many are shown at most.
        optional: nothing is shown where there is no such file.
    """

    required_arguments = 1
    option_spec = {
        "columns": directives.unchanged,
        "where": directives.unchanged,
        "largest": directives.unchanged,
        "limit": directives.positive_int,
        "optional": directives.flag,
    }

    def run(self) -> list[nodes.Node]:
        path = RESULTS / self.arguments[0]
        self.env.note_dependency(str(path))
        if not path.exists():
            if "optional" in self.options:
                return []
            return self.parse_text_to_nodes(f"*{NOT_YET}* (`benchmarks/results/{path.name}`)")
        rows = chosen(read_rows(path), self.options.get("where", ""))
        if not rows:
            raise self.error(f"{path.name}: expected rows where {self.options['where']}, got none")
        named = [part.strip().partition(" as ") for part in self.options.get("columns", "").split(",") if part.strip()]
        columns = {column: heading or column for column, _, heading in named}
        columns = columns or {column: column for column in rows[0] if column not in MACHINE}
        unknown = [column for column in columns if column not in rows[0]]
        if unknown:
            raise self.error(f"{path.name}: expected columns among {', '.join(rows[0])}, got {', '.join(unknown)}")
        if "largest" in self.options:
            rows = sorted(rows, key=lambda row: -float(row[self.options["largest"]]))
        body = [[shown(row[column]).replace("|", "\\|") for column in columns] for row in rows]
        body = body[: self.options.get("limit")]
        text = table(list(columns.values()), body)
        return self.parse_text_to_nodes(f"{text}\n\n{ran_on(rows, len(body), path.name)}")


class ReadmeTable(SphinxDirective):
    """A table that the README has too, or has a part of."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        if self.arguments[0] not in ON_PAGES:
            raise self.error(f"expected one of {', '.join(ON_PAGES)}, got {self.arguments[0]}")
        for path in RESULTS.glob("*.csv"):
            self.env.note_dependency(str(path))
        return self.parse_text_to_nodes(ON_PAGES[self.arguments[0]]())


def setup(app: Sphinx) -> dict[str, Any]:
    """Sphinx's entry."""
    app.add_directive("rows", Rows)
    app.add_directive("readme-table", ReadmeTable)
    return {"parallel_read_safe": True}
