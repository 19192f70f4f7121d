"""float32 errors of relprop beside those of the authors' code, on the same inputs: is ours any less exact?

On Vision Transformers, and on BERT with its authors' read-out. The published method amplifies the rounding of the
forward pass, so a float32 answer is judged by the authors' own float32. Truth is their code in float64. Run:
`python -m benchmarks.numerics.float32_parity --reference CHECKOUT`.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import relprop
from benchmarks.numerics.intervals import clustered_geometric_mean, geometric_mean
from benchmarks.numerics.models import (
    Case,
    TextCase,
    doubled,
    patches,
    random_case,
    random_text_case,
    relative_error,
    spread,
)
from benchmarks.numerics.reference import COMMIT, Reference, ReferenceBert
from benchmarks.numerics.rows import RESULTS, markdown, write_rows

METHODS = ("transformer_attribution", "full")
# The authors' BERT: rows of the maps normalised. Its class token shows another one's value and is left out here.
BERT: dict[str, Any] = {"composite": "chefer_bert", "method_options": {"normalise": True}}
BACKENDS = ("torch", "cpp")
BAR = 1.5  # of the upper confidence bound of ours / theirs
FIRST_SEED = 300


@dataclass(frozen=True)
class Errors:
    """Relative errors per input."""

    case: Case | TextCase
    method: str
    backend: str
    ours: NDArray[np.float64]
    theirs: NDArray[np.float64]
    ours_float64: NDArray[np.float64]

    @property
    def ratios(self) -> NDArray[np.float64]:
        return self.ours / self.theirs


def measure(case: Case, checkout: Path) -> list[Errors]:
    """Errors of every method and backend on one model."""
    images, targets = case.images, case.targets
    single, double = (Reference(checkout, case.model, dtype) for dtype in (torch.float32, torch.float64))
    found = []
    for method in METHODS:
        truth = double.explain(images, targets, method)
        theirs = relative_error(single.explain(images, targets, method), truth)
        wide = relprop.compile(doubled(case.model), (images[:2].double(),), method=method, backend="torch")
        ours_float64 = relative_error(patches(wide(images.double(), target=targets).relevance), truth)
        for backend in BACKENDS:
            engine = relprop.compile(case.model, (images[:2],), method=method, backend=backend)
            ours = relative_error(patches(engine(images, target=targets).relevance), truth)
            found.append(Errors(case, method, backend, *(e.numpy() for e in (ours, theirs, ours_float64))))
    return found


def measure_text(case: TextCase, checkout: Path) -> list[Errors]:
    """Errors of every backend on one BERT."""
    method, precise = METHODS[0], doubled(case.model)
    truth = ReferenceBert(checkout, precise).explain(case.ids, case.targets)[:, 1:]
    theirs = relative_error(ReferenceBert(checkout, case.model).explain(case.ids, case.targets)[:, 1:], truth)

    def error(model: nn.Module, backend: str) -> Tensor:
        engine = relprop.compile(model, (), case.words, method=method, backend=backend, **BERT)
        return relative_error(patches(engine(**case.words, target=case.targets).relevance), truth)

    errors = [theirs, error(precise, "torch")]
    return [
        Errors(case, method, backend, *(e.numpy() for e in (error(case.model, backend), *errors)))
        for backend in BACKENDS
    ]


def row(errors: Errors, attention_spread: float) -> dict[str, Any]:
    """One model's row; the sums let a reader recompute every bound."""
    logs = np.log(errors.ratios)
    return {
        "method": errors.method,
        "backend": errors.backend,
        "model": errors.case.name,
        "seed": errors.case.seed,
        "inputs": len(logs),
        "attention_spread": attention_spread,
        "ours_median": float(np.median(errors.ours)),
        "theirs_median": float(np.median(errors.theirs)),
        "ours_p90": float(np.quantile(errors.ours, 0.9)),
        "theirs_p90": float(np.quantile(errors.theirs, 0.9)),
        "ours_worst": float(errors.ours.max()),
        "theirs_worst": float(errors.theirs.max()),
        "ours_float64_worst": float(errors.ours_float64.max()),
        "sum_log_ratio": float(logs.sum()),
        "sum_squared_log_ratio": float((logs**2).sum()),
        "reference": COMMIT,
    }


def summarise(found: Sequence[Errors]) -> list[dict[str, Any]]:
    """Ours / theirs over all models of a kind, per method and backend."""
    groups: dict[tuple[str, str, str], list[Errors]] = defaultdict(list)
    for errors in found:
        kind = "bert" if isinstance(errors.case, TextCase) else "vit"
        groups[kind, errors.method, errors.backend].append(errors)
    rows = []
    for (kind, method, backend), members in groups.items():
        pooled = geometric_mean(np.concatenate([m.ratios for m in members]))
        clustered = clustered_geometric_mean([m.ratios for m in members])
        ours, theirs = (np.concatenate([getattr(m, side) for m in members]) for side in ("ours", "theirs"))
        rows.append(
            {
                "models": kind,
                "method": method,
                "backend": backend,
                "inputs": len(ours),
                "median ours": float(np.median(ours)),
                "median theirs": float(np.median(theirs)),
                "p99 ours": float(np.quantile(ours, 0.99)),
                "p99 theirs": float(np.quantile(theirs, 0.99)),
                "ours > 1e-2": float((ours > 1e-2).mean()),
                "theirs > 1e-2": float((theirs > 1e-2).mean()),
                "ours / theirs": pooled.estimate,
                "upper (t)": pooled.high,
                "upper (models)": clustered.high,
                "our float64, worst": float(max(m.ours_float64.max() for m in members)),
                "holds": max(pooled.high, clustered.high) <= BAR,
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.numerics.float32_parity", description=__doc__)
    parser.add_argument("--reference", type=Path, required=True, help="checkout of Transformer-Explainability")
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--inputs", type=int, default=80, help="per model")
    parser.add_argument("--out", type=Path, default=RESULTS / "float32_parity.csv")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found, rows = [], []
    for seed in range(FIRST_SEED, FIRST_SEED + options.models):
        case = random_case(seed, options.inputs)
        measured = measure(case, options.reference)
        found += measured
        uneven = spread(case.model, case.images)
        rows += [row(errors, uneven) for errors in measured]
    for seed in range(FIRST_SEED, FIRST_SEED + options.models):
        text = random_text_case(seed, options.inputs)
        measured = measure_text(text, options.reference)
        found += measured
        rows += [row(errors, spread(text.model, **text.words)) for errors in measured]
    write_rows(options.out, sorted(rows, key=lambda r: (r["method"], r["backend"], r["seed"], r["model"])))
    print(markdown(summarise(found)))


if __name__ == "__main__":
    main()
