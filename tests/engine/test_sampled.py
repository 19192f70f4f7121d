"""Integrated gradients and SmoothGrad against their closed forms and a plain loop."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import relprop
from relprop.errors import OptionError
from tests.engine.models import relative, vit

IMAGES = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def gradient(model: nn.Module, x: Tensor, target: int) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(model(leaf)[:, target].sum(), leaf)[0]


class Quadratic(nn.Module):
    """x^T M x of what a linear layer makes of the input, per class."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) ** 2)


def test_closed_form_on_a_quadratic() -> None:
    """Two nodes integrate a linear gradient exactly: the mean gradient is that half way."""
    model, x = Quadratic().double().eval(), torch.randn(4, 6, dtype=torch.float64)
    options: dict[str, Any] = {"steps": 2, "baseline": 0.5}
    found = relprop.explain(model, x, method="integrated_gradients", target=1, method_options=options).relevance
    assert relative(found, (x - 0.5) * gradient(model, (x + 0.5) / 2, 1)) < 1e-10
    difference = model(x)[:, 1] - model(torch.full_like(x, 0.5))[:, 1]
    assert torch.allclose(found.sum(-1), difference.detach())


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_a_loop_over_the_path(batch: int) -> None:
    model = vit(depth=2).double()
    nodes, weights = np.polynomial.legendre.leggauss(7)
    expected = sum(w / 2 * gradient(model, IMAGES * (1 + a) / 2, 3) for a, w in zip(nodes, weights, strict=True))
    found = relprop.explain(
        model, IMAGES, method="integrated_gradients", target=3, method_options={"steps": 7, "batch": batch}
    )
    assert relative(found.relevance, (IMAGES * expected).sum(1)) < 1e-9


def test_completeness_targets_and_one_sample_alone() -> None:
    model = vit(depth=2).double()
    engine = relprop.compile(model, (IMAGES,), method="integrated_gradients", method_options={"steps": 64})
    found = engine(IMAGES, target=[[3, 5], [1, 3]])
    assert found.relevance.shape == (2, 2, 32, 32)
    black = model(torch.zeros_like(IMAGES))
    difference = torch.gather(found.logits - black, 1, torch.tensor([[3, 5], [1, 3]]))
    assert torch.allclose(found.relevance.sum((2, 3)), difference.detach(), rtol=1e-3, atol=1e-4)
    alone = engine(IMAGES[1:], target=3).relevance[0]
    assert relative(alone, found.relevance[1, 1]) < 1e-10
    called = engine(IMAGES, target=lambda logits: logits[:, 3]).relevance
    assert relative(called[0], found.relevance[0, 0]) < 1e-10


@pytest.mark.parametrize("method", ["integrated_gradients", "smoothgrad"])
def test_a_callable_sees_one_point_at_a_time(method: str) -> None:
    """One that holds something of every sample, and one that is not linear."""
    model, wanted = vit(depth=2).double(), torch.tensor([3, 5])
    partner = torch.randn(2, model(IMAGES).shape[-1], dtype=torch.float64)
    for target in (relprop.contrast(wanted, against=0), lambda out: torch.cosine_similarity(out, partner, -1)):
        together, one = (
            relprop.explain(model, IMAGES, method=method, target=target, method_options={"batch": batch}).relevance
            for batch in (5, 1)
        )
        assert relative(together, one) < 1e-10
    engine = relprop.compile(model, (IMAGES,), method=method)
    difference = engine(IMAGES, target=relprop.contrast(wanted, against=0)).relevance
    parts = [engine(IMAGES, target=classes).relevance for classes in (wanted, 0)]
    assert relative(difference, parts[0] - parts[1]) < 1e-10


def test_smoothgrad_is_a_mean_over_noise() -> None:
    model = vit(depth=2).double()
    options: dict[str, Any] = {"samples": 5, "noise": 0.1, "batch": 2, "seed": 7}
    found = relprop.explain(model, IMAGES, method="smoothgrad", target=3, method_options=options).relevance
    spread = 0.1 * (IMAGES.flatten(1).max(1)[0] - IMAGES.flatten(1).min(1)[0])
    draws = [torch.tensor(np.random.default_rng([7, i, 0]).standard_normal((3, 32, 32), np.float32)) for i in range(5)]
    expected = sum(gradient(model, IMAGES + spread[:, None, None, None] * draw, 3) for draw in draws) / 5
    assert relative(found, expected.sum(1)) < 1e-9  # type: ignore[union-attr]
    times = relprop.explain(
        model, IMAGES, method="smoothgrad", target=3, method_options={**options, "times_input": True}
    ).relevance
    assert relative(times, (IMAGES * expected).sum(1)) < 1e-9


def test_token_embeddings_are_the_input() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids).tanh().mean(1))

    torch.manual_seed(0)
    model, ids = Bag().double().eval(), torch.tensor([[1, 2, 3], [4, 4, 0]])
    found = relprop.explain(model, ids, method="integrated_gradients", target=1, method_options={"steps": 40})
    # One weight per channel and token: the integral of tanh' along the line is tanh itself.
    expected = (model.embed(ids).tanh() * model.head.weight[1]).sum(-1) / 3
    assert relative(found.relevance, expected.detach()) < 1e-8


class Pair(nn.Module):
    """Two sequences, and a score that depends on both at once."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.other, self.head = nn.Embedding(9, 4), nn.Linear(6, 4), nn.Linear(4, 3)

    def score(self, words: Tensor, regions: Tensor) -> Tensor:
        return self.head(words.tanh().mean(1) * self.other(regions).sin().mean(1))

    def forward(self, ids: Tensor, regions: Tensor) -> Tensor:
        return self.score(self.embed(ids), regions)

    def gradients(self, words: Tensor, regions: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (words, regions)]
        return torch.autograd.grad(self.score(*leaves)[:, 1].sum(), leaves)


def pair() -> tuple[Pair, Tensor, Tensor]:
    return Pair().double().eval(), torch.randint(9, (3, 5)), torch.randn(3, 2, 6, dtype=torch.float64)


def test_several_inputs_share_a_path() -> None:
    """One straight line through all of them, as one loop over it; together they are complete."""
    model, ids, regions = pair()
    words, options = model.embed(ids).detach(), {"steps": 20, "batch": 3}
    found = relprop.explain(model, ids, regions, method="integrated_gradients", target=1, method_options=options)
    nodes, weights = np.polynomial.legendre.leggauss(20)
    totals = [torch.zeros_like(words), torch.zeros_like(regions)]
    for node, weight in zip(nodes, weights, strict=True):
        share = (1 + node) / 2
        for total, gradient in zip(totals, model.gradients(share * words, share * regions), strict=True):
            total += weight / 2 * gradient
    assert relative(found.relevances["ids"], (totals[0] * words).sum(-1)) < 1e-10
    assert relative(found.relevances["regions"], (totals[1] * regions).sum(-1)) < 1e-10
    black = model.score(torch.zeros_like(words), torch.zeros_like(regions))
    whole = found.relevances["ids"].sum(1) + found.relevances["regions"].sum(1)
    assert torch.allclose(whole, (found.logits - black)[:, 1].detach(), atol=1e-6)


def test_several_inputs_are_noisy_at_once() -> None:
    """Each with noise of its own, in a sequence of the size of its own token's range."""
    model, ids, regions = pair()
    words, options = model.embed(ids).detach(), {"samples": 4, "batch": 3, "noise": 0.2, "seed": 5}
    found = relprop.explain(model, ids, regions, method="smoothgrad", target=1, method_options=options)
    totals = [torch.zeros_like(words), torch.zeros_like(regions)]
    for i in range(4):
        moved = []
        for number, x in enumerate((words, regions)):
            draw = np.random.default_rng([5, i, number]).standard_normal(tuple(x.shape[1:]), np.float32)
            moved.append(x + 0.2 * (x.max(-1)[0] - x.min(-1)[0]).unsqueeze(-1) * torch.tensor(draw))
        for total, gradient in zip(totals, model.gradients(*moved), strict=True):
            total += gradient / 4
    assert relative(found.relevances["ids"], totals[0].sum(-1)) < 1e-10
    assert relative(found.relevances["regions"], totals[1].sum(-1)) < 1e-10


def test_held_inputs_stay() -> None:
    """As if they were constants of the model: the other input's answer alone, from it and its own baseline."""
    model, ids, regions = pair()
    found = relprop.explain(
        model, ids, regions, method="integrated_gradients", target=1, method_options={"steps": 20}, held=("ids",)
    )
    assert list(found.relevances) == ["regions"]
    words = model.embed(ids).detach()
    change = (found.logits - model.score(words, torch.zeros_like(regions)))[:, 1].detach()
    assert torch.allclose(found.relevances["regions"].sum(1), change, atol=1e-6)
    assert torch.equal(found.relevance, found.relevances["regions"])
    for held in (("words",), ("ids", "regions")):
        with pytest.raises(OptionError, match=re.escape("held: expected some arguments of ids, regions, not all, got")):
            relprop.explain(model, ids, regions, method="smoothgrad", held=held)
    with pytest.raises(OptionError, match="held: expected a tuple of names, got 'ids'"):
        relprop.explain(model, ids, regions, method="smoothgrad", held="ids")  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["integrated_gradients", "smoothgrad"])
def test_scores_between_samples(method: str) -> None:
    """Points of several samples share a pass, and no score between them counts."""

    class Similar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text, self.image = nn.Linear(4, 6), nn.Linear(7, 6)

        def forward(self, text: Tensor, image: Tensor) -> Tensor:
            return self.text(text).tanh() @ self.image(image).sin().T

    torch.manual_seed(0)
    model = Similar().double().eval()
    given = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    engine = relprop.compile(model, given, method=method, method_options={"batch": 5})
    together = engine(*given)
    for i in range(3):
        alone = engine(*(t[i : i + 1] for t in given))
        for name, found in alone.relevances.items():
            assert relative(together.relevances[name][i : i + 1], found) < 1e-10


def test_wrong_options() -> None:
    for options, text in (({"steps": 0}, "steps: expected an int from 1, got 0"), ({"batch": 1.5}, "batch: expected")):
        with pytest.raises(OptionError, match=text):
            relprop.explain(vit(), IMAGES.float(), method="integrated_gradients", method_options=options)
    with pytest.raises(OptionError, match="seed: expected an int from 0, got -1"):
        relprop.explain(vit(), IMAGES.float(), method="smoothgrad", method_options={"seed": -1})
    with pytest.raises(OptionError, match="ledger: expected a method of one pass, got smoothgrad"):
        relprop.explain(vit(), IMAGES.float(), method="smoothgrad", ledger=True)
