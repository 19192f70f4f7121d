"""The gradient itself as a rule: the vector-Jacobian product of any operation, in closed form for the common ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import Tensor

from relprop.graph import Node, Value
from relprop.rules.base import ANY, Call, Relevances, Rule, register_rule, unbroadcast
from relprop.rules.linear_map import multiply, transpose, weight_of
from relprop.rules.movement_adjoint import adjoint, movement_needs
from relprop.rules.vjp import vjp

aten = torch.ops.aten


@register_rule
class Gradient(Rule):
    """g_in = J^T g_out, with the model's own Jacobian.

    Conservation:
        none; in a relevance stream the ledger books the difference under "rule".
    Source: the chain rule.
    """

    kind: ClassVar = ANY
    name: ClassVar = "gradient"
    conserves: ClassVar = False

    def needs(self, node: Node) -> tuple[bool, bool]:
        """By kind: a linear operation needs neither."""
        if node.kind == "movement":
            return movement_needs(node)
        return _NEEDS.get(node.kind, (True, True))

    def propagate(self, call: Call, relevance: Any) -> Relevances:
        """relevance: [T, *output shape] (a gradient), or one per output -> [T, *operand shape] per operand."""
        form = _FORMS.get(call.node.kind)
        return form(call, relevance) if form is not None else vjp(call, relevance)


def _rest(call: Call, first: Tensor | None) -> Relevances:
    return (first, *[None] * (len(call.node.operands) - 1))


def _linear(call: Call, gradient: Tensor) -> Relevances:
    if not call.wanted[0]:
        return vjp(call, gradient)
    return _rest(call, transpose(call, gradient, weight_of(call)))


def _matmul(call: Call, gradient: Tensor) -> Relevances:
    a, b = call.x, call.operand(1)
    assert b is not None
    left = unbroadcast(multiply(call, gradient, b.mT), a.shape) if call.wanted[0] else None
    right = unbroadcast(multiply(call, a.mT, gradient), b.shape) if call.wanted[1] else None
    return left, right


def _softmax(call: Call, gradient: Tensor) -> Relevances:
    axis = call.node.args[1] if len(call.node.args) > 1 else -1
    p = call.y
    at = axis % p.ndim + 1
    return _rest(call, p * (gradient - (p * gradient).sum(at, keepdim=True)))


def _add(call: Call, gradient: Tensor) -> Relevances:
    from relprop.rules.add_epsilon import signed_factors

    results: list[Tensor | None] = []
    for argument, factor in zip(call.node.args[:2], signed_factors(call), strict=True):
        if isinstance(argument, Value):
            part = gradient if factor == 1.0 else gradient * factor
            results.append(unbroadcast(part, call.shapes[argument.index]) if argument.carrying else None)
    return tuple(results)


def _mul(call: Call, gradient: Tensor) -> Relevances:
    node = call.node
    if node.target is aten.neg.default:
        return (-gradient,)
    divides = node.target is aten.div.Tensor
    if node.kwargs or (divides and isinstance(node.args[1], Value) and node.args[1].carrying):
        return vjp(call, gradient)
    results: list[Tensor | None] = []
    for argument, other in zip(node.args[:2], reversed(node.args[:2]), strict=True):
        if isinstance(argument, Value) and argument.carrying:
            factor = call.tensor(other) if isinstance(other, Value) else other
            part = gradient / factor if divides else gradient * factor
            results.append(unbroadcast(part, call.shapes[argument.index]))
        elif isinstance(argument, Value):
            results.append(None)
    return tuple(results)


def _norm(call: Call, gradient: Tensor) -> Relevances:
    node = call.node
    if node.target is not aten.layer_norm.default:
        return vjp(call, gradient)
    from relprop.rules.norm_sigma_constant import layer_norm_arguments

    x = call.x
    shape, weight, bias, eps = layer_norm_arguments(node)
    scale = call.tensor(weight) if isinstance(weight, Value) else None
    offset = call.tensor(bias) if isinstance(bias, Value) else None
    _, mean, inverse = torch.native_layer_norm(x, shape, scale, offset, eps)
    rows = [
        aten.native_layer_norm_backward(g, x, shape, mean, inverse, scale, offset, [True, False, False])[0]
        for g in gradient
    ]
    return _rest(call, rows[0].unsqueeze(0) if len(rows) == 1 else torch.stack(rows))


def _activation(call: Call, gradient: Tensor) -> Relevances:
    if gradient.shape[0] == 1 and call.node.target is aten.gelu.default:
        approximate = call.node.kwargs.get("approximate", "none")
        return _rest(call, aten.gelu_backward(gradient[0], call.x, approximate=approximate).unsqueeze(0))
    # Elementwise: one slope serves all targets.
    slope = vjp(call, torch.ones_like(gradient[:1]))[0]
    assert slope is not None
    return _rest(call, gradient * slope)


def _fanout(call: Call, gradient: Any) -> Relevances:
    parts = gradient if isinstance(gradient, tuple) else (gradient,)
    return (reduce(torch.add, [part for part in parts if part is not None]),)


def _select(call: Call, gradient: Tensor) -> Relevances:
    return (gradient.reshape(gradient.shape[0], *call.shape(0)),)


def _movement(call: Call, gradient: Any) -> Relevances:
    return adjoint(call, gradient)


def _attention(call: Call, gradient: Tensor) -> Relevances:
    from relprop.rules.attention_composed import attention_gradient

    return attention_gradient(call, gradient)


def _embedding(call: Call, gradient: Tensor) -> Relevances:
    return None, None


_NEEDS = {
    **dict.fromkeys(("linear", "conv", "add", "fanout", "select", "movement", "embedding"), (False, False)),
    **dict.fromkeys(("matmul", "attention", "mul", "norm", "activation", "pool"), (True, False)),
    "softmax": (False, True),
}

_FORMS: dict[str, Callable[[Call, Any], Relevances]] = {
    "linear": _linear,
    "conv": _linear,
    "matmul": _matmul,
    "softmax": _softmax,
    "attention": _attention,
    "add": _add,
    "mul": _mul,
    "norm": _norm,
    "activation": _activation,
    "fanout": _fanout,
    "select": _select,
    "movement": _movement,
    "embedding": _embedding,
}
