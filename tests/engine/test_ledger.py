"""The ledger closes: seed = frontier + everything absorbed, per sample and target, step by step and end to end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import relprop
from relprop.errors import OptionError, UnsupportedTopologyError
from tests.engine.models import vit

COMPOSITES = ["chefer", "chefer_stable", "chefer_original", "gradient"]


@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize("method", ["transformer_attribution", "full", "relevance_rollout", "last_layer"])
def test_it_closes(method: str, composite: str) -> None:
    model, x = vit().double(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    engine = relprop.compile(model, (x,), method=method, composite=composite)
    books = engine(x, target=[[1, 2]] * 3, ledger=True).ledger
    assert books is not None
    assert books.seed.shape == books.frontier.shape == books.imbalance.shape == (2, 3)
    assert torch.equal(books.seed, torch.ones_like(books.seed))
    scale = max(1.0, *(float(e.arriving.abs().max()) for e in books.entries))
    assert float(books.imbalance.abs().max()) < 1e-10 * scale
    for entry in books.entries:
        assert float(entry.rounding.abs().max()) < 1e-10 * scale, entry.step
        assert (entry.amplification >= 0).all()


# None of these propagates relevance: their books would say that all of the seed is missing.
NO_RELEVANCE = [
    "generic_attention",
    "gradient_x_input",
    "attention_rollout",
    "raw_attention",
    "last_layer_attention",
    "attention_gradcam",
]


def test_methods_with_and_without_books() -> None:
    """Every method keeps books that close, or says that it has none."""
    model, x = vit().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for method in relprop.methods():
        engine = relprop.compile(model, (x,), method=method)
        if method in (*NO_RELEVANCE, "integrated_gradients", "smoothgrad"):
            kind = "that propagates relevance" if method in NO_RELEVANCE else "of one pass"
            with pytest.raises(OptionError, match=f"ledger: expected a method {kind}, got {method}"):
                engine(x, target=1, ledger=True)
            continue
        books = engine(x, target=1, ledger=True).ledger
        assert books is not None and books.entries
        scale = max(1.0, *(float(e.arriving.abs().max()) for e in books.entries))
        assert float(books.imbalance.abs().max()) < 1e-10 * scale, method


LRP = ["attnlrp", "cp_lrp", "reslrp", "libragrad", "pa_lrp", "epsilon", "gamma", "epsilon_plus", "alpha2_beta1"]


@pytest.mark.parametrize("composite", LRP)
def test_it_closes_at_the_score(composite: str) -> None:
    """score = relevance of the input + what biases, constants, positions and the rules themselves keep."""
    model, x = vit().double(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    found = relprop.compile(model, (x,), method="full", composite=composite)(x, target=[[1, 2]] * 3, ledger=True)
    books = found.ledger
    assert books is not None
    torch.testing.assert_close(books.seed, found.logits[:, 1:3].T)
    torch.testing.assert_close(books.frontier, found.relevance.sum((2, 3)).T)
    scale = max(1.0, *(float(e.arriving.abs().max()) for e in books.entries))
    assert float(books.imbalance.abs().max()) < 1e-10 * scale
    kinds = {e.kind for e in books.entries if float(e.absorbed.get("rule", torch.zeros(1)).abs().max()) > 1e-9}
    # The constant term of the softmax's expansion; shares of z- where a unit has no z-.
    expected = {"alpha2_beta1": {"attention", "linear", "conv"}}.get(composite, {"attention"})
    assert kinds <= (set() if composite in ("cp_lrp", "libragrad") else expected)


class Rows(nn.Module):
    """A layer that works on all tokens of a batch as one list, as routers of experts do, in order or not."""

    def __init__(self, ordered: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ordered = ordered
        self.embed, self.inner, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        rows = h.view(-1, 6)
        if not self.ordered:
            rows = rows[torch.arange(rows.shape[0], device=ids.device).flip(0)]
        rows = rows + self.inner(rows).relu()
        if not self.ordered:
            rows = rows[torch.arange(rows.shape[0], device=ids.device).flip(0)]
        return self.head(rows.view(*ids.shape, 6).mean(1))


def test_rows_of_a_batch_in_one_list() -> None:
    """Sums are per sample also where samples share an axis whose length depends on the call."""
    ids = torch.randint(11, (3, 5))
    engine = relprop.compile(Rows(True).double().eval(), (ids[:, :4],), method="full", composite="chefer")
    found = engine(ids, target=1, ledger=True)
    books = found.ledger
    assert books is not None and books.imbalance.abs().max() < 1e-10
    for i in range(3):
        torch.testing.assert_close(engine(ids[i : i + 1], target=1).relevance, found.relevance[i : i + 1])


def test_scattered_rows_are_refused() -> None:
    ids = torch.randint(11, (3, 5))
    engine = relprop.compile(Rows(False).double().eval(), (ids,), method="full", composite="chefer_stable")
    assert engine(ids, target=1).relevance.isfinite().all()
    with pytest.raises(UnsupportedTopologyError, match=r"expected samples on an axis of their own, got .* of index"):
        engine(ids, target=1, ledger=True)


def test_constants_are_named() -> None:
    """Position embedding and class token keep what the read-out drops."""
    model, x = vit().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    found = relprop.explain(model, x, target=1, method="full", ledger=True)
    books = found.ledger
    assert books is not None
    assert set(books.absorbed) == {"constant", "epsilon"}
    by_step = {e.step: e.absorbed["constant"] for e in books.entries if "constant" in e.absorbed}
    assert len(by_step) == 2  # cat with the class token, add of the position embedding
    assert all(float(kept.abs().min()) > 1e-4 for kept in by_step.values())
    # The frontier is the pixels: what the explanation shows is what the books say.
    assert torch.allclose(found.relevance.sum((1, 2)), books.frontier[0], atol=1e-12)


def test_bias_is_named() -> None:
    from relprop import entry
    from relprop.composites import find_composite

    model, x = vit().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    rules = find_composite("chefer").overridden(entry("linear", "epsilon"), name="epsilon_linear")
    books = relprop.explain(model, x, target=1, composite=rules, ledger=True).ledger
    assert books is not None
    head = next(e for e in books.entries if e.module == "head")
    logit = model(x)[:, 1]
    # R = 1 at one output: the bias keeps b / y of it.
    assert torch.allclose(head.absorbed["bias"][0], model.head.bias[1] / logit, rtol=1e-4)


def test_off_by_default_and_the_same_answer() -> None:
    model, x = vit(), torch.randn(2, 3, 32, 32)
    engine = relprop.compile(model, (x,))
    plain, booked = engine(x, target=1), engine(x, target=1, ledger=True)
    assert plain.ledger is None
    assert torch.allclose(plain.relevance, booked.relevance, rtol=1e-3, atol=1e-5)
    text = str(booked.ledger)
    assert "frontier" in text and "blocks.0.attn" in text
    worst = booked.ledger.worst(3) if booked.ledger else []
    assert len(worst) == 3
    assert worst[0].amplification.max() >= worst[-1].amplification.max()


def test_trust_check() -> None:
    model, x = vit(), torch.randn(4, 3, 32, 32)
    engine = relprop.compile(model, (x,), composite="chefer_stable")
    assert engine(x).trustworthy is None
    checked = engine(x, check=True)
    assert checked.trustworthy is not None and checked.disagreement is not None
    assert checked.trustworthy.shape == checked.disagreement.shape == (4,)
    assert checked.trustworthy.all() and float(checked.disagreement.min()) > 0
    several = engine(x, target=[[0, 1]] * 4, check=True)
    assert several.trustworthy is not None and several.trustworthy.shape == (4, 2)
    alone = engine(x[2:3], check=True)
    assert abs(float(alone.disagreement - checked.disagreement[2])) < 1e-6  # type: ignore[operator]
