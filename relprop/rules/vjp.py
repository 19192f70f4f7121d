"""The vector-Jacobian product of one operation by automatic differentiation, for ops without a closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from relprop.graph import Value, substitute
from relprop.rules.base import Call, Relevances


def _as_stream(call: Call, value: Value) -> Any:
    """A saved tensor in the streams' dtype; zeros for an input that was not kept (its op is linear in it)."""
    kept = call.tensors.get(value.index)
    if kept is None:
        return torch.zeros(call.shapes[value.index], dtype=call.dtype, device=_device(call))
    if isinstance(kept, Tensor) and kept.dtype.is_floating_point:
        return kept.to(call.dtype)
    return kept


def _device(call: Call) -> torch.device:
    kept = [t for t in call.tensors.values() if isinstance(t, Tensor)]
    return kept[0].device if kept else torch.device("cpu")


def vjp(call: Call, gradient: Any) -> Relevances:
    """J^T g by automatic differentiation of the operation alone, one product per target."""
    node = call.node
    gradients = gradient if isinstance(gradient, tuple) else (gradient,)
    given = [g for g in gradients if g is not None]
    tracked = torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in (*call.tensors.values(), *given)
    )
    leaves: dict[int, Tensor] = {}
    with torch.enable_grad():
        for position, value in enumerate(node.operands):
            if value is not None and value.carrying and call.wanted[position]:
                tensor = _as_stream(call, value).to(given[0].device)
                leaves[value.index] = tensor if tensor.requires_grad and tracked else tensor.detach().requires_grad_()

        def bound(value: Value) -> Any:
            return leaves[value.index] if value.index in leaves else _as_stream(call, value)

        outputs = node.target(*substitute(node.args, bound), **substitute(node.kwargs, bound))
        outputs = tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)
        kept = [i for i, g in enumerate(gradients) if g is not None]
        targets = given[0].shape[0]
        rows = [
            torch.autograd.grad(
                [outputs[i] for i in kept],
                list(leaves.values()),
                [gradients[i][t].to(outputs[i].dtype) for i in kept],
                retain_graph=True,
                create_graph=tracked,
                allow_unused=True,
            )
            for t in range(targets)
        ]
    stacked = {
        index: None if rows[0][at] is None else torch.stack([row[at] for row in rows])
        for at, index in enumerate(leaves)
    }
    return tuple(None if v is None else stacked.get(v.index) for v in node.operands)
