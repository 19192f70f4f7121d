"""What a contender's answer has to be: computed in float64 apart from what is timed, one sample alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import relprop
from benchmarks.peers.cases import TARGET, Case
from benchmarks.peers.packages import EPSILON, STEPS, Answer, last_norm, on_grid
from benchmarks.peers.proofs import Proof, aligned, same
from relprop.compat import gradcam
from relprop.compat import lxt as modified
from relprop.compat import zennit as compat_zennit

Way = Callable[[Case], Tensor]


@dataclass(frozen=True)
class Truth:
    """Attributes:
    ways: from a case in float64 on the CPU to the answer [B, ...]; a later one takes less memory than those before.
    passes: about how many forward passes the first takes.
    tolerances: the largest relative error (L2) of a sample in float32, in bfloat16, and in "medium" precision.
    directions: in place of them at a model's whole depth, the largest 1 - correlation of a sample with its truth, in
        what products the method loses more with random weights than a relative error can tell from a wrong answer:
        single entries and the common factor of all patches, by cancellation, whoever computes it (docs/numerics.md).
        Other samples are at 0.9.
    """

    ways: tuple[Way, ...]
    passes: float
    tolerances: Mapping[str, float]
    directions: Mapping[str, float] = field(default_factory=dict)

    def held(self, check: str, answer: Tensor, truth: Tensor, products: str) -> Proof:
        """An answer at the whole depth against its truth, both [B, ...]. products: a key of the tolerances."""
        if products in self.directions:
            return aligned(f"{check}, 1 - correlation", answer, truth, self.directions[products])
        return same(check, answer, truth, self.tolerances[products])


def plain(case: Case, **settings: Any) -> Tensor:
    """By relprop's plain rules, or by another backend. The relevance of the model's input."""
    engine = relprop.compile(case.model, (case.inputs,), **{"backend": "torch", **settings})
    return engine(case.inputs, target=TARGET).relevance


def of_gradients(case: Case, rules: Any) -> Tensor:
    """Input times gradient under modified gradients, summed over channels. [B, H, W] or [B, N]"""
    with rules(case.model):
        return (case.inputs * gradient(case)).sum(1 if case.images else -1)


def gradient(case: Case) -> Tensor:
    """The target's, by autograd. The shape of the inputs."""
    leaf = case.inputs.clone().requires_grad_()
    case.model(leaf)[:, TARGET].sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def zennit_answer(case: Case, backend: str) -> Answer:
    """EpsilonPlus by relprop. The shape of the inputs."""
    attributor = compat_zennit.Gradient(case.model, compat_zennit.EpsilonPlus(EPSILON), backend=backend)
    classes = case.model(case.inputs[:1]).shape[-1]
    one_hot = torch.eye(classes).to(case.inputs)[[TARGET] * len(case.inputs)]
    return lambda: attributor(case.inputs, one_hot)[1]


def zennit(case: Case, backend: str) -> Tensor:
    """The same, at once."""
    return zennit_answer(case, backend)()


def grad_cam(case: Case) -> Tensor:
    """Grad-CAM by relprop, on the same layer. [B, H, W]"""
    cam = gradcam.GradCAM(case.model, [last_norm(case)], partial(on_grid, case))
    targets = [lambda output: output[TARGET]] * len(case.inputs)
    return torch.from_numpy(cam(case.inputs, targets))


def integrated_gradients(case: Case) -> Tensor:
    """Integrated gradients from zero by Gauss-Legendre quadrature, a step at a time. The shape of the inputs."""
    places, weights = np.polynomial.legendre.leggauss(STEPS)
    total = torch.zeros_like(case.inputs)
    for place, weight in zip((places + 1) / 2, weights / 2, strict=True):
        leaf = (case.inputs * place).requires_grad_()
        total += weight * torch.autograd.grad(case.model(leaf)[:, TARGET].sum(), leaf)[0]
    return total * case.inputs


def _logits(case: Case) -> Tensor:
    with torch.no_grad():
        return case.model(case.inputs)


def _cp_or_attnlrp(case: Case) -> Tensor:
    return of_gradients(case, modified.cp_lrp if case.family == "torchvision" else modified.attnlrp)


def _patches(**settings: Any) -> tuple[Way, ...]:
    return tuple(
        lambda case, backend=backend: plain(case, backend=backend, **settings)[:, 1:] for backend in ("torch", "auto")
    )


_WELL = {"float32": 1e-4, "bfloat16": 0.06, "medium": 0.06}  # conditioned, that is
_ATTNLRP = {"float32": 1e-3, "bfloat16": 0.06, "medium": 0.2}
_ATTNLRP_DEEP = {"bfloat16": 0.1}
TRUTHS: Mapping[str, Truth] = {
    "logits": Truth((_logits,), 1, _WELL),
    "gradient": Truth((gradient,), 4, _WELL),
    "chefer": Truth(
        _patches(),
        10,
        {"float32": 0.01, "bfloat16": 0.5, "medium": 0.2},
        {"float32": 0.1, "bfloat16": 0.4, "medium": 0.4},
    ),
    "chefer_stable": Truth(_patches(composite="chefer_stable"), 6, _WELL),
    "attnlrp": Truth(
        (lambda case: of_gradients(case, modified.attnlrp), lambda case: plain(case, method="attnlrp", backend="auto")),
        4,
        _ATTNLRP,
        _ATTNLRP_DEEP,
    ),
    "cp_lrp": Truth((lambda case: of_gradients(case, modified.cp_lrp),), 4, _ATTNLRP, _ATTNLRP_DEEP),
    "lxt": Truth((_cp_or_attnlrp,), 4, _ATTNLRP, _ATTNLRP_DEEP),
    "zennit": Truth(
        tuple(lambda case, backend=backend: zennit(case, backend) for backend in ("torch", "auto")),
        4,
        {"float32": 1e-3, "bfloat16": 0.5},
        {"float32": 0.05, "bfloat16": 0.2},
    ),
    "grad_cam": Truth((grad_cam,), 4, _WELL),
    "integrated_gradients": Truth((integrated_gradients,), 3 * STEPS, {"float32": 1e-3, "bfloat16": 0.2}),
}
