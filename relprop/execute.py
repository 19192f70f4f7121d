"""Running a program: one forward pass that keeps what the plan names, one reverse sweep over its steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from relprop.graph import Node, Value, substitute
from relprop.latents import Latent, Paths, make_latent
from relprop.ledger import Ledger, LedgerEntry, book, cancellation
from relprop.methods.base import Reader, Reading, RowReader
from relprop.methods.input_maps import by_name
from relprop.methods.sampled import Origin, SampledMap
from relprop.methods.topology import explained_tokens, number_of_keys, padded_tokens, read_profile, tokens_read
from relprop.program import ForwardStep, FusedStep, JointStep, JointStream, Program, ReverseStep, Scaled, StreamStep
from relprop.rules import Absorbed, Call
from relprop.rules.add_epsilon import summands
from relprop.targets import Target
from relprop.weights import Derive

Streams = dict[int, Tensor]


@dataclass
class Forward:
    """What a forward pass leaves behind: tensors by value index, and the shapes of all values."""

    tensors: dict[int, Any]
    shapes: dict[int, torch.Size]

    @property
    def device(self) -> torch.device:
        return next(t.device for t in self.tensors.values() if isinstance(t, Tensor))


@dataclass
class Trace:
    """Streams at every value and maps at every attention layer, for looking inside; see `Engine.trace`."""

    streams: dict[tuple[str, str], Tensor] = field(default_factory=dict)  # (value, stream) -> [T, *shape]
    maps: dict[tuple[str, str], Tensor] = field(default_factory=dict)  # (path, map) -> [T, B, H, Nq, Nk]


def run_forward(
    program: Program, bound: dict[int, Any], derive: Derive, move: Callable[[Value, Tensor], Tensor] | None = None
) -> Forward:
    """The model's forward pass, step by step.

    Args:
        bound: inputs, parameters and constants by value index.
        derive: what kernels in place of an operation take from its weights.
        move: applied to every input and every embedding, for the trust check.
    """
    tensors: dict[int, Any] = dict(bound)
    if move is not None:
        for value in program.graph.inputs.values():
            if value.index in tensors:
                tensors[value.index] = move(value, tensors[value.index])
    shapes: dict[int, torch.Size] = {i: t.shape for i, t in bound.items() if isinstance(t, Tensor)}
    for step in program.forward:
        node = step.node
        if node.kind == "fanout":
            source = node.operands[0]
            assert source is not None
            result: Any = tensors[source.index]
            for value in node.outputs:
                tensors[value.index], shapes[value.index] = result, result.shape
        else:
            result = _outcome(step, tensors, derive)
            if step.sums:
                result, sums = result
                if sums is not None:
                    tensors[node.outputs[0].sums] = sums
            if len(node.outputs) == 1 and not isinstance(result, (list, tuple)):
                index = node.outputs[0].index
                if move is not None and node.kind == "embedding":
                    result = move(node.outputs[0], result)
                tensors[index] = result
                if isinstance(result, Tensor):
                    shapes[index] = result.shape
            else:
                for value, part in zip(node.outputs, result, strict=True):
                    tensors[value.index], shapes[value.index] = part, part.shape
        for index in step.frees:
            tensors.pop(index, None)
    return Forward(tensors, shapes)


def _outcome(step: ForwardStep, tensors: dict[int, Any], derive: Derive) -> Any:
    """What a forward step's operation gives."""
    node = step.node
    args, kwargs = _bind(node.args, tensors), _bind(node.kwargs, tensors)
    if step.kernel is None:
        return node.target(*args, **kwargs)
    return step.kernel(node, derive, *args, **kwargs)


def _bind(structure: Any, tensors: dict[int, Any]) -> Any:
    return substitute(structure, lambda value: tensors[value.index])


class Sweep:
    """One reverse sweep: named streams walk down the graph; a reader takes the attention maps on the way."""

    def __init__(
        self,
        program: Program,
        forward: Forward,
        derive: Derive,
        reading: Reading,
        reader: Reader,
        dtype: torch.dtype,
        precision: str,
        ledger: bool,
        trace: Trace | None = None,
    ) -> None:
        self.program, self.forward, self.derive = program, forward, derive
        self.reading, self.reader = reading, reader
        self.dtype, self.precision = dtype, precision
        self.trace = trace
        self.streams: dict[str, Streams] = {name: {} for name in program.seeds}
        self.activations = {name: forward.tensors[value.index] for name, value in program.requirements.latents.items()}
        self.entries: list[LedgerEntry] | None = [] if ledger else None
        self.wanted_values = program.requirements.values
        self.kept = {name: {v.index for v, of in self.wanted_values if of == name} for name in program.seeds}
        self.latent_stream = program.requirements.latent_stream or "relevance"
        if self.latent_stream in self.kept:
            latents = program.requirements.latents.values()
            self.kept[self.latent_stream] |= {value.index for value in latents}

    def run(self, seed: Tensor) -> Ledger | None:
        """Seed every stream at the output and walk.

        Args:
            seed: [T, *output shape]
        """
        output = self.program.graph.output
        relevance = seed
        if self.program.composite.seed == "score" and not self.program.gradient_form:
            relevance = seed * self.forward.tensors[output.index].to(seed.dtype)
        for name in self.program.seeds:
            self._arrive(name, output, relevance if name == "relevance" else seed)
        for step in self.program.reverse:
            self._step(step)
        self._collect()
        if self.entries is None:
            return None
        batch = self.reading.batch
        total = output.per_sample(relevance, batch).sum(-1, dtype=torch.float64)
        frontier = torch.zeros_like(total)
        for value in self.program.frontier.get("relevance", ()):
            arrived = self.streams["relevance"].get(value.index)
            if arrived is not None:
                frontier = frontier + value.per_sample(arrived, batch).sum(-1, dtype=torch.float64)
        return Ledger(total, frontier, self.entries)

    def latents(self, several: bool) -> dict[str, Latent]:
        """Relevance at the values that the plan keeps by name; call it after `run`."""
        found: dict[str, Latent] = {}
        times_value = self.latent_stream == "gradient" or self.program.gradient_form
        for name, value in self.program.requirements.latents.items():
            activation, stream = self.activations[name], self.streams[self.latent_stream].get(value.index)
            if stream is None:
                stream = activation.new_zeros(self.reading.targets, *activation.shape, dtype=self.dtype)
            found[name] = make_latent(value, activation, stream, times_value, several)
        return found

    def _collect(self) -> None:
        for value, name in self.wanted_values:
            found = self.streams[name].get(value.index)
            if found is None:
                shape = self.forward.shapes[value.index]
                found = torch.zeros(self.reading.targets, *shape, dtype=self.dtype, device=self.forward.device)
            if name == "relevance" and self.program.gradient_form:
                found = found * self.reading.inputs[value].to(found.dtype)
            self.reading.streams[value, name] = found

    def _arrive(self, name: str, value: Value, tensor: Tensor) -> None:
        self.streams[name][value.index] = tensor
        if self.trace is not None:
            self.trace.streams[value.name, name] = tensor

    def _step(self, step: ReverseStep) -> None:
        for made in step.remakes:
            self.forward.tensors[made.node.outputs[0].index] = _outcome(made, self.forward.tensors, self.derive)
        whole = self.entries is None and self.trace is None
        if whole and step.fused is not None and self._fused(step.fused):
            pass
        elif whole and step.joint is not None:
            self._joint(step, step.joint)
        else:
            self._streams(step)
        for index in step.frees:
            if index not in self.program.graph.parameters:
                self.forward.tensors.pop(index, None)

    def _fused(self, fused: FusedStep) -> bool:
        """Several steps in one kernel; no where one of its streams never arrived, and its steps run one by one."""
        arrived = [self.streams[name].get(value.index) for name, value in fused.takes]
        if any(part is None for part in arrived):
            for (name, value), part in zip(fused.takes, arrived, strict=True):
                if isinstance(part, Scaled):
                    self.streams[name][value.index] = part.settled()
            return False
        for name, value in fused.takes:
            if value.index not in self.kept[name]:
                del self.streams[name][value.index]
        made = fused.run([self._call(node, ()) for node in fused.nodes], arrived)  # type: ignore[arg-type]
        for (name, value), part in zip(fused.gives, made, strict=True):
            self.streams[name][value.index] = part  # type: ignore[assignment]
        return True

    def _joint(self, step: ReverseStep, joint: JointStep) -> None:
        """All streams and the read-out's row in one kernel."""
        node = step.node
        streams: dict[str, JointStream] = {}
        for stream in step.streams:
            arrived = self._take(stream, node)
            if arrived is not None:
                streams[stream.stream] = JointStream(stream.rule, arrived, stream.wanted)
        row, edge = None, None
        if joint.edge is not None:
            assert isinstance(self.reader, RowReader)
            row = self.reader.queried(node, self.reading)
            edge = joint.edge if step.maps - {"attention"} <= streams.keys() else None
        passed, product = joint.kernel(self._call(node, ()), streams, edge, row)
        for name, parts in passed.items():
            for value, part in zip(node.operands, parts, strict=False):
                if value is not None and value.carrying and part is not None:
                    self._arrive(name, value, part)
        if row is not None and isinstance(self.reader, RowReader):
            keys = number_of_keys(node, self.forward.shapes)
            # Where a stream of the edge never arrived, its map is 0.
            self.reader.advance(node, row.new_zeros(*row.shape[:2], keys) if product is None else product)

    def _streams(self, step: ReverseStep) -> None:
        """Stream after stream, then the maps that they left to the reader."""
        node = step.node
        call: Call | None = None
        for stream in step.streams:
            arrived = self._take(stream, node)
            if arrived is None:
                continue
            booked = Absorbed() if self.entries is not None and stream.stream == "relevance" else None
            wanted = stream.wanted
            if booked is not None:
                wanted = tuple(v is not None and v.carrying for v in node.operands)
            if call is None:
                call = self._call(node, wanted)
            call.wanted, call.absorbed = wanted, booked
            if step.maps and node.kind == "softmax":
                call.maps[stream.stream] = arrived
            kernel = None if booked is not None else stream.kernel
            passed = stream.rule.propagate(call, arrived) if kernel is None else kernel(stream.rule, call, arrived)
            if stream.stream == "relevance" and stream.rule.name == "gradient" and "gradient" in call.maps:
                call.maps["relevance"] = call.maps["gradient"]  # of a stream with that rule they are one
            for value, part in zip(node.operands, passed, strict=False):
                if value is not None and value.carrying and part is not None:
                    self._arrive(stream.stream, value, part)
            if booked is not None:
                self._book(call, stream, arrived, passed, booked)
        if step.maps:
            self._read(step, call or self._call(node, ()))

    def _call(self, node: Node, wanted: tuple[bool, ...]) -> Call:
        call = Call(
            node,
            self.forward.tensors,
            self.forward.shapes,
            wanted,
            self.dtype,
            self.derive,
            precision=self.precision,
        )
        call.positions, call.samples = self.reading.positions, self.reading.batch
        return call

    def _take(self, stream: StreamStep, node: Node) -> Any:
        streams = self.streams[stream.stream]
        kept = self.kept[stream.stream]
        parts = tuple(streams.get(v.index) if v.index in kept else streams.pop(v.index, None) for v in node.outputs)
        if all(part is None for part in parts):
            return None
        return parts if len(node.outputs) > 1 else parts[0]

    def _read(self, step: ReverseStep, call: Call) -> None:
        if "attention" in step.maps and "attention" not in call.maps:
            from relprop.rules.attention_composed import heads

            if call.node.kind == "softmax":
                call.maps["attention"] = call.y[None]
            else:
                heads(call)
        shape = next((m.shape for m in call.maps.values()), None)
        for name in step.maps - set(call.maps):
            assert shape is not None
            call.maps[name] = torch.zeros(
                self.reading.targets, *shape[1:], dtype=self.dtype, device=self.forward.device
            )
        if self.trace is not None:
            path = Paths(self.program.graph).own(step.node)
            for name, found in call.maps.items():
                self.trace.maps[path, name] = found
        self.reader.visit(step.node, {name: call.maps[name] for name in step.maps}, self.reading)

    def _book(self, call: Call, stream: StreamStep, arrived: Any, passed: Any, booked: Absorbed) -> None:
        assert self.entries is not None
        node = call.node
        outputs = arrived if isinstance(arrived, tuple) else (arrived,)

        def sums(values: Any, tensors: Any) -> list[tuple[Tensor, Tensor]]:
            return [
                (flat.sum(-1, dtype=torch.float64), flat.abs().sum(-1, dtype=torch.float64))
                for value, tensor in zip(values, tensors, strict=False)
                if tensor is not None and value is not None and value.carrying
                for flat in (value.per_sample(tensor, self.reading.batch),)
            ]

        rule = stream.rule
        self.entries.append(
            book(
                node,
                rule.describe(),
                bool(rule.conserves),
                sums(node.outputs, outputs),
                sums(node.operands, passed),
                booked.causes,
                self._cancellation(call),
            )
        )

    def _cancellation(self, call: Call) -> Tensor | None:
        node = call.node
        kept = all(v is not None and v.index in call.tensors for v in node.operands)
        if not (node.is_residual and kept):
            return None
        return cancellation(node.outputs[0], *summands(call), self.reading.batch)


@dataclass
class PassResult:
    """What one pass leaves: the read-out's map [T or 1, B, ...], the model's output, and how they came about.

    Attributes:
        by_input: the read-out's maps by explained input, where it answers for inputs.
        matrices: between sequences of inputs, where it has such. Each [T or 1, B or 1, N, M]
    """

    relevance: Tensor
    output: Tensor
    target: Target
    reading: Reading
    shapes: dict[int, torch.Size]
    books: Ledger | None = None
    latents: dict[str, Latent] = field(default_factory=dict)
    by_input: dict[str, Tensor] = field(default_factory=dict)
    matrices: dict[tuple[str, str], Tensor] = field(default_factory=dict)


def run_pass(
    program: Program,
    bound: dict[int, Any],
    aim: Callable[[Tensor], Target],
    derive: Derive,
    dtype: torch.dtype,
    precision: str,
    *,
    move: Callable[[Value, Tensor], Tensor] | None = None,
    ledger: bool = False,
    trace: Trace | None = None,
    explained: Tensor | None = None,
    instead: Callable[[Forward, Target], dict[Value, Tensor]] | None = None,
) -> PassResult:
    """Forward pass, reverse sweep and read-out.

    Args:
        bound: inputs, parameters and constants by value index.
        aim: from the model's output to what is explained of it.
        move: see `run_forward`.
        explained: `Reading.explained_tokens` of an earlier run with the same lengths, to make no tensor anew.
        instead: makes the read-out's maps at explained inputs from the forward pass, where one sweep does not; see
            `run_sampled`.
    """
    forward = run_forward(program, bound, derive, move)
    output = forward.tensors[program.graph.output.index]
    target = aim(output)
    reading = _reading(program, forward, output, target, explained)
    reader = program.readout.reader()
    sweep = Sweep(program, forward, derive, reading, reader, dtype, precision, ledger, trace)
    books = None if instead is not None else sweep.run(target.seed)
    if instead is None:
        relevance, by_input = reader.finish(reading), reader.by_input(program.graph, reading)
    else:
        found = instead(forward, target)
        relevance, by_input = next(iter(found.values())), by_name(program.graph, found)
    latents = sweep.latents(target.several)
    matrices = reader.matrices()
    return PassResult(relevance, output, target, reading, forward.shapes, books, latents, by_input, matrices)


def run_sampled(
    program: Program,
    readout: SampledMap,
    repeated: Callable[[int], dict[int, Any]],
    derive: Derive,
    forward: Forward,
    target: Target,
    aim: Callable[[Tensor, int], Tensor],
    dtype: torch.dtype,
    precision: str,
) -> dict[Value, Tensor]:
    """Gradients at a read-out's points, several points to a batch, and its answer at each explained input. [T, B, ...]

    Args:
        repeated: inputs, parameters and constants for that many times the batch.
        forward, target: of the pass at the input itself.
        aim: from the output of some points, and their number, to the seed.
    """
    origins = _origins(program, forward)
    weights, totals = readout.weights(), dict[Value, Tensor]()
    for start in range(0, len(weights), readout.batch):
        scale = weights[start : start + readout.batch]
        points = range(start, start + len(scale))
        moved = {value: torch.cat([readout.moved(of, i) for i in points]) for value, of in origins.items()}
        run = run_forward(program, repeated(len(scale)), derive, _replacing(moved))
        output = run.tensors[program.graph.output.index]
        seed = aim(output, len(scale))
        reading = _reading(program, run, output, replace(target, seed=seed), None)
        Sweep(program, run, derive, reading, Reader(), dtype, precision, False).run(seed)
        for value, stream in program.requirements.values:
            per_point = reading.streams[value, stream].unflatten(1, (len(scale), -1))
            part = torch.einsum("tk...,k->t...", per_point, per_point.new_tensor(scale))
            totals[value] = totals[value] + part if value in totals else part
    return {
        value: readout.over_channels(readout.combine(origins[value].x.to(total.dtype), total))
        for value, total in totals.items()
    }


def _origins(program: Program, forward: Forward) -> dict[Value, Origin]:
    """What a read-out's points are made around."""
    found: dict[Value, Origin] = {}
    for number, (value, _) in enumerate(program.requirements.values):
        x, first = forward.tensors[value.index], None
        if x.ndim == 3:
            hidden = padded_tokens(program.graph, forward.tensors, forward.shapes, len(x), x.shape[1])
            first = None if hidden is None else hidden.int().cumprod(1).sum(1)
        found[value] = Origin(x, number, first)
    return found


def _replacing(moved: dict[Value, Tensor]) -> Callable[[Value, Tensor], Tensor]:
    """A forward pass's hook that puts tensors in the place of values."""
    return lambda at, found: moved[at].to(found.dtype) if at in moved else found


def _reading(program: Program, forward: Forward, output: Tensor, target: Target, explained: Tensor | None) -> Reading:
    graph = program.graph
    reading = Reading(output.shape[0], target.seed.shape[0])
    compiled = any(s.backend == "cpp" for step in program.reverse for s in step.streams)
    reading.backend = "cpp" if compiled else "torch"
    if program.requirements.profile:
        reading.profile = read_profile(graph, forward.tensors, forward.shapes, target.seed)
        reading.tokens = reading.profile.shape[-1] - graph.tokens.extra
        reading.explained_tokens = explained
        if explained is None:
            flags = explained_tokens(graph, graph.attention_sites()[0], lambda i: forward.shapes[i])
            reading.explained_tokens = torch.tensor(flags, device=output.device) if flags else None
    if program.requirements.read_after:
        reading.read = tokens_read(graph, forward.tensors, forward.shapes, target.seed, program.requirements.read_after)
    if program.requirements.positions:
        reading.positions = []
    if program.requirements.padding and program.requirements.profile:
        reading.padded = padded_tokens(graph, forward.tensors, forward.shapes, reading.batch)
    for value, _ in program.requirements.values:
        reading.inputs[value] = forward.tensors[value.index]
    return reading
