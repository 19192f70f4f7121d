"""The Triton backend under the interpreter against the torch backend: single operations and whole explanations."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import relprop
from relprop.backends import backends, triton
from relprop.backends.triton import KERNELS, kernel_reasons, reasons_against
from relprop.composites import find_composite
from relprop.errors import BackendError
from relprop.rules import AddNormalised, FanoutEpsilon, LinearAlphaBeta, Rule
from tests.backend_checks import check_method, check_whole_explanation
from tests.engine.models import vit
from tests.rules.rule_checks import Op, assert_parts, each, random

CPU = torch.device("cpu")


@pytest.mark.parametrize("composite", ["chefer", "chefer_stable"])
def test_kernel_equals_rule(composite: str) -> None:
    op, images = Op(vit(depth=1), random(2, 3, 32, 32), kind="conv"), random(2, 3, 32, 32, seed=1)
    seen: Counter[type[Rule]] = Counter()
    for node, rule in find_composite(composite).assign(op.graph).items():
        kernel = KERNELS.get(type(rule))
        if kernel is None or kernel_reasons(node, rule):
            continue
        shapes = op.call([images], torch.float32, node=node).shapes
        made = tuple(random(2, *shapes[v.index], seed=i) for i, v in enumerate(node.outputs))
        relevance = each(lambda r: r.float(), made if len(made) > 1 else made[0])
        calls = [op.call([images], torch.float32, node=node) for _ in range(2)]
        assert_parts(kernel(rule, calls[0], relevance), rule.propagate(calls[1], relevance), 2e-3)
        seen[type(rule)] += 1
    assert seen[LinearAlphaBeta] >= 4
    assert composite != "chefer" or (seen[AddNormalised] >= 2 and seen[FanoutEpsilon] >= 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("composite", ["chefer", "chefer_stable"])
def test_whole_explanation(composite: str, dtype: torch.dtype) -> None:
    check_whole_explanation("triton", composite, dtype)


@pytest.mark.parametrize("method", ["attention_rollout", "relevance_rollout", "attention_gradcam", "full"])
def test_other_methods(method: str) -> None:
    check_method("triton", method)


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reasons_against(torch.float32, CPU) == []
    assert reasons_against(torch.float64, CPU) == ["its kernels take torch.float32, not torch.float64"]
    assert backends()["triton"] == "available"
    monkeypatch.setattr(triton, "_interpreted", lambda: False)
    assert reasons_against(torch.float64, CPU) == [
        "its kernels run on CUDA devices (or under TRITON_INTERPRET=1), not on cpu",
        "its kernels take torch.float32, not torch.float64",
    ]
    model, images = vit(depth=1).double(), random(2, 3, 32, 32)
    with pytest.raises(BackendError) as error:
        relprop.compile(model, (images,), backend="triton")
    assert str(error.value) == (
        "backend triton: expected to run on cpu in torch.float64, but its kernels run on CUDA devices (or under"
        " TRITON_INTERPRET=1), not on cpu; its kernels take torch.float32, not torch.float64"
    )


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: None)
    assert reasons_against(torch.float32, CPU) == ["triton is not installed"]
    assert triton.available() == (False, "triton is not installed")


def test_auto_on_the_cpu_is_cpp() -> None:
    model, images = vit(depth=1).float(), random(2, 3, 32, 32).float()
    engine = relprop.compile(model, (images,))
    used = {stream.backend for step in engine.program.reverse for stream in step.streams}
    assert "triton" not in used
