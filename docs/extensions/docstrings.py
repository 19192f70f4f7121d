"""Docstrings are plain text with names in backquotes: what reStructuredText would read into formulas is escaped."""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

_RAISES = re.compile(r"^( *)Raises:\n((?:\1 +\S.*\n)+)", re.MULTILINE)
_NEXT = re.compile(r"(?<=\.) (?=\w+Error(?:, \w+Error)*:)")
_CODE = re.compile(r"(`[^`]*`)")
_MARKUP = re.compile(r"([*|]|(?<=\w)_(?!\w))")


def one_a_line(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """ "AError, BError: why. CError: why." are two entries, and so two lines."""

    def entries(found: re.Match[str]) -> str:
        inside = found[1] + "    "
        text = " ".join(line.strip() for line in found[2].splitlines())
        parts = [part if ":" in part else part.rstrip(".") for part in _NEXT.split(text)]
        return f"{found[1]}Raises:\n" + "".join(f"{inside}{part}\n" for part in parts)

    lines[:] = _RAISES.sub(entries, "\n".join([*lines, ""])).split("\n")


def escape(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """|x||w| is no substitution, *args no emphasis, R_ no reference."""
    for number, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            parts = _CODE.split(line)
            lines[number] = "".join(part if part.startswith("`") else _MARKUP.sub(r"\\\1", part) for part in parts)


def setup(app: Sphinx) -> dict[str, Any]:
    """Sphinx's entry."""
    app.connect("autodoc-process-docstring", one_a_line, priority=100)
    app.connect("autodoc-process-docstring", escape, priority=110)  # before napoleon writes markup of its own
    return {"parallel_read_safe": True}
