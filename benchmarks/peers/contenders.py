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
from benchmarks.peers import packages
from benchmarks.peers.cases import TARGET, Case
from benchmarks.peers.packages import STEPS, TOGETHER, Answer, CannotExplain
from benchmarks.peers.proofs import ROUNDED, Proof, same
from relprop.compat import lxt as modified
from relprop.compat import zennit as compat_zennit
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
    package: whose version stands in its rows.
    note: how it is run.
    """

    make: Make
    prove: Prove
    passes: float
    package: str = ""
    note: str = ""


def _engine(case: Case, options: Options, **settings: Any) -> Any:
    if settings.get("precision") == "medium" and options.device == "cpu" and not native_bfloat16():
        raise CannotExplain("this CPU has no bfloat16 products")
    backend = "triton" if options.device == "cuda" else "auto"
    return relprop.compile(case.model, (case.inputs,), **{"backend": backend, **settings})


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


def _ours_zennit(case: Case, options: Options, backend: str | None = None) -> Answer:
    chosen = backend or ("triton" if options.device == "cuda" else "auto")
    attributor = compat_zennit.Gradient(case.model, compat_zennit.EpsilonPlus(packages.EPSILON), backend=chosen)
    classes = case.model(case.inputs[:1]).shape[-1]
    one_hot = torch.eye(classes).to(case.inputs)[[TARGET] * len(case.inputs)]
    return lambda: attributor(case.inputs, one_hot)[1]


def _plain(case: Case, **settings: Any) -> Tensor:
    return relprop.compile(case.model, (case.inputs,), backend="torch", **settings)(
        case.inputs, target=TARGET
    ).relevance


def _compared(check: str, truth: Tensor, make: Make, cut: Case, low: Case, options: Options) -> list[Proof]:
    """The answer in float64, and in the dtype that is timed."""
    dtype = low.point.dtype
    medium = isinstance(make, partial) and make.keywords.get("precision") == "medium"
    return [
        same(f"{check}, float64", make(cut, options)(), truth),
        same(f"{check}, {dtype}", make(low, options)(), truth, ROUNDED["bfloat16" if medium else dtype]),
    ]


def _prove_chefer(make: Make, cut: Case, low: Case, options: Options) -> list[Proof]:
    if options.reference is not None and cut.family in ("timm", "bert"):
        return _compared("authors' code", packages.authors(cut, options.reference)(), make, cut, low, options)
    return _compared("plain rules", _plain(cut)[:, 1:], make, cut, low, options)


def _prove_stable(make: Make, cut: Case, low: Case, options: Options) -> list[Proof]:
    return _compared("plain rules", _plain(cut, composite="chefer_stable")[:, 1:], make, cut, low, options)


def _prove_authors(make: Make, cut: Case, low: Case, options: Options) -> list[Proof]:
    return _compared("relprop", _plain(cut)[:, 1:].cpu(), make, cut, low, options)


def _prove_modified(rules: Any, make: Make, cut: Case, low: Case, options: Options) -> list[Proof]:
    leaf = cut.inputs.clone().requires_grad_()
    with rules(cut.model):
        cut.model(leaf)[:, TARGET].sum().backward()
    assert leaf.grad is not None
    truth = (leaf * leaf.grad).detach().sum(1 if cut.images else -1)
    return _compared("modified gradients", truth, make, cut, low, options)


def _prove_lxt(make: Make, cut: Case, low: Case, options: Options) -> list[Proof]:
    truth = _plain(cut, method="cp_lrp" if cut.family == "torchvision" else "attnlrp")
    return _compared("relprop", truth, make, cut, low, options)


def _prove_ours_zennit(make: Make, cut: Case, low: Case, options: Options) -> list[Proof]:
    try:
        return _compared("zennit", packages.zennit(cut)(), make, cut, low, options)
    except CannotExplain:
        return _compared("plain rules", _ours_zennit(cut, options, "torch")(), make, cut, low, options)


def _prove_zennit(make: Make, cut: Case, low: Case, options: Options) -> list[Proof]:
    return _compared("relprop", _ours_zennit(cut, options, "torch")(), make, cut, low, options)


def _prove_sampled(make: Make, cut: Case, low: Case, options: Options) -> list[Proof]:
    return packages.prove_integrated_gradients(lambda case: make(case, options), cut, low)


def _prove_forward(make: Make, cut: Case, low: Case, options: Options) -> list[Proof]:
    return [same(low.point.dtype, make(low, options)(), make(cut, options)(), ROUNDED[low.point.dtype])]


def _forward(case: Case, options: Options) -> Answer:
    def run() -> Tensor:
        with torch.no_grad():
            return case.model(case.inputs)

    return run


def _forward_backward(case: Case, options: Options) -> Answer:
    def run() -> Tensor:
        leaf = case.inputs.clone().requires_grad_()
        case.model(leaf)[:, TARGET].sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    return run


def _prove_gradient(make: Make, cut: Case, low: Case, options: Options) -> list[Proof]:
    """Against a central difference along a random direction."""
    along = torch.randn(cut.inputs.shape, generator=torch.Generator().manual_seed(0)).to(cut.inputs)
    gradient, step = make(cut, options)(), 1e-5
    with torch.no_grad():
        ahead, behind = (cut.model(cut.inputs + sign * step * along)[:, TARGET] for sign in (1, -1))
    slope = (gradient * along).flatten(1).sum(1, keepdim=True)
    return [
        same("central difference", slope, (ahead - behind)[:, None] / (2 * step), 1e-2),
        same(low.point.dtype, make(low, options)(), gradient, ROUNDED[low.point.dtype]),
    ]


def _theirs(make: Callable[[Case], Answer]) -> Make:
    return lambda case, options: make(case)


_PLUS = f"EpsilonPlus({packages.EPSILON})"
_IG = f"integrated gradients, {STEPS} steps"
CONTENDERS: Mapping[str, Contender] = {
    "forward": Contender(_forward, _prove_forward, 1, "torch"),
    "forward_backward": Contender(_forward_backward, _prove_gradient, 3, "torch"),
    "relprop": Contender(_ours_chefer, _prove_chefer, 5, "relprop", "transformer_attribution"),
    "relprop_medium": Contender(
        partial(_ours_chefer, precision="medium"), _prove_chefer, 4, "relprop", "transformer_attribution, medium"
    ),
    "relprop_stable": Contender(
        partial(_ours_chefer, composite="chefer_stable"), _prove_stable, 5, "relprop", "chefer_stable"
    ),
    "relprop_stable_medium": Contender(
        partial(_ours_chefer, composite="chefer_stable", precision="medium"),
        _prove_stable,
        4,
        "relprop",
        "chefer_stable, medium",
    ),
    "authors": Contender(
        lambda case, options: packages.authors(case, options.reference),
        _prove_authors,
        13,
        "authors",
        "transformer_attribution, one sample after the other",
    ),
    "relprop_attnlrp": Contender(_ours_attnlrp, partial(_prove_modified, modified.attnlrp), 3, "relprop", "attnlrp"),
    "relprop_attnlrp_medium": Contender(
        partial(_ours_attnlrp, precision="medium"),
        partial(_prove_modified, modified.attnlrp),
        3,
        "relprop",
        "attnlrp, medium",
    ),
    "relprop_cp_lrp": Contender(_ours_cp_lrp, partial(_prove_modified, modified.cp_lrp), 3, "relprop", "cp_lrp"),
    "lxt": Contender(_theirs(packages.lxt), _prove_lxt, 4, "lxt", "AttnLRP; CP-LRP on torchvision's"),
    "relprop_zennit": Contender(_ours_zennit, _prove_ours_zennit, 6, "relprop", f"{_PLUS} of compat.zennit"),
    "zennit": Contender(_theirs(packages.zennit), _prove_zennit, 6, "zennit", _PLUS),
    "grad_cam": Contender(
        _theirs(packages.grad_cam),
        lambda make, cut, low, options: packages.prove_grad_cam(low),
        3,
        "grad-cam",
        "last block's first norm",
    ),
    "captum_gradient_shap": Contender(
        _theirs(packages.gradient_shap),
        lambda make, cut, low, options: packages.prove_gradient_shap(lambda case: make(case, options), cut),
        15,
        "captum",
        "5 samples",
    ),
    "relprop_ig": Contender(_ours_sampled, _prove_sampled, 3 * STEPS, "relprop", _IG),
    "captum_ig": Contender(
        _theirs(packages.integrated_gradients),
        _prove_sampled,
        3 * STEPS,
        "captum",
        _IG,
    ),
    "captum_lime": Contender(
        _theirs(packages.lime),
        lambda make, cut, low, options: packages.prove_lime(cut),
        50,
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
