"""The canonical graph: nodes of known kinds, explicit fan-out, roles, and which values carry relevance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from relprop.errors import UnsupportedTopologyError


@dataclass(frozen=True)
class SampleAxis:
    """Where a value keeps its samples: `axis` has size batch * factor, samples outermost.

    The factor is None where it depends on the call, as in a list of all tokens of a batch.
    """

    axis: int
    factor: int | None


@dataclass(eq=False, repr=False)
class Value:
    """A tensor of the graph. Sizes that depend on the batch or the sequence length are SymInts."""

    index: int
    name: str
    shape: tuple[Any, ...]
    dtype: torch.dtype
    carrying: bool
    sample: SampleAxis | None
    producer: Node | None = None
    output: int = 0  # which of the producer's outputs

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def sums(self) -> int:
        """The index of the float32 sums that this value was rounded from, where a pass keeps them; no value has it."""
        return ~self.index

    def __repr__(self) -> str:  # in one line: the fields would print everything before this value
        return f"<Value {self.index} {self.name} {self.describe()} {self.dtype}>"

    def describe(self) -> str:
        return f"[{', '.join(str(s) for s in self.shape)}]"

    def per_sample(self, tensor: Tensor, batch: int | None) -> Tensor:
        """Bring a stream's tensor [T, *shape] to [T, B, rest].

        Args:
            batch: how many samples; where it is not at hand, only axes of a known factor can be cut.
        Raises:
            UnsupportedTopologyError: samples lie scattered along one axis, as in tokens sorted by expert.
        """
        if self.sample is None or (batch is None and self.sample.factor is None):
            place = self.producer.describe() if self.producer is not None else "an input"
            raise UnsupportedTopologyError(
                f"sums per sample: expected samples on an axis of their own, got {self.name} {self.describe()} of"
                f" {place}"
            )
        lead = tensor.movedim(self.sample.axis + 1, 1)
        factor = self.sample.factor
        return lead.reshape(lead.shape[0], batch if factor is None else lead.shape[1] // factor, -1)


@dataclass(eq=False, repr=False)
class Node:
    """One operation. `operands` are its tensor inputs in order, as rules see them (None where one is absent).

    `later_calls` has those of the modules around it that had been called before, and how often; `calls` all whose call
    it is part of, which leaves out a module that only holds another one, such as a list.
    """

    name: str
    kind: str
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    operands: tuple[Value | None, ...]
    outputs: tuple[Value, ...]
    role: str = ""
    module: str = ""
    source: str = ""
    later_calls: dict[str, int] = field(default_factory=dict)
    calls: frozenset[str] = frozenset()
    attributes: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<Node {self.kind}: {self.describe()}>"

    @property
    def carrying(self) -> bool:
        return any(v.carrying for v in self.outputs)

    @property
    def is_residual(self) -> bool:
        return self.role == "residual"

    def describe(self) -> str:
        op = getattr(self.target, "__name__", str(self.target))
        place = " ".join(part for part in (self.module, self.source) if part)
        return f"{op} ({self.name})" + (f" at {place}" if place else "")


@dataclass(frozen=True)
class TokenSpace:
    """The tokens that attention layers mix, as one row.

    Attributes:
        covering: the layer whose keys are all of them, None where layers do not share their tokens.
        extra: learned queries that stand after them in the row; they are no tokens of the model's.
        problems: layers that do not fit in, and why.
    """

    covering: Node | None
    extra: int = 0
    problems: tuple[tuple[Node, str], ...] = ()


@dataclass
class Graph:
    """Nodes in execution order, with the values that come from outside."""

    nodes: list[Node]
    values: list[Value]
    inputs: dict[str, Value]  # placeholder -> value
    parameters: dict[int, str]  # value index -> qualified name in the model
    constants: dict[int, Tensor]
    explained: list[Value]  # inputs whose relevance is asked for
    output: Value
    tokens: TokenSpace = TokenSpace(None)

    def consumers(self) -> dict[int, list[Node]]:
        uses: dict[int, list[Node]] = {}
        for node in self.nodes:
            for value in leaves((node.args, node.kwargs)):
                uses.setdefault(value.index, []).append(node)
        return uses

    def attention_sites(self) -> list[Node]:
        """Attention layers, and softmax layers that mix tokens with more between the two products; first to last."""
        return [
            node
            for node in self.nodes
            if node.carrying and (node.kind == "attention" or node.attributes.get("site", False))
        ]


def depends_on_input(graph: Graph, value: Value) -> bool:
    """Whether a value is made from what is in an input, not from weights and sizes alone."""
    inputs = {v.index for v in graph.inputs.values()}
    stack, seen = [value], set()
    while stack:
        at = stack.pop()
        if at.index in inputs:
            return True
        if at.index in seen or at.producer is None:
            continue
        seen.add(at.index)
        # Sizes are read off the inputs everywhere; only values count.
        if at.producer.target is not torch.ops.aten.sym_size.int:
            stack.extend(leaves((at.producer.args, at.producer.kwargs)))
    return False


def leaves(structure: Any) -> Iterator[Value]:
    """Every Value inside nested arguments."""
    if isinstance(structure, Value):
        yield structure
    elif isinstance(structure, (list, tuple)):
        for item in structure:
            yield from leaves(item)
    elif isinstance(structure, dict):
        for item in structure.values():
            yield from leaves(item)


def substitute(structure: Any, replace: Callable[[Value], Any]) -> Any:
    """Nested arguments with every Value replaced."""
    if isinstance(structure, Value):
        return replace(structure)
    if isinstance(structure, list):
        return [substitute(item, replace) for item in structure]
    if isinstance(structure, tuple):
        return tuple(substitute(item, replace) for item in structure)
    if isinstance(structure, dict):
        return {key: substitute(item, replace) for key, item in structure.items()}
    return structure
