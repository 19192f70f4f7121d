"""Relevance as pictures: heat maps laid over images, and panels of titled tiles. Needs matplotlib.

Nothing here touches matplotlib's global state: no pyplot, no display.
"""

from __future__ import annotations

import importlib
import math
import os
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from relprop.errors import MissingDependencyError, NonFiniteError, OptionError, OutputError, ShapeError
from relprop.ledger import Ledger

__all__ = ["conditioning_picture", "enlarge", "normalise", "overlay", "panel", "require", "save_png", "token_matrix"]

UNSIGNED, SIGNED = "turbo", "bwr"

_OPACITY = 0.85  # of the heat map at its hottest
_HOTTEST = 0.92  # of turbo's range: above it the red darkens and would look weaker
_FONT, _LINE, _CHARACTER = 13, 19, 7.2  # pixels: size of the letters, height of a line, usual width of a letter
_DPI = 100


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


def normalise(heat: Tensor | NDArray[Any], *, signed: bool = False) -> NDArray[np.float64]:
    """A map in the range of a colour map.

    Args:
        heat: [h, w]
        signed: whether 0 keeps its place.
    Returns:
        unsigned from 0 (lowest) to 1 (highest), signed from -1 to 1 with 0 at 0; zeros for a constant (signed: zero)
        map. [h, w]
    Raises:
        ShapeError: not [h, w] or empty. NonFiniteError: it holds NaN or infinity.
    """
    values = np.asarray(heat.detach().cpu().double() if isinstance(heat, Tensor) else heat, dtype=np.float64)
    if values.ndim != 2 or not values.size:
        raise ShapeError(f"map: expected shape [h, w], got {list(values.shape)}")
    finite = np.isfinite(values)
    if not finite.all():
        raise NonFiniteError(
            f"map: expected finite numbers, got {int((~finite).sum())} NaN or infinite of {values.size}"
        )
    if not signed:
        values = values - values.min()
    largest = float(np.abs(values).max())
    return values / largest if largest > 0 else values


def overlay(image: Image.Image, heat: Tensor | NDArray[Any], *, signed: bool = False) -> Image.Image:
    """A heat map over an image; the map is normalised on its own and shows where it is strong.

    Args:
        image: any mode, W x H.
        heat: any size, enlarged bilinearly. [h, w]
        signed: blue for negative, red for positive, symmetric around 0; otherwise from the image alone at the map's
            lowest value over blue and yellow to red at its highest.
    Returns:
        RGB, W x H.
    Raises:
        ShapeError, NonFiniteError: as `normalise`. MissingDependencyError: matplotlib is not installed.
    """
    colours = require("matplotlib").colormaps[SIGNED if signed else UNSIGNED]
    small = Image.fromarray(normalise(heat, signed=signed).astype(np.float32))
    values = normalise(np.asarray(small.resize(image.size, Image.Resampling.BILINEAR)), signed=signed)
    strength = np.sqrt(np.abs(values))
    painted = colours((1 + np.sign(values) * strength) / 2 if signed else _HOTTEST * values)[..., :3]
    opacity = _OPACITY * strength[..., None]
    plain = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
    faded = 0.5 * plain + 0.5 * plain.mean(-1, keepdims=True)  # colours of the photograph do not pass for heat
    mixed = (1 - opacity) * faded + opacity * painted
    return Image.fromarray((mixed * 255).round().astype(np.uint8))


def enlarge(image: Image.Image, side: int) -> Image.Image:
    """The image with its longer side at least `side` pixels long; a larger one stays as it is."""
    factor = side / max(image.size)
    if factor <= 1:
        return image
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.BICUBIC)


def panel(
    tiles: Sequence[tuple[str, Image.Image]], *, columns: int | None = None, heading: str = "", gap: int = 8
) -> Image.Image:
    """Pictures in rows on white, each below its title; pixels of the pictures are kept as they are.

    Args:
        tiles: title (long ones are broken into lines) and picture.
        columns: tiles per row, all in one row by default.
        heading: a line above all.
        gap: pixels between tiles and around them.
    Returns:
        RGB.
    Raises:
        OptionError: no tile, or fewer than one column. MissingDependencyError: matplotlib is not installed.
    """
    if not tiles:
        raise OptionError("panel: expected at least one tile, got none")
    columns = len(tiles) if columns is None else columns
    if columns < 1:
        raise OptionError(f"panel: expected at least one column, got {columns}")
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    width = max(image.width for _, image in tiles)
    height = max(image.height for _, image in tiles)
    titles = [_lines(title, width) for title, _ in tiles]
    titled = max(len(lines) for lines in titles) * _LINE
    total = (columns * (width + gap) + gap, 0)
    top = _lines(heading, total[0] - 2 * gap)
    above = len(top) * _LINE + (gap if top else 0)
    total = (total[0], above + rows * (titled + height + gap) + gap)
    texts = [(line, total[0] / 2, gap + (i + 0.5) * _LINE) for i, line in enumerate(top)]
    places = []
    for index, (lines, (_, image)) in enumerate(zip(titles, tiles, strict=True)):
        left = gap + index % columns * (width + gap)
        upper = gap + above + index // columns * (titled + height + gap)
        first = titled - len(lines) * _LINE
        texts += [(line, left + width / 2, upper + first + (i + 0.5) * _LINE) for i, line in enumerate(lines)]
        places.append((left + (width - image.width) // 2, upper + titled + (height - image.height) // 2))
    drawn = Image.new("RGB", total, "white")
    drawn.paste(_write_texts(texts, total))
    for (_, image), place in zip(tiles, places, strict=True):
        drawn.paste(image.convert("RGB"), place)
    return drawn


def _lines(text: str, width: int) -> list[str]:
    return [line for part in text.splitlines() for line in textwrap.wrap(part, max(8, int(width / _CHARACTER))) or [""]]


def _write_texts(texts: Sequence[tuple[str, float, float]], size: tuple[int, int]) -> Image.Image:
    """White ground with lines of text centred at (x, y), in pixels from the upper left."""
    require("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = size
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    for text, x, y in texts:
        figure.text(
            x / width,
            1 - y / height,
            text,
            ha="center",
            va="center_baseline",
            fontsize=_FONT * 72 / _DPI,
            color="black",
            parse_math=False,  # a $ in a file's name is no formula
            usetex=False,
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a letter that the font lacks is drawn as a box
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def save_png(image: Image.Image, path: str | Path) -> Path:
    """Write a PNG so that the file is either whole or not there: beside it first, then renamed.

    Raises:
        OutputError: it cannot be written.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            image.save(part, format="PNG")
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{path}: expected to write a picture, got the fault: {reason}") from error
    return path


def conditioning_picture(ledgers: Mapping[str, Ledger]) -> Image.Image:
    """Cancellation and amplification of every residual add, site by site: which model is ill-conditioned, and where.

    Args:
        ledgers: by a name for the legend, such as the model's; each of a run with `ledger=True`.
    """
    require("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=_DPI, facecolor="white", layout="constrained")
    axes = figure.subplots(1, 2)
    for name, ledger in ledgers.items():
        sites = ledger.residual_sites()
        for plot, which in zip(axes, ("cancellation", "amplification"), strict=True):
            values = [getattr(site, which).flatten() for site in sites]
            line = plot.plot([float(v.median()) for v in values], marker="o", markersize=3, label=name)[0]
            plot.fill_between(
                range(len(values)),
                [float(v.min()) for v in values],
                [float(v.max()) for v in values],
                color=line.get_color(),
                alpha=0.2,
                linewidth=0,
            )
    for plot, title in zip(axes, ("cancellation C", "amplification A"), strict=True):
        plot.set(title=title, xlabel="residual add, from the input", yscale="log")
    axes[0].legend()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def token_matrix(relevance: Tensor | NDArray[Any], rows: Sequence[str], columns: Sequence[str]) -> Image.Image:
    """What a model wrote against what it had read: one sample of `Generation.relevance` or its source.

    Args:
        relevance: [G, N]
        rows, columns: texts of the generated tokens and of those that they are explained by.
    Raises:
        ShapeError: as many rows or columns as texts are expected.
    """
    values = np.asarray(relevance.detach().cpu() if isinstance(relevance, Tensor) else relevance, dtype=np.float64)
    if values.shape != (len(rows), len(columns)):
        raise ShapeError(
            f"token_matrix: expected relevance [{len(rows)}, {len(columns)}] for as many texts, got"
            f" {list(values.shape)}"
        )
    require("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (2 + 0.22 * len(columns), 1.4 + 0.22 * len(rows))
    figure = Figure(figsize=size, dpi=_DPI, facecolor="white", layout="constrained")
    axes = figure.subplots()
    largest = float(np.abs(values).max()) or 1.0
    drawn = axes.imshow(values, cmap=SIGNED, vmin=-largest, vmax=largest, aspect="auto")
    axes.set_xticks(range(len(columns)), [text.strip() or repr(text) for text in columns], rotation=90, fontsize=7)
    axes.set_yticks(range(len(rows)), [text.strip() or repr(text) for text in rows], fontsize=7)
    figure.colorbar(drawn, ax=axes)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
