"""From the canonicalised fx graph to relprop's own Graph: roles, sample axes and explicit fan-out."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from relprop.capture import ops
from relprop.capture.canonicalise import canonicalise, explained_inputs, token_source
from relprop.capture.export import Captured, calls, later_calls, module_path, source_line
from relprop.capture.hoist import hoist_rows
from relprop.capture.reasons import sized_by_values
from relprop.capture.tokens import find_tokens
from relprop.errors import CaptureError
from relprop.graph import Graph, Node, SampleAxis, Value, depends_on_input, leaves

aten = torch.ops.aten


def alias(x: Tensor) -> Tensor:
    """Forward of an explicit fan-out: every output is the input itself."""
    return x


def lower(captured: Captured, hoist: bool = True) -> Graph:
    """Canonicalise a copy of a captured graph, hoist its row slices and lower it.

    Args:
        hoist: compute only the rows that the output reads.
    Returns:
        The graph; nodes of unknown kinds have kind "unknown" and are refused when rules are assigned.
    """
    captured = captured.copy()
    canonicalise(captured)
    if hoist:
        hoist_rows(captured.graph)
    captured.output = next(n for n in captured.graph.nodes if n.op == "output").args[0][0]
    lowering = _Lowering(captured)
    lowering.run()
    graph = lowering.graph
    _assign_roles(graph)
    _make_fanout_explicit(graph)
    graph.tokens = find_tokens(graph)
    return graph


class _Lowering:
    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self.values: list[Value] = []
        self.of: dict[fx.Node, Any] = {}
        self.nodes: list[Node] = []
        self.graph: Graph
        self.explained = set(explained_inputs(captured))

    def value(self, name: str, fake: Any, carrying: bool) -> Value:
        shape = tuple(fake.shape) if isinstance(fake, Tensor) else ()
        dtype = fake.dtype if isinstance(fake, Tensor) else torch.int64
        made = Value(len(self.values), name, shape, dtype, carrying, self.sample_axis(shape) if carrying else None)
        self.values.append(made)
        return made

    def sample_axis(self, shape: tuple[Any, ...]) -> SampleAxis | None:
        symbols = self.captured.batch_symbols
        found = []
        for axis, size in enumerate(shape):
            expr = size.node.expr if isinstance(size, torch.SymInt) else None
            if expr is not None and expr.free_symbols & symbols:
                (batch, *others) = expr.free_symbols & symbols
                factor = expr / batch
                if others or batch in factor.free_symbols:
                    return None  # not a multiple of the batch size
                found.append(SampleAxis(axis, int(factor) if factor.is_Integer else None))
        # Scores of all samples with all samples belong to those of the first axis.
        whole = len(found) == 2 and all(axis.factor == 1 for axis in found) and len(shape) == 2
        return found[0] if len(found) == 1 or whole else None

    def run(self) -> None:
        inputs: dict[str, Value] = {}
        parameters: dict[int, str] = {}
        constants: dict[int, Tensor] = {}
        explained_names = self.explained
        for node in self.captured.graph.nodes:
            if node.op == "placeholder":
                if not node.users:
                    continue
                made = self.value(node.name, node.meta["val"], node.meta["carrying"])
                self.of[node] = made
                if node.name in self.captured.parameters:
                    parameters[made.index] = self.captured.parameters[node.name]
                elif node.name in self.captured.constants:
                    constants[made.index] = self.captured.constants[node.name]
                else:
                    inputs[node.name] = made
            elif node.op == "call_function" and self._is_part(node):
                self.of[node] = self.of[node.args[0]][node.args[1]]
            elif node.op == "call_function":
                self._lower_call(node)
        explained = [inputs[name] for name in inputs if name in explained_names]
        output = self.of[self.captured.output]
        self.graph = Graph(self.nodes, self.values, inputs, parameters, constants, explained, output)

    def _is_part(self, node: fx.Node) -> bool:
        return node.target is operator.getitem and isinstance(self.of.get(node.args[0]), tuple)  # type: ignore[arg-type]

    def _lower_call(self, node: fx.Node) -> None:
        args = fx.map_arg(node.args, lambda n: self.of[n])
        kwargs = fx.map_arg(node.kwargs, lambda n: self.of[n])
        fake = node.meta.get("val")
        carrying = bool(node.meta.get("carrying"))
        if isinstance(fake, (list, tuple)):
            outputs = tuple(
                self.value(f"{node.name}.{i}", f, carrying and f.dtype.is_floating_point) for i, f in enumerate(fake)
            )
            self.of[node] = outputs
        else:
            outputs = (self.value(node.name, fake, carrying),)
            self.of[node] = outputs[0]
        kind = ops.kind_of(node.target) if carrying else "constant"  # type: ignore[arg-type]
        if kind == "activation" and sum(bool(n.meta["carrying"]) for n in node.all_input_nodes) > 1:
            kind = None  # a clamp between values of the input's
        made = Node(
            name=node.name,
            kind=kind or "unknown",
            target=node.target,  # type: ignore[arg-type]
            args=tuple(_plain(args)),
            kwargs=dict(_plain(kwargs)),
            operands=(),
            outputs=outputs,
            module=module_path(node),
            source=source_line(node),
            later_calls=later_calls(node),
            calls=calls(node),
        )
        if token_source(node) in self.explained:
            made.role = "tokens"
            made.attributes["ids"] = token_source(node)
        if "query_rows" in node.meta:
            made.attributes["query_rows"] = node.meta["query_rows"]
        for i, out in enumerate(outputs):
            out.producer, out.output = made, i
        made.operands = _operands(made)
        if carrying and sized_by_values(fake):
            raise CaptureError(
                f"the size of what {made.describe()} gives depends on the values of a tensor: expected sizes that"
                " follow from the shapes of the inputs; keep every row and mask those that do not count (torch.where,"
                " an attention mask), let a mixture compute all its experts, or explain the part of the model after"
                " that choice"
            )
        _check_samples(made)
        self.nodes.append(made)


def _check_samples(node: Node) -> None:
    """What scatters samples along an axis that they share: nothing can then be summed per sample.

    A view may merge samples with an axis in front of them; rows of a merged axis may be picked, sorted or put together.
    """
    before, after = node.operands[0] if node.operands else None, node.outputs[0]
    for out in node.outputs:
        merged = out.sample is not None and out.sample.factor is None
        if merged and (_reorders(node, out) or any(v is not None and _scattered(v) for v in node.operands)):
            out.sample = None
    if node.target not in ops.RESHAPES or before is None or before.sample is None or after.sample is None:
        return
    lead = [math.prod(v.shape[: v.sample.axis]) for v in (before, after) if v.sample is not None]
    if not statically_known_true(lead[0] == lead[1]):
        after.sample = None


def _scattered(value: Value) -> bool:
    return value.carrying and value.sample is None


def _reorders(node: Node, out: Value) -> bool:
    """Whether a movement can change the order of rows along a merged axis."""
    if node.kind != "movement" or node.target in ops.ORDERED:
        return False
    assert out.sample is not None
    parts = [v for v in node.operands if v is not None and v.carrying]
    joined = node.target in (aten.cat.default, aten.concat.default)
    return not joined or any(
        v.sample != out.sample or v.shape[out.sample.axis] != out.shape[out.sample.axis] for v in parts
    )


def _plain(structure: Any) -> Any:
    """fx's immutable containers as ordinary ones."""
    if isinstance(structure, dict):
        return {k: _plain(v) for k, v in structure.items()}
    if isinstance(structure, (list, tuple)) and not isinstance(structure, torch.Size):
        items = [_plain(v) for v in structure]
        return tuple(items) if isinstance(structure, tuple) else items
    return structure


def _operands(node: Node) -> tuple[Value | None, ...]:
    if node.kind in ("linear", "conv"):
        args = (*node.args, None, None)[:3]
        return tuple(a if isinstance(a, Value) else None for a in args)
    if node.kind == "attention":
        return tuple(a if isinstance(a, Value) else None for a in node.args[:4])
    return tuple(leaves((node.args, node.kwargs)))


def _assign_roles(graph: Graph) -> None:
    """Name what structure shows: residual and rope adds, positional and bias operands, gates, first layers."""
    explained = {v.index for v in graph.explained}
    for node in graph.nodes:
        if not node.carrying:
            continue
        carrying = [v for v in node.operands if v is not None and v.carrying]
        if node.kind == "add":
            node.role = _add_role(graph, node, carrying)
            if node.role == "rope":
                for value in carrying:
                    assert value.producer is not None
                    value.producer.role = "rope"
        elif node.kind == "matmul" and len(carrying) == 1:
            node.role = "weights"
        elif node.kind == "mul":
            node.role = "gate" if len(carrying) > 1 else "scale"
        elif node.kind in ("linear", "conv") and carrying and carrying[0].index in explained:
            node.role = "input"


def _add_role(graph: Graph, node: Node, carrying: list[Value]) -> str:
    if len(carrying) == 2:
        return "rope" if _is_rope(carrying) else "residual"
    others = [v for v in node.operands if v is not None and not v.carrying]
    if not others:
        return "offset"
    other = others[0]
    if other.dtype == torch.bool or depends_on_input(graph, other):
        return "mask"
    extent = [s for s in other.shape if not (isinstance(s, int) and s == 1)]
    return "bias" if len(extent) <= 1 else "positional"


def _is_rope(operands: list[Value]) -> bool:
    """x * cos + rotated(x) * sin: both operands are products with a constant of movements of one value."""
    sources = []
    for value in operands:
        node = value.producer
        if node is None or node.kind != "mul" or node.role != "scale":
            return False
        at = next(v for v in node.operands if v is not None and v.carrying)
        seen = {at.index}
        while at.producer is not None and (at.producer.kind == "movement" or at.producer.target is aten.neg.default):
            parents = [v for v in leaves(at.producer.args) if v.carrying]
            at = parents[0]
            seen.add(at.index)
        sources.append(seen)
    return bool(sources[0] & sources[1])


def _make_fanout_explicit(graph: Graph) -> None:
    """A carrying value with several carrying consumers goes through nodes of kind "fanout", one output per use.

    Uses inside one submodule are gathered there first, as that module hands on one value: queries, keys and values of
    an attention module before the residual branch around it. It matters where gathering has an epsilon.
    """
    uses: dict[int, list[Node]] = {}
    for node in graph.nodes:
        if node.carrying:
            for value in leaves((node.args, node.kwargs)):
                if value.carrying:
                    uses.setdefault(value.index, []).append(node)
    made: dict[int, _Fanout] = {}
    for value in list(graph.values):
        users = uses.get(value.index, [])
        if len(users) > 1:
            made[value.index] = _Fanout([], [value] * len(users))
            _gather(graph, value, value, list(enumerate(users)), made[value.index])
    _rewire(graph, made)


@dataclass
class _Fanout:
    """The nodes that hand a value to its uses, outermost first, and what each use gets, in the order of uses."""

    nodes: list[Node]
    parts: list[Value]


def _gather(graph: Graph, origin: Value, value: Value, users: list[tuple[int, Node]], found: _Fanout) -> None:
    """Append the fan-out of a value to these users, and the fan-outs nested in it."""
    groups = _by_module(users)
    outputs = []
    for i in range(len(groups)):
        name = f"{origin.name}~{len(found.nodes)}.{i}" if found.nodes else f"{origin.name}~{i}"
        copy = Value(len(graph.values), name, value.shape, value.dtype, True, value.sample)
        graph.values.append(copy)
        outputs.append(copy)
    producer = origin.producer
    node = Node(
        name=f"{origin.name}_fanout" + (f"_{len(found.nodes)}" if found.nodes else ""),
        kind="fanout",
        target=alias,
        args=(value,),
        kwargs={},
        operands=(value,),
        outputs=tuple(outputs),
        module=producer.module if producer else "",
        source=producer.source if producer else "",
    )
    found.nodes.append(node)
    for i, (out, group) in enumerate(zip(outputs, groups, strict=True)):
        out.producer, out.output = node, i
        if len(group) > 1:
            _gather(graph, origin, out, group, found)
        else:
            found.parts[group[0][0]] = out


def _by_module(users: list[tuple[int, Node]]) -> list[list[tuple[int, Node]]]:
    """Users in groups of one submodule each, below the module that holds them all; its own stand alone."""
    paths = [node.module.split(".") if node.module else [] for _, node in users]
    shared = len(list(takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))))
    groups: dict[Any, list[tuple[int, Node]]] = {}
    for i, (user, path) in enumerate(zip(users, paths, strict=True)):
        groups.setdefault(path[shared] if len(path) > shared else i, []).append(user)
    return list(groups.values()) if len(groups) > 1 else [[user] for user in users]


def _rewire(graph: Graph, made: dict[int, _Fanout]) -> None:
    taken: dict[int, int] = dict.fromkeys(made, 0)
    ordered: list[Node] = [node for v in graph.inputs.values() if v.index in made for node in made[v.index].nodes]

    def use(structure: Any) -> Any:
        if isinstance(structure, Value):
            if structure.index not in made:
                return structure
            at = taken[structure.index]
            taken[structure.index] += 1
            return made[structure.index].parts[at]
        if isinstance(structure, (list, tuple)):
            return type(structure)(use(item) for item in structure)
        if isinstance(structure, dict):
            return {k: use(v) for k, v in structure.items()}
        return structure

    for node in graph.nodes:
        if node.carrying:
            node.args, node.kwargs = use(node.args), use(node.kwargs)
            node.operands = _operands(node)
        ordered.append(node)
        ordered.extend(fanout for v in node.outputs if v.index in made for fanout in made[v.index].nodes)
    graph.nodes = ordered
