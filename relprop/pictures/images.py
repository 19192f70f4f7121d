"""Heat maps laid over images, with their colour scale."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from relprop.pictures.colours import SIGNED, UNSIGNED, Range, as_numbers, in_range, picture_range
from relprop.pictures.figures import drawn, make_figure, require

_OPACITY = 0.85  # of the heat map at its hottest
_SOFT, _LIGHT = 0.35, 0.6  # contrast and darkest grey of the ground below two-sided maps
_HOTTEST = 0.92  # of turbo's range: above it the red darkens and would look weaker
_GREY = (200, 200, 200)  # of the image below a colour scale


def normalise(heat: Tensor | NDArray[Any], *, signed: bool = False, limits: Range | None = None) -> NDArray[np.float64]:
    """A map in the range of a colour map.

    Args:
        heat: [h, w]
        signed: whether 0 keeps its place.
        limits: lowest and highest value of the scale, to share it between maps; by default the map's own
            (`colours.picture_range`), beyond which are at most the strongest pixels of a two-sided map.
    Returns:
        unsigned from 0 (lowest) to 1 (highest), signed from -1 to 1 with 0 at 0; zeros for a constant (signed: zero)
        map. [h, w]
    Raises:
        ShapeError: not [h, w] or empty. NonFiniteError: it holds NaN or infinity.
    """
    values = as_numbers(heat, "map", 2)
    return in_range(values, picture_range([values], signed=signed) if limits is None else limits, signed=signed)


def overlay(
    image: Image.Image, heat: Tensor | NDArray[Any], *, signed: bool = False, limits: Range | None = None
) -> Image.Image:
    """A heat map over an image; it shows where it is strong.

    Args:
        image: any mode, W x H.
        heat: any size, enlarged bilinearly. [h, w]
        signed: blue for negative, red for positive, symmetric around 0, over the image in soft grey; otherwise from the
            image alone at the map's lowest value over blue and yellow to red at its highest.
        limits: lowest and highest value of the scale; by default the map is normalised on its own. What is beyond has
            the full colour.
    Returns:
        RGB, W x H.
    Raises:
        ShapeError, NonFiniteError: as `normalise`. MissingDependencyError: matplotlib is not installed.
    """
    small = Image.fromarray(normalise(heat, signed=signed, limits=limits).astype(np.float32))
    values = np.asarray(small.resize(image.size, Image.Resampling.BILINEAR), dtype=np.float64)
    return _mixed(image, normalise(values) if limits is None and not signed else values, signed=signed)


def _mixed(image: Image.Image, values: NDArray[np.float64], *, signed: bool) -> Image.Image:
    """values: normalised, at the image's size."""
    colours = require("matplotlib").colormaps[SIGNED if signed else UNSIGNED]
    strength = np.sqrt(np.abs(values))
    painted = colours((1 + np.sign(values) * (1 + strength) / 2) / 2 if signed else _HOTTEST * values)[..., :3]
    opacity = _OPACITY * strength[..., None]
    plain = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
    grey = plain.mean(-1, keepdims=True)  # colours of the photograph do not pass for heat
    ground = _LIGHT + _SOFT * grey if signed else 0.5 * plain + 0.5 * grey
    mixed = (1 - opacity) * ground + opacity * painted
    return Image.fromarray((mixed * 255).round().astype(np.uint8))


def painted_scale(*, signed: bool, size: tuple[int, int] = (256, 1)) -> Image.Image:
    """The colours of `overlay` over grey, from the lowest value on the left to the highest. RGB"""
    width, height = size
    steps = np.linspace(-1 if signed else 0, 1, width)[None].repeat(height, 0)
    return _mixed(Image.new("RGB", size, _GREY), steps, signed=signed)


def colour_bar(low: str, high: str, *, signed: bool, width: int = 360) -> Image.Image:
    """The colours of `overlay` from the lowest to the highest value, over grey. RGB, width x 42"""
    figure = make_figure(width / 100, 0.42)
    axes = figure.subplots()
    axes.imshow(np.asarray(painted_scale(signed=signed)), aspect="auto", extent=(0, 1, 0, 1))
    ends = [0, 0.5, 1] if signed else [0, 1]
    texts = [low, "0", high] if signed else [low, high]
    axes.set_xticks(ends, texts, fontsize=8.5, parse_math=False)
    for tick, side in zip(
        axes.get_xticklabels(), ("left", "center", "right") if signed else ("left", "right"), strict=True
    ):
        tick.set_horizontalalignment(side)
    axes.set_yticks([])
    axes.tick_params(length=2, pad=2)
    for spine in axes.spines.values():
        spine.set_linewidth(0.5)
    return drawn(figure)


def enlarge(image: Image.Image, side: int) -> Image.Image:
    """The image with its longer side at least `side` pixels long; a larger one stays as it is."""
    factor = side / max(image.size)
    if factor <= 1:
        return image
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.BICUBIC)


def fitted(image: Image.Image, side: int) -> Image.Image:
    """The image with its longer side `side` pixels long."""
    factor = side / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)
