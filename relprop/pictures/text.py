"""Relevance of words: coloured HTML that copies as plain text, and coloured lines of a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from relprop.errors import OptionError, ShapeError
from relprop.pictures.colours import (
    DARK,
    LIGHT,
    Colour,
    Range,
    Theme,
    as_numbers,
    shared_ranges,
    shown,
)
from relprop.pictures.page import fragment, legend
from relprop.pictures.tokens import Piece, readable

__all__ = ["Passage", "colour_depth", "text_html", "text_terminal"]

DEPTHS = ("none", "256", "truecolor")
_UNDERLINED, _PAINTED = 0.05, 0.03  # shares from which a word against is underlined, a terminal's word coloured
_STRONGEST = 5  # words listed where there are no colours


@dataclass(frozen=True)
class Passage:
    """One text and what each of its tokens is relevant for.

    Attributes:
        tokens: as their tokenizer names them.
        relevance: [N]
        title: what is explained.
        sample: passages of the same sample may share a colour scale.
        special: tokens that are none of the text's own.
    """

    tokens: Sequence[str]
    relevance: Tensor | NDArray[Any] | Sequence[float]
    title: str = ""
    sample: int = 0
    special: Iterable[str] = ()

    def read(self) -> tuple[list[Piece], NDArray[np.float64]]:
        """Pieces and their relevance.

        Raises:
            ShapeError: not as many numbers as tokens. NonFiniteError, OptionError
        """
        what = f"relevance of {self.title!r}" if self.title else "relevance"
        values = as_numbers(self.relevance, what, 1)
        if len(values) != len(self.tokens):
            raise ShapeError(f"{what}: expected a number for each of {len(self.tokens)} tokens, got {len(values)}")
        return readable(self.tokens, self.special), values


@dataclass(frozen=True)
class _Line:
    title: str
    pieces: list[Piece]
    values: NDArray[np.float64]
    shares: NDArray[np.float64]  # of the largest magnitude, from -1 to 1
    limits: Range
    signed: bool


def _lines(passages: Sequence[Passage], scale: str, signed: bool | None) -> list[_Line]:
    """Every passage with its shares of the largest magnitude of a word; special tokens may be beyond, and are cut."""
    if not passages:
        raise OptionError("passages: expected at least one text, got none")
    read = [passage.read() for passage in passages]
    own = [_of_words(pieces, values) for pieces, values in read]
    ranges = shared_ranges(own, [passage.sample for passage in passages], scale, signed=[True] * len(passages))
    negative = [bool((values < 0).any()) for _, values in read]
    sides = negative if scale == "map" else [any(negative)] * len(passages)
    lines = []
    for passage, (pieces, values), (_, largest), two in zip(passages, read, ranges, sides, strict=True):
        two = two if signed is None else signed
        shares = np.clip(values / largest, -1 if two else 0, 1) if largest > 0 else np.zeros_like(values)
        lines.append(_Line(passage.title, pieces, values, shares, (-largest if two else 0.0, largest), two))
    return lines


def _of_words(pieces: Sequence[Piece], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Without special tokens, whose relevance often outweighs all words; all of it where nothing else is left."""
    own = values[[not piece.special for piece in pieces]]
    return own if own.any() else values


def text_html(
    passages: Sequence[Passage], *, scale: str = "map", signed: bool | None = None, theme: str = "auto"
) -> str:
    """Texts whose words lie on the colour of their relevance: red for, blue and dotted against.

    Needs nothing but the browser; copied, it is the plain text. Pointing at a word shows its number.

    Args:
        passages: any number.
        scale: "map" (each passage from the largest magnitude of its own words), "sample" or "batch" (comparable).
            Special tokens do not stretch it: what is beyond it is painted as its end.
        signed: None for both sides only where there is something negative.
        theme: "auto", "light" or "dark".
    Returns:
        a fragment with its style.
    Raises:
        ShapeError, NonFiniteError: a passage's relevance. OptionError: scale, theme, no passage.
    """
    lines = _lines(passages, scale, signed)
    figures = [_figure(line, alone=scale != "batch" or i == 0) for i, line in enumerate(lines)]
    return fragment("\n".join(figures), theme)


def _figure(line: _Line, *, alone: bool) -> str:
    low, high = (shown(limit, signed=line.signed) for limit in line.limits)
    scale = legend(low, high, signed=line.signed) if alone else ""
    words = "".join(
        escape(piece.before) + _span(piece, float(value), float(share))
        for piece, value, share in zip(line.pieces, line.values, line.shares, strict=True)
    )
    caption = f"<figcaption><span>{escape(line.title)}</span>{scale}</figcaption>"
    return f'<figure>{caption}<p class="text">{words}</p></figure>'


def _span(piece: Piece, value: float, share: float) -> str:
    if not piece.text:
        return ""
    classes = ["special"] if piece.special else []
    classes += ["p"] if share >= 0.0005 else ["n"] if share <= -0.0005 else []
    classes += ["against"] if share <= -_UNDERLINED else []
    classes += ["break"] if "\n" in piece.text else []
    named = f' class="{" ".join(classes)}"' if classes else ""
    style = f' style="--share:{abs(share):.3f}"' if classes and abs(share) >= 0.0005 else ""
    return f'<span{named}{style} title="{escape(f"{piece.text}: {value:+.4g}")}">{escape(piece.text)}</span>'


def colour_depth(stream: TextIO | None = None) -> str:
    """The colours that a terminal takes: "none", "256" or "truecolor".

    None where the stream is no terminal, NO_COLOR is set and not empty (no-color.org), or TERM is "dumb";
    24 bits where COLORTERM says so.

    Args:
        stream: standard output by default.
    """
    stream = sys.stdout if stream is None else stream
    terminal = getattr(stream, "isatty", lambda: False)()
    if not terminal or os.environ.get("NO_COLOR") or os.environ.get("TERM", "") in ("", "dumb"):
        return "none"
    return "truecolor" if os.environ.get("COLORTERM", "").lower() in ("truecolor", "24bit") else "256"


def text_terminal(
    passages: Sequence[Passage],
    *,
    scale: str = "map",
    signed: bool | None = None,
    colours: str | None = None,
    theme: str | None = None,
) -> str:
    """Texts as lines for a terminal.

    Args:
        passages, scale, signed: as `text_html`.
        colours: "truecolor", "256" or "none"; by default what `colour_depth` finds of standard output. Without colours
            the strongest words are listed with their numbers.
        theme: "light" or "dark" grounds of the words, with letters to match; by default dark, save where COLORFGBG
            tells of a light terminal.
    Raises:
        ShapeError, NonFiniteError, OptionError
    """
    depth = colour_depth() if colours is None else colours
    if depth not in DEPTHS:
        raise OptionError(f"colours: expected one of {', '.join(DEPTHS)}, got {colours!r}")
    if theme not in (None, "light", "dark"):
        raise OptionError(f"theme: expected light or dark, got {theme!r}")
    lines = _lines(passages, scale, signed)
    ground = os.environ.get("COLORFGBG", "").rpartition(";")[2]
    look = LIGHT if theme == "light" or (theme is None and ground in ("7", "15")) else DARK
    return "\n".join(part for line in lines for part in _terminal_lines(line, depth, look))


def _terminal_lines(line: _Line, depth: str, theme: Theme) -> list[str]:
    title = [line.title] if line.title else []
    words = list(zip(line.pieces, line.shares.tolist(), strict=True))
    if depth == "none":
        text = "".join(piece.before + _visible(piece.text) for piece, _ in words)
        order = np.argsort(-np.abs(line.shares), kind="stable")[:_STRONGEST]
        strongest = ", ".join(
            f"{_visible(line.pieces[i].text)} {line.values[i]:+.3g}" for i in order if line.pieces[i].text.strip()
        )
        return [*title, text, f"  strongest: {strongest}"]
    text = "".join(piece.before + _painted(_visible(piece.text), share, depth, theme) for piece, share in words)
    low, high = line.limits
    steps = np.linspace(-1 if line.signed else 0, 1, 17)
    bar = "".join(_painted(" ", float(step), depth, theme) for step in steps)
    return [*title, text, f"  {shown(low, signed=line.signed)} {bar} {shown(high, signed=line.signed)}"]


def _visible(text: str) -> str:
    """Control characters as pictures of themselves: a text must not steer the terminal."""
    drawn = "".join(
        letter if letter.isprintable() or letter == "\n" else chr(0x2400 + ord(letter)) if ord(letter) < 32 else "�"
        for letter in text
    )
    return drawn


def _painted(text: str, share: float, depth: str, theme: Theme) -> str:
    if not text.strip("\n") or abs(share) < _PAINTED:
        return text
    ground = theme.ground(share)
    codes = [_code(48, ground, depth), _code(38, theme.ink, depth)]
    return f"\x1b[{';'.join(codes)}m{text}\x1b[0m"


def _code(place: int, colour: Colour, depth: str) -> str:
    if depth == "truecolor":
        return f"{place};2;{colour[0]};{colour[1]};{colour[2]}"
    return f"{place};5;{nearest_of_256(colour)}"


def nearest_of_256(colour: Colour) -> int:
    """The nearest of a terminal's 240 fixed colours: a cube of six levels, then 24 greys."""
    levels = (0, 95, 135, 175, 215, 255)
    cube = [min(range(6), key=lambda i, part=part: abs(levels[i] - part)) for part in colour]  # type: ignore[misc]
    grey = max(0, min(23, round((sum(colour) / 3 - 8) / 10)))
    candidates = {
        16 + 36 * cube[0] + 6 * cube[1] + cube[2]: tuple(levels[i] for i in cube),
        232 + grey: (8 + 10 * grey,) * 3,
    }
    return min(candidates, key=lambda code: sum((a - b) ** 2 for a, b in zip(candidates[code], colour, strict=True)))
