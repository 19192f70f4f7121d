"""How exact the well-conditioned composite is in float32 and on bfloat16 models, beside the original composite.

Truth is the same composite in float64 on the same weights and inputs; for a bfloat16 model on its rounded weights and
inputs. A bfloat16 model rounds every activation of its forward pass, and no relevance pass can undo that; so its error
is also compared with two relevance passes over the very same bfloat16 activations, the plain-PyTorch rules in float32
and in float64. Run: `python -m benchmarks.numerics.stable_composite`.
"""

from __future__ import annotations

import argparse
import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import relprop
from benchmarks.numerics.models import (
    Case,
    batches,
    doubled,
    patches,
    random_case,
    relative_error,
    trained_available,
    trained_case,
)
from benchmarks.numerics.rows import RESULTS, kept_rows, markdown, write_rows

METHOD = "transformer_attribution"
COMPOSITES = ("chefer_stable", "chefer")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WITHIN = {"float32": 1e-4, "bfloat16": 1e-1}
LEAST_WITHIN = {"float32": 0.995, "bfloat16": 0.99}  # bfloat16: with trained weights
MOST_RATIO = 1.2  # bfloat16 with random weights, over the same activations' exact relevance pass
FIRST_SEED = 4000
SCENES_SEED = 6000
BATCH = 256


@dataclass(frozen=True)
class Errors:
    """Relative errors of one model, composite and dtype, per input.

    Attributes:
        ours: of the engine as a user gets it.
        same_forward: of the plain-PyTorch rules over the same activations, by the streams' dtype.
    """

    case: Case
    composite: str
    dtype: str
    ours: NDArray[np.float64]
    same_forward: dict[str, NDArray[np.float64]]


def measure(case: Case, composite: str, dtype: str, batch: int = BATCH) -> Errors:
    """Errors on one model."""
    rounded = copy.deepcopy(case.model).to(DTYPES[dtype])
    example = case.images[:2].to(DTYPES[dtype])
    engine = relprop.compile(rounded, (example,), method=METHOD, composite=composite)
    wide = relprop.compile(doubled(rounded), (example.double(),), method=METHOD, composite=composite, backend="torch")
    others = {}
    if dtype == "bfloat16":
        given: dict[str, Any] = {"method": METHOD, "composite": composite, "backend": "torch"}
        plain = relprop.compile(rounded, (example,), tape=False, **given)  # a recorded run would keep its streams
        others = {"float32": plain, "float64": _with_streams(plain, torch.float64)}
    errors: dict[str, list[torch.Tensor]] = defaultdict(list)
    for images, targets in batches(case, batch):
        images = images.to(DTYPES[dtype])
        truth = patches(wide(images.double(), target=targets).relevance)
        for name, asked in {"ours": engine, **others}.items():
            errors[name].append(relative_error(patches(asked(images, target=targets).relevance), truth))
    found = {name: torch.cat(parts).numpy() for name, parts in errors.items()}
    return Errors(case, composite, dtype, found.pop("ours"), found)


def _with_streams(engine: relprop.Engine, dtype: torch.dtype) -> relprop.Engine:
    """The same program over the same forward pass with relevance in another dtype."""
    changed = copy.copy(engine)
    changed._dtype = dtype
    return changed


def quantiles(errors: NDArray[np.float64]) -> dict[str, float]:
    """What a row says about a distribution."""
    return {
        "median": float(np.quantile(errors, 0.5, method="higher")),
        "p90": float(np.quantile(errors, 0.9, method="higher")),
        "p99": float(np.quantile(errors, 0.99, method="higher")),
        "worst": float(errors.max()),
    }


def comparison(found: Sequence[Errors]) -> dict[str, float | str]:
    """Ours over the same activations' other passes: geometric mean of the ratio, and the ratio of 99th percentiles."""
    result: dict[str, float | str] = {}
    for name in ("float32", "float64"):
        if not all(name in e.same_forward for e in found):
            result[f"ratio_{name}"] = result[f"ratio_p99_{name}"] = ""
            continue
        ours = np.concatenate([e.ours for e in found])
        theirs = np.concatenate([e.same_forward[name] for e in found])
        result[f"ratio_{name}"] = float(np.exp(np.log(ours / theirs).mean()))
        result[f"ratio_p99_{name}"] = float(
            np.quantile(ours, 0.99, method="higher") / np.quantile(theirs, 0.99, method="higher")
        )
    return result


def row(errors: Errors) -> dict[str, Any]:
    """One model's row."""
    return {
        "composite": errors.composite,
        "dtype": errors.dtype,
        "model": errors.case.name,
        "seed": errors.case.seed,
        "trained": int(errors.case.trained),
        "inputs": len(errors.ours),
        "bound": WITHIN[errors.dtype],
        "within": int((errors.ours <= WITHIN[errors.dtype]).sum()),
        **quantiles(errors.ours),
        **comparison([errors]),
    }


def summarise(found: Sequence[Errors]) -> list[dict[str, Any]]:
    """Over all random models, and for the trained one."""
    groups: dict[tuple[str, str, bool], list[Errors]] = defaultdict(list)
    for errors in found:
        groups[errors.composite, errors.dtype, errors.case.trained].append(errors)
    rows = []
    for (composite, dtype, trained), members in groups.items():
        ours = np.concatenate([m.ours for m in members])
        rows.append(
            {
                "composite": composite,
                "dtype": dtype,
                "weights": "trained" if trained else "random",
                "models": len(members),
                "inputs": len(ours),
                "bound": WITHIN[dtype],
                "share within": float((ours <= WITHIN[dtype]).mean()),
                **quantiles(ours),
                **comparison(members),
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.numerics.stable_composite", description=__doc__)
    parser.add_argument("--models", type=int, default=16)
    parser.add_argument("--inputs", type=int, default=256, help="per random model")
    parser.add_argument("--scenes", type=int, default=500, help="for the trained model, two inputs each")
    parser.add_argument("--only", choices=("random", "trained"), help="measure these; keep the file's other rows")
    parser.add_argument("--out", type=Path, default=RESULTS / "stable_composite.csv")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cases = []
    if options.only != "trained":
        seeds = range(FIRST_SEED, FIRST_SEED + options.models)
        cases += [(random_case(seed, options.inputs), BATCH) for seed in seeds]
    if trained_available() and options.only != "random":
        cases.append((trained_case(options.scenes, SCENES_SEED), 64))
    found = [
        measure(case, composite, dtype, batch) for case, batch in cases for composite in COMPOSITES for dtype in DTYPES
    ]
    write_rows(options.out, [row(errors) for errors in found], kept_rows(options.out, options.only))
    print(markdown(summarise(found)))


if __name__ == "__main__":
    main()
