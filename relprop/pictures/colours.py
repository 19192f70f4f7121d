"""Values as colours: one range per map, sample or batch, and the two colour scales of texts and tables.

Pictures use matplotlib's colour maps (`UNSIGNED`, `SIGNED`). Texts need none: a word's ground is red (for) or blue
(against), mixed into the page's colour by the word's share of the largest magnitude, so weakly that its letters keep a
contrast of 4.5 (WCAG 2.2, AA) at every share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from relprop.errors import NonFiniteError, OptionError, ShapeError

UNSIGNED, SIGNED = "turbo", "bwr"
SCALES = ("map", "sample", "batch")
_MOST, _BULK = (
    0.99,
    0.75,
)  # of a two-sided map's elements, and of the sum of their magnitudes, within its colours' range

Range = tuple[float, float]
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Theme:
    """Colours of a page.

    Attributes:
        page, ink, quiet: ground, letters, and what stands back (special tokens, legends).
        positive, negative: grounds of words that speak for and against.
        strongest: opacity of the ground at the largest magnitude.
    """

    page: Colour
    ink: Colour
    quiet: Colour
    positive: Colour
    negative: Colour
    strongest: float

    def ground(self, share: float) -> Colour:
        """Of a word. share: of the largest magnitude, from -1 to 1."""
        over, opacity = self.positive if share > 0 else self.negative, self.strongest * abs(share)
        red, green, blue = (round((1 - opacity) * p + opacity * c) for p, c in zip(self.page, over, strict=True))
        return red, green, blue


LIGHT = Theme((255, 255, 255), (27, 27, 31), (92, 92, 102), (222, 45, 38), (33, 113, 181), 0.6)
DARK = Theme((22, 24, 29), (240, 240, 242), (160, 162, 170), (215, 48, 39), (49, 116, 204), 0.75)


def as_numbers(values: Tensor | NDArray[Any] | Sequence[float], what: str, ndim: int) -> NDArray[np.float64]:
    """An array of finite numbers.

    Args:
        what: for the error.
        ndim: number of axes.
    Raises:
        ShapeError: other axes, or none of its elements. NonFiniteError: NaN or infinity.
    """
    array = np.asarray(values.detach().cpu().double() if isinstance(values, Tensor) else values, dtype=np.float64)
    if array.ndim != ndim or not array.size:
        shape = {1: "[N]", 2: "[h, w]"}[ndim]
        raise ShapeError(f"{what}: expected shape {shape}, got {list(array.shape)}")
    finite = np.isfinite(array)
    if not finite.all():
        raise NonFiniteError(
            f"{what}: expected finite numbers, got {int((~finite).sum())} NaN or infinite of {array.size}"
        )
    return array


def value_range(maps: Sequence[NDArray[np.float64]], *, signed: bool) -> Range:
    """What a colour scale spans: from the lowest to the highest value, signed from -largest to largest magnitude."""
    low, high = min(float(m.min()) for m in maps), max(float(m.max()) for m in maps)
    largest = max(abs(low), abs(high))
    return (-largest, largest) if signed else (low, high)


def picture_range(maps: Sequence[NDArray[np.float64]], *, signed: bool) -> Range:
    """What a picture's colours span: `value_range`, of two-sided maps without the few elements far beyond the others.

    Relevance of pixels has heavy tails, and a range up to the largest would leave nearly all of it pale. It ends at the
    smallest magnitude that at most 1 % of the elements exceed, with at most a quarter of the sum of magnitudes: the
    first keeps maps of less than 100 tokens whole, the second those with little beside a few pixels.
    """
    low, high = value_range(maps, signed=signed)
    if not signed or high == 0:
        return low, high
    magnitudes = np.sort(np.concatenate([np.abs(m).ravel() for m in maps]) / high)
    sums = np.cumsum(magnitudes)
    last = max(math.ceil(_MOST * len(sums)) - 1, int(np.searchsorted(sums, _BULK * sums[-1])))
    end = high * float(magnitudes[last])
    return -end, end


def shared_ranges(
    maps: Sequence[NDArray[np.float64]],
    samples: Sequence[int],
    scale: str,
    *,
    signed: Sequence[bool],
    span: Callable[..., Range] = value_range,
) -> list[Range]:
    """The range of every map, by what its colours are comparable with.

    Args:
        samples, signed: of each map; maps with one and with two sides never share a range.
        scale: "map" (each on its own), "sample" (all of a sample alike) or "batch" (all alike).
        span: of maps that share a range, `value_range` or `picture_range`.
    Raises:
        OptionError: the scale.
    """
    check_scale(scale)
    keys: list[tuple[int, bool]] = [
        ({"map": i, "sample": sample, "batch": 0}[scale], kind)
        for i, (sample, kind) in enumerate(zip(samples, signed, strict=True))
    ]
    pools: dict[tuple[int, bool], list[NDArray[np.float64]]] = {}
    for key, values in zip(keys, maps, strict=True):
        pools.setdefault(key, []).append(values)
    found = {key: span(pool, signed=key[1]) for key, pool in pools.items()}
    return [found[key] for key in keys]


def check_scale(scale: str) -> None:
    """Raises:
    OptionError: not one of `SCALES`.
    """
    if scale not in SCALES:
        raise OptionError(f"scale: expected one of {', '.join(SCALES)}, got {scale!r}")


def in_range(values: NDArray[np.float64], limits: Range, *, signed: bool) -> NDArray[np.float64]:
    """Values as places on a colour scale: unsigned from 0 to 1, signed from -1 to 1; zeros where the range is empty."""
    low, high = limits
    if signed:
        largest = max(abs(low), abs(high))
        return np.clip(values / largest, -1, 1) if largest > 0 else np.zeros_like(values)
    return np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros_like(values)


def shown_range(values: NDArray[np.float64], limits: Range, *, signed: bool) -> str:
    """A map's range in words, also that some of it is beyond."""
    low, high = limits
    if not signed:
        return f"{shown(low)} … {shown(high)}"
    return f"±{shown(high)}" + (" and beyond" if float(np.abs(values).max()) > high else "")


def shown(value: float, *, signed: bool = False) -> str:
    """A number in a legend, three digits."""
    text = f"{value:+.3g}" if signed else f"{value:.3g}"
    return text.replace("-", "−") if value else "0"
