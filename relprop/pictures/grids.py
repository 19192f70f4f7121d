"""Grids of heat maps: samples by classes, layers, heads or methods."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from relprop.errors import OptionError, ShapeError
from relprop.explanation import Explanation
from relprop.latents import HEADS, Latent
from relprop.methods import METHODS
from relprop.pictures.colours import Range, as_numbers, picture_range, shared_ranges, shown, shown_range
from relprop.pictures.images import colour_bar, fitted, overlay
from relprop.pictures.panels import panel

__all__ = ["OVER", "Block", "draw_blocks", "explanation_blocks"]

OVER = ("targets", "layers", "heads")
_SIDE, _COLUMNS = 180, 6
_MOST_EXTRA = 8  # class and register tokens before an image's patches


@dataclass(frozen=True)
class HeatMap:
    """One map and how to paint it.

    Attributes:
        title: above it.
        values: [h, w]
        signed: blue against, red for; otherwise from the lowest to the highest value.
    """

    title: str
    values: NDArray[np.float64]
    signed: bool


@dataclass(frozen=True)
class Block:
    """The maps of one sample.

    Attributes:
        heading: above it; empty for none.
        image: the sample's.
        maps: one tile each.
        sample: its place in the batch.
    """

    heading: str
    image: Image.Image
    maps: list[HeatMap]
    sample: int = 0


def is_signed(explanation: Explanation) -> bool:
    """Whether a method's maps have two sides: those at the input do."""
    method = METHODS.get(explanation.method)
    return method is None or method.output == "input"


def explanation_blocks(explanation: Explanation, over: str, samples: Sequence[int] | None) -> list[Block]:
    """The maps of an explanation, sample by sample.

    Args:
        over: "targets", or "layers" or "heads" of its latents.
        samples: which of the batch; all by default.
    Raises:
        OptionError: over, samples, or latents that it lacks. ShapeError: there is no image, or tokens are no patches.
    """
    if over not in OVER:
        raise OptionError(f"over: expected one of {', '.join(OVER)}, got {over!r}")
    chosen = chosen_samples(explanation, samples)
    if explanation.image_size is None:
        raise ShapeError(
            f"picture: expected an explained image, got relevance {list(explanation.relevance.shape)} of a text; use"
            " html or save it as .html"
        )
    images = explanation.annotation.pictures(explanation.image_input(), explanation.batch)
    several = len(chosen) > 1
    blocks = []
    if over == "targets":
        maps = explanation.target_maps()
        for sample in chosen:
            titles = explanation.target_names(sample)
            signed = is_signed(explanation)
            found = [HeatMap(title, as_numbers(maps[sample, i], "map", 2), signed) for i, title in enumerate(titles)]
            blocks.append(Block(f"sample {sample}" if several else "", images[sample], found, sample))
        return blocks
    for sample in chosen:
        for target, name in enumerate(explanation.target_names(sample)):
            named = f"sample {sample}, {name}" if several else name
            layers = _latent_maps(explanation, over, sample, target)
            if over == "heads":
                blocks += [Block(f"{named}, {path}", images[sample], maps, sample) for path, maps in layers.items()]
            else:
                blocks.append(Block(named, images[sample], [maps[0] for maps in layers.values()], sample))
    return blocks


def chosen_samples(explanation: Explanation, samples: Sequence[int] | None) -> list[int]:
    """Raises:
    OptionError: a sample that the batch does not have, or none.
    """
    chosen = list(range(explanation.batch)) if samples is None else [int(i) for i in samples]
    if not chosen or not all(-explanation.batch <= i < explanation.batch for i in chosen):
        raise OptionError(f"samples: expected some of 0 to {explanation.batch - 1}, got {chosen}")
    return [i % explanation.batch for i in chosen]


def _latent_maps(explanation: Explanation, over: str, sample: int, target: int) -> dict[str, list[HeatMap]]:
    """Maps by layer: one, or one for each head. A layer of which the class token alone is left has none."""
    wanted = {path: latent for path, latent in explanation.latents.items() if path.endswith(HEADS) == (over == "heads")}
    if not wanted:
        example = "blocks.*.attn:heads" if over == "heads" else "blocks.?"
        raise OptionError(
            f"over: expected an explanation with relevance inside the model for {over!r}, got one without; explain with"
            f" latents=[{example!r}]"
        )
    found: dict[str, list[HeatMap]] = {}
    for path, latent in wanted.items():
        rows = _of_target(latent, sample, target)
        if rows.shape[-1] == 1 and rows.ndim < 3:
            continue
        assert explanation.image_size is not None
        maps = as_grid(rows if over == "heads" else rows[None], explanation.image_size, path)
        titles = [f"head {i}" for i in range(len(maps))] if over == "heads" else [path]
        found[path.removesuffix(HEADS)] = [
            HeatMap(title, as_numbers(one, path, 2), True) for title, one in zip(titles, maps, strict=True)
        ]
    if not found:
        raise ShapeError(f"{', '.join(wanted)}: expected relevance of an image's patches, got the class token's alone")
    return found


def _of_target(latent: Latent, sample: int, target: int) -> Tensor:
    """[N], [h, w] where tokens lie in a plane, with heads [H, N]"""
    rows = latent.per_token()[sample]
    return rows[target] if latent.several else rows


def as_grid(rows: Tensor, size: tuple[int, int], what: str) -> Tensor:
    """Rows of tokens as patches: the last ones are the patches, squares that fill the image. [..., N] -> [..., h, w]

    Args:
        rows: with up to 8 class and register tokens before the patches. Already [..., h, w] stays as it is.
        size: of the image in pixels.
    Raises:
        ShapeError: no such squares.
    """
    height, width = size
    if rows.ndim == 3 and rows.shape[-2] * width == rows.shape[-1] * height and rows.shape[-2] > 1:
        return rows
    tokens = rows.shape[-1]
    for extra in range(min(_MOST_EXTRA, tokens - 1) + 1):
        side = math.isqrt(height * width // (tokens - extra))
        if side and not (height % side or width % side) and (height // side) * (width // side) == tokens - extra:
            return rows[..., extra:].reshape(*rows.shape[:-1], height // side, width // side)
    raise ShapeError(f"{what}: expected the patches of an image of {height} x {width} pixels, got {tokens} tokens")


def draw_blocks(
    blocks: Sequence[Block],
    *,
    signed: bool | None = None,
    scale: str = "map",
    columns: int | None = None,
    side: int = _SIDE,
    heading: str = "",
) -> Image.Image:
    """Blocks below one another, each its image and the maps over it, and the scale of the colours.

    Args:
        signed: paint all maps as two-sided or not, whatever they say.
        scale: "map" (each map on its own, see `colours.picture_range`), "sample" (maps of a block are comparable) or
            "batch" (all are); two-sided and other maps are never on one scale.
        columns: tiles in a row, by default as many as there are, up to 6 and the image.
        side: pixels of a tile's longer side.
        heading: above all.
    Raises:
        OptionError: scale, columns or side. MissingDependencyError: matplotlib is not installed.
    """
    if isinstance(side, bool) or not isinstance(side, int) or side < 16:
        raise OptionError(f"side: expected a number of pixels from 16, got {side!r}")
    if signed is not None:
        blocks = [replace(block, maps=[replace(one, signed=signed) for one in block.maps]) for block in blocks]
    flat = [(one, block.sample) for block in blocks for one in block.maps]
    kinds = [one.signed for one, _ in flat]
    ranges = shared_ranges(
        [one.values for one, _ in flat], [sample for _, sample in flat], scale, signed=kinds, span=picture_range
    )
    columns = min(max(len(block.maps) for block in blocks), _COLUMNS) + 1 if columns is None else columns
    limits, rows = iter(ranges), []
    for block in blocks:
        tiles = [("image", fitted(block.image, side))]
        tiles += [_tile(one, tiles[0][1], next(limits), scale) for one in block.maps]
        rows.append(panel(tiles, columns=columns, heading=block.heading))
    width = min(340, max(image.width for image in rows))
    bars = []
    for kind in sorted(set(kinds)):
        largest = max(float(np.abs(one.values).max()) for one, _ in flat if one.signed == kind)
        bars.append(_bar(kind, ranges[kinds.index(kind)], largest, scale, width))
    return _stacked([*rows, *bars], heading)


def _tile(one: HeatMap, image: Image.Image, limits: Range, scale: str) -> tuple[str, Image.Image]:
    ends = "" if scale == "batch" else f"\n{shown_range(one.values, limits, signed=one.signed)}"
    return one.title + ends, overlay(image, one.values, signed=one.signed, limits=limits)


def _bar(signed: bool, limits: Range, largest: float, scale: str, width: int) -> Image.Image:
    ends = ("against", "for") if signed else ("lowest", "highest")
    if scale == "batch":
        least, most = ("≤ ", "≥ ") if signed and largest > limits[1] else ("", "")
        ends = (least + shown(limits[0], signed=signed), most + shown(limits[1], signed=signed))
    return colour_bar(*ends, signed=signed, width=width)


def _stacked(images: Sequence[Image.Image], heading: str) -> Image.Image:
    """Pictures below one another on white."""
    if heading:
        width = max(image.width for image in images)
        images = [panel([(heading, Image.new("RGB", (width - 16, 1), "white"))], gap=8), *images]
    whole = Image.new("RGB", (max(image.width for image in images), sum(image.height for image in images)), "white")
    top = 0
    for image in images:
        whole.paste(image, ((whole.width - image.width) // 2, top))
        top += image.height
    return whole


def compared_blocks(explanations: Mapping[str, Explanation], samples: Sequence[int] | None) -> list[Block]:
    """One block for each sample and target, with a map for each explanation.

    Raises:
        OptionError: nothing to compare. ShapeError: explanations of different numbers of samples or targets.
    """
    if not explanations:
        raise OptionError("compare: expected at least one explanation, got none")
    parts = {name: explanation_blocks(found, "targets", samples) for name, found in explanations.items()}
    first_name, first = next(iter(parts.items()))
    blocks = []
    for index, block in enumerate(first):
        for target in range(len(block.maps)):
            maps = []
            for name, found in parts.items():
                if len(found) != len(first) or len(found[index].maps) not in (1, len(block.maps)):
                    raise ShapeError(
                        f"compare: expected {len(first)} sample(s) with {len(block.maps)} target(s) as in"
                        f" {first_name!r}, got {len(found)} with {len(found[0].maps)} in {name!r}"
                    )
                own = found[index].maps
                maps.append(replace(own[target if len(own) > 1 else 0], title=name))
            heading = ", ".join(part for part in (block.heading, block.maps[target].title) if part)
            blocks.append(Block(heading, block.image, maps, block.sample))
    return blocks
