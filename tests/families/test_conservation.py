"""Every composite on stock models: the books close, and what a rule set keeps is named, with its place."""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from typing import Any

import pytest
import torch

import relprop
from relprop.explanation import Explanation
from relprop.ledger import Ledger
from tests.families.catalogue import Family
from tests.families.checks import Subject
from tests.families.text_models import FAMILIES, build, inputs, refused
from tests.families.vision_models import VISION

pytestmark = [pytest.mark.filterwarnings("ignore")]

MODELS = ("bert", "gpt2", "llama", "bart", "lxmert", "detr")
QUICK = {("bert", composite) for composite in ("chefer", "attnlrp", "reslrp", "libragrad", "alpha2_beta1")}
ATTENTION = frozenset({"attention", "softmax"})
LINEAR = frozenset({"linear", "conv", "matmul"})
# Kinds of operations whose published rule keeps or makes relevance by itself. With softmax expanded to first order it
# is the constant term; with alpha 2 and beta 1 units without z-; where the authors' code shares out x+ w+ and x- w-
# apart, each part hands on the whole; a plain gradient conserves nothing.
BY_RULE: dict[str, frozenset[str]] = {
    **dict.fromkeys(("attnlrp", "reslrp", "pa_lrp", "epsilon", "gamma", "epsilon_plus"), ATTENTION),
    **dict.fromkeys(("chefer", "chefer_stable", "chefer_bert", "chefer_detr", "cp_lrp", "libragrad"), frozenset()),
    "alpha2_beta1": ATTENTION | LINEAR,
    "chefer_original": LINEAR,
    "gradient": ATTENTION | LINEAR | {"norm", "activation", "mul", "add", "pool", "movement"},
}
# Biases, in layers and norms, keep their share of a score that is shared out; where the seed is 1 they take none.
BIASED = frozenset(BY_RULE) - {
    *("chefer", "chefer_stable", "chefer_bert", "chefer_detr", "chefer_original", "gradient")
}


@cache
def explained(name: str, composite: str) -> Explanation:
    return relprop.explain(
        build(name),
        method="full",
        composite=composite,
        output=FAMILIES[name].output,
        target=FAMILIES[name].target(9),
        ledger=True,
        **inputs(name, 2),
    )


def cases() -> list[Any]:
    found = [(name, composite) for name in MODELS for composite in relprop.composites()]
    return [pytest.param(*case, marks=() if case in QUICK else pytest.mark.full) for case in found]


def check_closed(books: Ledger) -> float:
    """Every step, and the pass as a whole; by what its sums are, and by how far entries grow that cancel in them.

    Returns:
        the size that errors are measured against.
    """
    size = max(1.0, *(float(entry.arriving.abs().max()) for entry in books.entries))
    size *= max(1.0, *(float(entry.amplification.max()) for entry in books.entries))
    assert float(books.imbalance.abs().max()) < 1e-11 * size
    for entry in books.entries:
        assert float(entry.rounding.abs().max()) < 1e-11 * size, entry.step
        assert entry.step and entry.rule
    return size


def test_every_composite_is_held_to_something() -> None:
    assert set(BY_RULE) == set(relprop.composites())


@pytest.mark.parametrize(("name", "composite"), cases())
def test_books(name: str, composite: str) -> None:
    found = explained(name, composite)
    books = found.ledger
    assert books is not None
    size = check_closed(books)
    kept: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for entry in books.entries:
        for cause, amount in entry.absorbed.items():
            kept[cause][entry.kind] += float(amount.abs().max())
    # Models that compute in float32 somewhere do not conserve beyond that.
    by_rule = {kind for kind, amount in kept["rule"].items() if amount > 1e-5 * size}
    assert by_rule <= BY_RULE[composite]
    assert (sum(kept["bias"].values()) > 1e-3) == (composite in BIASED and name != "llama")
    assert set(kept) <= {"bias", "epsilon", "constant", "rule", "position"}
    total = sum(relevance.flatten(1).sum(1) for relevance in found.relevances.values())
    torch.testing.assert_close(books.frontier[0], total)


REST = [name for name in relprop.composites() if name not in ("chefer", "chefer_stable", "gradient")]


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in MODELS and not refused(name)])
def test_books_of_every_text_family(name: str) -> None:
    """With the composites that test_text.py does not try."""
    for composite in REST:
        books = explained(name, composite).ledger
        assert books is not None
        check_closed(books)


@pytest.mark.full
@pytest.mark.parametrize("family", VISION, ids=lambda family: family.name)
def test_books_of_every_image_family(family: Family) -> None:
    """With the composites that test_vision.py does not try."""
    subject = Subject(family)
    for composite in REST:
        books = subject.explain("full", composite, ledger=True).ledger
        assert books is not None
        check_closed(books)
