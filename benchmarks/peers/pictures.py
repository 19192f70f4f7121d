"""Plots of the race's rows: python -m benchmarks.peers.pictures [ROWS] [--out docs/pictures].

Each says in its metadata which rows it was drawn from: `shows` compares.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image

from benchmarks.numerics.rows import RESULTS, read_rows
from benchmarks.peers.names import NAMES

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS, OTHERS = "#1b6ca8", "#b0b0b0"
Row = dict[str, str]
ROWS = "Rows"  # the metadata's key


def shows(picture: Path, rows: Sequence[Row]) -> bool:
    """Whether a plot was drawn from these rows."""
    with Image.open(picture) as image:
        return image.info.get(ROWS) == _digest(rows)


def _digest(rows: Sequence[Row]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _saved(figure: Any, path: Path, rows: Sequence[Row]) -> None:
    figure.savefig(path, dpi=110, metadata={ROWS: _digest(rows)})
    plt.close(figure)


def times(rows: Sequence[Row], path: Path) -> None:
    """Time per sample with p20 and p80, a panel for each model at its smallest size in float32."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    panels = [(model, _smallest([row for row in rows if row["model"] == model])) for model in models]
    panels = [(model, found) for model, found in panels if found]
    figure, axes = _grid(len(panels))
    for axis, (model, found) in zip(axes.flat, panels, strict=False):
        _bars(axis, found)
        axis.set_title(
            f"{model}, batch {found[0]['batch']}, {found[0]['tokens']} tokens, {found[0]['dtype']}", fontsize=9
        )
    figure.tight_layout()
    _saved(figure, path, rows)


def _grid(panels: int) -> tuple[Any, Any]:
    """A figure with this many axes, three in a line, without those that are left over."""
    columns = max(1, min(3, panels))
    lines = max(1, -(-panels // columns))
    figure, axes = plt.subplots(lines, columns, figsize=(6 * columns, 4.2 * lines), squeeze=False)
    for axis in axes.flat[max(1, panels) :]:
        axis.set_visible(False)
    return figure, axes


def _smallest(rows: Sequence[Row]) -> list[Row]:
    timed = [row for row in rows if row["ms_median"]]
    if not timed:
        return []
    sizes = min((row["dtype"] != "float32", int(row["batch"]), int(row["tokens"])) for row in timed)
    return [row for row in timed if (row["dtype"] != "float32", int(row["batch"]), int(row["tokens"])) == sizes]


def _bars(axis: Any, rows: Sequence[Row]) -> None:
    ordered = sorted(rows, key=lambda row: -float(row["ms_per_sample"]))
    low, values, high = (
        [float(row[f"ms_{part}"]) / int(row["batch"]) for row in ordered] for part in ("p20", "median", "p80")
    )
    spread = [[v - a for v, a in zip(values, low, strict=True)], [b - v for v, b in zip(values, high, strict=True)]]
    colours = [OURS if row["contender"].startswith("relprop") else OTHERS for row in ordered]
    axis.barh([NAMES[row["contender"]] for row in ordered], values, color=colours, xerr=spread, ecolor="0.3")
    for place, (row, value, end) in enumerate(zip(ordered, values, high, strict=True)):
        text = f"{value:,.0f} ms, {float(row['ratio_to_forward']):.1f}x"
        beside = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 7}
        axis.annotate(text, (end, place), **beside)
    axis.set_xlim(right=max(values) * 1.4)
    axis.set_xlabel("ms per sample (and times the forward pass)", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def memory(rows: Sequence[Row], path: Path) -> None:
    """Peak memory of one sample by number of tokens, a panel for each model that has several."""
    found = [row for row in rows if row["ms_median"] and row["batch"] == "1" and row["dtype"] == "float32"]
    models = list(dict.fromkeys(row["model"] for row in found))
    panels = {m: lines for m in models if (lines := _lines([row for row in found if row["model"] == m]))}
    figure, axes = _grid(len(panels))
    drawn: dict[str, Any] = {}
    for axis, (model, lines) in zip(axes.flat, panels.items(), strict=False):
        for name, points in lines.items():
            place = list(NAMES).index(name)
            style = "o-" if name.startswith("relprop") else "s--"
            colour = plt.get_cmap("tab20")(place % 20)  # a contender's own, in every panel
            (drawn[name],) = axis.plot(*zip(*points, strict=True), style, color=colour, markersize=4, linewidth=1.2)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="peak MiB beyond the model", title=model)
        ticks = sorted({tokens for points in lines.values() for tokens, _ in points})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    named = [name for name in NAMES if name in drawn]
    keys = 2 * axes.shape[1]
    below = 0.22 * -(-len(named) // keys) / figure.get_figheight()
    figure.legend([drawn[name] for name in named], [NAMES[n] for n in named], ncols=keys, fontsize=8, loc="lower left")
    figure.tight_layout(rect=(0, below, 1, 1))
    _saved(figure, path, rows)


def _lines(rows: Sequence[Row]) -> dict[str, list[tuple[int, float]]]:
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in sorted(rows, key=lambda row: int(row["tokens"])):
        lines.setdefault(row["contender"], []).append((int(row["tokens"]), int(row["peak_bytes"]) / 2**20))
    return {name: points for name, points in lines.items() if len(points) > 1}


def main() -> None:
    """Draw both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path, nargs="?", default=RESULTS / "peers_cpu.csv")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "docs" / "pictures")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    rows = read_rows(given.rows)
    times(rows, given.out / "race_times.png")
    memory(rows, given.out / "race_memory.png")


if __name__ == "__main__":
    main()
