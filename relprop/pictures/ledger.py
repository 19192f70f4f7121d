"""The ledger as pictures: relevance on its way down the layers, and where a pass is ill-conditioned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from relprop.errors import OptionError
from relprop.ledger import LayerBooks, Ledger
from relprop.pictures.colours import DARK, LIGHT
from relprop.pictures.figures import drawn, make_figure, style_axes

_CAUSES = {"bias": "#e69f00", "epsilon": "#999999", "constant": "#009e73", "rule": "#cc79a7"}  # Okabe and Ito
_LEAST, _NEGLIGIBLE = 0.002, 1e-4  # of the largest amount absorbed, and of the seed: causes below it are not drawn
_OTHER, _FLOW, _END = "#d55e00", "#56b4e9", "#0072b2"
_BRANCHES = ("#aa3377", "#117733", "#ddaa33")  # Tol


def conditioning_picture(ledgers: Mapping[str, Ledger]) -> Image.Image:
    """Cancellation and amplification of every residual add, site by site: which model is ill-conditioned, and where.

    Args:
        ledgers: by a name for the legend, such as the model's; each of a run with `ledger=True`.
    Raises:
        OptionError: one is no ledger.
    """
    for name, ledger in ledgers.items():
        _check_ledger(f"ledgers[{name!r}]", ledger)
    figure = make_figure(9, 3.6)
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
    return drawn(figure)


def _check_ledger(name: str, given: Any) -> None:
    if not isinstance(given, Ledger):
        raise OptionError(
            f"{name}: expected the ledger of a run with ledger=True, such as relprop.explain(..., ledger=True).ledger,"
            f" got {type(given).__name__}"
        )


def ledger_picture(
    ledger: Ledger, *, sample: int | None = None, target: int | None = None, dark: bool = False, scale: int = 1
) -> Image.Image:
    """Relevance on its way from the output down, layer by layer: what arrives, and what is absorbed by what.

    The narrow bars are what goes through a layer's branches, the rest stays on the residual stream past them. The last
    bar is the frontier, where the pass ends: the first attention map of a row walk, else the input.

    Args:
        ledger: of a run with `ledger=True`.
        sample, target: which; the mean over all by default.
        dark: on a dark ground.
        scale: 2 for twice as many pixels.
    Raises:
        OptionError: no ledger, or a sample or target that the pass did not have. MissingDependencyError: matplotlib is
            not installed.
    """
    _check_ledger("ledger", ledger)
    layers = ledger.by_layer()
    read = _reader(ledger, sample, target)
    names = [*(layer.name for layer in layers), "frontier"]
    width = max(4.5, 1.4 + 0.42 * len(names))
    figure = make_figure(width, 4.4, dark=dark, scale=scale)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    places = range(len(names))
    above.bar(list(places)[:-1], [read(layer.arriving) for layer in layers], width=0.7, color=_FLOW)
    above.bar(places[-1], read(ledger.frontier), width=0.7, color=_END)
    through = {name: [read(layer.branches.get(name)) for layer in layers] for name in _names(layers)}
    _beside(above, through)
    kept = {cause: [read(layer.absorbed.get(cause)) for layer in layers] for cause in ledger.absorbed}
    most = max((abs(amount) for amounts in kept.values() for amount in amounts), default=0.0)
    least = max(_LEAST * most, _NEGLIGIBLE * abs(read(ledger.seed)))
    kept = {cause: amounts for cause, amounts in kept.items() if max(map(abs, amounts)) > least}
    _stack(below, kept)
    below.set_xticks(list(places), names, rotation=90, fontsize=8.5, parse_math=False)
    ink = tuple(part / 255 for part in (DARK if dark else LIGHT).ink)
    for axes, title in ((above, "relevance that arrives"), (below, "absorbed")):
        style_axes(axes, dark=dark)
        axes.set_title(title, fontsize=10, loc="left", color=ink)
        axes.axhline(0, color=ink, linewidth=0.6)
        axes.grid(axis="y", color=ink, alpha=0.15, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", labelsize=8.5)
    if not kept:
        below.set_yticks([0])
        below.text(0.5, 0.6, "next to nothing", transform=below.transAxes, ha="center", fontsize=8.5, color=ink)
    for axes, count in ((above, len(through)), (below, len(kept))):
        if count:
            box = axes.legend(fontsize=8.5, frameon=False, ncols=count, loc="lower right", bbox_to_anchor=(1, 1))
            for text in box.get_texts():
                text.set_color(ink)
    return drawn(figure)


def _names(layers: Sequence[LayerBooks]) -> list[str]:
    """Of the branches, from the output down, as many as have a colour."""
    return list(dict.fromkeys(name for layer in layers for name in layer.branches))[: len(_BRANCHES)]


def _beside(axes: Any, through: dict[str, list[float]]) -> None:
    """Narrow bars next to one another, within the width of those that they belong to."""
    width = 0.5 / max(1, len(through))
    for turn, ((name, amounts), colour) in enumerate(zip(through.items(), _BRANCHES, strict=False)):
        shift = (turn - (len(through) - 1) / 2) * width
        places = [place + shift for place in range(len(amounts))]
        axes.bar(places, amounts, width=0.8 * width, color=colour, label=f"through {name}")


def _reader(ledger: Ledger, sample: int | None, target: int | None) -> Any:
    """From [T, B] to the number that is drawn."""
    targets, batch = ledger.seed.shape
    for what, index, size in (("sample", sample, batch), ("target", target, targets)):
        if index is not None and not 0 <= index < size:
            raise OptionError(f"{what}: expected None or 0 to {size - 1}, got {index!r}")

    def read(values: Tensor | None) -> float:
        if values is None:
            return 0.0
        values = values.expand(targets, batch)
        values = values if target is None else values[target : target + 1]
        values = values if sample is None else values[:, sample : sample + 1]
        return float(values.mean())

    return read


def _stack(axes: Any, kept: dict[str, list[float]]) -> None:
    """Bars on top of one another, those below 0 hanging from it."""
    ends = {side: [0.0] * max(map(len, kept.values()), default=0) for side in (True, False)}
    for cause, amounts in kept.items():
        bottoms = [ends[amount >= 0][i] for i, amount in enumerate(amounts)]
        axes.bar(range(len(amounts)), amounts, bottom=bottoms, width=0.7, color=_CAUSES.get(cause, _OTHER), label=cause)
        for i, amount in enumerate(amounts):
            ends[amount >= 0][i] += amount
