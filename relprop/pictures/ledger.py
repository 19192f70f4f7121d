"""The ledger as pictures: relevance on its way down the layers, and where a pass is ill-conditioned."""

from __future__ import annotations

from collections.abc import Mapping

from PIL import Image

from relprop.ledger import Ledger
from relprop.pictures.figures import drawn, make_figure


def conditioning_picture(ledgers: Mapping[str, Ledger]) -> Image.Image:
    """Cancellation and amplification of every residual add, site by site: which model is ill-conditioned, and where.

    Args:
        ledgers: by a name for the legend, such as the model's; each of a run with `ledger=True`.
    """
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
