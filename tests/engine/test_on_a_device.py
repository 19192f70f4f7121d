"""A pass on a GPU that is not there: torch's stand-ins for CUDA tensors refuse to meet tensors of the CPU.

A recorded pass must make no tensor on the host and must not wait for one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import relprop
from relprop.execute import run_pass
from relprop.targets import aimed_at
from relprop.weights import Derive
from tests.engine.models import vit


class MadeOnTheHost(TorchDispatchMode):
    """Notes operations whose results lie on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if any(isinstance(t, Tensor) and t.device.type == "cpu" for t in tree_leaves(found)):
            self.operations.append(str(func))
        return found


@pytest.mark.parametrize(
    "method", ["transformer_attribution", "full", "attnlrp", "generic_attention", "attention_rollout"]
)
def test_nothing_is_made_on_the_host(method: str) -> None:
    model, images = vit(depth=2).float(), torch.randn(2, 3, 32, 32)
    program = relprop.compile(model, (images,), method=method, backend="torch").program
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    graph = program.graph
    tensors = {i: named[name] for i, name in graph.parameters.items()} | graph.constants
    tensors |= {value.index: images for value in graph.inputs.values()}
    explained: Tensor | None = None
    with FakeTensorMode():
        on_device = {i: torch.empty(t.shape, dtype=t.dtype, device="cuda") for i, t in tensors.items()}
        index = torch.empty(2, 1, 1, dtype=torch.int64, device="cuda")
        for recorded in (False, True):  # a recorder warms up first, and hands on what that run made
            with MadeOnTheHost() as seen:
                found = run_pass(
                    program,
                    dict(on_device),
                    lambda output: aimed_at(index, output, torch.float32, several=True),
                    Derive(),
                    torch.float32,
                    "highest",
                    explained=explained,
                )
            explained = found.reading.explained_tokens
            assert found.relevance.device.type == "cuda"
            assert not recorded or not seen.operations
