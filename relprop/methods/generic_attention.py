"""The generic attention updates: self-attention, and attention between two sequences, as the graph wires them.

Each sequence of tokens has a state; attention that is added to its residual stream makes the next. A state keeps for
each input a matrix of how much its tokens stand for the input's: R_tt, R_ti, R_it and R_ii of two modalities.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from relprop.errors import UnsupportedTopologyError
from relprop.graph import Graph, Node, Value
from relprop.methods.attention_maps import EDGES, RowWalk, edge_matrix
from relprop.methods.base import Maps, Reader, Reading, Readout, Requirements
from relprop.methods.topology import query_rows, self_attention_sites


@dataclass(frozen=True)
class Pending:
    """What attention hands to the residual stream of its queries, not yet added to it."""

    query: int
    key: int
    site: Node


@dataclass(frozen=True)
class Update:
    """A state made of the states of queries and keys; `residual` keeps the queries' own."""

    state: int
    of: Pending
    residual: bool


@dataclass
class Topology:
    """How attention wires sequences of tokens.

    Attributes:
        roots: states before any attention, by the explained input that they come from; "" for constants.
        origin: for every state the root of its own tokens.
        updates: in order.
        final: the state that the output reads, and the attention layer that made it.
    """

    roots: dict[int, str] = field(default_factory=dict)
    origin: list[int] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    final: tuple[int, Node] | None = None

    def new(self, origin: int | None = None) -> int:
        """A state; a root where it has no origin."""
        self.origin.append(len(self.origin) if origin is None else origin)
        return len(self.origin) - 1


class _Tracer:
    def __init__(self, graph: Graph, method: str) -> None:
        self.graph, self.method = graph, method
        self.found = Topology()
        self.at: dict[int, int | Pending] = {}
        self.made: dict[tuple[Node, bool], int] = {}

    def run(self) -> Topology:
        for value in self.graph.explained:
            if value.carrying:
                self.at[value.index] = self.root(self.name_of(value))
        for node in self.graph.nodes:
            if node.carrying:
                state = self.through(node)
                self.at.update({value.index: state for value in node.outputs})
        final = self.settled(self.at[self.graph.output.index])
        site = next((u.of.site for u in self.found.updates if u.state == final), None)
        if site is None:
            raise self.error("an output that reads tokens after an attention layer, got one that reads an input")
        self.found.final = (final, site)
        return self.found

    def root(self, name: str) -> int:
        state = self.found.new()
        self.found.roots[state] = name
        return state

    def name_of(self, value: Value | None) -> str:
        names = {v.index: name for name, v in self.graph.inputs.items()}
        while value is not None and value.index not in names:
            value = None if value.producer is None else next((v for v in value.producer.operands if v), None)
        return "" if value is None else names[value.index]

    def error(self, text: str) -> UnsupportedTopologyError:
        return UnsupportedTopologyError(f"method {self.method!r} follows attention between sequences: expected {text}")

    def settled(self, state: int | Pending) -> int:
        if isinstance(state, int):
            return state
        # A constant query, such as a learned one, keeps its own row whether or not it is added.
        return self.updated(state, residual=self.found.roots.get(state.query) == "")

    def updated(self, of: Pending, residual: bool) -> int:
        if (of.site, residual) not in self.made:
            state = self.found.new(self.found.origin[of.query])
            self.found.updates.append(Update(state, of, residual))
            self.made[of.site, residual] = state
        return self.made[of.site, residual]

    def through(self, node: Node) -> int | Pending:
        carrying = [v for v in node.operands if v is not None and v.carrying]
        if node.kind == "embedding":
            return self.root(self.name_of(node.operands[1]))
        if node.kind == "attention":
            return self.attention(node)
        states = list(dict.fromkeys(self.at[v.index] for v in carrying))
        if len(states) == 1:
            return states[0]
        pending = [s for s in states if isinstance(s, Pending)]
        plain = [s for s in states if not isinstance(s, Pending)]
        if len(pending) == 1 and plain == [pending[0].query]:
            return self.updated(pending[0], residual=True) if node.kind == "add" else pending[0]
        raise self.error(f"each operation to read one sequence of tokens, got several at {node.describe()}")

    def attention(self, node: Node) -> Pending:
        q, k = node.operands[0], node.operands[1]
        assert q is not None and k is not None
        for value in (q, k):
            shared = value.rank == 4 and value.sample is not None and value.sample.factor != 1
            if shared or (value.sample is not None and value.sample.axis != 0):
                raise self.error(f"attention over whole sequences, got windows at {node.describe()}")
        states = [self.settled(self.at[v.index]) if v.carrying else self.root("") for v in (q, k)]
        return Pending(states[0], states[1], node)


@dataclass(frozen=True)
class GenericAttention(Readout):
    """Positive gradient x attention, gathered along the graph.

    Args:
        method: for messages.
        start_layer: first layer of the product, where all layers attend within one sequence.
        normalise: the residual-free part of R_ss and R_qq is divided by its row sums where sequences meet.
    """

    method: str
    start_layer: int = 0
    normalise: bool = True

    def resolve(self, graph: Graph) -> Readout:
        """A row walk where all layers attend within one sequence, the matrices of all states elsewhere."""
        try:
            self_attention_sites(graph, self.method)
        except UnsupportedTopologyError:
            if not graph.attention_sites():
                raise
            return CoAttention(self.method, self.normalise, _Tracer(graph, self.method).run())
        return RowWalk("gradient_x_attention", self.method, self.start_layer)


@dataclass(frozen=True, eq=False)
class CoAttention(Readout):
    """The updates of eq. 5-11, state by state; memory is quadratic in the number of tokens."""

    method: str
    normalise: bool
    topology: Topology

    def require(self, graph: Graph) -> Requirements:
        """Attention and gradient of every layer that the output depends on."""
        maps = {update.of.site: EDGES["gradient_x_attention"] for update in self.topology.updates}
        assert self.topology.final is not None
        return Requirements(maps, profile=True, profile_site=self.topology.final[1])

    def reader(self) -> Reader:
        """A reader of whole maps."""
        return _States(self.topology, self.normalise)


class _States(Reader):
    def __init__(self, topology: Topology, normalise: bool) -> None:
        self.topology, self.normalise = topology, normalise
        self.edges: dict[Node, Tensor] = {}
        self.matrices: dict[int, dict[int, Tensor]] = {}  # state -> root -> [T or 1, B or 1, N, N of the root]

    def visit(self, site: Node, maps: Maps, reading: Reading) -> None:
        self.edges[site] = edge_matrix("gradient_x_attention", site, maps, reading.backend)

    def finish(self, reading: Reading) -> dict[str, Tensor]:
        for update in self.topology.updates:
            self.matrices[update.state] = self.apply(update)
        assert self.topology.final is not None and reading.profile is not None
        row = reading.profile.unsqueeze(-2)
        final = self.matrices[self.topology.final[0]]
        named = {self.topology.roots[root]: matrix for root, matrix in final.items()}
        return {name: (row @ matrix).squeeze(-2) for name, matrix in named.items() if name}

    def of(self, state: int, length: int, like: Tensor) -> dict[int, Tensor]:
        """A state's matrices; a root stands for itself."""
        if state not in self.matrices:
            own = torch.eye(length, dtype=like.dtype, device=like.device)
            self.matrices[state] = {state: own.expand(1, 1, -1, -1)}
        return self.matrices[state]

    def apply(self, update: Update) -> dict[int, Tensor]:
        site, edge = update.of.site, self.edges[update.of.site]
        same = update.of.query == update.of.key
        keys = self.of(update.of.key, edge.shape[-1], edge)
        queries = keys if same else self.of(update.of.query, edge.shape[-2], edge)
        ours, theirs = self.topology.origin[update.of.query], self.topology.origin[update.of.key]
        length = next(iter(queries.values())).shape[-2]
        rows = query_rows(site, length)
        gained: dict[int, Tensor] = {}
        for root, matrix in keys.items():
            if same or root != theirs or root == ours:
                gained[root] = edge @ matrix  # eq. 6, 7 and 11
                continue
            inner = edge @ self.bar(matrix)  # eq. 10
            gained[root] = inner if ours not in queries else self.bar(queries[ours])[..., rows, rows].mT @ inner
        found = dict(queries) if update.residual else {}
        for root, gain in gained.items():
            before = found.get(root)
            if before is None:
                before = gain.new_zeros(1, 1, length, gain.shape[-1])
            total = before.expand(*gain.shape[:2], *before.shape[-2:]).clone()
            total[..., rows, :] += gain
            found[root] = total
        return found

    def bar(self, matrix: Tensor) -> Tensor:
        """(R - I) / its row sums + I, eq. 8-9; a row without relevance stays the identity's."""
        if not self.normalise:
            return matrix
        identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        rest = matrix - identity
        sums = rest.sum(-1, keepdim=True)
        return torch.where(sums == 0, 0.0, rest / torch.where(sums == 0, 1.0, sums)) + identity
