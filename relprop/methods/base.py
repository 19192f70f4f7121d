"""What a method is: a default composite, the streams it needs and a read-out that turns them into one map."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from relprop.errors import OptionError, unknown_name
from relprop.graph import Graph, Node, Value

Maps = dict[str, Tensor]


@dataclass(frozen=True)
class Requirements:
    """What the reverse sweep must bring to a read-out.

    Attributes:
        maps: per attention layer, which of its maps: "attention", "gradient", "relevance".
        values: streams at values: (value, "gradient" or "relevance").
        profile: whether the read-out asks which tokens the output reads.
        read_after: attention layers for which the read-out asks how much of each query the output reads.
        positions: whether it asks for what positions keep.
        latents: values whose relevance is kept, by name.
        latent_stream: "relevance", or "gradient" where the method's relevance is the gradient times the value; None
            where there is no one pass to keep it of.
        padding: whether it asks which tokens no query sees.
    """

    maps: dict[Node, frozenset[str]] = field(default_factory=dict)
    values: tuple[tuple[Value, str], ...] = ()
    profile: bool = False
    positions: bool = False
    latents: Mapping[str, Value] = field(default_factory=dict)
    latent_stream: str | None = "relevance"
    padding: bool = False
    read_after: tuple[Node, ...] = ()


@dataclass
class Reading:
    """What one run offers to its read-out.

    Attributes:
        batch, targets: sizes B and T.
        profile: how much the output reads of each token after the last attention layer. [T or 1, B, N + E]
        tokens: how many tokens the row of all tokens has, N; learned queries stand after them.
        explained_tokens: for each token whether it comes from an explained input (not a class or register token). [N]
        padded: for each token whether it is hidden from every query. [B, N]
        streams: (value, stream name) -> tensor [T, *shape].
        inputs: value -> the tensor it had in the forward pass.
        positions: relevance that positions keep, each [T, B, N], where the read-out asks.
        read: how much the output reads of the queries of attention layers, where the read-out asks. Each [T, B, Nq]
        backend: that the run's kernels come from.
    """

    batch: int
    targets: int
    profile: Tensor | None = None
    tokens: int | None = None
    explained_tokens: Tensor | None = None
    padded: Tensor | None = None
    streams: dict[tuple[Value, str], Tensor] = field(default_factory=dict)
    inputs: dict[Value, Tensor] = field(default_factory=dict)
    positions: list[Tensor] | None = None
    read: dict[Node, Tensor] = field(default_factory=dict)
    backend: str = "torch"


class Reader:
    """The state of one read-out during one reverse sweep."""

    def visit(self, site: Node, maps: Maps, reading: Reading) -> None:
        """Take what is needed of one attention layer's maps [T, B, H, Nq, Nk]; layers come last first."""

    def finish(self, reading: Reading) -> Tensor:
        """The relevance map. [T or 1, B, ...]"""
        raise NotImplementedError

    def by_input(self, graph: Graph, reading: Reading) -> dict[str, Tensor]:
        """Relevance maps by explained input, where the read-out answers for inputs. Each [T or 1, B, ...]"""
        return {}

    def matrices(self) -> dict[tuple[str, str], Tensor]:
        """Matrices between the sequences of inputs, where the read-out has such. Each [T or 1, B or 1, N, M]"""
        return {}


class RowReader(Reader):
    """A reader that only multiplies a row with each layer's matrix E, which a kernel can do without E."""

    def queried(self, site: Node, reading: Reading) -> Tensor:
        """The row that comes to a layer, at its queries. [T or 1, B, Nq]"""
        raise NotImplementedError

    def advance(self, site: Node, product: Tensor) -> None:
        """Take that row times E, at the layer's keys. [T or 1, B, Nk]"""
        raise NotImplementedError


@dataclass(frozen=True)
class Readout:
    """Says what it needs of a graph and makes a reader for each run."""

    @property
    def starts_from_profile(self) -> bool:
        """Whether the answer holds the row that the walk started from, which says nothing about the input."""
        return False

    @property
    def all_rows(self) -> bool:
        """Whether it reads rows that the output does not, so that the graph must compute them."""
        return False

    @property
    def gives_matrices(self) -> bool:
        """Whether its readers have matrices between sequences beside the map."""
        return False

    def row_edge(self, site: Node) -> str | None:
        """What E is made of, a name of `EDGES`, where its reader is a `RowReader` and needs no map of this layer."""
        return None

    def resolve(self, graph: Graph) -> Readout:
        """The read-out for a graph, where its kind depends on the graph's structure."""
        return self

    def require(self, graph: Graph) -> Requirements:
        """Requirements for a graph.

        Raises:
            UnsupportedTopologyError: the model's structure is not one the read-out is defined for.
        """
        raise NotImplementedError

    def first_layers(self) -> Mapping[str, Node]:
        """Where it follows several sequences: of every input the first attention layer over its tokens."""
        return {}

    def read_of(self, name: str, tokens: int, reading: Reading) -> Tensor:
        """How much the output reads of each token of such an input. [T or 1, B, N]"""
        raise NotImplementedError

    def reader(self) -> Reader:
        """A fresh reader."""
        raise NotImplementedError


@dataclass(frozen=True)
class Method:
    """A named way to explain.

    Attributes:
        name, summary, source: for people.
        composite: the default rules of the relevance stream.
        readout: from options to a read-out.
        options: names and defaults of `method_options`.
        output: "tokens" ([B, N]) or "input" (one value per pixel or token).
        uses_target: whether the answer depends on the target.
    """

    name: str
    summary: str
    source: str
    composite: str
    readout: Callable[..., Readout]
    options: Mapping[str, Any] = field(default_factory=dict)
    output: str = "tokens"
    uses_target: bool = True

    def make_readout(self, options: Mapping[str, Any] | None) -> Readout:
        """The read-out with these options.

        Raises:
            OptionError: an option that the method does not have.
        """
        given = dict(options or {})
        unknown = sorted(set(given) - set(self.options))
        if unknown:
            known = ", ".join(sorted(self.options)) or "no options"
            raise OptionError(f"method_options of {self.name}: expected {known}, got {', '.join(unknown)}")
        return self.readout(**{**self.options, **given})


METHODS: dict[str, Method] = {}


def register_method(method: Method) -> Method:
    """Make a method known by its name."""
    METHODS[method.name] = method
    return method


def find_method(name: str) -> Method:
    """A method by name.

    Raises:
        UnknownNameError: no method has that name; the nearest is suggested.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise unknown_name("method", name, METHODS)
    return METHODS[name]


def methods() -> dict[str, str]:
    """Every method's name and what it answers."""
    return {name: method.summary for name, method in METHODS.items()}
