"""Image models explained by capture alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.families import checks
from tests.families.catalogue import Family
from tests.families.checks import AT_INPUT, COMPOSITES, ROWS, WALKS, Subject
from tests.families.vision_models import VISION


def _marked(family: Family, *rest: Any) -> Any:
    name = "-".join([family.name, *map(str, rest)])
    return pytest.param(family, *rest, id=name, marks=() if family.quick else pytest.mark.full)


def families(*columns: tuple[str, ...]) -> list[Any]:
    """Every family, crossed with the columns; all but the quick ones are marked `full`."""
    rows: list[tuple[Any, ...]] = [(family,) for family in VISION]
    for column in columns:
        rows = [(*row, item) for row in rows for item in column]
    return [_marked(*row) for row in rows]


@cache
def subject_of(name: str) -> Subject:
    return Subject(next(family for family in VISION if family.name == name))


@pytest.mark.parametrize(("family", "composite"), families(COMPOSITES))
def test_pixels(family: Family, composite: str) -> None:
    subject = subject_of(family.name)
    size = next(iter(subject.inputs.values())).shape[-1]
    for method in AT_INPUT:
        found = subject.explain(method, composite)
        checks.check_answer(found)
        assert found.relevance.shape == (3, size, size)
        checks.check_forward(subject, found.logits)


@pytest.mark.parametrize(("family", "composite"), families(COMPOSITES))
def test_tokens(family: Family, composite: str) -> None:
    subject = subject_of(family.name)
    for method in (*WALKS, *ROWS):
        if family.refusal:
            checks.check_refusal(subject, method)
            continue
        found = subject.explain(method, composite)
        checks.check_answer(found)
        assert found.relevance.shape == (3, len(found.token_kinds))
        assert found.image_map().shape == (3, 32, 32)


@pytest.mark.parametrize("family", families())
def test_gradient(family: Family) -> None:
    checks.check_gradient(subject_of(family.name))


@pytest.mark.parametrize(("family", "composite"), families((*COMPOSITES, "gradient")))
def test_ledger(family: Family, composite: str) -> None:
    subject = subject_of(family.name)
    checks.check_ledger(subject, "full", composite)
    if not family.refusal:
        checks.check_ledger(subject, "transformer_attribution", composite)


@pytest.mark.parametrize(("family", "composite"), families(COMPOSITES))
def test_batch(family: Family, composite: str) -> None:
    subject = subject_of(family.name)
    walks = () if family.refusal else ("transformer_attribution", "attention_rollout")
    for method in ("full", *walks):
        checks.check_batch(subject, method, composite)
