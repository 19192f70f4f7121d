"""Where the Triton backend takes streams through several steps in one kernel.

Through a linear layer and the activation below it: the gradient of both, while relevance passes the activation as it
is. A gradient alone, also one that AttnLRP's rules modify, through a linear layer, a gate and its activation. Through a
linear layer, the fan-out and the normalised add of a residual block (and norms that pass relevance on):
the sums per sample are taken on the way, and the add's scales are left to the steps below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from relprop.backends import triton
from relprop.backends.elementwise import ACTIVATIONS, stored
from relprop.graph import Node, Value
from relprop.program import FusedKernel, FusedStep, Place, ReverseStep, Scaled
from relprop.rules import (
    ActivationIdentity,
    ActivationSlope,
    AddNormalised,
    Call,
    FanoutEpsilon,
    Gradient,
    ModifiedGradient,
    MulHalf,
    NormIdentity,
    Rule,
)

_CHANNELS = 16  # rows of another multiple are read one element at a time, which the residual epilogue has no room for

_PRODUCTS = (torch.ops.aten.mul.Tensor,)

Steps = Mapping[Node, ReverseStep]
Unseen = Callable[[Value], bool]


def fused_step(step: ReverseStep, steps: Steps, unseen: Unseen, alone: bool) -> FusedStep | None:
    """The kernel that starts with a linear layer's step; see `relprop.program.FindFused`."""
    node, rules = step.node, {stream.stream: stream.rule for stream in step.streams}
    if node.kind != "linear" or step.maps or not all(stream.wanted[0] for stream in step.streams):
        return None
    gated = None if alone else _gated(step, rules, steps, unseen)
    if gated is not None:
        return gated
    if not all(_takes(node, name, rule) for name, rule in rules.items()) or not rules:
        return None
    if alone:
        return _fused(step, _Linear(rules), (node,), frozenset(), _places(rules, node.operands[0]))
    return _activation(step, rules, steps, unseen) or _residual(step, rules, steps, unseen)


def _takes(node: Node, stream: str, rule: Rule) -> bool:
    if stream == "gradient":
        return isinstance(rule, Gradient)
    return triton.KERNELS.get(type(rule)) is triton.linear and not triton.kernel_reasons(node, rule)


def _places(rules: Mapping[str, Rule], value: Value | None) -> tuple[Place, ...]:
    assert value is not None
    return tuple((name, value) for name in rules)


def _fused(
    step: ReverseStep,
    kernel: FusedKernel,
    nodes: tuple[Node, ...],
    covers: frozenset[tuple[str, Node]],
    gives: tuple[Place, ...],
    more: tuple[Place, ...] = (),
    scaled: bool = False,
) -> FusedStep:
    takes = (*((s.stream, step.node.outputs[0]) for s in step.streams), *more)
    left = tuple(scaled and name == "relevance" for name, _ in gives)
    return FusedStep("triton (fused)", kernel, nodes, covers, takes, gives, left)


def _rule_of(steps: Steps, node: Node, stream: str = "relevance") -> Rule | None:
    """What a stream meets at a node, if it goes on."""
    step = steps.get(node)
    if step is None or step.maps:
        return None
    return next((s.rule for s in step.streams if s.stream == stream and any(s.wanted)), None)


def _activation(step: ReverseStep, rules: dict[str, Rule], steps: Steps, unseen: Unseen) -> FusedStep | None:
    (x, *_), node = step.node.operands, step.node
    below = None if x is None else x.producer
    if x is None or below is None or below.target not in ACTIVATIONS or "gradient" not in rules or not unseen(x):
        return None
    met = {name: _rule_of(steps, below, name) for name in rules}
    passes = {"gradient": Gradient, "relevance": ActivationIdentity}
    h = below.operands[0]
    if h is None or not all(isinstance(rule, passes[name]) for name, rule in met.items()):
        return None
    if h.index not in steps[below].tensors:
        return None
    covers = frozenset((name, below) for name in rules)
    return _fused(step, _Linear(rules, triton.activation_name(below)), (node, below), covers, _places(rules, h))


def _gated(step: ReverseStep, rules: dict[str, Rule], steps: Steps, unseen: Unseen) -> FusedStep | None:
    """A gradient, of the model or as AttnLRP has it, through f(h) u; or as AttnLRP has it through f(h)."""
    m = step.node.operands[0]
    if m is None or not unseen(m) or len(rules) != 1:
        return None
    ((name, rule),) = rules.items()
    if not isinstance(rule, Gradient):
        return None
    found = (m, None, 1.0, ()) if _is_activation(m) else _gate(m.producer, steps, name, unseen)
    if found is None:
        return None
    f, u, factor, gates = found
    assert f.producer is not None
    h, form = f.producer.operands[0], _rule_of(steps, f.producer, name)
    # `linear_back` takes a gradient through an activation without a gate.
    known = _modifies(form, ActivationSlope) or (isinstance(form, Gradient) and u is not None)
    if not known or h is None or h.index not in steps[f.producer].tensors or str(h.shape) != str(f.shape):
        return None
    nodes = (step.node, *gates, f.producer)
    if not {v.index for v in (f, u) if v is not None} <= set(steps[nodes[1]].tensors):
        return None
    derivative = triton.activation_name(f.producer) if isinstance(form, Gradient) else None
    gives = _places(rules, h) + (() if u is None else _places(rules, u))
    covers = frozenset((name, covered) for covered in nodes[1:])
    return _fused(step, _LinearGated(h, f, u, derivative, factor), nodes, covers, gives)


def _gate(
    node: Node | None, steps: Steps, name: str, unseen: Unseen
) -> tuple[Value, Value, float, tuple[Node, ...]] | None:
    """f(h) and u of a product of two values of one shape, and the factor of a stream's gradients at both."""
    met = None if node is None else _rule_of(steps, node, name)
    if node is None or node.target not in _PRODUCTS or len(node.operands) != 2:
        return None
    f, u = node.operands if _is_activation(node.operands[0]) else node.operands[::-1]
    if f is None or u is None or not _is_activation(f) or not unseen(f) or str(f.shape) != str(u.shape):
        return None
    if not (isinstance(met, Gradient) or _modifies(met, MulHalf)):
        return None
    if not all(next(s.wanted for s in steps[node].streams if s.stream == name)):
        return None
    return f, u, 1.0 if isinstance(met, Gradient) else 0.5, (node,)


def _is_activation(value: Value | None) -> bool:
    return value is not None and value.producer is not None and value.producer.target in ACTIVATIONS


def _modifies(rule: Rule | None, kind: type[Rule]) -> bool:
    return isinstance(rule, ModifiedGradient) and isinstance(rule.rule, kind)


def _residual(step: ReverseStep, rules: dict[str, Rule], steps: Steps, unseen: Unseen) -> FusedStep | None:
    node, x = step.node, step.node.operands[0]
    if "relevance" not in rules or x is None or not isinstance(x.shape[-1], int) or x.shape[-1] % _CHANNELS:
        return None
    way = _way(x, steps, unseen)
    if way is None:
        return None
    nodes, gathered, add = way
    other = next(value for value in gathered.outputs if value not in (x, *(n.operands[0] for n in nodes)))
    rule, gather = _rule_of(steps, add), _rule_of(steps, gathered)
    assert isinstance(rule, AddNormalised) and isinstance(gather, FanoutEpsilon)
    shapes = {str(v.shape) for v in (x, gathered.operands[0], *add.operands[:2], add.outputs[0]) if v is not None}
    a, b = add.operands[:2]
    if len(shapes) != 1 or a is None or b is None or a is b or not all(unseen(v) for v in (other, a, b)):
        return None
    if triton.kernel_reasons(add, rule) or not {a.index, b.index} <= set(steps[add].tensors):
        return None
    wanted = next(s.wanted for s in steps[add].streams if s.stream == "relevance")[:2]
    gives: list[Place] = [("relevance", v) for v, want in zip((a, b), wanted, strict=True) if want]
    gives += [(name, x) for name in rules if name == "gradient"]
    covers = frozenset(("relevance", covered) for covered in (*nodes, gathered, add))
    kernel = _LinearAdd(rules, gather, rule, wanted)
    return _fused(step, kernel, (node, gathered, add), covers, tuple(gives), (("relevance", other),), scaled=True)


def _way(x: Value, steps: Steps, unseen: Unseen) -> tuple[list[Node], Node, Node] | None:
    """Norms that relevance passes as it is, the fan-out of two uses and the normalised add that it gets to."""
    passed: list[Node] = []
    gathered: Node | None = None
    value: Value | None = x
    while value is not None and value.producer is not None and unseen(value):
        node, rule = value.producer, _rule_of(steps, value.producer)
        if isinstance(rule, NormIdentity):
            passed.append(node)
        elif isinstance(rule, FanoutEpsilon) and gathered is None and len(node.outputs) == 2:
            gathered = node
        elif isinstance(rule, AddNormalised) and gathered is not None:
            return passed, gathered, node
        else:
            return None
        value = node.operands[0]
    return None


def _shares(rules: Mapping[str, Rule], call: Call, streams: Mapping[str, Tensor | Scaled]) -> dict[str, Any]:
    """What `linear_back` takes for relevance; its weight alone where there is none."""
    relevance = streams.get("relevance")
    if relevance is None:
        weight = call.node.operands[1]
        assert weight is not None
        return {"p1": None, "p2": None, "x": None, "w": call.tensors[weight.index]}
    return triton.shares(rules["relevance"], call, *_apart(relevance))


def _apart(stream: Tensor | Scaled) -> tuple[Tensor, Tensor | None]:
    return (stream.tensor, stream.scale) if isinstance(stream, Scaled) else (stream, None)


@dataclass(frozen=True)
class _Linear:
    """Streams through a linear layer, and through the activation whose output is its input."""

    rules: Mapping[str, Rule]
    activation: str | None = None

    def __call__(self, calls: Sequence[Call], arrived: Sequence[Tensor | Scaled]) -> list[Tensor | Scaled]:
        from relprop.kernels.linear_back import linear_back

        call, streams = calls[0], dict(zip(self.rules, arrived, strict=True))
        options = {}
        if self.activation is not None:
            h = stored(calls[1], calls[1].node.operands[0])
            options = {"activation": self.activation, "preactivation": h}
        found = linear_back(
            **_shares(self.rules, call, streams),
            gradients=streams.get("gradient"),  # type: ignore[arg-type]
            precision=call.precision,
            **options,
        )
        made = dict(zip(("relevance", "gradient"), found, strict=True))
        return [made[name] for name in self.rules]  # type: ignore[misc]


@dataclass(frozen=True)
class _LinearGated:
    """A gradient through a linear layer and factor f(h) u, u None for 1; derivative None for the slope f(h) / h."""

    h: Value
    f: Value
    u: Value | None
    derivative: str | None
    factor: float

    def __call__(self, calls: Sequence[Call], arrived: Sequence[Tensor | Scaled]) -> list[Tensor | Scaled]:
        from relprop.kernels.linear_back_gated import linear_back_gated

        call, product, weight = calls[0], calls[1], calls[0].node.operands[1]
        assert weight is not None
        (gradients,) = arrived
        found = linear_back_gated(
            gradients,  # type: ignore[arg-type]
            call.tensors[weight.index],
            stored(calls[-1], self.h),
            stored(product, self.f),
            None if self.u is None else stored(product, self.u),
            activation=self.derivative,
            factor=self.factor,
            precision=call.precision,
        )
        return [part for part in found if part is not None]


@dataclass(frozen=True)
class _LinearAdd:
    """Relevance through a linear layer, a fan-out and a normalised add; the gradient through the layer."""

    rules: Mapping[str, Rule]
    gather: FanoutEpsilon
    add: AddNormalised
    wanted: tuple[bool, ...]

    def __call__(self, calls: Sequence[Call], arrived: Sequence[Tensor | Scaled]) -> list[Tensor | Scaled]:
        from relprop.kernels.linear_back_add import linear_back_add

        call, gathered, add = calls
        *streams, beside = arrived
        by_name = dict(zip(self.rules, streams, strict=True))
        other, scale = _apart(beside)
        a, b = (stored(add, value) for value in add.node.operands[:2])
        *parts, scales, passed = linear_back_add(
            **_shares(self.rules, call, by_name),
            other=other,
            f=a if self.gather.stabiliser.is_exact else stored(gathered, gathered.node.operands[0]),
            a=a,
            b=b,
            gradients=by_name.get("gradient"),  # type: ignore[arg-type]
            other_scale=scale,
            gather_stabiliser=self.gather.stabiliser.code,
            stabiliser=self.add.stabiliser.code,
            precision=call.precision,
        )
        made: list[Tensor | Scaled] = [Scaled(part, scales[..., i]) for i, part in enumerate(parts) if self.wanted[i]]
        return made if passed is None else [*made, passed]
