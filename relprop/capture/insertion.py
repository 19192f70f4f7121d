"""New nodes in a captured graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree


def insert(
    graph: fx.Graph,
    before: fx.Node,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    like: fx.Node,
    value: Any = None,
) -> fx.Node:
    """A new node before another, with its shape and the provenance of `like`.

    Args:
        value: a fake tensor of the new node's shape, or the size that the node is, where it is at hand; tracing an
            operation on fake tensors can tie free sizes to the example's.
    """
    with graph.inserting_before(before):
        node = graph.call_function(target, args)
    node.meta = {k: like.meta[k] for k in ("nn_module_stack", "stack_trace") if k in like.meta}
    if value is None:
        infer(node)
    else:
        node.meta["val"] = value
    node.meta["carrying"] = any(p.meta.get("carrying", False) for p in node.all_input_nodes)
    return node


def infer(node: fx.Node) -> None:
    """Recompute a node's shape from its inputs' shapes."""
    values = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    given = [v for n in node.all_input_nodes for v in pytree.tree_leaves(n.meta["val"])]
    with next(v.fake_mode for v in given if isinstance(v, Tensor)), torch.no_grad():
        node.meta["val"] = node.target(*values[0], **values[1])  # type: ignore[operator]
