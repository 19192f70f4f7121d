"""Whole explanations on the device, each beside what it is compared with, in one run per point.

    python -m benchmarks.gpu.end_to_end [POINT...] [--dry-run] [--out FOLDER]

Points: `parity` (float32 and bfloat16 answers against float64), `vit` (ViT-B/16, batch 64), `latency` (batch 1 from a
CUDA graph), `tokens` (a ViT of 16,384 tokens), `llama` (a Llama-shaped 1B model, 4,096 tokens), `several` (targets of
one input). Each writes end_to_end_POINT.csv. The authors' code is timed where $REFERENCE is a checkout of it, LXT where
it is installed or $LXT is a checkout of it.
"""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

import relprop
from benchmarks.gpu.machine import Machine, machine_of
from benchmarks.numerics.reference import Reference
from relprop import native_cuda

Run = Callable[[], Any]
LARGEST_ERROR = 1e-3
COMPOSITES = ("chefer", "chefer_stable")


def vit(machine: Machine, side: int = 224, dtype: torch.dtype = torch.float32) -> Any:
    """ViT-B/16 with random weights; a tiny one in a dry run."""
    torch.manual_seed(0)
    tiny = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 10}
    model = timm.models.VisionTransformer(**(tiny if machine.dry else {"img_size": side})).eval()
    model.norm.eps = 1e-5  # as the reference's final norm has it
    return model.to(machine.device, dtype)


def images(machine: Machine, batch: int, side: int = 224, dtype: torch.dtype = torch.float32) -> Tensor:
    side = machine.size(side, 32)
    return machine.randn(batch, 3, side, side, dtype=dtype)


def compiled(machine: Machine, model: Any) -> Any:
    """Through torch.compile; as it is in a dry run."""
    return model if machine.dry else torch.compile(model)


def engine_of(machine: Machine, model: Any, example: Any, graph: bool = True, **options: Any) -> Any:
    """An engine on Triton kernels, recorded where there is a device to record on."""
    options = {"backend": "triton", "cuda_graph": graph and not machine.dry, **options}
    args, kwargs = example if isinstance(example, tuple) else ((example,), {})
    return relprop.compile(model, args, kwargs, **options)


def backends(machine: Machine) -> list[str]:
    """Those whose kernels run on the device."""
    cuda = native_cuda.available()[0] and native_cuda.device_type() == machine.device.type
    return ["triton", "cuda"] if cuda else ["triton"]


def forward(model: Any, *args: Any, **kwargs: Any) -> Run:
    def run() -> Any:
        with torch.no_grad():
            return model(*args, **kwargs)

    return run


def forward_backward(model: Any, given: Tensor) -> Run:
    def run() -> None:
        leaf = given.clone().requires_grad_()
        model(leaf)[:, 5].sum().backward()

    return run


def attempt(machine: Machine, name: str, run: Callable[[], Run], **row: Any) -> float:
    """Time one contender; what fails is a row of its own and stops nothing. Milliseconds, NaN where it failed."""
    try:
        found = machine.time(run())
    except Exception as problem:
        machine.add(run=name, **row, failed=f"{type(problem).__name__}: {problem}"[:300])
        if not machine.dry:
            torch.cuda.empty_cache()  # what did not fit must not take the next one's memory
        return float("nan")
    machine.add(run=name, **row, **found)
    return found["ms"]


def parity(machine: Machine) -> bool:
    """Errors against the rules in float64; for bfloat16 the measure is what plain rules lose with bfloat16 streams."""
    given = images(machine, 2).double()
    exact = vit(machine).double()

    def answer(model: Any, backend: str, dtype: torch.dtype, streams: torch.dtype | None = None) -> Tensor:
        engine = relprop.compile(model, (given.to(dtype),), backend=backend, composite="chefer_stable")
        engine._dtype = streams or engine._dtype
        return engine(given.to(dtype), target=5).relevance[:, 1:].double()

    truth = answer(exact, "torch", torch.float64)
    errors: dict[tuple[str, str], float] = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        for label, backend, streams in (
            ("torch", "torch", None),
            ("torch_own_streams", "torch", dtype),
            ("triton", "triton", None),
        ):
            found = answer(copy.deepcopy(exact).to(dtype), backend, dtype, streams)
            errors[name, label] = float((found - truth).norm() / truth.norm())
            machine.add(run=f"error_{label}", dtype=name, batch=2, error=errors[name, label])
    return (
        errors["float32", "triton"] < LARGEST_ERROR
        and errors["bfloat16", "triton"] <= 2 * errors["bfloat16", "torch_own_streams"]
    )


def large_batch(machine: Machine) -> None:
    """ViT-B/16 at batch 64 in bfloat16 and float32, and the authors' code one image after the other."""
    batch, base = machine.size(64, 2), vit(machine)
    theirs = attempt(machine, "reference", lambda: reference(base, images(machine, 1)), dtype="float32", batch=1)
    machine.amend(explanations_s=1e3 / theirs)
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        model, given = copy.deepcopy(base).to(dtype), images(machine, batch, dtype=dtype)
        target = torch.full((batch,), 5, device=machine.device)
        fast, row = compiled(machine, model), {"dtype": name, "batch": batch}
        once = attempt(machine, "forward_compiled", lambda f=fast, g=given: forward(f, g), **row)
        attempt(machine, "forward_backward_compiled", lambda f=fast, g=given: forward_backward(f, g), **row)
        contenders = [(b, graph, c) for b in backends(machine) for graph in (True, False) for c in COMPOSITES]
        for backend, graph, composite in [*contenders, ("torch", False, "chefer")]:
            label = f"relprop_{backend}_{composite}{'_graph' if graph else ''}"
            options = {"backend": backend, "composite": composite}
            engine: list[Any] = []

            def contender(
                m: Any = model,
                g: Tensor = given,
                t: Tensor = target,
                e: list[Any] = engine,
                r: bool = graph,
                o: Any = options,
            ) -> Run:
                e.append(engine_of(machine, m, g, r, **o))
                return lambda: e[0](g, target=t)

            ms = attempt(machine, label, contender, **row)
            if not engine:
                continue
            rate = 5 * engine[0].program.flops()["forward"] * batch / ms / 1e9  # what the method needs is five passes
            ceiling = machine.ceilings().get(f"{'bf16' if name == 'bfloat16' else 'tf32'}_tflop_s", float("nan"))
            machine.amend(
                explanations_s=1e3 * batch / ms,
                over_forward=ms / once,
                over_reference=theirs * batch / ms,
                tflop_s=rate,
                share_of_matrix_rate=rate / ceiling,
            )


def reference(base: Any, given: Tensor) -> Run:
    """The authors' code as it is, from the checkout at $REFERENCE."""
    checkout = os.environ.get("REFERENCE")
    if not checkout:
        raise FileNotFoundError("REFERENCE: expected a checkout of the authors' code, got none")
    theirs = Reference(Path(checkout), copy.deepcopy(base).cpu(), torch.float32)
    if given.device.type == "cpu":
        return lambda: theirs.explain(given, torch.tensor([5]), "transformer_attribution")
    theirs.generator.model.to(given.device)
    return lambda: theirs.generator.generate_LRP(given.clone().requires_grad_(), 5, method="transformer_attribution")


def latency(machine: Machine) -> None:
    """Batch 1: median and 99th percentile of calls that end when the answer is there."""
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        given = images(machine, 1, dtype=dtype)
        engine = engine_of(machine, vit(machine, dtype=dtype), given)
        target = torch.tensor([5], device=machine.device)
        times = []
        for _ in range(machine.size(1100, 3)):
            start = time.perf_counter()
            engine(given, target=target).relevance.cpu()
            times.append(1e3 * (time.perf_counter() - start))
        kept = sorted(times[machine.size(100, 1) :])
        p50, p99 = (kept[int(share * (len(kept) - 1))] for share in (0.5, 0.99))
        row = {"dtype": name, "batch": 1, "ms": p50, "ms_p99": p99, "p99_over_p50": p99 / p50, "calls": len(kept)}
        machine.add(run="relprop_triton_graph", **row)


def tokens(machine: Machine) -> None:
    """12 layers of 768 channels over 128 x 128 patches: memory is what matters. The authors' code keeps the maps."""
    side, row = 2048, {"batch": 1, "tokens": machine.size(16384, 4)}
    given = images(machine, 1, side, torch.bfloat16)
    model = vit(machine, side, torch.bfloat16)
    once = attempt(machine, "forward", lambda: forward(model, given), dtype="bfloat16", **row)
    for backend in backends(machine):

        def contender(b: str = backend) -> Run:
            engine = engine_of(machine, model, given, graph=False, backend=b)
            return lambda: engine(given, target=5)

        ms = attempt(machine, f"relprop_{backend}_chefer", contender, dtype="bfloat16", **row)
        machine.amend(over_forward=ms / once)
    attempt(machine, "reference", lambda: reference(vit(machine, side), given.float()), dtype="float32", **row)


def llama_of(machine: Machine) -> Any:
    """A Llama-shaped model of 1.2 billion weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32)
    if machine.dry:
        sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    config = LlamaConfig(
        **sizes,
        num_key_value_heads=machine.size(8, 2),
        vocab_size=machine.size(128256, 50),
        head_dim=machine.size(64, 16),
    )
    torch.manual_seed(0)
    with torch.device(machine.device):
        return LlamaForCausalLM(config).eval().to(torch.bfloat16)


def llama(machine: Machine) -> None:
    """AttnLRP of one position's logits, beside the compiled forward and backward passes and LXT."""
    model, length = llama_of(machine), machine.size(4096, 6)
    ids = torch.randint(0, machine.size(128256, 50), (1, length)).to(machine.device)
    options = {"use_cache": False, "logits_to_keep": 1}
    row = {"dtype": "bfloat16", "batch": 1, "tokens": length}
    fast, best = compiled(machine, model), float("nan")
    once = attempt(machine, "forward_compiled", lambda: forward(fast, ids, **options), **row)
    attempt(machine, "forward_backward_compiled", lambda: of_embeddings(fast, model, ids), **row)
    for backend in backends(machine):
        for graph in (True, False):

            def contender(b: str = backend, g: bool = graph) -> Run:
                engine = engine_of(machine, model, ((ids,), options), g, backend=b, method="attnlrp", output="logits")
                return lambda: engine(ids, target=(0, 7), **options)

            ms = attempt(machine, f"relprop_{backend}_attnlrp{'_graph' if graph else ''}", contender, **row)
            machine.amend(over_forward=ms / once)
            best = min(best, ms) if best == best else ms
    theirs = attempt(machine, "lxt", lambda: lxt(model, ids), **row)
    machine.amend(over_relprop=theirs / best)


def of_embeddings(model: Any, plain: Any, ids: Tensor) -> Run:
    """One logit's gradient at the embeddings."""

    def run() -> Tensor:
        embedded = plain.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embedded, use_cache=False, logits_to_keep=1).logits[0, -1, 7].backward()
        assert embedded.grad is not None
        return (embedded * embedded.grad).float().sum(-1)

    return run


def lxt(model: Any, ids: Tensor) -> Run:
    """AttnLRP by LXT's patched modules ($LXT is a checkout). They are patched for good: nothing may run after it."""
    if os.environ.get("LXT"):
        sys.path.insert(0, os.environ["LXT"])
    from lxt.efficient import monkey_patch
    from transformers.models.llama import modeling_llama

    monkey_patch(modeling_llama)
    theirs = copy.deepcopy(model)
    return of_embeddings(theirs, theirs, ids)


def several(machine: Machine) -> None:
    """What each further target of one input costs, in forward passes."""
    batch = machine.size(16, 1)
    model, given = vit(machine, dtype=torch.bfloat16), images(machine, batch, dtype=torch.bfloat16)
    fast = compiled(machine, model)
    once = attempt(machine, "forward_compiled", lambda: forward(fast, given), batch=batch, dtype="bfloat16")
    for method in ("transformer_attribution", "attnlrp"):
        engine, first = engine_of(machine, model, given, method=method), float("nan")
        for targets in (1, 2, 4):
            index = torch.arange(targets, device=machine.device).expand(batch, targets)
            row = {"batch": batch, "dtype": "bfloat16", "targets": targets}
            ms = attempt(
                machine, f"relprop_triton_{method}", lambda e=engine, i=index: lambda: e(given, target=i), **row
            )
            first = ms if targets == 1 else first
            if targets > 1:
                machine.amend(forwards_per_target=(ms - first) / (targets - 1) / once)


POINTS: dict[str, Callable[[Machine], bool | None]] = {
    "parity": parity,
    "vit": large_batch,
    "latency": latency,
    "tokens": tokens,
    "llama": llama,
    "several": several,
}


def main(machine: Machine) -> int:
    """The rows of every point asked for, all of them where none is."""
    status = 0
    for name in machine.points or POINTS:
        machine.begin(f"end_to_end_{name}")
        wrong = POINTS[name](machine) is False
        if wrong:
            print(f"{name}: expected errors within bounds, got those above")
            status = 1
    return status


if __name__ == "__main__":
    raise SystemExit(main(machine_of()))
