"""Compute only the rows that matter: move a slice of rows above every operation that works row by row.

Above the last attention layer of a classifier only the class token's row is read. Hoisting that slice through the
final norm, the last block's MLP and the last attention's queries shortens the forward pass and the relevance pass
alike, with one mechanism and the same numbers: the rows left out carry no relevance.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from relprop.capture import ops
from relprop.capture.canonicalise import is_tensor
from relprop.capture.export import module_path
from relprop.capture.insertion import insert

aten = torch.ops.aten


def hoist_rows(graph: fx.Graph) -> None:
    """Move row slices towards the inputs until none can move, in place."""
    changed = True
    while changed:
        changed = False
        for node in list(graph.nodes):
            if node.target is aten.slice.Tensor and node.meta.get("carrying") and not node._erased:
                _merge_twins(graph, node)
        for node in list(graph.nodes):
            if not node._erased and _is_row_slice(node) and _hoist(graph, node):
                changed = True
    graph.eliminate_dead_code()


def _key(node: fx.Node) -> tuple[Any, ...]:
    return (*node.args, *(() if len(node.args) > 4 else (1,)))


def _merge_twins(graph: fx.Graph, node: fx.Node) -> None:
    source = node.args[0]
    order = list(graph.nodes)
    twins = [u for u in source.users if u.target is aten.slice.Tensor and _key(u) == _key(node)]  # type: ignore[union-attr]
    if len(twins) < 2 or len(twins) < len(source.users):  # type: ignore[union-attr]
        return  # only where all uses are this slice can it move on
    first = min(twins, key=order.index)
    if len({module_path(twin) for twin in twins}) > 1:  # then the slice is none of theirs, but part of what they read
        first.meta["nn_module_stack"] = source.meta.get("nn_module_stack", {})  # type: ignore[union-attr]
    for twin in twins:
        if twin is not first:
            twin.replace_all_uses_with(first)
            graph.erase_node(twin)


def _is_row_slice(node: fx.Node) -> bool:
    if node.target is not aten.slice.Tensor or not node.meta.get("carrying") or len(node.args) > 4:
        return False
    source, axis, start, stop = node.args
    if not (isinstance(axis, int) and isinstance(start, int) and isinstance(stop, int)):
        return False
    if len(source.users) != 1 or source.op != "call_function" or not source.meta.get("carrying"):  # type: ignore[union-attr]
        return False
    return isinstance(node.meta["val"].shape[axis], int)


def _hoist(graph: fx.Graph, node: fx.Node) -> bool:
    """Replace slice(op(x)) by op(slice(x)) where op works on each row alone."""
    source: Any = node.args[0]
    axis, start, stop = node.args[1:]
    rank = source.meta["val"].ndim
    axis = int(axis) % rank  # type: ignore[call-overload, arg-type]
    length = node.meta["val"].shape[axis]

    def rows(value: Any, at: int = axis) -> Any:
        return insert(graph, node, aten.slice.Tensor, (value, at, start, stop), source)

    kind, target = ops.kind_of(source.target), source.target
    args = list(source.args)
    if kind == "activation" or target is aten.to.dtype:
        args[0] = rows(args[0])
        if isinstance(target, ops.Region):
            args[1:] = [_broadcast_rows(a, axis, source, rows) for a in args[1:]]
    elif kind in ("add", "mul"):
        args[:2] = [_broadcast_rows(a, axis, source, rows) for a in args[:2]]
    elif kind == "linear" and axis < rank - 1:
        args[0] = rows(args[0])
    elif kind == "norm" and _normalises_last(source) and axis < rank - _normalised_axes(source):
        args[0] = rows(args[0])
        if isinstance(target, ops.Region):
            args[1:] = [_broadcast_rows(a, axis, source, rows) for a in args[1:]]
    elif kind == "attention" and axis == rank - 2 and not args[5]:
        args[0] = rows(args[0])
        if args[3] is not None:
            args[3] = _broadcast_rows(args[3], axis, source, rows)
    elif target in (aten.transpose.int, aten.permute.default, aten.unsqueeze.default):
        moved = _moved_axis(source, axis)
        if moved is None:
            return False
        args[0] = rows(args[0], moved)
    elif target in (aten.view.default, aten.reshape.default):
        kept = kept_axis(args[0].meta["val"].shape, source.meta["val"].shape, axis)
        if kept is None:
            return False
        args[0] = rows(args[0], kept)
        sizes = list(args[1])
        sizes[axis] = length
        args[1] = sizes
        target = aten.reshape.default
    else:
        return False
    with graph.inserting_before(node):
        moved_node = graph.call_function(target, tuple(args), dict(source.kwargs))
    moved_node.meta = dict(source.meta)
    moved_node.meta["val"] = node.meta["val"]
    if kind == "attention":
        before = source.meta.get("query_rows")
        moved_node.meta["query_rows"] = (start, stop) if before is None else before
    node.replace_all_uses_with(moved_node)
    graph.erase_node(node)
    graph.erase_node(source)
    return True


def _broadcast_rows(operand: Any, axis: int, output: fx.Node, rows: Any) -> Any:
    """Slice an operand that has the output's rows; leave one that is broadcast along them."""
    if not is_tensor(operand):
        return operand
    shape, target = operand.meta["val"].shape, output.meta["val"].shape
    at = axis - (len(target) - len(shape))
    if at < 0 or not statically_known_true(shape[at] == target[axis]) or shape[at] == 1:
        return operand
    return rows(operand, at)


def _normalised_axes(node: fx.Node) -> int:
    return len(node.args[1]) if node.target in (aten.layer_norm.default, aten.rms_norm.default) else 1  # type: ignore[arg-type]


def _normalises_last(node: fx.Node) -> bool:
    if node.target in (aten.layer_norm.default, aten.rms_norm.default):
        return True
    if not isinstance(node.target, ops.Region):
        return False
    rank = node.meta["val"].ndim
    axes = [n.args[1] for n in node.target.module.graph.nodes if n.target in ops.REDUCTIONS]
    return all([a % rank for a in (axis if isinstance(axis, (list, tuple)) else [axis])] == [rank - 1] for axis in axes)


def _moved_axis(node: fx.Node, axis: int) -> int | None:
    rank = node.meta["val"].ndim
    if node.target is aten.transpose.int:
        a, b = (int(i) % rank for i in node.args[1:3])  # type: ignore[arg-type]
        return {a: b, b: a}.get(axis, axis)
    if node.target is aten.permute.default:
        return int(node.args[1][axis]) % rank  # type: ignore[index, arg-type]
    inserted = int(node.args[1]) % rank  # type: ignore[arg-type]
    return None if axis == inserted else axis - (axis > inserted)


def kept_axis(before: Any, after: Any, axis: int) -> int | None:
    """The input axis that a reshape leaves in place as the given output axis."""
    count = 1
    for size in after[:axis]:
        count = count * size
    seen = 1
    for i, size in enumerate(before):
        if statically_known_true(seen == count) and statically_known_true(size == after[axis]):
            return i
        seen = seen * size
    return None
