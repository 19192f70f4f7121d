"""The README's table of models names what is tested, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import relprop
from benchmarks.tables import README
from relprop.errors import UnsupportedOpError, UnsupportedTopologyError
from tests.families import text_models, vision_models
from tests.families.catalogue import Inputs, rendered, rows
from tests.families.checks import widened
from tests.families.text_models import FAMILIES
from tests.families.vision_models import VISION

FEW_POINTS = {"integrated_gradients": {"steps": 2}, "smoothgrad": {"samples": 2}}


def check_row(model: nn.Module, given: Inputs, refuses: frozenset[str], output: Any, target: Any) -> None:
    """A row's methods answer, and no others: those say why."""
    refused = set()
    for method in relprop.methods():
        options: dict[str, Any] = {"method": method, "method_options": FEW_POINTS.get(method), "output": output}
        try:
            found = relprop.compile(model, (), given, **options)(**given, target=target)
        except (UnsupportedTopologyError, UnsupportedOpError) as error:
            assert f"method '{method}'" in str(error), method
            refused.add(method)
            continue
        for relevance in (found.relevances or {"": found.relevance}).values():
            assert relevance.isfinite().all(), method
            assert relevance.any() or method == "attention_gradcam", method  # its positive part may be empty
    assert refused == refuses


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in FAMILIES if not text_models.refused(name)])
def test_methods_of_texts(name: str) -> None:
    family = FAMILIES[name]
    given = text_models.inputs(name, 2)
    check_row(text_models.build(name), given, family.refuses, family.output, family.target(9))


@pytest.mark.full
@pytest.mark.parametrize("family", VISION, ids=lambda family: family.name)
def test_methods_of_images(family: vision_models.Family) -> None:
    check_row(family.small().double(), widened(family.inputs(2)), family.refuses, family.output, family.target)


def test_the_table_is_the_tested_families() -> None:
    text = README.read_text(encoding="utf-8")
    assert rendered(text) == text, "run python -m tests.families.catalogue"


def test_titles_are_unique() -> None:
    titles = [row.title for row in rows().values()]
    assert len(set(titles)) == len(titles) > 0
