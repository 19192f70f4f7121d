"""Who takes part in the race: what each runs, and the check that comes before its time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import relprop
from benchmarks.peers import packages, truths
from benchmarks.peers.cases import TARGET, Case
from benchmarks.peers.packages import STEPS, TOGETHER, Answer, CannotExplain
from benchmarks.peers.proofs import Proof, same
from benchmarks.peers.truths import plain
from relprop.compat import lxt as modified
from relprop.rules.linear_map import native_bfloat16

Make = Callable[[Case, "Options"], Answer]
Prove = Callable[[Make, Case, Case, "Options"], list[Proof]]


@dataclass(frozen=True)
class Options:
    """Attributes:
    reference: a checkout of the authors' code.
    budget: seconds for one contender's runs of one point.
    memory: GiB that its process may take.
    rounds: at most.
    device: "cpu" or "cuda".
    """

    reference: Path | None = None
    budget: float = 30.0
    memory: float = 5.0
    rounds: int = 7
    device: str = "cpu"


@dataclass(frozen=True)
class Contender:
    """Attributes:
    make: what is timed, returning one answer per sample, [B, ...]; it raises CannotExplain with the reason.
    prove: its checks, on two layers of the model in float64 and in the run's dtype.
    passes: about how many forward passes it takes.
    truth: of `truths.TRUTHS`, what its timed answer is held to; "" for an answer that is drawn at random.
    package: whose version stands in its rows.
    note: how it is run.
    """

    make: Make
    prove: Prove
    passes: float
    truth: str
    package: str = ""
    note: str = ""


def _engine(case: Case, options: Options, **settings: Any) -> Any:
    rounds = settings.get("precision") == "medium" and case.inputs.dtype != torch.float64
    if rounds and case.device == "cpu" and not native_bfloat16():
        raise CannotExplain("this CPU has no bfloat16 products")
    return relprop.compile(case.model, (case.inputs,), **{"backend": _backend(case), **settings})


def _backend(case: Case) -> str:
    return "triton" if case.device == "cuda" else "auto"  # a proof's float64 is on the CPU wherever the run is


def _ours(case: Case, options: Options, **settings: Any) -> Answer:
    engine = _engine(case, options, **settings)
    return lambda: engine(case.inputs, target=TARGET).relevance


def _ours_chefer(case: Case, options: Options, **settings: Any) -> Answer:
    if case.family == "llama":
        raise CannotExplain("a decoder is raced with attnlrp, which LXT has too")
    run = _ours(case, options, **settings)
    return lambda: run()[:, 1:]


def _ours_attnlrp(case: Case, options: Options, **settings: Any) -> Answer:
    return _ours(case, options, **{"method": "attnlrp", **settings})


def _ours_cp_lrp(case: Case, options: Options) -> Answer:
    if case.family != "torchvision":
        raise CannotExplain("raced where LXT has CP-LRP: torchvision's Vision Transformer")
    return _ours(case, options, method="cp_lrp")


def _ours_sampled(case: Case, options: Options) -> Answer:
    chosen = {"steps": STEPS, "batch": max(1, TOGETHER // len(case.inputs)), "channels": "kept"}
    return _ours(case, options, method="integrated_gradients", method_options=chosen)


def _ours_zennit(case: Case, options: Options) -> Answer:
    return truths.zennit_answer(case, _backend(case))


def products(make: Make, dtype: str) -> str:
    """What a contender rounds to: the run's dtype, or "medium" where that alone is coarser than float32."""
    medium = isinstance(make, partial) and make.keywords.get("precision") == "medium"
    return "medium" if medium and dtype == "float32" else dtype


def _rounding(name: str, make: Make, dtype: str) -> float:
    return truths.TRUTHS[name].tolerances[products(make, dtype)]


def _compared(check: str, name: str, truth: Tensor, make: Make, cut: Case, low: Case, options: Options) -> list[Proof]:
    """The answer in float64, and in the dtype that is timed, which may lose what `TRUTHS` says."""
    dtype = low.point.dtype
    return [
        same(f"{check}, float64", make(cut, options)(), truth),
        same(f"{check}, {dtype}", make(low, options)(), truth, _rounding(name, make, dtype)),
    ]


def _prove_chefer(make: Make, cut: Case, low: Case, options: Options) -> list[Proof]:
    if options.reference is not None and cut.family in ("timm", "bert"):
        return _compared("authors' code", "chefer", packages.authors(cut, options.reference)(), make, cut, low, options)
    return _compared("plain rules", "chefer", plain(cut)[:, 1:], make, cut, low, options)


def _prove_stable(make: Make, cut: Case, low: Case, options: Options) -> list[Proof]:
    return _compared(
        "plain rules", "chefer_stable", plain(cut, composite="chefer_stable")[:, 1:], make, cut, low, options
    )


def _prove_authors(make: Make, cut: Case, low: Case, options: Options) -> list[Proof]:
    return _compared("relprop", "chefer", plain(cut)[:, 1:].cpu(), make, cut, low, options)


def _prove_modified(rules: Any, make: Make, cut: Case, low: Case, options: Options) -> list[Proof]:
    return _compared("modified gradients", "attnlrp", truths.of_gradients(cut, rules), make, cut, low, options)


def _prove_lxt(make: Make, cut: Case, low: Case, options: Options) -> list[Proof]:
    truth = plain(cut, method="cp_lrp" if cut.family == "torchvision" else "attnlrp")
    return _compared("relprop", "lxt", truth, make, cut, low, options)


def _prove_ours_zennit(make: Make, cut: Case, low: Case, options: Options) -> list[Proof]:
    try:
        return _compared("zennit", "zennit", packages.zennit(cut)(), make, cut, low, options)
    except CannotExplain:
        return _compared("plain rules", "zennit", truths.zennit(cut, "torch"), make, cut, low, options)


def _prove_zennit(make: Make, cut: Case, low: Case, options: Options) -> list[Proof]:
    return _compared("relprop", "zennit", truths.zennit(cut, "torch"), make, cut, low, options)


def _prove_grad_cam(make: Make, cut: Case, low: Case, options: Options) -> list[Proof]:
    return _compared("relprop", "grad_cam", truths.grad_cam(cut), make, cut, low, options)


def _prove_sampled(make: Make, cut: Case, low: Case, options: Options) -> list[Proof]:
    tolerance = _rounding("integrated_gradients", make, low.point.dtype)
    return packages.prove_integrated_gradients(lambda case: make(case, options), cut, low, tolerance)


def _prove_forward(make: Make, cut: Case, low: Case, options: Options) -> list[Proof]:
    return [
        same(low.point.dtype, make(low, options)(), make(cut, options)(), _rounding("logits", make, low.point.dtype))
    ]


def _forward(case: Case, options: Options) -> Answer:
    def run() -> Tensor:
        with torch.no_grad():
            return case.model(case.inputs)

    return run


def _forward_backward(case: Case, options: Options) -> Answer:
    return lambda: truths.gradient(case)


def _prove_gradient(make: Make, cut: Case, low: Case, options: Options) -> list[Proof]:
    """Against a central difference along a random direction."""
    along = torch.randn(cut.inputs.shape, generator=torch.Generator().manual_seed(0)).to(cut.inputs)
    gradient, step = make(cut, options)(), 1e-5
    with torch.no_grad():
        ahead, behind = (cut.model(cut.inputs + sign * step * along)[:, TARGET] for sign in (1, -1))
    slope = (gradient * along).flatten(1).sum(1, keepdim=True)
    return [
        same("central difference", slope, (ahead - behind)[:, None] / (2 * step), 1e-2),
        same(low.point.dtype, make(low, options)(), gradient, _rounding("gradient", make, low.point.dtype)),
    ]


def _theirs(make: Callable[[Case], Answer]) -> Make:
    return lambda case, options: make(case)


_PLUS = f"EpsilonPlus({packages.EPSILON})"
_IG = f"integrated gradients, {STEPS} steps"
CONTENDERS: Mapping[str, Contender] = {
    "forward": Contender(_forward, _prove_forward, 1, "logits", "torch"),
    "forward_backward": Contender(_forward_backward, _prove_gradient, 3, "gradient", "torch"),
    "relprop": Contender(_ours_chefer, _prove_chefer, 5, "chefer", "relprop", "transformer_attribution"),
    "relprop_medium": Contender(
        partial(_ours_chefer, precision="medium"),
        _prove_chefer,
        4,
        "chefer",
        "relprop",
        "transformer_attribution, medium",
    ),
    "relprop_stable": Contender(
        partial(_ours_chefer, composite="chefer_stable"), _prove_stable, 5, "chefer_stable", "relprop", "chefer_stable"
    ),
    "relprop_stable_medium": Contender(
        partial(_ours_chefer, composite="chefer_stable", precision="medium"),
        _prove_stable,
        4,
        "chefer_stable",
        "relprop",
        "chefer_stable, medium",
    ),
    "authors": Contender(
        lambda case, options: packages.authors(case, options.reference),
        _prove_authors,
        13,
        "chefer",
        "authors",
        "transformer_attribution, one sample after the other",
    ),
    "relprop_attnlrp": Contender(
        _ours_attnlrp, partial(_prove_modified, modified.attnlrp), 3, "attnlrp", "relprop", "attnlrp"
    ),
    "relprop_attnlrp_medium": Contender(
        partial(_ours_attnlrp, precision="medium"),
        partial(_prove_modified, modified.attnlrp),
        3,
        "attnlrp",
        "relprop",
        "attnlrp, medium",
    ),
    "relprop_cp_lrp": Contender(
        _ours_cp_lrp, partial(_prove_modified, modified.cp_lrp), 3, "cp_lrp", "relprop", "cp_lrp"
    ),
    "lxt": Contender(_theirs(packages.lxt), _prove_lxt, 4, "lxt", "lxt", "AttnLRP; CP-LRP on torchvision's"),
    "relprop_zennit": Contender(_ours_zennit, _prove_ours_zennit, 6, "zennit", "relprop", f"{_PLUS} of compat.zennit"),
    "zennit": Contender(_theirs(packages.zennit), _prove_zennit, 6, "zennit", "zennit", _PLUS),
    "grad_cam": Contender(
        _theirs(packages.grad_cam),
        _prove_grad_cam,
        3,
        "grad_cam",
        "grad-cam",
        "last block's first norm",
    ),
    "captum_gradient_shap": Contender(
        _theirs(packages.gradient_shap),
        lambda make, cut, low, options: packages.prove_gradient_shap(lambda case: make(case, options), cut),
        15,
        "",
        "captum",
        "5 samples",
    ),
    "relprop_ig": Contender(_ours_sampled, _prove_sampled, 3 * STEPS, "integrated_gradients", "relprop", _IG),
    "captum_ig": Contender(
        _theirs(packages.integrated_gradients),
        _prove_sampled,
        3 * STEPS,
        "integrated_gradients",
        "captum",
        _IG,
    ),
    "captum_lime": Contender(
        _theirs(packages.lime),
        lambda make, cut, low, options: packages.prove_lime(lambda case: make(case, options), cut),
        50,
        "",
        "captum",
        f"50 samples, Lasso with alpha {packages.LASSO}",
    ),
}


def version(contender: Contender) -> str:
    """Package and version of a contender, "" where it has none."""
    if contender.package == "authors":
        return f"Transformer-Explainability {packages.COMMIT}"
    if contender.package in ("torch", "relprop"):
        return f"{contender.package} {(torch if contender.package == 'torch' else relprop).__version__}"
    try:
        return packages.version(contender.package)
    except CannotExplain:
        return ""
