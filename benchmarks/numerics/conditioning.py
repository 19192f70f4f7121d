"""Which models are ill-conditioned, and where: cancellation C and amplification A of every residual add.

Two are trained: the demo's Vision Transformer, asked for the digits of test scenes, and the sentence encoder of
`benchmarks.sentence_similarity`, asked for the similarity of pairs of sentences, one pair at a time, so without
padding. One has random weights (`benchmarks.numerics.models`). C is the model's own and the same for every composite;
A is the rules'. Run:

    python -m benchmarks.numerics.conditioning [--model FOLDER]     # writes the rows, then the picture
    python -m benchmarks.numerics.conditioning --picture            # the picture of the committed rows
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import relprop
from benchmarks.numerics.models import Case, batches, random_case, trained_case
from benchmarks.numerics.rows import RESULTS, read_rows, write_rows
from benchmarks.sentence_similarity import Study, cosine, model_folder
from relprop.ledger import Ledger
from relprop.pictures import save_png
from relprop.pictures.figures import drawn, make_figure

COMPOSITES = ("chefer", "chefer_stable", "attnlrp", "reslrp")
ENCODER = "all-MiniLM-L6-v2"
ROWS = RESULTS / "conditioning.csv"
PICTURE = Path(__file__).parents[2] / "docs" / "pictures" / "conditioning.png"
SCENES_SEED, RANDOM_SEED = 6500, 4001


def images(case: Case, composite: str) -> Iterator[Ledger]:
    """Books of an image model."""
    engine = relprop.compile(case.model, (case.images[:2],), method="full", composite=composite)
    for part, targets in batches(case, 50):
        yield booked(engine(part, target=targets, ledger=True))


def sentences(study: Study, count: int, composite: str) -> Iterator[Ledger]:
    """Books of the encoder, one pair of sentences each."""
    pairs = study.pairs()[:count]
    example = study.given(study.tokens([pairs[0][0]]))
    engine = relprop.compile(study.model, (), example, method="full", composite=composite)
    for first, second in pairs:
        target = cosine(study.embed([second]))
        yield booked(engine(**study.given(study.tokens([first])), target=target, ledger=True))


def booked(found: relprop.Explanation) -> Ledger:
    """The ledger that was asked for."""
    assert found.ledger is not None
    return found.ledger


def rows_of(model: str, composite: str, ledgers: Sequence[Ledger]) -> list[dict[str, Any]]:
    """One row for each residual add, from the input up."""
    rows = []
    for number, sites in enumerate(zip(*(ledger.residual_sites() for ledger in ledgers), strict=True)):
        c = torch.cat([site.cancellation.flatten() for site in sites])
        a = torch.cat([site.amplification.flatten() for site in sites])
        head = {"model": model, "composite": composite, "site": number, "module": sites[0].module, "inputs": len(a)}
        rows.append({**head, **figures("cancellation", c), **figures("amplification", a)})
    return rows


def figures(name: str, values: Tensor) -> dict[str, float]:
    """What a row says of a number over the inputs."""
    return {f"{name}_median": float(values.quantile(0.5)), f"{name}_worst": float(values.max())}


def draw(rows: Sequence[dict[str, str]], path: Path) -> None:
    """C by model, and A by composite for each model: medians, and up to the worst input in a lighter colour."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = make_figure(10, 7)
    panels = figure.subplots(2, 2).flat
    for model in models:
        curve(panels[0], model, "cancellation", [r for r in rows if (r["model"], r["composite"]) == (model, "attnlrp")])
    panels[0].set(title="cancellation C")
    for axes, model in zip(panels[1:], models, strict=True):
        for composite in COMPOSITES:
            found = [row for row in rows if (row["model"], row["composite"]) == (model, composite)]
            curve(axes, composite, "amplification", found)
        axes.set(title=f"amplification A, {model}")
    for axes in panels:
        axes.set(xlabel="residual add, from the input", yscale="log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_formatter("{x:g}")
        if high < 10 * low:
            axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(labelsize=8, which="both")
        axes.grid(axis="y", alpha=0.2)
        axes.legend(fontsize=8)
    save_png(drawn(figure), path)


def curve(axes: Any, label: str, column: str, rows: Sequence[dict[str, str]]) -> None:
    """One line of a panel."""
    sites = [int(row["site"]) for row in rows]
    median, worst = ([float(row[f"{column}_{which}"]) for row in rows] for which in ("median", "worst"))
    line = axes.plot(sites, median, marker="o", markersize=3, label=label)[0]
    axes.fill_between(sites, median, worst, color=line.get_color(), alpha=0.15, linewidth=0)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.numerics.conditioning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--inputs", type=int, default=100, help="for each model")
    parser.add_argument("--model", type=Path, help="folder of the encoder's files")
    parser.add_argument("--picture", action="store_true", help="draw the committed rows, measure nothing")
    options = parser.parse_args(arguments)
    if not options.picture:
        study, rows = Study(model_folder(options.model)), []
        cases = [trained_case(options.inputs // 2, SCENES_SEED), random_case(RANDOM_SEED, options.inputs)]
        for composite in COMPOSITES:
            rows += [row for case in cases for row in rows_of(case.name, composite, list(images(case, composite)))]
            rows += rows_of(ENCODER, composite, list(sentences(study, options.inputs, composite)))
            print(f"{composite}: {len(rows)} rows", flush=True)
        write_rows(ROWS, rows)
    draw(read_rows(ROWS), PICTURE)


if __name__ == "__main__":
    main()
