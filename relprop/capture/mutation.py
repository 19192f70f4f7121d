"""In-place updates: made functional where only one tensor sees them, refused where views of it would have to follow."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from relprop.capture import ops
from relprop.capture.export import Captured, module_path, source_line
from relprop.errors import CaptureError

aten = torch.ops.aten


def remove_mutation(captured: Captured) -> None:
    """relu_(x) becomes relu(x), and every later use of x one of the result.

    Only values that carry relevance matter: constants may be built in place.

    Raises:
        CaptureError: the update goes through a view, or an update of a constant makes it depend on the input.
    """
    order = {node: i for i, node in enumerate(captured.graph.nodes)}
    for node in list(captured.graph.nodes):
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        if not any(parent.meta.get("carrying") for parent in node.all_input_nodes):
            continue
        target, functional = node.args[0], _functional(node.target)
        views = [user for user in target.users if user.target in ops.MOVEMENT and order[user] < order[node]]
        seen_later = any(order[use] > order[node] for view in views for use in view.users)
        if functional is None or target.op != "call_function" or target.target in ops.MOVEMENT or seen_later:
            raise CaptureError(
                f"the model updates a tensor in place at {module_path(node)} {source_line(node)} ({node.target}):"
                " expected a forward whose values are each computed once, got one that writes into a part or a view of"
                " another; build the tensor with torch.cat, torch.stack or torch.where, or clone it before"
            )
        node.target = functional
        for user in list(target.users):
            if user is not node and order[user] > order[node]:
                user.replace_input_with(target, node)
        if captured.output is target:
            captured.output = node


def _functional(target: Any) -> Any:
    """The same operation without its update, None where there is none."""
    namespace, _, name = target._schema.name.partition("::")
    if namespace != "aten" or not name.endswith("_"):
        return None
    packet = getattr(aten, name.rstrip("_"), None)
    return getattr(packet, target._schema.overload_name or "default", None)
