"""One thing to look at: it shows itself in a notebook, a terminal or a window, and saves itself by suffix."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from relprop.errors import MissingDependencyError, OptionError
from relprop.pictures.page import data_uri, fragment, page, save_text
from relprop.pictures.panels import save_picture

__all__ = ["View"]

RASTER = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
PAGES = (".html", ".htm")


@dataclass(frozen=True)
class View:
    """A picture, a text, or both.

    Attributes:
        title: of a page, and what stands for the picture where it is not seen.
        picture: draws it. None where there is none.
        text: writes it as a fragment of HTML for a theme. None where there is none.
        terminal: writes it as lines for a terminal.
        either: the picture and the text say the same, so that HTML has the text alone.
    """

    title: str
    picture: Callable[[], Image.Image] | None = None
    text: Callable[[str], str] | None = None
    terminal: Callable[[], str] | None = None
    either: bool = False

    def image(self) -> Image.Image:
        """The picture.

        Raises:
            OptionError: there is none. MissingDependencyError: matplotlib is not installed.
        """
        if self.picture is None:
            raise OptionError(f"{self.title}: expected something with a picture, got a text; it can be shown as HTML")
        return self.picture()

    def html(self, theme: str = "auto") -> str:
        """A fragment of HTML that stands alone: pictures inside as data, style included.

        Args:
            theme: "auto" (what the reader's system prefers), "light" or "dark".
        """
        parts = []
        if self.picture is not None and not (self.either and self.text is not None):
            drawn = f'<img src="{data_uri(self.picture())}" alt="{escape(self.title)}">'
            parts.append(fragment(drawn, theme))
        if self.text is not None:
            parts.append(self.text(theme))
        return "\n".join(parts)

    def save(self, path: str | Path, theme: str = "auto") -> Path:
        """Write a picture (.png, .jpg, .webp) or a page (.html), whole or not at all.

        Raises:
            OptionError: another suffix, or a picture of what has none. OutputError: it cannot be written.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix in PAGES:
            return save_text(page(self.html(theme), self.title, theme), path)
        if suffix in RASTER and self.picture is not None:
            return save_picture(self.picture(), path, RASTER[suffix])
        fitting = (*(RASTER if self.picture is not None else ()), PAGES[0])
        raise OptionError(f"{path}: expected a name that ends in {', '.join(fitting)}, got {suffix or 'no suffix'}")

    def show(self) -> None:
        """Show it: in a notebook as its output, a text in the terminal, a picture in the system's viewer."""
        if _in_notebook():
            from IPython.display import HTML, display  # type: ignore[import-not-found]

            display(HTML(self.html()))
            return
        if self.terminal is not None:
            print(self.terminal())
        if self.picture is not None:
            self.picture().show(title=self.title)

    def _repr_html_(self) -> str | None:
        try:
            return self.html()
        except MissingDependencyError:
            return None


def _in_notebook() -> bool:
    """Whether a kernel runs this that displays HTML, as IPython's frontends do and its terminal does not."""
    if "IPython" not in sys.modules or importlib.util.find_spec("IPython") is None:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return shell is not None and type(shell).__name__ != "TerminalInteractiveShell"
