"""A pass on a GPU that is not there: torch's stand-ins for CUDA tensors refuse to meet tensors of the CPU.

A recorded pass must make no tensor on the host and must not wait for one, and neither must its answer.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import relprop
from relprop.answers import explanation_of
from relprop.engine import Engine
from relprop.execute import run_pass
from relprop.targets import aimed_at, find_index, sent
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


def pass_on_a_device(engine: Engine, model: Any, images: Tensor, explained: Tensor | None = None) -> Any:
    """Within a FakeTensorMode."""
    program = engine.program
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors = {i: named[name] for i, name in program.graph.parameters.items()} | program.graph.constants
    tensors |= {value.index: images for value in program.graph.inputs.values()}
    on_device = {i: torch.empty(t.shape, dtype=t.dtype, device="cuda") for i, t in tensors.items()}
    index = torch.empty(len(images), 1, 1, dtype=torch.int64, device="cuda")
    with MadeOnTheHost() as seen:
        found = run_pass(
            program,
            on_device,
            lambda output: aimed_at(index, output, torch.float32, several=True),
            Derive(),
            torch.float32,
            "highest",
            explained=explained,
        )
    return found, seen.operations


@pytest.mark.parametrize(
    "method", ["transformer_attribution", "full", "attnlrp", "generic_attention", "attention_rollout"]
)
def test_nothing_is_made_on_the_host(method: str) -> None:
    model, images = vit(depth=2).float(), torch.randn(2, 3, 32, 32)
    engine = relprop.compile(model, (images,), method=method, backend="torch")
    explained: Tensor | None = None
    with FakeTensorMode():
        for recorded in (False, True):  # a recorder warms up first, and hands on what that run made
            found, operations = pass_on_a_device(engine, model, images, explained)
            explained = found.reading.explained_tokens
            assert found.relevance.device.type == "cuda"
            assert not recorded or not operations


@pytest.mark.parametrize("method", ["transformer_attribution", "full"])
def test_an_answer_is_not_waited_for(method: str) -> None:
    """To look at a value of a stand-in is an error: only who asks for the kinds of the tokens does."""
    model, images = vit(depth=2).float(), torch.randn(2, 3, 32, 32)
    engine = relprop.compile(model, (images,), method=method, backend="torch")
    with FakeTensorMode():
        found, _ = pass_on_a_device(engine, model, images)
        answer = explanation_of(found, engine.program, engine._captured.inputs)
        assert answer.relevance.device.type == "cuda"
        if method == "full":
            assert answer.token_kinds == ()
            return
        assert answer.grid == (4, 4)
        with pytest.raises(DataDependentOutputException):
            _ = answer.token_kinds


def test_targets_are_sent_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked on the host, then copied from pinned memory."""
    output = torch.empty(2, 10, device="meta")
    index, _ = find_index([[1, -1], [3, 4]], output)
    assert index.device.type == "cpu" and index[..., 0].tolist() == [[1, 9], [3, 4]]
    sent_as: list[tuple[Any, ...]] = []
    pinned = index.clone()
    monkeypatch.setattr(Tensor, "pin_memory", lambda t: pinned if t is index else t)
    monkeypatch.setattr(Tensor, "to", lambda t, *args, **named: sent_as.append((t is pinned, *args, named)) or t)
    sent(index, torch.device("cuda"))
    assert sent_as == [(True, torch.device("cuda"), {"non_blocking": True})]
