"""In-place updates: made functional where only one tensor sees them, refused where views of it would have to follow."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from relprop.capture import ops
from relprop.capture.export import Captured, module_path, source_line
from relprop.errors import CaptureError

aten = torch.ops.aten


def make_functional(captured: Captured) -> None:
    """relu_(x) becomes relu(x), and every later use of x one of the result.

    An update that cannot become one matters only where values carry relevance: constants may be built in place.

    Raises:
        CaptureError: the update goes through a view, or nothing does the same without it.
    """
    order = {node: i for i, node in enumerate(captured.graph.nodes)}
    for node in list(captured.graph.nodes):
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        target, functional = node.args[0], _functional(node.target)
        others = _aliases(target) - {target, node}
        seen_later = any(order[user] > order[node] for alias in others for user in alias.users)
        if functional is not None and target.op == "call_function" and not seen_later:
            node.target = functional
            target.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: order[user] > order[node])
            if captured.output is target:
                captured.output = node
        elif any(parent.meta.get("carrying") for parent in node.all_input_nodes):
            raise CaptureError(
                f"the model updates a tensor in place at {module_path(node)} {source_line(node)} ({node.target}):"
                " expected a forward whose values are each computed once, got one that writes into a part or a view of"
                " another; build the tensor with torch.cat, torch.stack or torch.where, or clone it before"
            )


def _aliases(node: fx.Node) -> set[fx.Node]:
    """Values that share memory with a value, as far as movements can make views."""
    found, stack = set(), [node]
    while stack:
        at = stack.pop()
        if at in found:
            continue
        found.add(at)
        stack += [user for user in at.users if user.target in ops.MOVEMENT]
        if at.target in ops.MOVEMENT:
            stack += [n for n in at.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    return found


def _functional(target: Any) -> Any:
    """The same operation without its update, None where there is none."""
    namespace, _, name = target._schema.name.partition("::")
    if namespace != "aten" or not name.endswith("_") or name == "copy_":
        return None
    packet = getattr(aten, name.rstrip("_"), None)
    return getattr(packet, target._schema.overload_name or "default", None)
