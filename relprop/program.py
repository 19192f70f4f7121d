"""The plan of a pass: forward and reverse steps, what each keeps, when it is freed, which rule and backend runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from relprop import cost
from relprop.composites import Composite
from relprop.errors import OptionError
from relprop.graph import Graph, Node, Value, leaves
from relprop.latents import latent_values
from relprop.methods.base import Method, Readout, Requirements
from relprop.methods.topology import mask_of, profile_nodes
from relprop.rematerialise import rematerialised
from relprop.rules import Call, Relevances, Rule, make_rule

Kernel = Callable[[Rule, Call, Any], Relevances]
ForwardKernel = Callable[..., Any]  # (node, derive, *the operation's arguments) -> its output


class JointKernel(Protocol):
    """All streams of one step at once, and the walk of a row through it, without the step's maps."""

    def __call__(
        self, call: Call, streams: Mapping[str, JointStream], edge: str | None, row: Tensor | None
    ) -> tuple[dict[str, Relevances], Tensor | None]:
        """Streams at the operands by name, and row E.

        Args:
            edge: what E is made of, None for no walk.
            row: [T or 1, B, Nq]
        """


@dataclass(frozen=True)
class Scaled:
    """A stream whose factor per target and sample is left to who reads it: tensor [T, B, ...], scale [T, B]."""

    tensor: Tensor
    scale: Tensor

    def settled(self) -> Tensor:
        """The stream itself. [T, B, ...]"""
        return self.tensor * self.scale.reshape(*self.scale.shape, *[1] * (self.tensor.ndim - 2))


Place = tuple[str, Value]  # a stream at a value


class FusedKernel(Protocol):
    """Several steps, one after the other, in one go."""

    def __call__(self, calls: Sequence[Call], arrived: Sequence[Tensor | Scaled]) -> list[Tensor | Scaled]:
        """Streams at the places that it gives, from those at the places that it takes."""


@dataclass(frozen=True)
class FusedStep:
    """A kernel that takes streams on through further steps, where nothing asks for what lies between.

    A step that it covers finds no stream to take on. Where a stream at its places never arrived, and for a ledger or a
    trace, steps run one after the other.

    Attributes:
        backend: the kernel's, with its name.
        nodes: of the steps, the first one's first.
        covers: streams of later steps that it takes on.
        takes, gives: where streams are read and written; what is read may be `Scaled`.
        scaled: which of those that it gives are.
    """

    backend: str
    kernel: FusedKernel
    nodes: tuple[Node, ...]
    covers: frozenset[tuple[str, Node]]
    takes: tuple[Place, ...]
    gives: tuple[Place, ...]
    scaled: tuple[bool, ...]

    def run(self, calls: Sequence[Call], arrived: Sequence[Tensor | Scaled]) -> list[Tensor | Scaled]:
        """Streams at the places that it gives, `Scaled` only where their reader can scale."""
        made = zip(self.kernel(calls, arrived), self.scaled, strict=True)
        return [part.settled() if isinstance(part, Scaled) and not later else part for part, later in made]


def _no_kernel(node: Node, rule: Rule) -> tuple[str, Kernel | None]:
    return "torch", None


@dataclass(frozen=True)
class Kernels:
    """What a plan's steps run on; by default the rules themselves and the model's own operations.

    Attributes:
        rule: the backend of a rule at a node and its kernel, None for the rule itself.
        joint: the kernel for all streams of an operation and the edge that a row walks, with its backend's name.
        forward: the kernel of an operation's forward.
        sums: the same for an operation whose rules ask for its output as it was before it was rounded: a kernel that
            gives the output and the float32 sums, None in their place where it has none.
        fused: the kernel for a step and those after it on its streams' way, by node; see `FusedStep`.
    """

    rule: Callable[[Node, Rule], tuple[str, Kernel | None]] = _no_kernel
    joint: Callable[[Node, Mapping[str, Rule], str | None], tuple[str, JointKernel] | None] = lambda *step: None
    forward: Callable[[Node], ForwardKernel | None] = lambda node: None
    sums: Callable[[Node, Mapping[str, Rule]], ForwardKernel | None] = lambda *step: None
    fused: FindFused | None = None


class FindFused(Protocol):
    """Where a backend has kernels for several steps."""

    def __call__(
        self, step: ReverseStep, steps: Mapping[Node, ReverseStep], unseen: Callable[[Value], bool], alone: bool
    ) -> FusedStep | None:
        """The kernel that starts with a step.

        Args:
            steps: all of them, by node.
            unseen: whether nothing asks for what is at a value.
            alone: the step alone, for a stream that arrives `Scaled`.
        """


@dataclass(frozen=True)
class StreamStep:
    """One stream through one operation.

    Attributes:
        stream: "gradient" or "relevance".
        rule: what it does there.
        backend: "torch" for the rule itself, else the kernel's backend.
        kernel: the backend's function, None for the rule itself.
        wanted: which operands receive anything.
    """

    stream: str
    rule: Rule
    backend: str
    kernel: Kernel | None
    wanted: tuple[bool, ...]


@dataclass(frozen=True)
class JointStream:
    """One stream as a joint kernel takes it.

    Attributes:
        rule: what it does there.
        arrived: the stream at the output. [T, *output shape]
        wanted: which operands receive anything.
    """

    rule: Rule
    arrived: Tensor
    wanted: tuple[bool, ...]


@dataclass(frozen=True)
class JointStep:
    """A kernel that takes a whole step, where neither the ledger nor a trace asks for its parts.

    Attributes:
        backend: the kernel's, with its name.
        edge: what the read-out's row is multiplied with there, None where nothing is read.
    """

    backend: str
    kernel: JointKernel
    edge: str | None


@dataclass(frozen=True)
class ReverseStep:
    """One operation on the way back: its streams, the read-out's maps, and what is freed after it.

    Attributes:
        remakes: forward steps that run again before it; see `rematerialise`.
    """

    node: Node
    streams: tuple[StreamStep, ...]
    maps: frozenset[str]
    tensors: tuple[int, ...]  # values that the step reads
    frees: tuple[int, ...]
    joint: JointStep | None = None
    fused: FusedStep | None = None
    remakes: tuple[ForwardStep, ...] = ()


@dataclass(frozen=True)
class ForwardStep:
    """One operation of the forward pass, the values that are dead after it, and a kernel in place of its own.

    Attributes:
        sums: the kernel gives the float32 sums of its output too.
    """

    node: Node
    frees: tuple[int, ...]
    kernel: ForwardKernel | None = None
    sums: bool = False


@dataclass
class Program:
    """An explicit plan: run the forward steps in order, seed the streams, run the reverse steps in order.

    Attributes:
        graph, method, composite: what it was built from.
        readout, requirements: the read-out and what it asked for.
        forward, reverse: the steps.
        seeds: streams that start at the output.
        gradient_form: relevance is walked as a modified gradient g and becomes x g where it is read.
        batch_symbols: sizes that stand for the batch.
    """

    graph: Graph
    method: Method
    composite: Composite
    readout: Readout
    requirements: Requirements
    forward: tuple[ForwardStep, ...]
    reverse: tuple[ReverseStep, ...]
    seeds: tuple[str, ...]
    batch_symbols: frozenset[Any]
    frontier: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    gradient_form: bool = False

    @property
    def kept(self) -> tuple[Value, ...]:
        """Values that live on after their last use in the forward pass."""
        indices = {i for step in self.reverse for i in step.tensors}
        indices -= {v.index for step in self.reverse for again in step.remakes for v in again.node.outputs}
        return tuple(v for v in self.graph.values if v.index in indices and v.carrying)

    def flops(self) -> dict[str, float]:
        """Matrix-product operations of one sample, forward and reverse."""
        forward = sum(cost.forward_flops(step.node, self.batch_symbols) for step in self.forward)
        reverse = sum(
            cost.forward_flops(step.node, self.batch_symbols) * cost.products(step.node, s.rule, s.stream, s.wanted)
            for step in self.reverse
            for s in step.streams
        )
        return {"forward": float(forward), "reverse": float(reverse)}

    def __str__(self) -> str:
        return "\n".join(
            [
                f"method {self.method.name}, composite {self.composite.name}; sizes for one sample",
                "",
                "forward",
                _table(("step", "op", "module", "kept", "rows", "MFLOP", "kB"), self._forward_rows()),
                "",
                "reverse",
                _table(
                    ("step", "op", "module", "stream", "rule", "backend", "kept tensors", "rows", "MFLOP", "kB"),
                    self._reverse_rows(),
                ),
                "",
                self._summary(),
            ]
        )

    def _summary(self) -> str:
        flops = self.flops()
        forward, reverse = flops["forward"], flops["reverse"]
        ratio = f"{(forward + reverse) / forward:.2f}" if forward else "-"
        return (
            f"matrix products: forward {forward / 1e9:.4g} GFLOP, reverse {reverse / 1e9:.4g} GFLOP, total {ratio} x"
            f" forward; kept between them {cost.nbytes(_distinct(self.kept), self.batch_symbols) / 1e6:.4g} MB"
        )

    def _rows_of(self, value: Value) -> str:
        if value.rank < 2 or not value.carrying:
            return "-"
        shape = cost.sizes(value, self.batch_symbols)
        return str(shape[-2]) if value.rank > 2 else "1"

    def _forward_rows(self) -> list[tuple[str, ...]]:
        kept = {v.index for v in self.kept}
        rows: list[tuple[str, ...]] = []
        for i, step in enumerate(self.forward):
            node = step.node
            moved = [v for v in (*node.operands, *node.outputs) if v is not None]
            rows.append(
                (
                    str(i),
                    node.kind + (f" ({node.role})" if node.role else ""),
                    node.module,
                    ", ".join(v.name for v in node.outputs if v.index in kept),
                    self._rows_of(node.outputs[0]),
                    f"{cost.forward_flops(node, self.batch_symbols) / 1e6:.4g}",
                    f"{cost.nbytes(moved, self.batch_symbols) / 1e3:.4g}",
                )
            )
        return rows

    def _reverse_rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = []
        covered = {
            place: f"in step {i}" for i, step in enumerate(self.reverse) if step.fused for place in step.fused.covers
        }
        for i, step in enumerate(self.reverse):
            node = step.node
            names = {v.index: v.name for v in (*node.operands, *node.outputs) if v is not None}
            names.update((v.sums, f"{v.name} (sums)") for v in node.outputs)
            again = {v.index for made in step.remakes for v in made.node.outputs}
            tensors = ", ".join(names[t] + (" (again)" if t in again else "") for t in step.tensors if t in names)
            size = cost.nbytes([v for v in (*node.operands, *node.outputs) if v is not None], self.batch_symbols)
            whole = step.fused or step.joint
            joint = None if whole is None else whole.backend
            for stream in step.streams or (None,):
                share = cost.products(node, stream.rule, stream.stream, stream.wanted) if stream else 0
                rows.append(
                    (
                        str(i),
                        node.kind + (f" ({node.role})" if node.role else ""),
                        node.module,
                        stream.stream if stream else "row" if joint else "map",
                        stream.rule.describe() if stream else "-",
                        (stream and covered.get((stream.stream, node)))
                        or joint
                        or (stream.backend if stream else "torch"),
                        tensors,
                        self._rows_of(node.outputs[0]),
                        f"{share * cost.forward_flops(node, self.batch_symbols) / 1e6:.4g}",
                        f"{size / 1e3:.4g}",
                    )
                )
        return rows


def _distinct(values: tuple[Value, ...]) -> list[Value]:
    """Values that own memory: outputs of movement and fan-out share their input's."""
    return [v for v in values if v.producer is None or v.producer.kind not in ("movement", "fanout", "select")]


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    rows = [tuple(cell if len(cell) <= 44 else f"{cell[:20]}...{cell[-21:]}" for cell in row) for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    numeric = [name in ("step", "rows", "MFLOP", "kB") for name in head]

    def line(cells: tuple[str, ...]) -> str:
        parts = (c.rjust(w) if n else c.ljust(w) for c, w, n in zip(cells, widths, numeric, strict=True))
        return "  ".join(parts).rstrip()

    return "\n".join([line(head), line(tuple("-" * w for w in widths)), *(line(row) for row in rows)])


def build_program(
    graph: Graph,
    method: Method,
    options: Mapping[str, Any] | None,
    composite: Composite,
    kernels: Kernels,
    batch_symbols: frozenset[Any],
    everything: bool = False,
    books: bool = False,
    latents: Sequence[str] = (),
) -> Program:
    """Plan a method on a graph.

    Args:
        kernels: what its steps run on.
        everything: run every step of every stream down to the inputs (for tracing).
        books: walk relevance itself also where a modified gradient would do, for a ledger or a trace.
        latents: module paths at whose outputs relevance is kept.
    Raises:
        OptionError: latents of a method of several passes.
        UnsupportedOpError: operations without a rule; all are named.
        UnsupportedTopologyError: the method does not apply to this structure.
    """
    readout = method.make_readout(options).resolve(graph)
    requirements = replace(readout.require(graph), latents=latent_values(graph, latents))
    if latents and requirements.latent_stream is None:
        raise OptionError(f"latents: expected a method of one pass, got {method.name}, a mean over several")
    streams: dict[str, dict[Node, Rule]] = {}
    gradient = make_rule("any", "gradient")
    if _uses(requirements, "gradient"):
        streams["gradient"] = {node: gradient for node in graph.nodes if node.carrying}
    if _uses(requirements, "relevance"):
        streams["relevance"] = composite.assign(graph)
    forms = None if books else _gradient_forms(composite, requirements, streams.get("relevance", {}))
    if forms is not None:
        streams["relevance"] = forms
    reached = {name: _reached(graph, requirements, name, everything) for name in streams}
    reverse: list[tuple[Node, tuple[StreamStep, ...], frozenset[str]]] = []
    frontier: dict[str, list[Value]] = {name: [] for name in streams}
    live = {name: {graph.output.index} for name in streams}
    for node in reversed(graph.nodes):
        if not node.carrying:
            continue
        maps = requirements.maps.get(node, frozenset())
        steps = []
        for name, rules in streams.items():
            if not any(v.index in live[name] for v in node.outputs):
                continue
            source = not any(v is not None and v.carrying for v in node.operands)
            if source or not any(v.index in reached[name] for v in node.outputs):
                frontier[name].extend(v for v in node.outputs if v.index in live[name])
                continue
            wanted = tuple(v is not None and v.carrying and v.index in reached[name] for v in node.operands)
            live[name].update(v.index for v in node.operands if v is not None and v.carrying)
            backend, kernel = kernels.rule(node, rules[node])
            steps.append(StreamStep(name, rules[node], backend, kernel, wanted))
        if steps or maps:
            reverse.append((node, tuple(steps), maps))
    for name in streams:
        frontier[name].extend(v for v in graph.explained if v.index in live[name])
    sums = {
        node: kernel
        for node, steps, _ in reverse
        if (kernel := kernels.sums(node, {step.stream: step.rule for step in steps})) is not None
    }
    needed = [_needed(node, steps, maps, node in sums) for node, steps, maps in reverse]
    kept = _kept(graph, requirements)
    outside = {v.index for v in graph.inputs.values()} | set(graph.parameters) | set(graph.constants)
    again = rematerialised(graph, needed, kept, outside)
    kept |= {i for indices in needed for i in indices} - {v.index for node in again for v in node.outputs}
    sweep = _reverse_steps(reverse, needed, [_joint(*item, readout, kernels) for item in reverse])
    return Program(
        graph=graph,
        method=method,
        composite=composite,
        readout=readout,
        requirements=requirements,
        forward=_forward_steps(graph, kept | outside, kernels, sums),
        reverse=_remaking(_fused(sweep, requirements, kernels), again, kernels),
        seeds=tuple(streams),
        batch_symbols=batch_symbols,
        frontier={name: tuple(values) for name, values in frontier.items()},
        gradient_form=forms is not None,
    )


def _gradient_forms(
    composite: Composite, requirements: Requirements, rules: Mapping[Node, Rule]
) -> dict[Node, Rule] | None:
    """The rules as modified gradients, where relevance starts as the score and is only read at values."""
    if composite.seed != "score" or any("relevance" in maps for maps in requirements.maps.values()):
        return None
    forms = {node: form for node, rule in rules.items() if (form := rule.gradient_form(node)) is not None}
    return forms if rules and len(forms) == len(rules) else None


def _joint(
    node: Node, steps: tuple[StreamStep, ...], maps: frozenset[str], readout: Readout, kernels: Kernels
) -> JointStep | None:
    """The kernel for a whole step; none where the read-out wants the maps themselves."""
    edge = readout.row_edge(node) if maps else None
    if maps and edge is None:
        return None
    found = kernels.joint(node, {step.stream: step.rule for step in steps}, edge)
    return None if found is None else JointStep(*found, edge)


def _fused(steps: tuple[ReverseStep, ...], requirements: Requirements, kernels: Kernels) -> tuple[ReverseStep, ...]:
    """Steps with the kernels that take streams on through later ones."""
    find = kernels.fused
    if find is None:
        return steps
    kept = {value.index for value, _ in requirements.values} | {v.index for v in requirements.latents.values()}
    by_node = {step.node: step for step in steps}

    def unseen(value: Value) -> bool:
        return value.index not in kept

    found = {step.node: fused for step in steps if (fused := find(step, by_node, unseen, False)) is not None}
    covered = {place for fused in found.values() for place in fused.covers}
    offered = {place for f in found.values() for place, scaled in zip(f.gives, f.scaled, strict=True) if scaled}
    for step in steps:
        places = {(s.stream, v) for s in step.streams for v in step.node.outputs}
        if (
            step.node not in found
            and places & offered
            and not any((s.stream, step.node) in covered for s in step.streams)
        ):
            alone = find(step, by_node, unseen, True)
            if alone is not None:
                found[step.node] = alone
    taken = {place for fused in found.values() for place in fused.takes}
    for node, fused in found.items():
        scaled = tuple(s and place in taken for s, place in zip(fused.scaled, fused.gives, strict=True))
        found[node] = replace(fused, scaled=scaled)
    return tuple(replace(step, fused=found.get(step.node)) for step in steps)


def _uses(requirements: Requirements, stream: str) -> bool:
    if stream == requirements.latent_stream and requirements.latents:
        return True
    return any(stream in maps for maps in requirements.maps.values()) or any(
        name == stream for _, name in requirements.values
    )


def _reached(graph: Graph, requirements: Requirements, stream: str, everything: bool) -> set[int]:
    """Values at which a stream is needed: below each lies something that is read out."""
    wanted = {value.index for value, name in requirements.values if name == stream}
    if stream == requirements.latent_stream:
        wanted |= {value.index for value in requirements.latents.values()}
    if everything:
        wanted |= {v.index for v in graph.explained}
        wanted |= {node.outputs[0].index for node in graph.nodes if node.kind == "embedding" and node.carrying}
    found = set(wanted)
    for node in graph.nodes:
        if not node.carrying:
            continue
        below = any(v is not None and v.index in found for v in node.operands)
        if below or stream in requirements.maps.get(node, ()):
            found |= {v.index for v in node.outputs}
    return found


def _needed(node: Node, steps: tuple[StreamStep, ...], maps: frozenset[str], summed: bool) -> list[int]:
    """Values that a reverse step reads."""
    inputs = output = False
    for step in steps:
        needs = step.rule.needs(node)
        inputs, output = inputs or needs[0], output or needs[1]
    if maps and node.kind == "softmax":
        output = True
    elif maps and not steps:
        inputs = True
    found = [v.index for v in node.operands if v is not None and (inputs or not v.carrying)]
    if output:
        found += [v.sums if summed else v.index for v in node.outputs]
    return list(dict.fromkeys(found))


def _reverse_steps(
    plan: list[tuple[Node, tuple[StreamStep, ...], frozenset[str]]],
    needed: list[list[int]],
    joints: list[JointStep | None],
) -> tuple[ReverseStep, ...]:
    last: dict[int, int] = {}
    for i, indices in enumerate(needed):
        last.update(dict.fromkeys(indices, i))
    return tuple(
        ReverseStep(node, steps, maps, tuple(needed[i]), tuple(v for v in needed[i] if last[v] == i), joints[i])
        for i, (node, steps, maps) in enumerate(plan)
    )


def _remaking(steps: tuple[ReverseStep, ...], again: Sequence[Node], kernels: Kernels) -> tuple[ReverseStep, ...]:
    """Steps with what runs again before each: the first that reads it, or whose kernel goes on to one that does."""
    waiting = {node.outputs[0].index: ForwardStep(node, (), kernels.forward(node)) for node in again}
    reads = {step.node: step.tensors for step in steps}
    found = []
    for step in steps:
        nodes = (step.node, *(step.fused.nodes if step.fused is not None else ()))
        due = dict.fromkeys(i for node in nodes for i in reads.get(node, ()) if i in waiting)
        found.append(replace(step, remakes=tuple(waiting.pop(i) for i in due)))
    return tuple(found)


def _kept(graph: Graph, requirements: Requirements) -> set[int]:
    """Values that live through the forward pass for something other than the reverse steps."""
    kept = {graph.output.index} | {v.index for v, _ in requirements.values}
    kept |= {value.index for value in requirements.latents.values()}
    read_after = requirements.read_after or (graph.attention_sites()[-1:] if requirements.profile else ())
    read = [v for node in profile_nodes(graph, read_after) for v in (*node.operands, *node.outputs)]
    kept |= {v.index for v in read if v is not None and not v.carrying}
    if requirements.padding:
        kept |= {mask.value.index for site in graph.attention_sites() if (mask := mask_of(site)) is not None}
    return kept


def _forward_steps(
    graph: Graph, kept: set[int], kernels: Kernels, sums: Mapping[Node, ForwardKernel]
) -> tuple[ForwardStep, ...]:
    last: dict[int, int] = {}
    for i, node in enumerate(graph.nodes):
        for value in (*leaves((node.args, node.kwargs)), *node.outputs):
            last[value.index] = i
    dying: dict[int, list[int]] = {}
    for index, i in last.items():
        if index not in kept:
            dying.setdefault(i, []).append(index)
    return tuple(
        ForwardStep(node, tuple(dying.get(i, ())), sums.get(node) or kernels.forward(node), node in sums)
        for i, node in enumerate(graph.nodes)
    )


__all__ = [
    "ForwardStep",
    "JointKernel",
    "JointStep",
    "JointStream",
    "Kernels",
    "Program",
    "ReverseStep",
    "StreamStep",
    "build_program",
]
