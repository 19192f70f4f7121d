"""What a model wrote against what it had read, token by token: a picture, and a table of HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from relprop.errors import ShapeError
from relprop.pictures.colours import DARK, LIGHT, SIGNED, as_numbers, shown, value_range
from relprop.pictures.figures import drawn, make_figure
from relprop.pictures.page import fragment, legend

_CELL = 0.24  # inches


def _checked(relevance: Tensor | NDArray[Any], rows: Sequence[str], columns: Sequence[str]) -> NDArray[np.float64]:
    if tuple(relevance.shape) != (len(rows), len(columns)):
        raise ShapeError(
            f"token_matrix: expected relevance [{len(rows)}, {len(columns)}] for as many texts, got"
            f" {list(relevance.shape)}"
        )
    return as_numbers(relevance, "token_matrix", 2)


def token_matrix(
    relevance: Tensor | NDArray[Any], rows: Sequence[str], columns: Sequence[str], *, dark: bool = False, scale: int = 1
) -> Image.Image:
    """What a model wrote against what it had read: one sample of `Generation.relevance` or its source.

    Args:
        relevance: [G, N]
        rows, columns: texts of the generated tokens and of those that they are explained by.
        dark: on a dark ground.
        scale: 2 for twice as many pixels.
    Raises:
        ShapeError: as many rows or columns as texts are expected. NonFiniteError: NaN or infinity.
        MissingDependencyError: matplotlib is not installed.
    """
    values = _checked(relevance, rows, columns)
    longest = [max(len(_tick(text)) for text in texts) * 0.075 for texts in (rows, columns)]
    size = (1.5 + longest[0] + _CELL * len(columns), 0.8 + longest[1] + _CELL * len(rows))
    figure = make_figure(max(size[0], 3.2), max(size[1], 1.9), dark=dark, scale=scale)
    axes = figure.subplots()
    theme = DARK if dark else LIGHT
    ink = tuple(part / 255 for part in theme.ink)
    low, high = value_range([values], signed=True)
    painted = axes.imshow(values, cmap=_map(dark), vmin=low or -1, vmax=high or 1, aspect="equal")
    for set_ticks, texts in ((axes.set_xticks, columns), (axes.set_yticks, rows)):
        ticks = [_tick(text) for text in texts]
        turned = 90 if texts is columns and max(map(len, ticks)) > 2 else 0
        set_ticks(range(len(texts)), ticks, rotation=turned, fontsize=9, color=ink, parse_math=False)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_xticks(np.arange(-0.5, len(columns)), minor=True)
    axes.set_yticks(np.arange(-0.5, len(rows)), minor=True)
    axes.grid(which="minor", color=ink, alpha=0.12, linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    width, height = _CELL * len(columns), _CELL * len(rows)
    tall = min(height, 2.2) / height
    beside = axes.inset_axes((1 + 0.12 / width, 1 - tall, 0.14 / width, tall)) if height > 1 else None
    bar = figure.colorbar(painted, ax=axes, cax=beside, aspect=12, pad=0.02)  # of few rows, taller than they are
    bar.ax.tick_params(colors=ink, labelsize=8)
    bar.outline.set_visible(False)
    return drawn(figure)


def _map(dark: bool) -> Any:
    """From the colour against over the ground to the colour for, as in the tables."""
    if not dark:
        return SIGNED
    from matplotlib.colors import LinearSegmentedColormap

    colours = [(part[0] / 255, part[1] / 255, part[2] / 255) for part in (DARK.negative, DARK.page, DARK.positive)]
    return LinearSegmentedColormap.from_list("dark", colours)


def _tick(text: str) -> str:
    """A token on an axis: spaces around it dropped, nothing left shown as it is written."""
    stripped = text.strip()
    return stripped if stripped and stripped.isprintable() else repr(text)[1:-1]


def matrix_html(
    relevance: Tensor | NDArray[Any],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str = "",
    theme: str = "auto",
) -> str:
    """`token_matrix` as a table: a row for each token that was written, numbers in the cells' titles.

    Args:
        relevance: [G, N]. Cells of a token itself and of what came after it stay empty: they are 0.
        rows, columns: texts of the tokens.
        title: above it.
        theme: "auto", "light" or "dark".
    Raises:
        ShapeError, NonFiniteError: relevance. OptionError: theme.
    """
    values = _checked(relevance, rows, columns)
    low, high = value_range([values], signed=True)
    head = "".join(f'<th scope="col"><span>{escape(_tick(text))}</span></th>' for text in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(_tick(text))}</th>'
        + "".join(_cell(float(value), high, text, other) for value, other in zip(row, columns, strict=True))
        + "</tr>"
        for text, row in zip(rows, values, strict=True)
    )
    scale = legend(shown(low, signed=True), shown(high, signed=True), signed=True)
    return fragment(
        f'<figure class="cells"><figcaption><span>{escape(title)}</span>{scale}</figcaption>'
        f'<div class="scroll"><table class="matrix"><thead><tr><td class="corner"></td>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></figure>",
        theme,
    )


def _cell(value: float, largest: float, row: str, column: str) -> str:
    if value == 0:
        return '<td class="none"></td>'
    title = escape(f"{_tick(column)} for {_tick(row)}: {value:+.4g}")
    return f'<td class="{"p" if value > 0 else "n"}" style="--share:{abs(value) / largest:.3f}" title="{title}"></td>'
