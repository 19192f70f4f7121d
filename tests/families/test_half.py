"""Every family in half precision: a finite answer, of images and some texts close to that in float64."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import relprop
from relprop.errors import CaptureError
from tests.engine.models import relative
from tests.families.catalogue import Inputs
from tests.families.text_models import FAMILIES, build, inputs, refused
from tests.families.vision_models import VISION

pytestmark = [pytest.mark.filterwarnings("ignore")]

QUICK = ("vit", "bert", "t5")
LENGTH = 9
# Against the same weights in float64. Logits: some twenty unit roundoffs (2^-11, 2^-8). The cosine is that of
# gradient x input: where parts of a mean cancel, as random weights make them, its shares have no digit left.
LOGITS = {torch.float16: 0.01, torch.bfloat16: 0.08}
COSINE = {torch.float16: 0.99, torch.bfloat16: 0.9}
COMPARED = {*QUICK, *(family.name for family in VISION)}


def cases() -> list[Any]:
    names = [family.name for family in VISION] + [name for name in FAMILIES if not refused(name)]
    return [
        pytest.param(
            name, dtype, id=f"{name}-{dtype}".replace("torch.", ""), marks=() if name in QUICK else pytest.mark.full
        )
        for name in names
        for dtype in LOGITS
    ]


def subject(name: str) -> tuple[nn.Module, Inputs, dict[str, Any]]:
    """A model, two samples and what is explained."""
    image = next((family for family in VISION if family.name == name), None)
    if image is not None:
        return image.small(), image.inputs(2), {"output": image.output, "target": image.target}
    family = FAMILIES[name]
    return build(name), inputs(name, 2, LENGTH), {"output": family.output, "target": family.target(LENGTH)}


def in_dtype(model: nn.Module, given: Inputs, dtype: torch.dtype) -> tuple[nn.Module, Inputs]:
    floating = {k: v.to(dtype) for k, v in given.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return deepcopy(model).to(dtype), {**given, **floating}


@pytest.mark.parametrize(("name", "dtype"), cases())
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model, given, asked = subject(name)
    model, given = in_dtype(model, given, dtype)
    if (name, dtype) == ("bart", torch.float16):
        with pytest.raises(CaptureError, match="modeling_bart.py:.*can be captured in bfloat16"):
            relprop.explain(model, **given, method="full", **asked)
        return
    found = relprop.explain(model, **given, method="full", composite="chefer_stable", **asked)
    if (name, dtype) == ("detr", torch.float16):
        with torch.no_grad():
            assert not model(**given).logits.isfinite().all()  # the model's own, with these weights
        return
    for relevance in (found.relevances or {"": found.relevance}).values():
        assert relevance.dtype == torch.float32 and relevance.isfinite().all()
        assert (relevance.flatten(1).abs().sum(1) > 0).all()
    if name not in COMPARED:
        return
    wide, precise = in_dtype(model, given, torch.float64)
    found = relprop.explain(model, **given, method="gradient_x_input", **asked)
    expected = relprop.explain(wide, **precise, method="gradient_x_input", **asked)
    assert relative(found.logits.double(), expected.logits) < LOGITS[dtype]
    for key, relevance in (expected.relevances or {"": expected.relevance}).items():
        own = found.relevances.get(key, found.relevance)
        assert torch.cosine_similarity(own.double().flatten(1), relevance.flatten(1)).min() > COSINE[dtype], key
