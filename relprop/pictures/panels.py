"""Panels of titled pictures, and files of them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from relprop.errors import OptionError
from relprop.images import write_whole
from relprop.pictures.figures import DPI, drawn, require

_FONT, _LINE, _CHARACTER = 13, 19, 7.2  # pixels: size of the letters, height of a line, usual width of a letter


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
    whole = _write_texts(texts, total)
    for (_, image), place in zip(tiles, places, strict=True):
        whole.paste(image.convert("RGB"), place)
    return whole


def _lines(text: str, width: int) -> list[str]:
    return [line for part in text.splitlines() for line in textwrap.wrap(part, max(8, int(width / _CHARACTER))) or [""]]


def _write_texts(texts: Sequence[tuple[str, float, float]], size: tuple[int, int]) -> Image.Image:
    """White ground with lines of text centred at (x, y), in pixels from the upper left."""
    require("matplotlib")
    from matplotlib.figure import Figure

    width, height = size
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    for text, x, y in texts:
        figure.text(
            x / width,
            1 - y / height,
            text,
            ha="center",
            va="center_baseline",
            fontsize=_FONT * 72 / DPI,
            color="black",
            parse_math=False,  # a $ in a file's name is no formula
            usetex=False,
        )
    return drawn(figure)


def save_png(image: Image.Image, path: str | Path) -> Path:
    """Write a PNG so that the file is either whole or not there.

    Raises:
        OutputError: it cannot be written.
    """
    return save_picture(image, path, "PNG")


def save_picture(image: Image.Image, path: str | Path, format: str) -> Path:
    """The same in another of Pillow's formats."""
    return write_whole(path, lambda part: image.save(part, format=format), "a picture")
