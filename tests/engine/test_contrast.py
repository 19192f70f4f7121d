"""Why one output and not another: differences of explanations, by contrasts of every form."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import relprop
from relprop.errors import TargetError
from relprop.targets import contrast
from tests.engine.models import relative, vit
from tests.families.text_models import build, inputs

IMAGES = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def engine() -> relprop.Engine:
    return relprop.compile(vit().double(), (IMAGES,), method="attnlrp")


def test_one() -> None:
    made = engine()
    first, second = (made(IMAGES, target=t).relevance for t in (1, 4))
    assert relative(made(IMAGES, target=contrast(1, 4)).relevance, first - second) < 1e-10
    assert relative(made(IMAGES, target=contrast(-9, against=[4, 4, 4])).relevance, first - second) < 1e-10
    mean = torch.stack([made(IMAGES, target=t).relevance for t in range(10)]).mean(0)
    assert relative(made(IMAGES, target=contrast([1, 4, 2])).relevance[0], (first - mean)[0]) < 1e-10


def test_several() -> None:
    """[B, T] questions are T contrasts of one each; one side may be the same for all."""
    made, wanted, against = engine(), [[1, 2], [3, 4], [5, 6]], [[7, 0], [8, 1], [9, 2]]
    alone = {}
    for column in range(2):
        left, right = ([row[column] for row in side] for side in (wanted, against))
        alone["both", column] = made(IMAGES, target=contrast(left, against=right)).relevance
        alone["one", column] = made(IMAGES, target=contrast(left, against=0)).relevance
        alone["mean", column] = made(IMAGES, target=contrast(left)).relevance
    asked = {"both": contrast(wanted, against), "one": contrast(torch.tensor(wanted), 0), "mean": contrast(wanted)}
    for name, target in asked.items():
        found = made(IMAGES, target=target)
        assert found.relevance.shape == (3, 2, 32, 32) and found.several and found.target is None
        for column in range(2):
            assert relative(found.relevance[:, column], alone[name, column]) < 1e-10
    pieces = made(IMAGES, target=asked["both"], batch_size=2).relevance
    assert relative(pieces, made(IMAGES, target=asked["both"]).relevance) < 1e-10
    checked = made(IMAGES, target=asked["one"], check=True)
    assert checked.trustworthy is not None and checked.trustworthy.shape == (3, 2)


def test_of_a_query() -> None:
    """An output with two axes per sample: against the mean of the same query's classes."""
    model, given = build("detr"), inputs("detr", 2, 9)

    def explained(target: Any) -> torch.Tensor:
        return relprop.explain(model, method="attnlrp", target=target, **given).relevance

    classes = model(**given).logits.shape[-1]
    every = explained([[[1, c] for c in range(classes)]] * 2)
    assert relative(explained(contrast((1, 2))), every[:, 2] - every.mean(1)) < 1e-7
    assert relative(explained(contrast((1, 2), against=(1, 0))), every[:, 2] - every[:, 0]) < 1e-7


@pytest.mark.parametrize("output", ["logits_per_text", "logits_per_image"])
def test_between_samples(output: str) -> None:
    """CLIP: why this text and not that one, each sample as if the others did not ask."""
    model, given, size = build("clip"), inputs("clip", 3, 9), 3
    other = [2, 0, 1]

    def explained(target: Any, given: dict[str, Any] = given) -> relprop.Explanation:
        return relprop.explain(model, method="attnlrp", output=output, target=target, **given)

    rows, columns = ("input_ids", "pixel_values") if output == "logits_per_text" else ("pixel_values", "input_ids")
    found = explained(contrast(list(range(size)), against=other))
    plain = explained(None)
    swapped = {**given, columns: given[columns][other]}
    if columns == "input_ids":
        swapped["attention_mask"] = given["attention_mask"][other]
    crossed = explained(None, swapped)
    assert found.relevance.shape == plain.relevance.shape and not found.several
    assert relative(found.relevances[rows], plain.relevances[rows] - crossed.relevances[rows]) < 1e-6
    assert relative(found.relevances[columns], plain.relevances[columns]) < 1e-6  # what it is held against is another's
    assert relative(explained(lambda o: o.diagonal()).relevances[rows], plain.relevances[rows]) < 1e-9
    asked = lambda o: o.diagonal() - o[torch.arange(size), other]  # noqa: E731
    for name, part in explained(asked).relevances.items():
        assert relative(part, found.relevances[name]) < 1e-9
    with pytest.raises(TargetError, match="contrast: expected one per sample for an output of shape"):
        explained(contrast([[0, 1]] * size, against=2))
    with pytest.raises(TargetError, match="expected None, a contrast or a callable for an output of shape"):
        explained(1)


def test_bad_input() -> None:
    made = engine()
    for asked, message in (
        (contrast(None), "contrast: expected classes or indices as target, got None"),
        (contrast(1, against=lambda o: o[:, 0]), "contrast: expected classes or indices as against, got <function"),
        (contrast(99, against=1), r"contrast: target: expected indices within .* \[B, 10\], got 99"),
        (contrast(1, against=-11), r"contrast: against: expected indices within .* \[B, 10\], got -11"),
        (contrast(1, against=[1, 2]), r"contrast: against: expected .* with B = 3"),
        (contrast([[1, 2]] * 3, against=[[1, 2, 3]] * 3), "expected as many against as targets, or one, got 2 and 3"),
    ):
        with pytest.raises(TargetError, match=message):
            made(IMAGES, target=asked)
