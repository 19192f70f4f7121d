"""Write the README's tables from the committed rows, between their markers: python -m benchmarks.tables [--check]."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.numerics.rows import RESULTS, read_rows
from benchmarks.peers.names import NAMES

README = Path(__file__).parents[1] / "README.md"
NOT_YET = "not yet measured"
# Contenders of speed_cpu.csv; the forward pass is what the others are shown beside.
NAMES_OF_SPEED = {
    "relprop": "relprop",
    "relprop_stable": "relprop, `chefer_stable`",
    "relprop_stable_medium": 'relprop, `chefer_stable`, `precision="medium"`',
    "relprop_stable_bfloat16": 'relprop, `chefer_stable`, bfloat16 model, `precision="medium"`',
    "relprop_plan": "relprop, `tape=False`",
    "relprop_avx2": "relprop, kernels of AVX2",
    "relprop_torch": "relprop, plain PyTorch rules",
    "forward_backward": "forward and backward",
    "reference": "the authors' code",
    "relprop_cp_lrp": "relprop, `cp_lrp`",
    "relprop_attnlrp": "relprop, `attnlrp`",
    "lxt": "LXT (CP-LRP)",
}


def table(head: list[str], rows: list[list[str]]) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def speed() -> str:
    """Times of one batch and ratios to the model's own forward pass."""
    path = RESULTS / "speed_cpu.csv"
    if not path.exists():
        return NOT_YET
    rows = []
    found = read_rows(path)
    for row in found:
        if row["contender"] in NAMES_OF_SPEED:
            rows.append(
                [
                    row["model"],
                    row["batch"],
                    NAMES_OF_SPEED[row["contender"]],
                    f"{float(row['ms_median']):.0f}",
                    f"{float(row['ratio_to_forward']):.2f}",
                ]
            )
    where = f"{found[0]['device']}, {found[0]['threads']} threads, float32, torch {found[0]['torch']}"
    head = ["model", "batch", "what", "ms", "x forward"]
    return f"{table(head, rows)}\n\n{where}; `benchmarks/results/speed_cpu.csv`."


def localisation() -> str:
    """How much relevance lies on the asked digit, and how often the hottest pixel does."""
    path = RESULTS / "localisation.csv"
    if not path.exists():
        return NOT_YET
    rows, count = [], ""
    for row in read_rows(path):
        if row["minus"] or row["dtype"] != "float32":
            continue
        count = f"{row['inputs']} questions about {row['scenes']} images"
        name = f"`{row['method']}`" + (f", `{row['composite']}`" if row["composite"] == "chefer_stable" else "")
        rows.append(
            [
                name,
                f"{float(row['mass']):.3f} ± {float(row['mass_se']):.3f}",
                f"{float(row['pointing']):.3f} ± {float(row['pointing_se']):.3f}",
            ]
        )
    head = ["method", "relevance on the asked digit", "pointing game"]
    return f"{table(head, rows)}\n\n{count}, mean ± standard error; `benchmarks/results/localisation.csv`."


def similarity() -> str:
    """How much similarity two sentences lose with the words that a method names."""
    path = RESULTS / "sentence_similarity.csv"
    if not path.exists():
        return NOT_YET
    rows: dict[str, list[str]] = {}
    for row in (found := read_rows(path)):
        lost = f"{float(row['similarity_lost']):.3f} ± {float(row['standard_error']):.3f}"
        rows.setdefault(row["method"], []).append(lost)
    deleted = sorted({int(row["deleted_words"]) for row in found})
    head = ["method", *(f"{count} word{'s' * (count > 1)} deleted" for count in deleted)]
    named = [[", ".join(f"`{part}`" for part in name.split(", ")), *cells] for name, cells in rows.items()]
    where = f"{found[0]['pairs']} pairs of sentences, cosine similarity lost, mean ± standard error"
    return f"{table(head, named)}\n\n{where}; `benchmarks/results/sentence_similarity.csv`."


def generation() -> str:
    """Seconds and memory of explaining all generated tokens."""
    path = RESULTS / "generation.csv"
    if not path.exists():
        return NOT_YET
    found = read_rows(path)
    rows = [
        [
            f"{row['model']}, {row['dtype']}",
            f"{row['prompt']} + {row['generated']}",
            row["way"],
            f"{float(row['seconds']):.1f}",
            f"{float(row['peak_mb']):.0f}",
            f"{float(row['predicted_mb']):.0f}" if row["predicted_mb"] else "-",
        ]
        for row in found
    ]
    where = f"{found[0]['device']}, {found[0]['threads']} threads, torch {found[0]['torch']}"
    head = ["model", "prompt + generated", "way", "s", "peak MB", "predicted MB"]
    return f"{table(head, rows)}\n\n{where}; `benchmarks/results/generation.csv`."


RACES = ("peers_cpu.csv", "peers_cuda.csv")
README_POINTS = 24  # of the table of larger inputs; the benchmarks page has all of them
_REASONS = {  # why there is no time, by how an error begins
    "over the memory budget": "memory",
    "the device's memory was full": "memory",
    "over the budget": "time",
    "wrong answer": "wrong",
    "cannot explain": "-",
}


def _race(name: str) -> dict[bool, list[dict[str, str]]]:
    """Rows of the race, sorted: those of one input of its model's shortest length in float32, and all others."""
    path = RESULTS / name
    rows = read_rows(path) if path.exists() else []
    rows.sort(key=lambda row: (row["model"], row["dtype"] != "float32", int(row["batch"]), int(row["tokens"])))
    single = [row for row in rows if (row["batch"], row["dtype"]) == ("1", "float32")]
    lengths = {row["model"]: row["tokens"] for row in reversed(single)}
    found: dict[bool, list[dict[str, str]]] = {True: [], False: []}
    for row in rows:
        found[row in single and row["tokens"] == lengths[row["model"]]].append(row)
    return found


def _race_cells(rows: list[dict[str, str]]) -> dict[tuple[str, str], str]:
    """By contender and point: times of the forward pass / MiB, marked where it ran once; or why there is no time."""
    found = {}
    for row in rows:
        if row["ratio_to_forward"]:
            times, once = float(row["ratio_to_forward"]), "°" if row["rounds"] == "1" else ""
            cell = f"{times:.1f}{once} / {int(row['peak_bytes']) / 2**20:.0f}"
        else:
            cell = next((word for start, word in _REASONS.items() if row["error"].startswith(start)), "failed")
        found[row["contender"], _point(row)] = cell
    return found


def _point(row: dict[str, str]) -> str:
    batch = f" × {row['batch']}" if row["batch"] != "1" else ""
    return f"{row['model']}{batch}, {row['tokens']} tokens" + (", bfloat16" if row["dtype"] == "bfloat16" else "")


def _on(rows: list[dict[str, str]]) -> str:
    return f"On {rows[0]['device']}, torch {rows[0]['torch']}:\n\n"


def race() -> str:
    """Times of one input against the forward pass, and memory, by contender and model; for each device."""
    tables = []
    for name in RACES:
        found = _race(name)[True]
        if found:
            cells, points = _race_cells(found), list(dict.fromkeys(map(_point, found)))
            rows = [[NAMES[name], *(cells.get((name, point), "-") for point in points)] for name in NAMES]
            rows = [row for row in rows if set(row[1:]) != {"-"}]
            tables.append((_on(found) if name != RACES[0] else "") + table(["contender", *points], rows))
    if not tables:
        return NOT_YET
    first = next(row for name in RACES for row in _race(name)[True])
    where = (
        f"Times of the forward pass / MiB beyond the model; one input. {first['device']}, {first['threads']}"
        f" threads, float32, torch {first['torch']}. Medians of rounds, °: of one; all of a column in one run. time,"
        " memory: over that budget; wrong: its answer failed the check; failed: with an error. A dash: no answer, or"
        " not measured; times with their spread, checks and reasons are in `benchmarks/results/peers_cpu.csv`. llama_1b"
        " is cut to 2 of 16 layers, which flatters relprop: it computes the last layer's MLP for the one token whose"
        " logits are asked, half of the model here."
    )
    return "\n\n".join([tables[0], where, *tables[1:]])


def race_larger() -> str:
    """The same for batches, longer inputs and bfloat16, by point and contender: a choice where there are many."""
    return _larger(README_POINTS)


def race_all() -> str:
    """The same without a choice."""
    return _larger(None)


def _larger(limit: int | None) -> str:
    tables = []
    for name in RACES:
        found = _race(name)[False]
        if found:
            count = len(set(map(_point, found)))
            kept = found if limit is None or count <= limit else _chosen(found)
            text = (_on(found) if name != RACES[0] else "") + _by_point(kept)
            left = count - len(set(map(_point, kept)))
            more = f"{left} more are on the [benchmarks page](docs/benchmarks.md#against-other-packages)."
            tables.append(f"{text}\n\n{more}" if left else text)
    return "\n\n".join(tables) or NOT_YET


def _chosen(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Each model's largest batch and longest input in float32, and its largest batch in bfloat16."""
    kept = set()
    for model, dtype in {(row["model"], row["dtype"]): None for row in rows}:
        same = [row for row in rows if (row["model"], row["dtype"]) == (model, dtype)]
        kept.add(_point(max(same, key=lambda row: (int(row["batch"]), int(row["tokens"])))))
        if dtype == "float32":
            kept.add(_point(max(same, key=lambda row: (int(row["tokens"]), int(row["batch"])))))
    return [row for row in rows if _point(row) in kept]


def _by_point(rows: list[dict[str, str]]) -> str:
    cells, points = _race_cells(rows), list(dict.fromkeys(map(_point, rows)))
    names = [name for name in NAMES if name != "forward" and any(cells.get((name, p), "-") != "-" for p in points)]
    alone = {row["contender"] == "forward" and _point(row) for row in rows if row["error"]}
    lines = [
        [
            f"{point} (forward pass: {cells['forward', point]})" if point in alone else point,
            *(cells.get((name, point), "-") for name in names),
        ]
        for point in points
    ]
    return table(["input", *(NAMES[name] for name in names)], lines)


TABLES: dict[str, Callable[[], str]] = {
    "speed": speed,
    "race": race,
    "race_larger": race_larger,
    "localisation": localisation,
    "similarity": similarity,
    "generation": generation,
}
ON_PAGES: dict[str, Callable[[], str]] = {**TABLES, "race_all": race_all}  # those that the site can show


def rendered(text: str) -> str:
    """The README's text with every table made anew."""
    for name, make in TABLES.items():
        pattern = re.compile(f"(<!-- {name} -->\n).*?(\n<!-- end {name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"README.md: expected the markers <!-- {name} --> and <!-- end {name} -->")
        body = make()
        text = pattern.sub(lambda match, body=body: f"{match[1]}{body}{match[2]}", text)
    return text


def main() -> None:
    """Rewrite the README, or with --check fail where it differs from the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    before = README.read_text(encoding="utf-8")
    after = rendered(before)
    if options.check:
        sys.exit(
            "README.md: its tables differ from the rows; run python -m benchmarks.tables" if before != after else 0
        )
    README.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
