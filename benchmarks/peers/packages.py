"""The other packages, driven as their own documentation does. Each function makes what is then timed."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.numerics.lxt import Lxt, LxtText
from benchmarks.numerics.reference import COMMIT, Reference, ReferenceBert
from benchmarks.peers.cases import PATCH, TARGET, Case
from benchmarks.peers.proofs import Proof, centred, complete, same

Answer = Callable[[], Tensor]
STEPS = 50  # Captum's default
TOGETHER = 8  # inputs that its sampling methods put through the model at once
LASSO = 1e-4  # Captum's 0.01 makes every coefficient 0 where random weights' logits hardly change
EPSILON = 0.25  # with zennit's 1e-6 relevance on a Transformer outgrows float32; see docs/dropin/zennit.md
_MODULES = {"zennit": "zennit", "captum": "captum", "lxt": "lxt", "grad-cam": "pytorch_grad_cam"}


class CannotExplain(Exception):
    """A contender has no answer for a case; the message says why."""


def version(package: str) -> str:
    """Name and version, or CannotExplain where it is not installed."""
    if importlib.util.find_spec(_MODULES[package]) is None:
        raise CannotExplain(f"{package} is not installed")
    return f"{package} {importlib.metadata.version(package)}"


@contextmanager
def _imported(whose: str) -> Iterator[None]:
    """A module that an import wants and that is not there is a CannotExplain."""
    try:
        yield
    except ModuleNotFoundError as problem:
        raise CannotExplain(f"{whose} needs {problem.name}, which is not installed") from problem


def authors(case: Case, checkout: Path | None) -> Answer:
    """The authors' code on its own model with the case's weights, one sample after the other. [B, N - 1]"""
    if checkout is None:
        raise CannotExplain("no checkout of the authors' code; name one with --reference")
    targets = torch.full((len(case.inputs),), TARGET)
    with _imported("the authors' code"):
        if case.family == "timm":
            model: Any = case.model
            theirs = Reference(checkout, model, case.inputs.dtype)
            return lambda: theirs.explain(case.inputs, targets, "transformer_attribution")
        if case.family == "bert" and case.ids is not None:
            text, ids = ReferenceBert(checkout, case.model.model), case.ids
            return lambda: text.explain(ids, targets)[:, 1:]
    raise CannotExplain(f"the authors' code ({COMMIT}) has timm's Vision Transformer and BERT alone")


def lxt(case: Case) -> Answer:
    """CP-LRP on torchvision's Vision Transformer, AttnLRP on texts. [B, H, W] or [B, N]"""
    version("zennit")
    if case.family == "torchvision":
        with _imported(version("lxt")):
            vision = Lxt()
        return lambda: vision.explain(case.model, case.inputs, TARGET)
    with _imported(version("lxt")):
        if case.family not in ("bert", "llama"):
            raise CannotExplain("LXT has no patches for timm's classes")
        wrapper: Any = case.model
        model: Any = type(wrapper)(LxtText(case.family).patched(wrapper.model), bool(wrapper.options)).eval()

    def run() -> Tensor:
        leaf = case.inputs.clone().requires_grad_()
        model(leaf)[:, TARGET].sum().backward()
        assert leaf.grad is not None
        return (leaf * leaf.grad).detach().sum(-1)

    return run


def zennit(case: Case) -> Answer:
    """EpsilonPlus, channels apart: below BERT's first LayerNorm their sum is 0. The shape of the inputs."""
    with _imported(version("zennit")):
        attribution, composites = (importlib.import_module(f"zennit.{name}") for name in ("attribution", "composites"))
    if any(isinstance(module, nn.MultiheadAttention) for module in case.model.modules()):
        raise CannotExplain("zennit takes torch.nn.MultiheadAttention for an activation, and its backward hook fails")
    classes = case.model(case.inputs[:1]).shape[-1]
    one_hot = torch.zeros(len(case.inputs), classes).to(case.inputs)
    one_hot[:, TARGET] = 1

    def run() -> Tensor:
        with attribution.Gradient(model=case.model, composite=composites.EpsilonPlus(EPSILON)) as attributor:
            return attributor(case.inputs.clone(), one_hot)[1]

    return run


def _captum() -> Any:
    with _imported(version("captum")):
        return importlib.import_module("captum.attr")


def integrated_gradients(case: Case) -> Answer:
    """Integrated gradients from zero. The shape of the inputs."""
    explainer = _captum().IntegratedGradients(case.model)
    together = max(TOGETHER, len(case.inputs))
    return lambda: explainer.attribute(case.inputs, target=TARGET, n_steps=STEPS, internal_batch_size=together)


def gradient_shap(case: Case) -> Answer:
    """GradientShap from zero, with its default of five samples. The shape of the inputs."""
    explainer = _captum().GradientShap(case.model)
    baselines = torch.zeros_like(case.inputs[:1])
    return lambda: explainer.attribute(case.inputs, baselines, target=TARGET)


def lime(case: Case) -> Answer:
    """LIME over patches or tokens, with its default of fifty samples. The shape of the inputs."""
    if importlib.util.find_spec("sklearn") is None:
        raise CannotExplain("Captum's LIME needs scikit-learn, which is not installed")
    lasso = importlib.import_module("captum._utils.models.linear_model").SkLearnLasso(alpha=LASSO)
    explainer, patches = _captum().Lime(case.model, interpretable_model=lasso), case.patches()
    return lambda: explainer.attribute(
        case.inputs, target=TARGET, feature_mask=patches, perturbations_per_eval=TOGETHER
    )


def grad_cam(case: Case) -> Answer:
    """Grad-CAM on the last block's first norm, as its README does for Vision Transformers. [B, H, W]"""
    with _imported(version("grad-cam")):
        package = importlib.import_module("pytorch_grad_cam")
        target = importlib.import_module("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget(TARGET)
    reshape, layers = partial(on_grid, case), [last_norm(case)]
    if case.inputs.dtype == torch.bfloat16:
        raise CannotExplain("pytorch-grad-cam computes with NumPy, which has no bfloat16")

    def run() -> Tensor:
        with package.GradCAM(model=case.model, target_layers=layers, reshape_transform=reshape) as cam:
            return torch.from_numpy(cam(input_tensor=case.inputs, targets=[target] * len(case.inputs)))

    return run


def last_norm(case: Case) -> nn.Module:
    """The first norm of a Vision Transformer's last block."""
    if not case.images:
        raise CannotExplain("pytorch-grad-cam makes maps of images")
    model: Any = case.model
    return model.blocks[-1].norm1 if case.family == "timm" else model.encoder.layers[-1].ln_1


def on_grid(case: Case, tokens: Tensor) -> Tensor:
    """Tokens of the patches where they are in the image. [B, N, C] -> [B, C, h, w]"""
    rows, columns = (size // PATCH for size in case.inputs.shape[2:])
    return tokens[:, 1:].unflatten(1, (rows, columns)).movedim(-1, 1)


def change(case: Case) -> Tensor:
    """How much the score changed from zero. [B]"""
    with torch.no_grad():
        return (case.model(case.inputs) - case.model(torch.zeros_like(case.inputs)))[:, TARGET]


def prove_integrated_gradients(make: Callable[[Case], Answer], cut: Case, low: Case, tolerance: float) -> list[Proof]:
    """Completeness, and in the run's dtype the same answer up to `tolerance`."""
    exact = make(cut)()
    return [
        complete("completeness", exact, change(cut), 0.02),
        same(low.point.dtype, make(low)(), exact, tolerance),
    ]


class Watched(nn.Module):
    """A model that keeps the inputs at which gradients were asked for. points: [[n, ...], ...]"""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.points = model, []

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.requires_grad:
            self.points.append(inputs.detach())
        return self.model(inputs)


def prove_gradient_shap(make: Callable[[Case], Answer], cut: Case) -> list[Proof]:
    """At the points it drew: the mean of gradient times input, and points anywhere between zero and the input alike.

    With both the answer is complete on average. That average itself tells less: near zero, where a LayerNorm is not
    yet saturated, the score changes most, and few draws are there.
    """
    np.random.seed(0)  # which Captum draws with
    watched = Watched(cut.model)
    run, size = make(replace(cut, model=watched)), cut.inputs.flatten(1).square().sum(1)[:, None]
    found = [run() for _ in range(4)]
    drawn = [points.unflatten(0, (len(cut.inputs), -1)) for points in watched.points]
    places = [(points * cut.inputs[:, None]).flatten(2).sum(2) / size for points in drawn]
    means = []
    for points in drawn:
        leaf = points.flatten(0, 1).requires_grad_()
        cut.model(leaf)[:, TARGET].sum().backward()
        assert leaf.grad is not None
        means.append(leaf.grad.unflatten(0, points.shape[:2]).mean(1) * cut.inputs)
    along = [torch.einsum("bn,b...->bn...", place, cut.inputs) for place in places]
    return [
        same("mean gradient at its points", torch.cat(found), torch.cat(means)),
        same("points on the path", torch.cat(drawn), torch.cat(along)),
        centred("points about the middle, in standard errors", torch.cat(places).flatten() - 0.5),
    ]


class Weighted(nn.Module):
    """A linear function of nine patches or tokens in place of a model: its whole is 1 + ... + 9 for the target."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.groups = [case.patches() == group for group in range(9)]
        self.wholes = [(group * case.inputs).sum() for group in self.groups]
        self.classes = torch.arange(TARGET + 1) / TARGET

    def forward(self, inputs: Tensor) -> Tensor:
        parts = [(group * inputs).flatten(1).sum(1) for group in self.groups]
        total = sum((at + 1) * part / whole for at, (part, whole) in enumerate(zip(parts, self.wholes, strict=True)))
        return torch.as_tensor(total)[:, None] * self.classes


def prove_lime(make: Callable[[Case], Answer], cut: Case) -> list[Proof]:
    """The coefficients of a linear function. Those of the model are drawn at random."""
    torch.manual_seed(0)
    inputs = cut.inputs[:1, :, : 3 * PATCH, : 3 * PATCH] if cut.images else cut.inputs[:1, :9]
    one = replace(cut, inputs=inputs)
    found = make(replace(one, model=Weighted(one)))()
    coefficients = torch.stack([found[(one.patches() == group).expand_as(found)].mean() for group in range(9)])
    return [same("coefficients of a linear function", coefficients[None], torch.arange(1.0, 10.0)[None], 0.05)]
