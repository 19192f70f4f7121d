"""Whole explanations on the device, each beside what it is compared with, in one run per point.

    python -m benchmarks.gpu.end_to_end [POINT...] [--dry-run] [--out FOLDER]

Points: `parity` (answers against float64, see `benchmarks.gpu.parity`), `vit` (ViT-B/16, batch 64), `latency` (batch 1
from a CUDA graph), `tokens` (a ViT of 16,384 tokens), `llama` (a Llama-shaped 1B model, 4,096 tokens), `several`
(targets of one input), `inductor` (passes of `vit` and `llama` through torch.compile, held to float64 first). Each
writes end_to_end_POINT.csv, what matters most first; what `parity` did not find right is not timed. The authors' code
is timed where $REFERENCE is a checkout of it, LXT where it is installed or $LXT is a checkout of it.
"""

from __future__ import annotations

import copy
import functools
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.contenders import (
    Explaining,
    Run,
    attempt,
    backends,
    compiled,
    engine_of,
    forward,
    forward_backward,
    images,
    key_of,
    label_of,
    llama,
    lxt,
    of_embeddings,
    reference,
    token_ids,
    unpatched_after,
    vit,
)
from benchmarks.gpu.machine import Machine, machine_of, told
from benchmarks.gpu.parity import compiled_parity, parity

ATTRIBUTION = "transformer_attribution"
NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


class LargeBatch:
    """ViT-B/16 at batch 64 in bfloat16 and float32, beside the authors' code one image after the other."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.batch, self.base = machine, machine.size(64, 2), vit(machine)
        self.models: dict[torch.dtype, tuple[Any, Tensor]] = {}

    def given(self, dtype: torch.dtype) -> tuple[Any, Tensor]:
        if dtype not in self.models:
            made = images(self.machine, self.batch, dtype=dtype)
            self.models[dtype] = copy.deepcopy(self.base).to(dtype), made
        return self.models[dtype]

    def ours(self, dtype: torch.dtype, backend: str, composite: str, graph: bool, compiled: bool = False) -> None:
        """One row, with what the method needs: five forward passes' products."""
        machine, batch, (model, given) = self.machine, self.batch, self.given(dtype)
        target, made = torch.full((batch,), 5, device=machine.device), []

        def contender() -> Run:
            options = {"backend": backend, "composite": composite, "compile": compiled}
            made.append(engine_of(machine, model, given, graph, **options))
            return Explaining(made[0], (given,), target)

        key = key_of("vit", ATTRIBUTION, composite, backend, graph, dtype, compiled)
        row, label = {"dtype": NAMES[dtype], "batch": batch}, label_of(backend, composite, graph, compiled)
        ms = attempt(machine, label, contender, checked=key, model=model, **row)
        if ms == ms:
            rate = 5 * made[0].program.flops()["forward"] * batch / ms / 1e9
            ceiling = machine.ceilings().get(f"{'bf16' if dtype == torch.bfloat16 else 'tf32'}_tflop_s", float("nan"))
            machine.amend(explanations_s=1e3 * batch / ms, tflop_s=rate, share_of_matrix_rate=rate / ceiling)
            machine.relate(self.ratios)

    def theirs(self, dtype: torch.dtype, backward: bool = False) -> None:
        """The compiled forward pass, or forward and backward."""
        model, given = self.given(dtype)
        run, name = (forward_backward, "forward_backward_compiled") if backward else (forward, "forward_compiled")
        row = {"dtype": NAMES[dtype], "batch": self.batch}
        attempt(self.machine, name, lambda: run(compiled(self.machine, model), given), **row)
        self.machine.relate(self.ratios)

    def authors(self) -> None:
        one = images(self.machine, 1)
        ms = attempt(self.machine, "reference", lambda: reference(self.base, one), dtype="float32", batch=1)
        self.machine.amend(explanations_s=1e3 / ms)
        self.machine.relate(self.ratios)

    def ratios(self, row: dict[str, Any]) -> dict[str, Any]:
        if not row["run"].startswith("relprop") or "ms" not in row:
            return {}
        once = self.machine.column("ms", run="forward_compiled", dtype=row["dtype"])
        theirs = self.machine.column("ms", run="reference")
        return {"over_forward": row["ms"] / once, "over_reference": theirs * row["batch"] / row["ms"]}


def large_batch(machine: Machine) -> None:
    """Rows of `vit`, those first without which nothing can be said."""
    run = LargeBatch(machine)
    half, single, others = torch.bfloat16, torch.float32, backends(machine)[1:]
    run.ours(half, "triton", "chefer", True)
    run.authors()
    run.ours(single, "triton", "chefer", True)
    run.theirs(half)
    for backend in others:
        run.ours(half, backend, "chefer", True)
        run.ours(single, backend, "chefer", True)
    for composite, graph in (("chefer_stable", True), ("chefer", False), ("chefer_stable", False)):
        for backend in backends(machine):
            run.ours(half, backend, composite, graph)
    run.ours(half, "torch", "chefer", False)
    run.theirs(single)
    run.theirs(half, backward=True)
    for backend in backends(machine):
        run.ours(single, backend, "chefer_stable", True)
    run.ours(single, "torch", "chefer", False)
    run.theirs(single, backward=True)


def latency(machine: Machine) -> None:
    """Batch 1: median and 99th percentile of calls that end when the answer is there."""
    for dtype in NAMES:
        for backend in backends(machine):
            row = {"run": f"relprop_{backend}_graph", "dtype": NAMES[dtype], "batch": 1}
            if key_of("vit", ATTRIBUTION, "chefer", backend, True, dtype) not in machine.passed():
                machine.add(**row, failed="no check of it passed")
                continue
            try:
                machine.add(**row, **calls(machine, backend, dtype), failed="")
            except Exception as problem:
                machine.add(**row, failed=told(problem))


def calls(machine: Machine, backend: str, dtype: torch.dtype) -> dict[str, float]:
    """Of one engine."""
    given = images(machine, 1, dtype=dtype)
    engine = engine_of(machine, vit(machine, dtype=dtype), given, backend=backend)
    target = torch.tensor([5], device=machine.device)
    times = []
    for _ in range(machine.size(1100, 2)):
        start = time.perf_counter()
        engine(given, target=target).relevance.cpu()
        times.append(1e3 * (time.perf_counter() - start))
    kept = sorted(times[machine.size(100, 1) :])
    p50, p99 = (kept[int(share * (len(kept) - 1))] for share in (0.5, 0.99))
    return {"ms": p50, "ms_p99": p99, "p99_over_p50": p99 / p50, "calls": len(kept)}


def tokens(machine: Machine) -> None:
    """12 layers of 768 channels over 128 x 128 patches: memory is what matters. The authors' code keeps the maps."""
    side, row = 2048, {"batch": 1, "tokens": machine.size(16384, 4)}
    given = images(machine, 1, side, torch.bfloat16)
    model = vit(machine, side, torch.bfloat16)
    for backend in backends(machine):

        def contender(b: str = backend) -> Run:
            engine = engine_of(machine, model, given, graph=False, backend=b)
            return Explaining(engine, (given,), 5)

        key = key_of("vit", ATTRIBUTION, "chefer", backend, False, torch.bfloat16)
        label = label_of(backend, "chefer", False)
        attempt(machine, label, contender, checked=key, model=model, dtype="bfloat16", **row)
    once = attempt(machine, "forward", lambda: forward(model, given), model=model, dtype="bfloat16", **row)
    machine.relate(lambda r: {"over_forward": r["ms"] / once} if "ms" in r else {})
    attempt(machine, "reference", lambda: reference(vit(machine, side), given.float()), dtype="float32", **row)


class LanguageModel:
    """AttnLRP of one position's logits of a Llama-shaped model."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.model, length = machine, llama(machine), machine.size(4096, 6)
        self.ids, self.options = token_ids(machine, length), {"use_cache": False, "logits_to_keep": 1}
        self.row = {"dtype": "bfloat16", "batch": 1, "tokens": length}

    def ours(self, backend: str, graph: bool, compiled: bool = False) -> None:
        def contender() -> Run:
            made = {"backend": backend, "method": "attnlrp", "output": "logits", "compile": compiled}
            engine = engine_of(self.machine, self.model, ((self.ids,), self.options), graph, **made)
            return Explaining(engine, (self.ids,), (0, 7), self.options)

        key = key_of("llama", "attnlrp", "attnlrp", backend, graph, torch.bfloat16, compiled)
        label = label_of(backend, "attnlrp", graph, compiled)
        attempt(self.machine, label, contender, checked=key, model=self.model, **self.row)


def language_model(machine: Machine) -> None:
    """AttnLRP beside LXT and the compiled forward and backward passes, all on one model."""
    run = LanguageModel(machine)
    model, ids, options, row = run.model, run.ids, run.options, run.row

    def ratios(row: dict[str, Any]) -> dict[str, Any]:
        fastest = min((r["ms"] for r in machine.rows if r["run"].startswith("relprop") and "ms" in r), default=None)
        if "ms" not in row or fastest is None:
            return {}
        once = machine.column("ms", run="forward_compiled")
        return {"over_forward": row["ms"] / once, "over_relprop": row["ms"] / fastest}

    for backend in backends(machine):
        run.ours(backend, True)
    with unpatched_after("transformers.models.llama.modeling_llama"):
        attempt(machine, "lxt", lambda: lxt(model, ids), model=model, **row)
    attempt(machine, "forward_compiled", lambda: forward(compiled(machine, model), ids, **options), model=model, **row)
    machine.relate(ratios)
    for backend in backends(machine):
        run.ours(backend, False)
    machine.relate(ratios)
    backward = "forward_backward_compiled"
    attempt(machine, backward, lambda: of_embeddings(compiled(machine, model), model, ids), model=model, **row)
    machine.relate(ratios)


def several(machine: Machine) -> None:
    """What each further target of one input costs, in forward passes."""
    batch = machine.size(16, 1)
    model, given = vit(machine, dtype=torch.bfloat16), images(machine, batch, dtype=torch.bfloat16)
    fast = compiled(machine, model)
    once = attempt(machine, "forward_compiled", lambda: forward(fast, given), batch=batch, dtype="bfloat16")
    for method, composite in ((ATTRIBUTION, "chefer"), ("attnlrp", "attnlrp")):
        for backend in backends(machine):
            key, first = key_of("vit", method, composite, backend, True, torch.bfloat16), float("nan")
            engine = functools.partial(engine_of, machine, model, given, method=method, backend=backend)
            made = functools.cache(engine)
            for targets in (1, 2, 4)[: machine.size(3, 2)]:
                index = torch.arange(targets, device=machine.device).expand(batch, targets)
                row = {"batch": batch, "dtype": "bfloat16", "targets": targets}

                def contender(m: Run = made, i: Tensor = index) -> Run:
                    return functools.partial(m(), given, target=i)

                ms = attempt(machine, f"relprop_{backend}_{method}", contender, checked=key, **row)
                first = ms if targets == 1 else first
                if targets > 1:
                    machine.amend(forwards_per_target=(ms - first) / (targets - 1) / once)


def inductor(machine: Machine) -> bool:
    """What torch.compile makes of the element-wise rest: a check, a ViT's and a Llama's row, beside their own without.

    What compiling costs is in no row.
    """
    right = compiled_parity(machine)
    LargeBatch(machine).ours(torch.bfloat16, "triton", "chefer_stable", True, compiled=True)
    machine.amend(over_not_compiled=_over(machine, "vit", label_of("triton", "chefer_stable", True)))
    LanguageModel(machine).ours("triton", True, compiled=True)
    machine.amend(over_not_compiled=_over(machine, "llama", label_of("triton", "attnlrp", True)))
    return right


def _over(machine: Machine, point: str, run: str) -> float:
    """The last row's time over that of a row of an earlier point; NaN where either has none."""
    found = (row for row in machine.read(f"end_to_end_{point}") if row["run"] == run and row["dtype"] == "bfloat16")
    return float(machine.rows[-1].get("ms", "nan")) / float(next(found, {}).get("ms") or "nan")


POINTS: dict[str, Callable[[Machine], bool | None]] = {
    "parity": parity,
    "vit": large_batch,
    "latency": latency,
    "tokens": tokens,
    "llama": language_model,
    "several": several,
    "inductor": inductor,
}


def main(machine: Machine) -> int:
    """The rows of every point asked for, all of them where none is; 1 where a relprop row has no time or is wrong."""
    status = 0
    for name in machine.points or POINTS:
        machine.begin(f"end_to_end_{name}")
        wrong = POINTS[name](machine) is False
        if wrong:
            print(f"{name}: expected errors within bounds, got those above")
        unmade = [row["run"] for row in machine.rows if row["run"].startswith("relprop") and row.get("failed")]
        if unmade:
            print(f"{name}: no time for {', '.join(unmade)}")
        if wrong or unmade:
            status = 1
        gc.collect()
    return status


if __name__ == "__main__":
    raise SystemExit(main(machine_of()))
