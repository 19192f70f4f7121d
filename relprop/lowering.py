"""A program as one function of tensors, and as one graph of custom ops and aten ops."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from relprop.execute import run_pass
from relprop.graph import Graph, Node, Value, leaves
from relprop.methods.attention_maps import EDGES
from relprop.methods.base import Reading
from relprop.program import ForwardStep, FusedStep, JointKernel, JointStream, Kernel, Program, ReverseStep, Scaled
from relprop.rules import Call, Relevances, Rule
from relprop.targets import Target, aimed_at
from relprop.weights import Derive, DerivedWeights, DeriveOnce

DerivedKey = tuple[str, str, torch.dtype]


class Outcome(NamedTuple):
    """What one pass answers: relevance [T, B, ...], logits, indices [B, T, k] and the profile [T or 1, B, N]."""

    relevance: Tensor
    logits: Tensor
    index: Tensor
    profile: Tensor | None


def outcome_of(tensors: Sequence[Tensor]) -> Outcome:
    """From the tensors that there are of it."""
    relevance, logits, index, *profile = tensors
    return Outcome(relevance, logits, index, profile[0] if profile else None)


@dataclass
class Layout:
    """What a pass shows of itself that does not depend on values."""

    shapes: dict[int, torch.Size]
    explained_tokens: Tensor | None


class DeriveInGraph(Derive):
    """What is derived from weights, as inputs of a graph; what is not among them is derived inside it."""

    def __init__(self, graph: Graph, given: Mapping[DerivedKey, Tensor]) -> None:
        self._names, self._given = graph.parameters, given

    def __call__(self, value: Value, tensor: Tensor, transform: str, dtype: torch.dtype) -> Tensor:
        found = self._given.get((self._names.get(value.index, ""), transform, dtype))
        return super().__call__(value, tensor, transform, dtype) if found is None else found


class PassFunction:
    """One pass as a function of tensors alone, with no decision on their values.

    Args:
        indices: of the values that the tensors given to it are.
        derive: from the weights; kept once per model, or inputs of a graph.
        index: [B, T, k], None for the largest output.
        explained: `Reading.explained_tokens`, so that no tensor is made from Python's numbers.
    """

    def __init__(self, program: Program, indices: Sequence[int], dtype: torch.dtype, precision: str) -> None:
        self.program, self.indices = program, tuple(indices)
        self.dtype, self.precision = dtype, precision
        self.layout: Layout | None = None

    def __call__(
        self,
        tensors: Sequence[Tensor],
        index: Tensor | None,
        derive: Derive,
        explained: Tensor | None = None,
    ) -> Outcome:
        result = run_pass(
            self.program,
            dict(zip(self.indices, tensors, strict=True)),
            lambda output: self._aim(index, output),
            derive,
            self.dtype,
            self.precision,
            explained=explained,
        )
        reading: Reading = result.reading
        self.layout = Layout(result.shapes, reading.explained_tokens)
        relevance = result.relevance.expand(reading.targets, *result.relevance.shape[1:])
        found = result.target.index
        assert found is not None
        return Outcome(relevance, result.output, found, reading.profile)

    def _aim(self, index: Tensor | None, output: Tensor) -> Target:
        if index is None:
            index = output.argmax(-1).reshape(output.shape[0], 1, 1)
        return aimed_at(index, output, self.dtype, several=True)


def lower(
    function: PassFunction,
    tensors: Sequence[Tensor],
    index: Tensor | None,
    derived: Mapping[DerivedKey, Tensor],
    explained: Tensor | None,
    weights: DerivedWeights,
) -> tuple[fx.GraphModule, list[Tensor]]:
    """The pass as one graph for these sizes: kernels as custom ops, everything else as aten ops.

    Args:
        weights: the cache that kernels derive from when they run.
    Returns:
        the graph, and the inputs that it was made with.
    """
    keys, graph = list(derived), function.program.graph
    own = PassFunction(opaque(function.program, weights), function.indices, function.dtype, function.precision)
    fixed = [index, explained]
    given = [t for t in fixed if t is not None]

    def flat(*inputs: Tensor) -> tuple[Tensor, ...]:
        rest = iter(inputs[len(tensors) + len(keys) :])
        again = [None if t is None else next(rest) for t in fixed]
        made = dict(zip(keys, inputs[len(tensors) :], strict=False))
        outcome = own(inputs[: len(tensors)], again[0], DeriveInGraph(graph, made), again[1])
        return tuple(t for t in outcome if t is not None)

    inputs = [*tensors, *derived.values(), *given]
    lowered = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    lowered.meta["program"] = own.program  # keeps the steps that its custom ops name
    return lowered, inputs


@dataclass
class _Step:
    """A kernel with what it needs beside tensors; shapes and indices are of the values of its node."""

    run: Callable[[Call, Sequence[Tensor], Sequence[Tensor | None]], list[Tensor]]
    fake: Callable[[Sequence[Tensor], Sequence[Tensor | None]], list[Tensor]]
    node: Node
    indices: list[int]
    plain: dict[int, Any]
    shapes: dict[int, torch.Size]
    wanted: tuple[bool, ...]
    dtype: torch.dtype
    precision: str
    derive: Derive

    def call(self, saved: Sequence[Tensor]) -> Call:
        tensors = {**self.plain, **dict(zip(self.indices, saved, strict=True))}
        return Call(self.node, tensors, self.shapes, self.wanted, self.dtype, self.derive, precision=self.precision)


_STEPS: weakref.WeakValueDictionary[int, _Step] = weakref.WeakValueDictionary()
_HANDLES = itertools.count()


@torch.library.custom_op("relprop::step", mutates_args=())
def _run_step(saved: Sequence[Tensor], arrived: Sequence[Tensor], there: Sequence[bool], step: int) -> list[Tensor]:
    """A step of this process's plans: what it passed on, in its own memory."""
    found = _STEPS[step]
    given = {t.data_ptr() for t in (*saved, *arrived)}
    made = found.run(found.call(saved), saved, _spread(arrived, there))
    return [t.clone() if t.data_ptr() in given else t.contiguous() for t in made]


@_run_step.register_fake
def _(saved: Sequence[Tensor], arrived: Sequence[Tensor], there: Sequence[bool], step: int) -> list[Tensor]:
    return _STEPS[step].fake(saved, _spread(arrived, there))


def _spread(arrived: Sequence[Tensor], there: Sequence[bool]) -> list[Tensor | None]:
    given = iter(arrived)
    return [next(given) if is_there else None for is_there in there]


def plain(program: Program) -> Program:
    """The same plan with every rule in plain PyTorch."""
    return replace(
        program,
        forward=tuple(replace(step, kernel=None, sums=False) for step in program.forward),
        reverse=tuple(
            replace(
                step,
                joint=None,
                fused=None,
                streams=tuple(replace(s, backend="torch", kernel=None) for s in step.streams),
                remakes=tuple(replace(made, kernel=None) for made in step.remakes),
            )
            for step in program.reverse
        ),
    )


def known_sizes(graph: Graph, inputs: Mapping[int, Tensor]) -> dict[Any, int]:
    """What the free sizes are in a call with these inputs, by symbol."""
    return {
        size.node.expr: real
        for value in graph.inputs.values()
        if value.index in inputs
        for size, real in zip(value.shape, inputs[value.index].shape, strict=True)
        if isinstance(size, torch.SymInt)
    }


def shape_within(value: Value, known: Mapping[Any, int]) -> torch.Size:
    """The shape that a value will have."""
    return torch.Size(
        int(size.node.expr.subs(known)) if isinstance(size, torch.SymInt) else size for size in value.shape
    )


def output_shape(graph: Graph, inputs: Mapping[int, Tensor]) -> torch.Size:
    """The shape that the model's output will have."""
    return shape_within(graph.output, known_sizes(graph, inputs))


def opaque(program: Program, weights: DerivedWeights) -> Program:
    """The same plan with every kernel behind a custom op, so that a trace holds the kernel and not what it does."""
    derive = DeriveOnce(program.graph, weights)
    return replace(
        program,
        forward=tuple(_opaque_forward(step, derive) for step in program.forward),
        reverse=tuple(_opaque_step(step, derive) for step in program.reverse),
    )


def _opaque_forward(step: ForwardStep, derive: Derive) -> ForwardStep:
    # One that gives sums beside its output is left to the operation: without them, the sweep makes its own.
    kernel = None if step.kernel is None or step.sums else _OpaqueForward(step.kernel, derive)
    return replace(step, kernel=kernel, sums=False)


def _opaque_step(step: ReverseStep, derive: Derive) -> ReverseStep:
    # A kernel that leaves maps to the reader beside what it returns is left to the rule.
    streams = tuple(
        stream
        if stream.kernel is None
        else replace(stream, kernel=None if step.maps else _OpaqueKernel(stream.kernel, derive))
        for stream in step.streams
    )
    joint, fused = step.joint, step.fused
    return replace(
        step,
        streams=streams,
        joint=None if joint is None else replace(joint, kernel=_OpaqueJoint(joint.kernel, derive)),
        fused=None if fused is None else replace(fused, kernel=_OpaqueFused(fused, derive)),
        remakes=tuple(_opaque_forward(made, derive) for made in step.remakes),
    )


class _Opaque:
    """Something that runs as a `relprop::step`; the steps it made live as long as it does."""

    def __init__(self, derive: Derive) -> None:
        self._derive = derive
        self._steps: list[_Step] = []

    def _run(
        self, call: Call, arrived: Sequence[Tensor | None], run: Any, fake: Any, nodes: Sequence[Node] = ()
    ) -> list[Tensor]:
        node = call.node
        values = {
            v.index
            for n in nodes or (node,)
            for v in (*leaves((n.args, n.kwargs)), *n.operands, *n.outputs)
            if v is not None
        }
        kept = {i: call.tensors[i] for i in sorted(values) if i in call.tensors}
        indices = [i for i, t in kept.items() if isinstance(t, Tensor)]
        plain = {i: t for i, t in kept.items() if not isinstance(t, Tensor)}
        shapes = {i: torch.Size(int(n) for n in call.shapes[i]) for i in values if i in call.shapes}
        step = _Step(
            run,
            fake,
            node,
            indices,
            plain,
            shapes,
            call.wanted,
            call.dtype,
            call.precision,
            self._derive,
        )
        handle = next(_HANDLES)
        _STEPS[handle] = step
        self._steps.append(step)
        there = [t is not None for t in arrived]
        return _run_step([kept[i] for i in indices], [t for t in arrived if t is not None], there, handle)


def _passed_shapes(call: Call, wanted: Sequence[bool]) -> list[tuple[int, torch.Size]]:
    """Operands that something is passed to, and their shapes."""
    return [
        (position, call.shapes[value.index])
        for position, value in enumerate(call.node.operands)
        if value is not None and value.carrying and wanted[position]
    ]


def _filled(parts: Relevances, places: Sequence[tuple[int, torch.Size]], like: Tensor) -> list[Tensor]:
    found = []
    for position, shape in places:
        part = parts[position]
        found.append(like.new_zeros(like.shape[0], *shape) if part is None else part)
    return found


def _returned(made: Sequence[Tensor], places: Sequence[tuple[int, torch.Size]], count: int) -> Relevances:
    parts: list[Tensor | None] = [None] * count
    for (position, _), part in zip(places, made, strict=True):
        parts[position] = part
    return tuple(parts)


class _OpaqueKernel(_Opaque):
    def __init__(self, kernel: Kernel, derive: Derive) -> None:
        super().__init__(derive)
        self._kernel = kernel

    def __call__(self, rule: Rule, call: Call, arrived: Any) -> Relevances:
        several = isinstance(arrived, tuple)
        given = arrived if several else (arrived,)
        like = next(t for t in given if t is not None)
        places = _passed_shapes(call, call.wanted)
        targets, dtype = like.shape[0], call.dtype

        def run(real: Call, saved: Sequence[Tensor], parts: Sequence[Tensor | None]) -> list[Tensor]:
            first = next(t for t in parts if t is not None)
            return _filled(self._kernel(rule, real, tuple(parts) if several else parts[0]), places, first)

        def fake(saved: Sequence[Tensor], parts: Sequence[Tensor | None]) -> list[Tensor]:
            first = next(t for t in parts if t is not None)
            return [first.new_empty((targets, *shape), dtype=dtype) for _, shape in places]

        return _returned(self._run(call, given, run, fake), places, len(call.node.operands))


class _OpaqueJoint(_Opaque):
    def __init__(self, kernel: JointKernel, derive: Derive) -> None:
        super().__init__(derive)
        self._kernel = kernel

    def __call__(
        self, call: Call, streams: Mapping[str, JointStream], edge: str | None, row: Tensor | None
    ) -> tuple[dict[str, Relevances], Tensor | None]:
        names, chosen = list(streams), list(streams.values())
        places = {name: _passed_shapes(call, streams[name].wanted) for name in names}
        walks = edge is not None and row is not None
        arrived = [*(stream.arrived for stream in chosen), row if walks else None]
        ops = [(stream.rule, stream.wanted, isinstance(stream.arrived, tuple)) for stream in chosen]
        if any(several for *_, several in ops):
            return self._kernel(call, streams, edge, row)
        keys = call.shape(1)[-2] if walks else 0

        def run(real: Call, saved: Sequence[Tensor], parts: Sequence[Tensor | None]) -> list[Tensor]:
            given = {
                name: JointStream(rule, part, wanted)  # type: ignore[arg-type]
                for name, (rule, wanted, _), part in zip(names, ops, parts, strict=False)
            }
            passed, product = self._kernel(real, given, edge, parts[-1])
            made = [t for name in names for t in _filled(passed[name], places[name], given[name].arrived)]
            return made if product is None else [*made, product]

        def fake(saved: Sequence[Tensor], parts: Sequence[Tensor | None]) -> list[Tensor]:
            made = [
                part.new_empty((part.shape[0], *shape), dtype=call.dtype)
                for name, part in zip(names, parts, strict=False)
                if part is not None
                for _, shape in places[name]
            ]
            walked = parts[-1]
            if walked is None:
                return made
            several = [p.shape[0] for n, p in zip(names, parts, strict=False) if p is not None and n in EDGES[edge]]  # type: ignore[index]
            return [*made, walked.new_empty((max(several, default=walked.shape[0]), walked.shape[1], keys))]

        made = iter(self._run(call, arrived, run, fake))
        count = len(call.node.operands)
        passed = {name: _returned([next(made) for _ in places[name]], places[name], count) for name in names}
        return passed, next(made, None)


class _OpaqueFused(_Opaque):
    """A stream that is scaled later is two tensors at the op's boundary."""

    def __init__(self, fused: FusedStep, derive: Derive) -> None:
        super().__init__(derive)
        self._fused = fused

    def __call__(self, calls: Sequence[Call], arrived: Sequence[Tensor | Scaled]) -> list[Tensor | Scaled]:
        fused, call = self._fused, calls[0]
        scaled = [isinstance(stream, Scaled) for stream in arrived]
        shapes = [call.shapes[value.index] for _, value in fused.gives]

        def run(real: Call, saved: Sequence[Tensor], parts: Sequence[Tensor | None]) -> list[Tensor]:
            real_calls = [_at_node(real, node) for node in fused.nodes]
            return _apart(fused.run(real_calls, _together(parts, scaled)))  # type: ignore[arg-type]

        def fake(saved: Sequence[Tensor], parts: Sequence[Tensor | None]) -> list[Tensor]:
            first = next(t for t in parts if t is not None)
            made: list[Tensor] = []
            for shape, later in zip(shapes, fused.scaled, strict=True):
                made.append(first.new_empty((first.shape[0], *shape), dtype=call.dtype))
                if later:
                    made.append(first.new_empty((first.shape[0], shape[0]), dtype=torch.float32))
            return made

        return _together(self._run(call, _apart(arrived), run, fake, fused.nodes), fused.scaled)


def _at_node(call: Call, node: Node) -> Call:
    """The same call at another node of its step."""
    return Call(node, call.tensors, call.shapes, (), call.dtype, call.derive, precision=call.precision)


def _apart(streams: Sequence[Tensor | Scaled]) -> list[Tensor]:
    return [t for s in streams for t in ((s.tensor, s.scale) if isinstance(s, Scaled) else (s,))]


def _together(parts: Sequence[Tensor], scaled: Sequence[bool]) -> list[Tensor | Scaled]:
    rest = iter(parts)
    return [Scaled(next(rest), next(rest)) if later else next(rest) for later in scaled]


class _OpaqueForward(_Opaque):
    """The kernel of an operation's forward; its arguments are the tensors among the operation's."""

    def __init__(self, kernel: Callable[..., Any], derive: Derive) -> None:
        super().__init__(derive)
        self._kernel = kernel

    def __call__(self, node: Node, derive: Derive, *args: Any, **kwargs: Any) -> Any:
        tensors = {v.index: t for v, t in zip(_values(node), _tensors(args, kwargs), strict=True)}
        shapes = {i: t.shape for i, t in tensors.items()}
        call = Call(node, tensors, shapes, (), torch.float32, derive)

        made = node.target(*args, **kwargs)
        shape, dtype = made.shape, made.dtype

        def run(real: Call, saved: Sequence[Tensor], parts: Sequence[Tensor | None]) -> list[Tensor]:
            return [self._kernel(node, real.derive, *real.raw(node.args), **real.raw(node.kwargs))]

        def fake(saved: Sequence[Tensor], parts: Sequence[Tensor | None]) -> list[Tensor]:
            return [saved[0].new_empty(shape, dtype=dtype)]

        return self._run(call, (), run, fake)[0]


def _values(node: Node) -> list[Value]:
    return list(leaves((node.args, node.kwargs)))


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    found, _ = torch.utils._pytree.tree_flatten((args, kwargs))
    return [t for t in found if isinstance(t, Tensor)]
