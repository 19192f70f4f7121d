"""Whole explanations on a GPU backend, run without a GPU, against the rules in plain PyTorch."""

from __future__ import annotations

import torch

import relprop
from tests.engine.models import vit
from tests.rules.rule_checks import assert_near, random


def check_whole_explanation(backend: str, composite: str, dtype: torch.dtype) -> None:
    """Kernels take every step they should. In bfloat16 shares are rounded on their way into a product."""
    model, images = vit(depth=2).to(dtype), random(2, 3, 32, 32, seed=2).to(dtype)
    found = {}
    for name in (backend, "torch"):
        engine = relprop.compile(model, (images,), composite=composite, backend=name)
        joint = {step.node.kind for step in engine.program.reverse if step.joint is not None}
        used = {stream.backend for step in engine.program.reverse for stream in step.streams}
        assert joint == (set() if name == "torch" else {"attention", "linear"})
        assert used == {name, "torch"}
        found[name] = engine(images, target=torch.tensor([[0, 9]] * 2)).relevance
    if dtype == torch.float32:
        assert_near(found[backend], found["torch"], 2e-2 if composite == "chefer" else 1e-3)
    elif composite == "chefer_stable":
        assert_near(found[backend], found["torch"], 0.1)


def check_method(backend: str, method: str) -> None:
    """In float32, one target."""
    model, images = vit(depth=2).float(), random(2, 3, 32, 32, seed=2).float()
    found = [
        relprop.compile(model, (images,), method=method, backend=name)(images, target=3).relevance
        for name in (backend, "torch")
    ]
    assert_near(found[0], found[1], 2e-2)
