"""What the registry knows of a method, and its picture: `{method-card} name`."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from relprop.composites import COMPOSITES
from relprop.methods import METHODS


class MethodCard(SphinxDirective):
    """Summary, source, options and picture of a method."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        if name not in METHODS:
            raise self.error(f"expected one of {', '.join(METHODS)}, got {name}")
        method = METHODS[name]
        options = ", ".join(f"`{key}={value!r}`" for key, value in method.options.items()) or "none"
        lines = [
            f"{method.summary[0].upper()}{method.summary[1:]}.",
            "",
            f"```{{image}} /_generated/methods/{name}.png",
            f":alt: relevance of two digits by {name}",
            "```",
            "",
            f"Source: {method.source}. Answers per {'token' if method.output == 'tokens' else 'pixel or input token'};"
            f" rules `{method.composite}`; `method_options`: {options}.",
        ]
        return self.parse_text_to_nodes("\n".join(lines))


class Composites(SphinxDirective):
    """All composites with what they are for."""

    def run(self) -> list[nodes.Node]:
        lines = ["| composite | rules | source |", "|---|---|---|"]
        lines += [f"| `{name}` | {found.summary} | {found.source or '-'} |" for name, found in COMPOSITES.items()]
        return self.parse_text_to_nodes("\n".join(lines))


def setup(app: Sphinx) -> dict[str, Any]:
    """Sphinx's entry."""
    app.add_directive("method-card", MethodCard)
    app.add_directive("composites", Composites)
    return {"parallel_read_safe": True}
