"""Data movement: relevance moves back to where the data came from, by the exact adjoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from relprop.graph import Node
from relprop.rules.base import Call, Relevances, Rule, plain_gradient, register_rule, unbroadcast
from relprop.rules.vjp import vjp

aten = torch.ops.aten


@register_rule
class MovementAdjoint(Rule):
    """R_in = P^T R_out for y = P x with P a selection, permutation or repetition of elements.

    Conservation:
        exact; what moves back to a constant (a class token in a `cat`, padding) is absorbed.
    Source: the chain rule of a linear map with entries 0 and 1.
    """

    kind: ClassVar = "movement"
    name: ClassVar = "adjoint"
    needs_inputs: ClassVar = False
    needs_output: ClassVar = False

    def needs(self, node: Node) -> tuple[bool, bool]:
        """Nothing, but where the data itself says what moves where."""
        return movement_needs(node)

    def gradient_form(self, node: Node) -> Rule | None:
        """The plain gradient."""
        return plain_gradient()

    def propagate(self, call: Call, relevance: Any) -> Relevances:
        """relevance: [T, *output shape], or one per output -> [T, *operand shape] per operand."""
        passed = adjoint(call, relevance)
        if call.absorbed is not None and call.node.target in _PADDING:
            _absorb_padding(call, relevance, passed[0])
        return passed


def movement_needs(node: Node) -> tuple[bool, bool]:
    """Whether the adjoint reads the inputs and the outputs."""
    return False, node.target is aten.topk.default


def adjoint(call: Call, relevance: Any) -> Relevances:
    """The adjoint of a movement node; by a closed form for the common ops, else by automatic differentiation."""
    found = _ADJOINTS.get(call.node.target)
    return found(call, relevance) if found is not None else vjp(call, relevance)


def _absorb_padding(call: Call, relevance: Tensor, passed: Tensor | None) -> None:
    """What an operation that pads has nowhere to hand to."""
    source, output = call.node.operands[0], call.node.outputs[0]
    assert call.absorbed is not None and source is not None and passed is not None
    before, after = (
        call.per_sample(value, stream).sum(-1, dtype=torch.float64)
        for value, stream in ((output, relevance), (source, passed))
    )
    call.absorbed.add("constant", before - after)


def _one(call: Call, back: Tensor) -> Relevances:
    return (back, *[None] * (len(call.node.operands) - 1))


def _axis(axis: int, rank: int) -> int:
    """An axis of a tensor as an axis of its stream, which has the targets in front."""
    return axis % rank + 1


def _reshape(call: Call, relevance: Tensor) -> Relevances:
    return _one(call, relevance.reshape(relevance.shape[0], *call.shape(0)))


def _permute(call: Call, relevance: Tensor) -> Relevances:
    order = call.node.args[1]
    rank = len(order)
    inverse = [0] * (rank + 1)
    for i, axis in enumerate(order):
        inverse[axis % rank + 1] = i + 1
    return _one(call, relevance.permute(inverse))


def _transpose(call: Call, relevance: Tensor) -> Relevances:
    rank = len(call.shape(0))
    a, b = call.node.args[1:3] if len(call.node.args) > 2 else (-2, -1)
    return _one(call, relevance.transpose(_axis(a, rank), _axis(b, rank)))


def _t(call: Call, relevance: Tensor) -> Relevances:
    return _one(call, relevance.transpose(-2, -1) if relevance.ndim > 2 else relevance)


def _slice(call: Call, relevance: Tensor) -> Relevances:
    shape = call.shape(0)
    defaults: tuple[Any, ...] = (0, None, None, 1)
    axis, start, stop, step = (*call.node.args[1:], *defaults[len(call.node.args) - 1 :])
    if not all(item is None or isinstance(item, int) for item in (axis, start, stop, step)):
        return vjp(call, relevance)
    back = relevance.new_zeros(relevance.shape[0], *shape)
    index = [slice(None)] * back.ndim
    index[_axis(axis, len(shape))] = slice(start, stop, step)
    back[tuple(index)] = relevance
    return _one(call, back)


def _select(call: Call, relevance: Tensor) -> Relevances:
    shape = call.shape(0)
    axis, index = call.node.args[1:3]
    back = relevance.new_zeros(relevance.shape[0], *shape)
    back.select(_axis(axis, len(shape)), index).copy_(relevance)
    return _one(call, back)


def _cat(call: Call, relevance: Tensor) -> Relevances:
    tensors = call.node.args[0]
    axis = call.node.args[1] if len(call.node.args) > 1 else call.node.kwargs.get("dim", 0)
    at, start = _axis(axis, relevance.ndim - 1), 0
    parts: list[Tensor | None] = []
    for value in tensors:
        size = call.shapes[value.index][axis]
        part = relevance.narrow(at, start, size)
        start += size
        parts.append(part if value.carrying else None)
        if not value.carrying and call.absorbed is not None:
            _absorb_along(call, part, at)
    return tuple(parts)


def _absorb_along(call: Call, part: Tensor, at: int) -> None:
    sample = call.node.outputs[0].sample
    assert sample is not None
    if at != sample.axis + 1:
        call.absorb("constant", part)


def _stack(call: Call, relevance: Tensor) -> Relevances:
    axis = call.node.args[1] if len(call.node.args) > 1 else 0
    parts = relevance.unbind(_axis(axis, relevance.ndim - 1))
    carrying = [value.carrying for value in call.node.args[0]]
    for part, kept in zip(parts, carrying, strict=True):
        if not kept and call.absorbed is not None:
            call.absorb("constant", part.unsqueeze(_axis(axis, relevance.ndim - 1)))
    return tuple(part if kept else None for part, kept in zip(parts, carrying, strict=True))


def _several(relevance: Any) -> tuple[Tensor | None, ...]:
    return relevance if isinstance(relevance, tuple) else (relevance,)


def _filled(call: Call, relevance: Any) -> list[Tensor]:
    """One stream per output, zeros where nothing arrived."""
    parts = _several(relevance)
    given = next(part for part in parts if part is not None)
    return [
        given.new_zeros(given.shape[0], *call.shapes[value.index]) if part is None else part
        for part, value in zip(parts, call.node.outputs, strict=True)
    ]


def _unbind(call: Call, relevance: Any) -> Relevances:
    axis = call.node.args[1] if len(call.node.args) > 1 else 0
    parts = _filled(call, relevance)
    back = _laid_out(call, parts[0])
    at = _axis(axis, len(call.shape(0)))
    for i, part in enumerate(parts):
        back.select(at, i).copy_(part)
    return _one(call, back)


def _laid_out(call: Call, like: Tensor) -> Tensor:
    """An empty stream [T, *shape of the operand] in the memory order that the operand's own producer will undo.

    Below `unbind(permute(reshape(x)))`, as fused query-key-value projections have it, the two steps that follow are
    then views.
    """
    value = call.node.operands[0]
    assert value is not None
    shape, producer = call.shape(0), value.producer
    if producer is None or producer.target is not aten.permute.default:
        return like.new_empty(like.shape[0], *shape)
    order = [axis % len(shape) for axis in producer.args[1]]
    before = [0] * len(shape)
    for i, axis in enumerate(order):
        before[axis] = shape[i]
    return like.new_empty(like.shape[0], *before).permute(0, *(axis + 1 for axis in order))


def _split(call: Call, relevance: Any) -> Relevances:
    axis = call.node.args[2] if len(call.node.args) > 2 else call.node.kwargs.get("dim", 0)
    return _one(call, torch.cat(_filled(call, relevance), _axis(axis, len(call.shape(0)))))


def _expand(call: Call, relevance: Tensor) -> Relevances:
    return _one(call, unbroadcast(relevance, call.shape(0)))


def _topk(call: Call, relevance: Any) -> Relevances:
    values, picked = _several(relevance)[0], call.tensors[call.node.outputs[1].index]
    assert values is not None
    rank = len(call.shape(0))
    axis = call.node.args[2] if len(call.node.args) > 2 else -1
    back = values.new_zeros(values.shape[0], *call.shape(0))
    return _one(call, back.scatter(_axis(axis, rank), picked.expand_as(values), values))


def _same(call: Call, relevance: Tensor) -> Relevances:
    return _one(call, relevance)


def _masked_fill(call: Call, relevance: Tensor) -> Relevances:
    mask = call.tensors[call.node.args[1].index]
    return _one(call, unbroadcast(relevance.masked_fill(mask, 0.0), call.shape(0)))


def _masked_scatter(call: Call, relevance: Tensor) -> Relevances:
    """y takes the source's elements, in order, where the mask is set, and x elsewhere."""
    mask = call.tensors[call.node.args[1].index].expand(call.shapes[call.node.outputs[0].index])
    size = call.shape(2).numel()
    order = torch.where(mask, mask.flatten().cumsum(0).reshape(mask.shape) - 1, size).flatten()
    taken = relevance.new_zeros(len(relevance), size + 1)
    taken.scatter_(1, order.expand(len(relevance), -1), relevance.flatten(1))
    kept = unbroadcast(relevance.masked_fill(mask, 0.0), call.shape(0))
    return kept, None, taken[:, :size].reshape(len(relevance), *call.shape(2))


def _roll(call: Call, relevance: Tensor) -> Relevances:
    shifts, axes = call.node.args[1], (*call.node.args[2:], ())[0]
    if not axes:
        return vjp(call, relevance)
    shifts = [shifts] if isinstance(shifts, int) else shifts
    axes = [axes] if isinstance(axes, int) else axes
    rank = relevance.ndim - 1
    return _one(call, relevance.roll([-s for s in shifts], [_axis(a, rank) for a in axes]))


def _flip(call: Call, relevance: Tensor) -> Relevances:
    return _one(call, relevance.flip([_axis(a, relevance.ndim - 1) for a in call.node.args[1]]))


_FORMS: dict[Callable[[Call, Any], Relevances], str] = {
    _reshape: "view reshape flatten.using_ints unflatten.int _unsafe_view squeeze squeeze.dim squeeze.dims unsqueeze"
    " view_as",
    _permute: "permute",
    _transpose: "transpose.int swapaxes mT",
    _t: "t",
    _slice: "slice.Tensor",
    _select: "select.int",
    _cat: "cat concat",
    _stack: "stack",
    _unbind: "unbind.int",
    _split: "split.Tensor split_with_sizes split.sizes chunk",
    _expand: "expand expand_as broadcast_to",
    _same: "to.dtype to.device to.dtype_layout _to_copy contiguous clone alias type_as",
    _masked_fill: "masked_fill.Scalar",
    _masked_scatter: "masked_scatter",
    _topk: "topk",
    _roll: "roll",
    _flip: "flip",
}


def _table() -> dict[Any, Callable[[Call, Any], Relevances]]:
    from relprop.capture.ops import overloads

    return {op: form for form, names in _FORMS.items() for op in overloads(names)}


def _padding() -> frozenset[Any]:
    from relprop.capture.ops import overloads

    return overloads("pad constant_pad_nd im2col masked_fill.Scalar")


_ADJOINTS = _table()
_PADDING = _padding()
