"""What every family is held to, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import relprop
from relprop.errors import UnsupportedTopologyError
from relprop.explanation import Explanation
from tests.engine.models import relative
from tests.families.catalogue import Family, Inputs

COMPOSITES = ("chefer", "chefer_stable")
# Methods that walk through attention layers, and those that read the input and run on any graph.
WALKS = ("transformer_attribution", "relevance_rollout", "attention_rollout", "generic_attention")
ROWS = ("raw_attention", "last_layer", "attention_gradcam")
AT_INPUT = ("full", "gradient_x_input")


class Subject:
    """One family's model in float64, three samples, and its engines."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.model: nn.Module = family.small().double()
        self.inputs = widened(family.inputs(3))

    def engine(self, method: str, composite: str | None = None) -> relprop.Engine:
        given = {"method": method, "composite": composite, "output": self.family.output}
        return relprop.compile(self.model, (), self.inputs, **given)  # type: ignore[arg-type]

    def explain(self, method: str, composite: str | None = None, samples: slice = slice(None), **options: Any) -> Any:
        inputs = {name: tensor[samples] for name, tensor in self.inputs.items()}
        return self.engine(method, composite)(**inputs, target=self.family.target, **options)


def widened(inputs: Inputs) -> Inputs:
    """Floating-point inputs in float64."""
    return {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}


def check_answer(found: Explanation) -> None:
    """Finite, and every sample says something; Grad-CAM's positive part may be empty."""
    relevance = found.relevance
    assert len(relevance) == 3 and relevance.isfinite().all()
    if found.method != "attention_gradcam":
        assert (relevance.reshape(3, -1).abs().sum(-1) > 0).all()


def check_forward(subject: Subject, logits: Tensor) -> None:
    """The engine's forward pass is the model's."""
    with torch.no_grad():
        output = subject.model(**subject.inputs)
    wanted = subject.family.output
    if isinstance(wanted, str):
        output = getattr(output, wanted)
    assert relative(logits, output) < 1e-12


def check_gradient(subject: Subject) -> None:
    """With the rule `gradient` everywhere, and as gradient x input, the engine gives what autograd gives."""
    (name,) = (n for n, t in subject.inputs.items() if t.is_floating_point())
    leaf = subject.inputs[name].clone().requires_grad_()
    subject.model(**{**subject.inputs, name: leaf})[:, subject.family.target].sum().backward()
    assert leaf.grad is not None
    axis = 1 if leaf.ndim == 4 else -1
    assert relative(subject.explain("full", "gradient").relevance, leaf.grad.sum(axis)) < 1e-11
    assert relative(subject.explain("gradient_x_input").relevance, (leaf * leaf.grad).sum(axis).detach()) < 1e-11


def check_ledger(subject: Subject, method: str, composite: str) -> None:
    """Seed = frontier + absorbed, per sample, step by step and end to end."""
    books = subject.explain(method, composite, ledger=True).ledger
    assert books is not None
    scale = max(1.0, *(float(entry.arriving.abs().max()) for entry in books.entries))
    assert float(books.imbalance.abs().max()) < 1e-11 * scale
    for entry in books.entries:
        assert float(entry.rounding.abs().max()) < 1e-11 * scale, (entry.step, entry.module)


def check_batch(subject: Subject, method: str, composite: str) -> None:
    """A sample's answer is the same alone."""
    together = subject.explain(method, composite).relevance
    alone = subject.explain(method, composite, slice(1, 2)).relevance
    # chefer amplifies the last bits of the forward pass, which a matrix product's shape decides.
    assert relative(alone[0], together[1]) < (1e-6 if composite == "chefer" else 1e-9)


def check_refusal(subject: Subject, method: str) -> None:
    """A method that does not apply says why, and what does."""
    with pytest.raises(UnsupportedTopologyError, match=subject.family.refusal):
        subject.engine(method)
