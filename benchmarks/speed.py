"""Speed of one explanation against the model's own forward pass, on the machine at hand.

    python -m benchmarks.speed [--reference CHECKOUT] [--models ...] [--batches 1 4] [--rounds 9] [--out FILE]

In each round every contender runs once, in turn: the forward pass without gradients, forward and backward, relprop
as it comes (a tape, from the second call of a shape on), step by step (`relprop_plan`), with plain PyTorch rules, with
kernels of AVX2 where the CPU has AVX-512 (`relprop_avx2`: torch's products, which keep what instructions they have,
and fused kernels around them), and (where a checkout is given) the authors' code, one image after the other as it is
only right at batch 1. LXT, where it is installed, explains torchvision's vit_b_16, in a run of its own with the same
rules of ours. Reported are medians of the paired ratios to that round's forward pass, so that a machine whose speed
drifts does not decide. No time is written for a wrong answer: answers are compared first. `gflop` counts the products
of the plan, also the part that the kernels leave out because no relevance arrives there (queries and keys in
`chefer_stable`), so that `share_of_rate` may exceed what was multiplied.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

import relprop
from benchmarks.numerics.lxt import Lxt, available, error_to
from benchmarks.numerics.reference import Reference
from benchmarks.numerics.rows import write_rows
from benchmarks.timing import in_turn, matrix_rate, spread
from relprop import native
from relprop.rules.linear_map import native_bfloat16

_LXT = "torchvision vit_b_16"
HALF = (
    "relprop_stable_medium",
    "relprop_stable_bfloat16",
)  # their products are bfloat16, and so is the rate they are held to
MODELS = ("vit_base_patch16_224", "vit_tiny_patch16_224")


def passes(model: Any, images: Tensor) -> dict[str, Callable[[], Any]]:
    """The model's own passes, which everything is compared with."""

    def forward() -> None:
        with torch.no_grad():
            model(images)

    def forward_backward() -> None:
        leaf = images.clone().requires_grad_()
        model(leaf)[:, 5].sum().backward()

    return {"forward": forward, "forward_backward": forward_backward}


@contextmanager
def instructions(isa: str) -> Iterator[None]:
    """Our kernels do without the instruction sets above one; torch's own keep them."""
    native._C.set_isa(isa)
    try:
        yield
    finally:
        native._C.set_isa("")


def contenders(model: Any, images: Tensor, reference: Path | None) -> dict[str, Callable[[], Any]]:
    """What is timed, by name. images: [B, 3, H, W]"""
    targets, found = torch.full((len(images),), 5), passes(model, images)
    for name, options in {
        "relprop": {},
        "relprop_torch": {"backend": "torch"},
        "relprop_stable": {"composite": "chefer_stable"},
        **(
            {"relprop_stable_medium": {"composite": "chefer_stable", "precision": "medium"}}
            if native_bfloat16()
            else {}
        ),
        "relprop_plan": {"tape": False},
    }.items():
        engine = relprop.compile(model, (images,), **options)  # type: ignore[arg-type]
        found[name] = lambda engine=engine: engine(images, target=targets)
    if "avx512" in native.info().get("isas_supported", []):
        with instructions("avx2"):
            engine = relprop.compile(model, (images,))

        def on_avx2(engine: Any = engine) -> None:
            with instructions("avx2"):
                engine(images, target=targets)

        found["relprop_avx2"] = on_avx2
    if native_bfloat16():
        half, halves = copy.deepcopy(model).bfloat16(), images.bfloat16()
        engine = relprop.compile(half, (halves,), composite="chefer_stable", precision="medium")
        found["relprop_stable_bfloat16"] = lambda engine=engine: engine(halves, target=targets)
    if reference is not None:
        theirs = Reference(reference, model, torch.float32)
        found["reference"] = lambda: theirs.explain(images, targets, "transformer_attribution")
    return found


def check(model: Any, images: Tensor, reference: Path | None) -> dict[str, float]:
    """Relative errors of answers to the first image.

    The published rules can be ill-conditioned on a random model, whoever computes them, so what is checked is the
    float64 answer against the authors' code, and the float32 answer of the well-conditioned composite, which also is
    the one that runs in bfloat16.
    """
    image, precise = images[:1], copy.deepcopy(model).double()

    def answer(asked: Any, x: Tensor, composite: str) -> Tensor:
        return relprop.explain(asked, x, target=5, composite=composite).relevance[:, 1:].double()

    def error(found: Tensor, truth: Tensor) -> float:
        return float((found - truth).norm() / truth.norm())

    stable = answer(precise, image.double(), "chefer_stable")
    errors = {"error_stable_float32": error(answer(model, image, "chefer_stable"), stable)}
    if reference is not None:
        theirs = Reference(reference, precise, torch.float64)
        truth = theirs.explain(image.double(), torch.tensor([5]), "transformer_attribution")
        errors["error_float64_to_reference"] = error(answer(precise, image.double(), "chefer"), truth)
    return errors


def measure(name: str, batch: int, rounds: int, reference: Path | None) -> list[dict[str, Any]]:
    """Rows of one model at one batch size."""
    torch.manual_seed(0)
    model: Any = timm.create_model(name, pretrained=False).eval()
    model.norm.eps = 1e-5  # as the authors' final norm has it
    images = torch.randn(batch, 3, 224, 224)
    errors = check(model, images, reference)
    if not all(error < 1e-4 for error in errors.values()):
        raise SystemExit(f"{name}: expected errors below 1e-4, got {errors}; nothing is timed")
    start = time.perf_counter()
    relprop.compile(timm.create_model(name, pretrained=False).eval(), (images,))
    compiled = time.perf_counter() - start
    rows = timed(contenders(model, images, reference), rounds)
    for row in rows:
        if "relprop" in row["contender"]:
            composite = "chefer_stable" if "stable" in row["contender"] else "chefer"
            flops = relprop.compile(model, (images,), composite=composite).program.flops()
            gflop = batch * (flops["forward"] + flops["reverse"]) / 1e9
            row.update(
                gflop=round(gflop, 2),
                counted_floor=round((flops["forward"] + flops["reverse"]) / flops["forward"], 3),
                share_of_rate=round(1e3 * gflop / row["ms_median"] / row["matrix_gflop_per_s"], 3),
            )
        if row["contender"] == "relprop":
            row.update(compile_s=round(compiled, 2), **{key: f"{error:.2e}" for key, error in errors.items()})
    return [{"model": name, "batch": batch, **row} for row in rows]


def measure_lxt(batch: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of torchvision's vit_b_16, by LXT and by the same rules."""
    torch.manual_seed(0)
    theirs = Lxt()
    model = torchvision.models.vit_b_16(weights=None).eval()
    nn.init.normal_(model.heads.head.weight, std=0.02)  # zeros as made, which leaves nothing to explain
    images = torch.randn(batch, 3, 224, 224)
    precise = copy.deepcopy(model).double()
    ours = relprop.explain(precise, images[:1].double(), target=5, method="cp_lrp").relevance
    error = error_to(ours, theirs.explain(precise, images[:1].double(), 5))
    if not error < 1e-4:
        raise SystemExit(f"{_LXT}: expected LXT's relevance within 1e-4, got {error}; nothing is timed")
    runs = passes(model, images)
    for method in ("cp_lrp", "attnlrp"):
        engine = relprop.compile(model, (images,), method=method)
        runs[f"relprop_{method}"] = lambda engine=engine: engine(images, target=5)
    runs["lxt"] = lambda: theirs.explain(model, images, 5)
    rows = timed(runs, rounds)
    for row in rows:
        if row["contender"] == "lxt":
            row["error_float64_to_relprop"] = f"{error:.2e}"
    return [{"model": _LXT, "batch": batch, **row} for row in rows]


def timed(runs: dict[str, Callable[[], Any]], rounds: int) -> list[dict[str, Any]]:
    """A row for every contender, each run once a round, in turn."""
    times = in_turn(runs, rounds)
    return [
        {
            "contender": contender,
            **spread(seconds, times["forward"]),
            "matrix_gflop_per_s": round(matrix_rate(torch.bfloat16 if contender in HALF else torch.float32), 1),
            "rounds": rounds,
        }
        for contender, seconds in times.items()
    ]


def main() -> None:
    """Measure, print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 4))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "speed_cpu.csv")
    options = parser.parse_args()
    rows = []
    asked = [*options.models, *([_LXT] if available() else [])]
    for name in asked:
        for batch in options.batches:
            lxt = name == _LXT
            found = (
                measure_lxt(batch, options.rounds) if lxt else measure(name, batch, options.rounds, options.reference)
            )
            for row in found:
                print(
                    f"{name} batch {batch} {row['contender']:<18} {row['ms_median']:>9} ms  x{row['ratio_to_forward']}"
                )
            rows += found
            columns = dict.fromkeys(column for row in rows for column in row)
            write_rows(options.out, [{column: row.get(column, "") for column in columns} for row in rows])


if __name__ == "__main__":
    main()
