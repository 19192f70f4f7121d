"""What every rule's test does: capture one operation for real, run its rule, hold it to a formula written out anew.

Nothing here computes a share the way a rule does: oracles build every single contribution z[n, k] and add them up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from relprop.capture import capture, lower
from relprop.execute import run_forward
from relprop.graph import Node, SampleAxis, Value
from relprop.ledger import LedgerEntry, book
from relprop.program import ForwardStep
from relprop.rules import Absorbed, Call, Rule, Stabiliser
from relprop.weights import Derive

Parts = tuple[Tensor | None, ...]
Oracle = Callable[..., Any]

# Sums of at most a few thousand float64 terms whose denominators cancel to no less than about 1e-4 of their terms.
EXACT_TOLERANCE = 1e-10
# The same sums in float32 (6e-8), only where denominators keep at least a fiftieth of the size of their terms.
SINGLE_TOLERANCE = 1e-4
# One sample or target alone goes through the same sums, in blocks of another size.
ALONE_TOLERANCE = 1e-11

# Batch and targets. (4, 3) holds (1, 3) and (4, 1) as well: `check_rule` runs each sample and each target alone.
SIZES = [(1, 1), (4, 3)]


def random(*shape: int, seed: int = 0, zeros: bool = False) -> Tensor:
    """Normal numbers that float32 holds exactly; every fifth is 0 where asked for."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()
    if zeros:
        made.view(-1)[::5] = 0.0
    return made


def spread_out(tensor: Tensor) -> Tensor:
    """The same numbers, not contiguous, with NaN between them."""
    room = torch.full((*tensor.shape, 2), float("nan"), dtype=tensor.dtype)
    room[..., 0] = tensor
    return room[..., 0]


def divide(relevance: Tensor, z: Tensor, stabiliser: Stabiliser) -> Tensor:
    """relevance / stab(z) from the stabiliser's definition, one branch per line."""
    epsilon = torch.tensor(stabiliser.epsilon, dtype=z.dtype)
    if stabiliser.kind == "reference":
        z = torch.where(z + epsilon == 0, epsilon, z + epsilon) / (z != 0)  # a zero z becomes infinite: share 0
    elif stabiliser.epsilon == 0:
        z = torch.where(z == 0, torch.inf, z)
    else:
        z = z + epsilon * (2.0 * (z >= 0).to(z.dtype) - 1.0)
    return relevance / z


class _One(nn.Module):
    def __init__(self, function: Callable[..., Tensor], constants: dict[str, Tensor]) -> None:
        super().__init__()
        self.function = function
        for name, tensor in constants.items():
            self.register_buffer(name, tensor)

    def call(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs, **dict(self.named_buffers()))

    def forward(self, a: Tensor) -> Tensor:
        return self.call(a)


class _Two(_One):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        return self.call(a, b)


class _Three(_One):
    def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:  # type: ignore[override]
        return self.call(a, b, c)


def module_of(function: Callable[..., Tensor], inputs: int = 1, **constants: Tensor) -> nn.Module:
    """A function of one to three tensors and of named constants as a module."""
    return (_One, _Two, _Three)[inputs - 1](function, constants)


class Op:
    """One operation of a small module, captured as the engine captures it, on any batch and in any dtype.

    Args:
        module: what holds the operation.
        inputs: an example call.
        kind, target: which node; the only carrying one of that kind whose op has `target` in its name.
    """

    def __init__(self, module: nn.Module, *inputs: Tensor, kind: str, target: str = "") -> None:
        self.module = module.eval().double()
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.is_floating_point():
                    tensor.copy_(tensor.float().double())
        captured = capture(self.module, inputs, {}, None)
        self.graph = lower(captured)
        self.places = [self.graph.inputs[spec.placeholder].index for spec in captured.inputs]
        found = [n for n in self.graph.nodes if n.kind == kind and n.carrying and target in str(n.target)]
        assert len(found) == 1, [(n.kind, str(n.target)) for n in self.graph.nodes]
        self.node: Node = found[0]

    def weights(self) -> dict[str, Tensor]:
        return {name: self.module.state_dict()[name] for name in self.graph.parameters.values()}

    def call(
        self,
        inputs: Sequence[Tensor],
        dtype: torch.dtype = torch.float64,
        *,
        weights: dict[str, Tensor] | None = None,
        absorbed: Absorbed | None = None,
        node: Node | None = None,
    ) -> Call:
        """What a rule sees of the operation (or of another node) for these inputs; all operands are wanted."""
        given = self.weights() if weights is None else weights
        bound: dict[int, Any] = {**self.graph.constants, **dict(zip(self.places, inputs, strict=True))}
        bound |= {index: given[name] for index, name in self.graph.parameters.items()}
        bound = {i: t.to(dtype) if t.is_floating_point() else t for i, t in bound.items()}
        program: Any = SimpleNamespace(graph=self.graph, forward=[ForwardStep(n, ()) for n in self.graph.nodes])
        forward = run_forward(program, bound, _Derive())
        return make_call(node or self.node, forward.tensors, forward.shapes, dtype, absorbed)

    def output(self, inputs: Sequence[Tensor]) -> Tensor:
        """The operation's output. [B, ...]"""
        return self.call(inputs).y

    def relevance(self, inputs: Sequence[Tensor], targets: int, seed: int = 7) -> Any:
        """Random relevance at every output. [T, B, ...]"""
        shapes = self.call(inputs).shapes
        made = [random(targets, *shapes[v.index], seed=seed + i) for i, v in enumerate(self.node.outputs)]
        return tuple(made) if len(made) > 1 else made[0]


def make_call(
    node: Node, tensors: dict[int, Any], shapes: dict[int, torch.Size], dtype: torch.dtype, absorbed: Absorbed | None
) -> Call:
    return Call(node, tensors, shapes, tuple(v is not None for v in node.operands), dtype, _Derive(), absorbed)


class _Derive(Derive):
    """Magnitudes are formed in another way than the engine's."""

    def __call__(self, value: Value, tensor: Tensor, transform: str, dtype: torch.dtype) -> Tensor:
        transforms = {"": lambda t: t, "abs": torch.abs, "positive": torch.relu, "negative": lambda t: -torch.relu(-t)}
        return transforms[transform](tensor.to(dtype))


def call_by_hand(kind: str, target: Any, args: Sequence[Any], outputs: Any, **kwargs: Any) -> Call:
    """A call of an op that no capture of a small module gives; every tensor among the arguments carries."""
    tensors: dict[int, Any] = {}

    def value(tensor: Tensor) -> Value:
        made = Value(len(tensors), f"v{len(tensors)}", tuple(tensor.shape), tensor.dtype, True, SampleAxis(0, 1))
        tensors[made.index] = tensor
        return made

    def wrap(item: Any) -> Any:
        if isinstance(item, Tensor):
            return value(item)
        return [wrap(i) for i in item] if isinstance(item, list) else item

    wrapped = [wrap(item) for item in args]
    operands = tuple(
        v for item in wrapped for v in (item if isinstance(item, list) else [item]) if isinstance(v, Value)
    )
    made = tuple(value(t) for t in (outputs if isinstance(outputs, (tuple, list)) else [outputs]))
    node = Node("by_hand", kind, target, tuple(wrapped), kwargs, operands, made)
    return make_call(node, tensors, {i: t.shape for i, t in tensors.items()}, torch.float64, None)


def assert_near(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Every element within tolerance of itself or of the tensor's root mean square; no NaN."""
    assert got.shape == want.shape, f"expected shape {list(want.shape)}, got {list(got.shape)}"
    if want.numel() == 0:
        return
    want = want.double()
    scale = torch.maximum(want.abs(), want.square().mean().sqrt()).clamp(min=1e-30)
    error = ((got.double() - want).abs() / scale).max()
    assert bool(error <= tolerance), f"relative error {float(error):.3g}, tolerance {tolerance:g}"


def assert_parts(got: Parts, want: Parts, tolerance: float) -> None:
    for one, other in zip(got, want, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert_near(one, other, tolerance)


def each(function: Callable[[Tensor], Tensor], relevance: Any) -> Any:
    """A function of one stream over one or several."""
    if isinstance(relevance, tuple):
        return tuple(None if r is None else function(r) for r in relevance)
    return function(relevance)


def only_needed(op: Op, rule: Rule, inputs: Sequence[Tensor]) -> Call:
    """The call as a plan leaves it: without what the rule says that it does not need."""
    call, (needs_inputs, needs_output) = op.call(inputs), rule.needs(op.node)
    for value in op.node.operands:
        if value is not None and value.carrying and not needs_inputs:
            call.tensors.pop(value.index, None)
    for value in op.node.outputs:
        if not needs_output:
            call.tensors.pop(value.index, None)
    return call


def by_autograd(op: Op, relevance: Any, inputs: Sequence[Tensor]) -> Parts:
    """The vector-Jacobian product of the node's function alone, one target at a time."""
    call = op.call(inputs)
    carrying = [v for v in op.node.operands if v is not None and v.carrying]
    leaves = {v.index: call.tensors[v.index].detach().clone().requires_grad_() for v in carrying}
    call.tensors.update(leaves)
    outputs = op.node.target(*call.raw(op.node.args), **call.raw(op.node.kwargs))
    given = relevance if isinstance(relevance, tuple) else (relevance,)
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,) * len(given)  # a fan-out has one
    rows = []
    for target in range(next(len(r) for r in given if r is not None)):
        total = sum((out * r[target]).sum() for out, r in zip(outputs, given, strict=True) if r is not None)
        assert isinstance(total, Tensor)
        rows.append(torch.autograd.grad(total, list(leaves.values()), retain_graph=True))
    found = dict(zip(leaves, (torch.stack(parts) for parts in zip(*rows, strict=True)), strict=True))
    return tuple(None if v is None else found.get(v.index) for v in op.node.operands)


def _cut(stream: Tensor, axis: int, at: slice) -> Tensor:
    return stream[at] if axis == 0 else stream[:, at]


def check_rule(
    op: Op,
    rule: Rule,
    inputs: Sequence[Tensor],
    relevance: Any,
    oracle: Oracle,
    settled: Callable[..., Tensor] | None = None,
) -> None:
    """Hold a rule to its oracle: float64, strided memory, one sample and one target at a time, float32.

    Args:
        oracle: relevance at every operand from (relevance, *inputs).
        settled: outputs whose denominators do not cancel, from the inputs; float32 gets relevance only there.
    """
    got = rule.propagate(op.call(inputs), relevance)
    want = oracle(relevance, *inputs)
    assert_parts(got, want, EXACT_TOLERANCE)

    assert_parts(rule.propagate(only_needed(op, rule, inputs), relevance), got, ALONE_TOLERANCE)

    strided = rule.propagate(op.call([spread_out(x) for x in inputs]), each(spread_out, relevance))
    assert_parts(strided, got, ALONE_TOLERANCE)

    first = relevance if isinstance(relevance, Tensor) else next(r for r in relevance if r is not None)
    for sample in range(first.shape[1]):
        at = slice(sample, sample + 1)
        alone = rule.propagate(op.call([x[at] for x in inputs]), each(partial(_cut, axis=1, at=at), relevance))
        assert_parts(alone, tuple(None if p is None else p[:, at] for p in got), ALONE_TOLERANCE)
    for target in range(first.shape[0]):
        at = slice(target, target + 1)
        alone = rule.propagate(op.call(inputs), each(partial(_cut, axis=0, at=at), relevance))
        assert_parts(alone, tuple(None if p is None else p[at] for p in got), ALONE_TOLERANCE)

    if settled is not None:
        relevance = each(lambda r: r * settled(*inputs), relevance)
    single = rule.propagate(op.call(inputs, torch.float32), each(lambda r: r.float(), relevance))
    assert all(part is None or part.dtype == torch.float32 for part in single)
    assert_parts(single, oracle(relevance, *inputs), SINGLE_TOLERANCE)


def ledger_entry(op: Op, rule: Rule, inputs: Sequence[Tensor], relevance: Any) -> LedgerEntry:
    """The books of one step, its sums taken here."""
    booked = Absorbed()
    passed = rule.propagate(op.call(inputs, absorbed=booked), relevance)

    def sums(tensors: Any) -> list[tuple[Tensor, Tensor]]:
        flat = [t.flatten(2) for t in tensors if t is not None]
        return [(t.sum(-1), t.abs().sum(-1)) for t in flat]

    arriving = sums(relevance if isinstance(relevance, tuple) else (relevance,))
    return book(op.node, rule.describe(), bool(rule.conserves), arriving, sums(passed), booked.causes)


def check_ledger(op: Op, rule: Rule, inputs: Sequence[Tensor], relevance: Any, causes: Sequence[str]) -> LedgerEntry:
    """arriving = passed + absorbed per target and sample, with exactly these causes.

    Where a rule does not conserve the ledger closes by definition, and "rule" holds the difference.
    """
    entry = ledger_entry(op, rule, inputs, relevance)
    assert set(entry.absorbed) == set(causes)
    size = entry.arriving.abs() + entry.passed.abs() + sum(a.abs() for a in entry.absorbed.values()) + 1.0
    # Sums of float64 shares, whose magnitudes are larger than their sum by the amplification.
    assert bool((entry.rounding.abs() <= 1e-13 * size * (1 + entry.amplification)).all()), entry.rounding
    return entry


def check_gradient(
    op: Op, rule: Rule, inputs: Sequence[Tensor], relevance: Tensor, weights: dict[str, Tensor] | None = None
) -> None:
    """gradcheck of the rule with respect to relevance, inputs and weights, in float64."""
    weights = {name: t for name, t in (weights or op.weights()).items() if t.is_floating_point()}

    def run(arriving: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = op.weights() | dict(zip(weights, tensors[len(inputs) :], strict=True))
        passed = rule.propagate(op.call(tensors[: len(inputs)], weights=given), arriving)
        return tuple(part for part in passed if part is not None)

    leaves = [t.detach().clone().requires_grad_() for t in (relevance, *inputs, *weights.values())]
    assert torch.autograd.gradcheck(run, leaves)


def away_from_zero(tensor: Tensor, distance: float = 0.3) -> Tensor:
    """Numbers moved away from 0, where magnitudes and signs are smooth."""
    return tensor + distance * torch.where(tensor < 0, -1.0, 1.0)
