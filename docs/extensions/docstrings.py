"""Docstrings are plain text with names in backquotes: what reStructuredText would read into formulas is escaped."""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

_CODE = re.compile(r"(`[^`]*`)")
_MARKUP = re.compile(r"([*|]|(?<=\w)_(?!\w))")


def escape(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """|x||w| is no substitution, *args no emphasis, R_ no reference."""
    for number, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            parts = _CODE.split(line)
            lines[number] = "".join(part if part.startswith("`") else _MARKUP.sub(r"\\\1", part) for part in parts)


def setup(app: Sphinx) -> dict[str, Any]:
    """Sphinx's entry."""
    app.connect("autodoc-process-docstring", escape, priority=100)  # before napoleon writes markup of its own
    return {"parallel_read_safe": True}
