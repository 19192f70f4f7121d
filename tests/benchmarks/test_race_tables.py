"""The race's tables and pictures of made-up rows: two devices, many points, points without a time."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import tables
from benchmarks.numerics.rows import RESULTS, read_rows
from benchmarks.peers import pictures
from benchmarks.peers.names import NAMES

MODELS = ("vit_tiny_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224", "bert_base", "llama_1b")
MEASURED = ("forward", "forward_backward", "relprop", "relprop_attnlrp")


def made_up(device: str, points: list[tuple[str, int, int, str]]) -> list[dict[str, str]]:
    """Rows of four contenders with a time and one without, the last point's but for its forward pass without any."""
    columns = list(read_rows(RESULTS / "peers_cpu.csv")[0])
    rows = []
    for model, batch, tokens, dtype in points:
        for place, name in enumerate((*MEASURED, "authors")):
            row = dict.fromkeys(columns, "")
            row |= {"model": model, "batch": str(batch), "tokens": str(tokens), "dtype": dtype, "contender": name}
            row |= {"device": device, "threads": "2", "torch": "2.15", "rounds": "3"}
            alone = (model, batch, tokens, dtype) == points[-1]
            if name == "authors" or (alone and name != "forward"):
                row["error"] = "over the budget of 30 s: about 13 forward passes of 9 s, not started"
            else:
                times = 100.0 * (1 + place)
                row |= {f"ms_{part}": str(times) for part in ("median", "p20", "p80")}
                row |= {"ratio_to_forward": str(1.0 + place), "ms_per_sample": str(times / batch)}
                row |= {"peak_bytes": str(2**20 * 50 * (1 + place) * batch), "process_bytes": "1"}
            rows.append(row)
    return rows


def written(folder: Path, name: str, rows: list[dict[str, str]]) -> None:
    with (folder / name).open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    return tmp_path


GRID = [(m, b, 197, d) for m, b, d in itertools.product(MODELS, (1, 8, 32), ("float32", "bfloat16"))]
LONG = [(model, 1, tokens, "float32") for model in MODELS for tokens in (577, 1025, 4097)]


def test_many_points(folder: Path) -> None:
    """The README keeps each model's extremes; the page has every point, and says where only a forward pass ran."""
    written(folder, "peers_cpu.csv", made_up("CPU", [*GRID, *LONG]))
    whole, short = tables.race_all().splitlines(), tables.race_larger().splitlines()
    assert len(whole) == 2 + len(GRID) + len(LONG) - len(MODELS)
    assert len(short) <= tables.README_POINTS + 4
    assert short[-1] == "25 more are on the [benchmarks page](docs/benchmarks.md#against-other-packages)."
    for model in MODELS:
        for point in (" × 32, 197 tokens", ", 4097 tokens", " × 32, 197 tokens, bfloat16"):
            assert any(line.startswith(f"| {model}{point} |") for line in short), (model, point)
    (last,) = (line for line in whole if line.startswith("| llama_1b, 4097 tokens |"))
    assert [cell.strip() for cell in last.split("|")[2:-1]] == ["time"] * 4
    assert len(tables.race().splitlines()) == 2 + 5 + 2  # head, contenders, a blank line and the note


def test_forward_without_a_time(folder: Path) -> None:
    rows = made_up("CPU", [("bert_base", 1, 197, "float32"), ("bert_base", 32, 197, "float32")])
    rows = [row for row in rows if row["batch"] == "1" or row["contender"] == "forward"]
    rows[-1] |= {"ratio_to_forward": "", "ms_median": "", "error": "over the memory budget of 5 GiB"}
    written(folder, "peers_cpu.csv", rows)
    assert "| bert_base × 32, 197 tokens (forward pass: memory) |" in tables.race_larger()


def test_rows_of_a_gpu(folder: Path) -> None:
    """A table of its own, under the device's name."""
    points = [("bert_base", 1, 197, "float32"), ("bert_base", 8, 197, "bfloat16")]
    written(folder, "peers_cpu.csv", made_up("CPU", [*points, ("bert_base", 1, 512, "float32")]))
    before = tables.race(), tables.race_larger()
    assert "On " not in before[1]
    written(folder, "peers_cuda.csv", made_up("H200", [*points, ("bert_base", 1, 512, "float32")]))
    for one, made in zip(before, (tables.race(), tables.race_larger()), strict=True):
        assert made.startswith(f"{one}\n\nOn H200, torch 2.15:\n\n| ")
    (folder / "peers_cpu.csv").unlink()
    assert tables.race().startswith("On H200, torch 2.15:\n\n| ")


def test_nothing_yet(folder: Path) -> None:
    assert {tables.race(), tables.race_larger(), tables.race_all()} == {tables.NOT_YET}


def test_pictures_of_many_points(tmp_path: Path) -> None:
    """A panel for each model with a time, as large with forty points as with six."""
    rows = made_up("CPU", [*GRID, *LONG, ("torchvision vit_b_16", 1, 197, "float32")])
    for name in set(NAMES) - {*MEASURED, "authors"}:
        rows += [{**row, "contender": name} for row in rows if row["contender"] == "relprop"]
    pictures.times(rows, tmp_path / "times.png")
    pictures.memory(rows, tmp_path / "memory.png")
    for name in ("times", "memory"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert max(picture.size) <= 2100, (name, picture.size)
        assert pictures.shows(tmp_path / f"{name}.png", rows)
        assert not pictures.shows(tmp_path / f"{name}.png", [*rows[:-1], {**rows[-1], "check": "another"}])


@pytest.mark.parametrize("name", ["race_times", "race_memory"])
def test_committed_pictures(name: str) -> None:
    """Drawn from the rows as they are; else `python -m benchmarks.peers.pictures` draws them anew."""
    folder = Path(__file__).parents[2] / "docs" / "pictures"
    assert pictures.shows(folder / f"{name}.png", read_rows(RESULTS / "peers_cpu.csv"))
