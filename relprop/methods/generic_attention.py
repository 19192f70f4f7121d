"""The generic attention updates: self-attention, and attention between two sequences, as the graph wires them.

Each sequence of tokens has a state; attention that is added to its residual stream makes the next. A state keeps for
each input a matrix of how much its tokens stand for the input's: R_tt, R_ti, R_it and R_ii of two modalities.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from relprop.errors import OptionError, UnsupportedTopologyError
from relprop.graph import Graph, Node, Value
from relprop.methods.attention_maps import EDGES, RowWalk, edge_matrix
from relprop.methods.base import Maps, Reader, Reading, Readout, Requirements
from relprop.methods.topology import key_rows, query_rows


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
        roots: states before any attention, by the explained inputs that they come from; none for constants.
        origin: for every state the root of its own tokens.
        updates: in order.
        final: the attention layers after which the output reads tokens, and the states that they made.
        inputs: names of explained inputs, in the order of the model's arguments.
        learned: how many learned queries stand after the tokens where layers' rows are counted.
    """

    roots: dict[int, tuple[str, ...]] = field(default_factory=dict)
    origin: list[int] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    final: dict[Node, int] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    learned: int = 0

    def rows(self, site: Node) -> slice:
        """Which of its own sequence a layer computes queries for."""
        rows = query_rows(site)
        if rows.start < 0:
            return slice(rows.start + self.learned, None if rows.stop is None else rows.stop + self.learned)
        return slice(rows.start, None if self.learned and rows.stop == -self.learned else rows.stop)

    def names(self) -> dict[int, tuple[str, ...]]:
        """What each root is called: its inputs, "learned" and "learned 2" ... for constants."""
        constants = [root for root, names in self.roots.items() if not names]
        numbered = {root: (f"learned {i}" if i > 1 else "learned",) for i, root in enumerate(constants, 1)}
        return {root: names or numbered[root] for root, names in self.roots.items()}

    def new(self, origin: int | None = None) -> int:
        """A state; a root where it has no origin."""
        self.origin.append(len(self.origin) if origin is None else origin)
        return len(self.origin) - 1


State = int | Pending | tuple[int, ...]  # several where an operation reads several sequences


class _Tracer:
    """Follows the states of sequences through a graph."""

    def __init__(self, graph: Graph, method: str) -> None:
        self.graph, self.method = graph, method
        self.found = Topology(inputs=tuple(graph.inputs), learned=graph.tokens.extra)
        self.at: dict[int, State] = {}
        self.made: dict[tuple[Node, bool], int] = {}

    def run(self) -> Topology:
        for value in self.graph.explained:
            if value.carrying:
                self.at[value.index] = self.root(self.name_of(value))
        for node in self.graph.nodes:
            if node.carrying:
                state = self.through(node)
                self.at.update({value.index: state for value in node.outputs})
        sites = {update.state: update.of.site for update in self.found.updates}
        for state in self.settled(self.at[self.graph.output.index]):
            site = sites.get(state)
            if site is None:
                raise self.error("an output that reads tokens after attention layers, got one that reads an input")
            self.found.final[site] = state
        return self.found

    def root(self, *names: str) -> int:
        state = self.found.new()
        self.found.roots[state] = names
        return state

    def name_of(self, value: Value | None) -> str:
        names = {v.index: name for name, v in self.graph.inputs.items()}
        while value is not None and value.index not in names:
            value = None if value.producer is None else next((v for v in value.producer.operands if v), None)
        return "" if value is None else names[value.index]

    def error(self, text: str) -> UnsupportedTopologyError:
        return UnsupportedTopologyError(f"method {self.method!r} follows attention between sequences: expected {text}")

    def settled(self, state: State) -> tuple[int, ...]:
        """States with nothing pending; what is not added to its queries stands without them."""
        if isinstance(state, Pending):
            return (self.updated(state, residual=False),)
        return (state,) if isinstance(state, int) else state

    def updated(self, of: Pending, residual: bool) -> int:
        if (of.site, residual) not in self.made:
            state = self.found.new(self.found.origin[of.query])
            self.found.updates.append(Update(state, of, residual))
            self.made[of.site, residual] = state
        return self.made[of.site, residual]

    def through(self, node: Node) -> State:
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
        if node.kind == "add" and all(isinstance(s, int) and s in self.found.roots for s in states):
            return self.merged(tuple(s for s in states if isinstance(s, int)))
        return tuple(dict.fromkeys(part for state in states for part in self.settled(state)))

    def merged(self, roots: tuple[int, ...]) -> int:
        """One sequence that several inputs are summed to, token by token."""
        names = tuple(name for root in roots for name in self.found.roots[root])
        known = next((root for root, of in self.found.roots.items() if of == names), None)
        return self.root(*names) if known is None else known

    def attention(self, node: Node) -> State:
        q, k = node.operands[0], node.operands[1]
        assert q is not None and k is not None
        states = [self.settled(self.at[v.index]) if v.carrying else (self.root(),) for v in (q, k)]
        if any(len(found) > 1 for found in states):
            raise self.error(f"queries and keys of one sequence each, got several at {node.describe()}")
        found = Pending(states[0][0], states[1][0], node)
        # Constant queries, such as learned ones, are added where nothing of the input shows it: they keep their rows.
        return self.updated(found, residual=True) if self.found.roots.get(found.query) == () else found


@dataclass(frozen=True)
class GenericAttention(Readout):
    """Positive gradient x attention, gathered along the graph.

    Args:
        method: for messages.
        start_layer, normalise, read_tokens, count_padding: of the row walk, where all layers attend within one
            sequence.
        normalise_between: where sequences meet, the residual-free parts of R_ss and R_qq are divided by their row sums.
        self_between: where they meet, relevance within each of them counts (eq. 10); without it E alone.
        edge: what E is made of, a name of `EDGES`.
        rows: "read" for the row that the output reads, "all" for every token's of its sequence, and for the matrices of
            all sequences.
    """

    method: str
    start_layer: int = 0
    normalise: bool = False
    read_tokens: str = "kept"
    count_padding: bool = False
    normalise_between: bool = True
    self_between: bool = True
    edge: str = "gradient_x_attention"
    rows: str = "read"

    @property
    def all_rows(self) -> bool:
        """Where whole matrices are asked for."""
        return self.rows == "all"

    def resolve(self, graph: Graph) -> Readout:
        """A row walk where all layers attend within one sequence and one row is read, matrices of all states elsewhere.

        Learned queries are a sequence of their own where they attend to each other.
        """
        walk = (self.start_layer, self.normalise, self.read_tokens, self.count_padding)
        if self.edge not in EDGES:
            raise OptionError(f"edge: expected one of {', '.join(EDGES)}, got {self.edge!r}")
        if self.rows not in ("read", "all"):
            raise OptionError(f"rows: expected 'read' or 'all', got {self.rows!r}")
        sites = graph.attention_sites()
        among_learned = any(key_rows(site).start < 0 for site in sites)
        alone = graph.tokens.covering is not None and not among_learned
        whole = bool(sites) and all(_whole(site) for site in sites)
        if not whole or (alone and (not self.all_rows or graph.tokens.extra)):
            if self.all_rows:
                raise OptionError(
                    f"rows: expected 'read' for method {self.method} where learned queries pool one sequence or a layer"
                    " does not attend over all of one, got 'all'"
                )
            return RowWalk(self.edge, self.method, *walk)
        if walk != (0, False, "kept", False):
            raise OptionError(
                f"method_options of {self.method}: expected none of the row walk's where matrices are walked, got"
                f" start_layer {walk[0]}, normalise {walk[1]}, read_tokens {walk[2]!r}, count_padding"
                f" {walk[3]}"
            )
        topology = _Tracer(graph, self.method).run()
        return CoAttention(self.method, self.normalise_between, topology, self.self_between, self.edge, self.rows)


def _whole(site: Node) -> bool:
    """Whether a layer attends over whole sequences, not within windows of them."""
    for value in site.operands[:2]:
        sample = None if value is None else value.sample
        if sample is not None and (sample.axis != 0 or (value.rank == 4 and sample.factor != 1)):  # type: ignore[union-attr]
            return False
    return site.kind == "attention"


@dataclass(frozen=True, eq=False)
class CoAttention(Readout):
    """The updates of eq. 5-11, state by state; memory is quadratic in the number of tokens."""

    method: str
    normalise: bool
    topology: Topology
    self_between: bool = True
    edge: str = "gradient_x_attention"
    rows: str = "read"

    @property
    def all_rows(self) -> bool:
        """Where whole matrices are asked for."""
        return self.rows == "all"

    @property
    def gives_matrices(self) -> bool:
        """Where every row of every state is computed."""
        return self.all_rows

    def require(self, graph: Graph) -> Requirements:
        """What E is made of, of every layer that the output depends on."""
        maps = {update.of.site: EDGES[self.edge] for update in self.topology.updates}
        return Requirements(maps, read_after=tuple(self.topology.final))

    def first_layers(self) -> dict[str, Node]:
        """Of every input the first layer that attends over its tokens."""
        found: dict[str, Node] = {}
        for update in self.topology.updates:
            for name in filter(None, self.topology.roots[self.topology.origin[update.of.key]]):
                found.setdefault(name, update.of.site)
        return found

    def read_of(self, name: str, tokens: int, reading: Reading) -> Tensor:
        """What the output reads of the last state of the input's own sequence; of another sequence's alone nothing."""
        for site, state in self.topology.final.items():
            if site in reading.read and name in self.topology.roots[self.topology.origin[state]]:
                read = reading.read[site]
                profile = read.new_zeros(*read.shape[:-1], tokens)
                profile[..., self.topology.rows(site)] = read
                return profile
        return torch.zeros(1, reading.batch, tokens)

    def reader(self) -> Reader:
        """A reader of whole maps."""
        return _States(self)


class _States(Reader):
    def __init__(self, readout: CoAttention) -> None:
        self.readout, self.topology, self.normalise = readout, readout.topology, readout.normalise
        self.edges: dict[Node, Tensor] = {}
        self.by_state: dict[int, dict[int, Tensor]] = {}  # state -> root -> [T or 1, B or 1, N, N of the root]
        self.maps: dict[str, Tensor] = {}

    def visit(self, site: Node, maps: Maps, reading: Reading) -> None:
        self.edges[site] = edge_matrix(self.readout.edge, site, maps, reading.backend)

    def finish(self, reading: Reading) -> Tensor:
        for update in self.topology.updates:
            self.by_state[update.state] = self.apply(update)
        found: dict[str, Tensor] = {}
        for site, state in self.topology.final.items():
            for root, matrix in self.by_state[state].items():
                row = matrix
                if not self.readout.all_rows:
                    row = (reading.read[site].unsqueeze(-2) @ matrix[..., self.topology.rows(site), :]).squeeze(-2)
                for name in self.topology.roots[root]:
                    found[name] = found[name] + row if name in found else row
        self.maps = {name: found[name] for name in self.topology.inputs if name in found}
        return next(iter(self.maps.values()))

    def by_input(self, graph: Graph, reading: Reading) -> dict[str, Tensor]:
        return self.maps

    def matrices(self) -> dict[tuple[str, str], Tensor]:
        """The last state's of every sequence, by the inputs whose tokens are rows and columns."""
        if not self.readout.gives_matrices:
            return {}
        last = {root: root for root in self.topology.roots}
        last |= {self.topology.origin[update.state]: update.state for update in self.topology.updates}
        names = self.topology.names()
        return {
            (row, column): matrix
            for origin, state in last.items()
            for root, matrix in self.by_state.get(state, {}).items()
            for row in names[origin]
            for column in names[root]
        }

    def of(self, state: int, length: int, like: Tensor) -> dict[int, Tensor]:
        """A state's matrices; a root stands for itself."""
        if state not in self.by_state:
            own = torch.eye(length, dtype=like.dtype, device=like.device)
            self.by_state[state] = {state: own.expand(1, 1, -1, -1)}
        return self.by_state[state]

    def apply(self, update: Update) -> dict[int, Tensor]:
        site, edge = update.of.site, self.edges[update.of.site]
        same = update.of.query == update.of.key
        keys = self.of(update.of.key, edge.shape[-1], edge)
        queries = keys if same else self.of(update.of.query, edge.shape[-2], edge)
        ours, theirs = self.topology.origin[update.of.query], self.topology.origin[update.of.key]
        length = next(iter(queries.values())).shape[-2]
        rows = self.topology.rows(site)
        gained: dict[int, Tensor] = {}
        for root, matrix in keys.items():
            if same or root != theirs or root == ours:
                gained[root] = edge @ matrix  # eq. 6, 7 and 11
                continue
            if not self.readout.self_between:
                gained[root] = edge
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
