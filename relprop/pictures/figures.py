"""matplotlib without its global state: no pyplot, no display. Pictures need it, and it is an extra."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import numpy as np
from PIL import Image

from relprop.errors import MissingDependencyError
from relprop.pictures.colours import DARK, LIGHT

DPI = 100


def require(package: str) -> Any:
    """An optional package that pictures need.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingDependencyError(
            f"pictures need {package}, which is not installed; install it with: pip install 'relprop[images]'"
        ) from error


def make_figure(width: float, height: float, *, dark: bool = False, scale: int = 1) -> Any:
    """An empty figure, laid out by constraints. width, height: in inches of 100 pixels; scale: pixels per pixel."""
    require("matplotlib")
    from matplotlib.figure import Figure

    red, green, blue = (DARK if dark else LIGHT).page
    ground = (red / 255, green / 255, blue / 255)
    return Figure(figsize=(width, height), dpi=DPI * scale, facecolor=ground, layout="constrained")


def style_axes(axes: Any, *, dark: bool = False) -> None:
    """Axes in the colours of the ground that they are drawn on."""
    theme = DARK if dark else LIGHT
    ink, page = (tuple(part / 255 for part in colour) for colour in (theme.ink, theme.page))
    axes.set_facecolor(page)
    axes.tick_params(colors=ink)
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
        text.set_color(ink)
    for name, spine in axes.spines.items():
        spine.set_color(ink)
        spine.set_visible(name in ("left", "bottom"))


def drawn(figure: Any) -> Image.Image:
    """A figure as RGB."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a letter that the font lacks is drawn as a box
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
