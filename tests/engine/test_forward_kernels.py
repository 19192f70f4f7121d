"""Forward operations whose results go to kept memory: the model's own numbers, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import relprop
from relprop.backends import forward
from relprop.graph import Node
from relprop.weights import Derive

ATEN = torch.ops.aten
WIDE = (3, 200, 128)  # above native.SMALLEST_KEPT in every dtype but the half precisions, which pass it by


def node_of(target: Any) -> Node:
    made = Node.__new__(Node)
    made.target = target
    return made


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


CASES = {
    "gelu": (ATEN.gelu.default, lambda x: ((x,), {})),
    "gelu_tanh": (ATEN.gelu.default, lambda x: ((x,), {"approximate": "tanh"})),
    "silu": (ATEN.silu.default, lambda x: ((x,), {})),
    "add": (ATEN.add.Tensor, lambda x: ((x, torch.randn_like(x)), {})),
    "add_broadcast": (ATEN.add.Tensor, lambda x: ((x[:1], torch.randn_like(x)), {})),
    "add_scaled": (ATEN.add.Tensor, lambda x: ((x, torch.randn_like(x)), {"alpha": 2})),
    "add_number": (ATEN.add.Tensor, lambda x: ((x, 3), {})),
    "add_promoted": (ATEN.add.Tensor, lambda x: ((x, torch.randn(x.shape, dtype=torch.float64)), {})),
    "layer_norm": (ATEN.layer_norm.default, lambda x: ((x, [x.shape[-1]], x[0, 0], x[0, 1], 1e-6), {})),
    "layer_norm_two_axes": (ATEN.layer_norm.default, lambda x: ((x, list(x.shape[1:])), {})),
    "layer_norm_transposed": (ATEN.layer_norm.default, lambda x: ((x.mT, [x.shape[1]]), {})),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 20, 16), WIDE])
@pytest.mark.parametrize("case", CASES)
def test_the_same_bits(case: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    target, arguments = CASES[case]
    args, kwargs = arguments(random(*shape, dtype=dtype))
    node = node_of(target)
    assert forward.takes(node)
    with torch.no_grad():
        found = forward.run(node, Derive(), *args, **kwargs)
        expected = target(*args, **kwargs)
    assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_autograd_sees_the_operation_itself() -> None:
    x = random(*WIDE, dtype=torch.float32).requires_grad_()
    forward.run(node_of(ATEN.gelu.default), Derive(), x).sum().backward()
    assert x.grad is not None


def test_an_engine_s_forward_pass_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=7).eval()
    images = torch.randn(2, 3, 224, 224)
    kept = []
    monkeypatch.setattr(forward.native, "empty", lambda *a, made=forward.native.empty: kept.append(a) or made(*a))
    logits = relprop.compile(model, (images,), backend="cpp")(images, target=3).logits
    assert len(kept) > 10
    assert torch.equal(logits, relprop.compile(model, (images,), backend="torch")(images, target=3).logits)
