"""Read-outs of attention maps: the row walk through all layers, one layer's row, and attention Grad-CAM."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from relprop import native
from relprop.errors import LayerIndexError, OptionError, UnsupportedTopologyError
from relprop.graph import Graph, Node
from relprop.methods.base import Maps, Reader, Reading, Readout, Requirements, RowReader
from relprop.methods.topology import by_head, key_rows, queries_are_tokens, query_rows, self_attention_sites

# What one entry of a layer's token-to-token matrix is made of, before the mean over heads.
EDGES: dict[str, frozenset[str]] = {
    "gradient_x_relevance": frozenset({"gradient", "relevance"}),
    "gradient_x_attention": frozenset({"gradient", "attention"}),
    "relevance": frozenset({"relevance"}),
    "attention": frozenset({"attention"}),
}

READ_TOKENS = ("kept", "zero", "minimum")


def layer_number(name: str, given: Any) -> int:
    """An option that counts layers: any integer, also of NumPy.

    Raises:
        LayerIndexError: it is none.
    """
    try:
        if not isinstance(given, bool):
            return operator.index(given)
    except (TypeError, ValueError):
        pass
    raise LayerIndexError(f"{name}: expected an int, got {given!r}")


def edge_matrix(edge: str, site: Node, maps: Maps, backend: str) -> Tensor:
    """Mean over heads of a layer's map; products and relevance are cut at zero first. [T, B, Nq, Nk]"""
    parts = [by_head(site, maps[name]) for name in sorted(EDGES[edge])]
    if edge == "attention":
        return parts[0].mean(2)
    if len(parts) == 2:
        if backend == "cpp" and parts[0].shape == parts[1].shape:
            return native.rollout_matrix(*parts)
        return (parts[0] * parts[1]).clamp(min=0).mean(2)
    return parts[0].clamp(min=0).mean(2)


@dataclass(frozen=True)
class RowWalk(Readout):
    """The read-out row of (I + E_B) ... (I + E_1), from the last layer to `start_layer`.

    Args:
        edge: what E is made of, a name of `EDGES`.
        start_layer: first layer of the product.
        normalise: divide each row of I + E by its sum.
        read_tokens: what the tokens that the output reads show for themselves: "kept", "zero", or "minimum" for the
            smallest relevance of the sample, as the authors' code does for BERT.
        count_padding: let padded tokens count in that minimum, as the authors' code does.
        method: for messages.
    """

    edge: str
    method: str
    start_layer: int = 0
    normalise: bool = False
    read_tokens: str = "kept"
    count_padding: bool = False

    @property
    def starts_from_profile(self) -> bool:
        """The start is a summand of the answer, unless rows are normalised on the way."""
        return not self.normalise

    def require(self, graph: Graph) -> Requirements:
        """Maps of every layer from `start_layer` on."""
        sites = self_attention_sites(graph, self.method)
        start = layer_number("start_layer", self.start_layer)
        if not -len(sites) <= start < len(sites):
            raise LayerIndexError(f"start_layer: expected one of {len(sites)} attention layers, got {start}")
        if self.read_tokens not in READ_TOKENS:
            raise OptionError(f"read_tokens: expected one of {', '.join(READ_TOKENS)}, got {self.read_tokens!r}")
        walked = sites[start % len(sites) :]
        asked = self.read_tokens == "minimum" and not self.count_padding
        return Requirements({site: EDGES[self.edge] for site in walked}, profile=True, padding=asked)

    def row_edge(self, site: Node) -> str | None:
        """Any, but rows are normalised without E only where they add up to 1: attention that sees a key."""
        if site.kind == "softmax":
            return None
        known = not self.normalise or (self.edge == "attention" and site.operands[3] is None)
        return self.edge if known else None

    def reader(self) -> Reader:
        """A walk from the rows that the output reads."""
        return _Walk(self.edge, self.normalise, self.read_tokens)


class _Walk(RowReader):
    def __init__(self, edge: str, normalise: bool, read_tokens: str) -> None:
        self.edge, self.normalise, self.read_tokens = edge, normalise, read_tokens
        self.row: Tensor | None = None  # [T or 1, B, N]

    def visit(self, site: Node, maps: Maps, reading: Reading) -> None:
        matrix = edge_matrix(self.edge, site, maps, reading.backend)
        queried = self._descend(site, reading, matrix.sum(-1) if self.normalise else None)
        self.advance(site, (queried.unsqueeze(-2) @ matrix).squeeze(-2))

    def queried(self, site: Node, reading: Reading) -> Tensor:
        assert reading.profile is not None
        return self._descend(site, reading, reading.profile.new_ones(()) if self.normalise else None)

    def advance(self, site: Node, product: Tensor) -> None:
        assert self.row is not None
        if self.row.shape[-1] == product.shape[-1]:
            self.row = self.row + product
            return
        self.row = self.row.expand(len(product), *self.row.shape[1:]).clone()
        self.row[..., key_rows(site)] += product

    def _descend(self, site: Node, reading: Reading, sums: Tensor | None) -> Tensor:
        """The row at a layer's queries, divided by the sums of the rows of I + E where they are normalised."""
        assert reading.profile is not None
        row = reading.profile if self.row is None else self.row
        rows = query_rows(site)
        queried = row[..., rows]
        if sums is not None:
            queried = queried / (sums + int(queries_are_tokens(site)))
            row = row.expand(len(queried), *row.shape[1:]).clone()
            row[..., rows] = queried
        self.row = row
        return queried

    def finish(self, reading: Reading) -> Tensor:
        assert self.row is not None and reading.profile is not None and reading.tokens is not None
        row, read = self.row[..., : reading.tokens], reading.profile[..., : reading.tokens] > 0
        if self.read_tokens == "kept":
            return row
        if self.read_tokens == "zero":
            shown = torch.zeros_like(row[..., :1])
        else:
            counted = row if reading.padded is None else row.masked_fill(reading.padded, torch.inf)
            shown = counted.amin(-1, keepdim=True)
        return torch.where(read, shown, row)


@dataclass(frozen=True)
class LayerRow(Readout):
    """The read-out row of one layer's matrix E.

    Args:
        edge: what E is made of; `gradient_weighted` multiplies relevance with the gradient.
        layer: which layer; negative counts from the last.
        method: for messages.
    """

    edge: str
    method: str
    layer: int = -1
    gradient_weighted: bool = False

    def _edge(self) -> str:
        return "gradient_x_relevance" if self.gradient_weighted and self.edge == "relevance" else self.edge

    def require(self, graph: Graph) -> Requirements:
        """Maps of that layer alone."""
        sites = self_attention_sites(graph, self.method)
        if not -len(sites) <= self.layer < len(sites):
            raise UnsupportedTopologyError(
                f"method {self.method!r}: expected a model with attention layer {self.layer}, got {len(sites)} layer(s)"
            )
        site = sites[self.layer]
        if site is not sites[-1] and not _starts_within(sites[-1], site):
            raise UnsupportedTopologyError(
                f"method {self.method!r}: expected a layer whose queries hold the tokens that the output reads, got"
                f" {site.describe()}; the last layer, {sites[-1].describe()}, is one"
            )
        return Requirements({site: EDGES[self._edge()]}, profile=True)

    def row_edge(self, site: Node) -> str | None:
        """Its own."""
        return self._edge()

    def reader(self) -> Reader:
        """A reader of one row."""
        return _Row(self._edge())


class _Row(RowReader):
    def __init__(self, edge: str) -> None:
        self.edge = edge
        self.length = 0
        self.row: Tensor | None = None

    def visit(self, site: Node, maps: Maps, reading: Reading) -> None:
        matrix = edge_matrix(self.edge, site, maps, reading.backend)
        self.advance(site, (self.queried(site, reading).unsqueeze(-2) @ matrix).squeeze(-2))

    def queried(self, site: Node, reading: Reading) -> Tensor:
        assert reading.profile is not None
        self.length = reading.profile.shape[-1]
        return reading.profile[..., query_rows(site)]

    def advance(self, site: Node, product: Tensor) -> None:
        self.row = product.new_zeros(*product.shape[:-1], self.length)
        self.row[..., key_rows(site)] = product

    def finish(self, reading: Reading) -> Tensor:
        assert self.row is not None and reading.tokens is not None
        return self.row[..., : reading.tokens]


def _starts_within(last: Node, site: Node) -> bool:
    """Whether the queries of the last layer are among those of another."""
    if "key_rows" not in last.attributes:
        return True
    read, asked = query_rows(last), query_rows(site)
    return (read.start < 0) == (asked.start < 0) and asked.start <= read.start and asked.stop is None


@dataclass(frozen=True)
class GradCam(Readout):
    """Grad-CAM on the last attention map: heads weighted by their mean gradient.

    Args:
        normalise: stretch each sample's map to [0, 1]; a constant map becomes zeros.
        over: what the mean and the stretch run over: "row" for the explained tokens in the rows that the output reads,
            as the authors' code does for ViT, "matrix" for all tokens by all tokens, as it does for BERT.
        count_padding: let padded tokens count there, as the authors' code does.
        method: for messages.
    """

    method: str
    normalise: bool = True
    over: str = "row"
    count_padding: bool = False

    @property
    def all_rows(self) -> bool:
        """Over the matrix: its other rows too."""
        return self.over == "matrix"

    def require(self, graph: Graph) -> Requirements:
        """The last layer's attention and its gradient."""
        if self.over not in ("row", "matrix"):
            raise OptionError(f"over: expected 'row' or 'matrix', got {self.over!r}")
        site = self_attention_sites(graph, self.method)[-1]
        assert graph.tokens.covering is not None
        if key_rows(site) != key_rows(graph.tokens.covering):
            raise UnsupportedTopologyError(
                f"method {self.method!r}: expected a last attention layer that sees all tokens, got {site.describe()}"
            )
        return Requirements({site: EDGES["gradient_x_attention"]}, profile=True, padding=not self.count_padding)

    def reader(self) -> Reader:
        """A reader of the last layer."""
        return _Cam(self.normalise, self.over)


class _Cam(Reader):
    def __init__(self, normalise: bool, over: str) -> None:
        self.normalise, self.over = normalise, over
        self.cam: Tensor | None = None

    def visit(self, site: Node, maps: Maps, reading: Reading) -> None:
        attention, gradient = by_head(site, maps["attention"]), by_head(site, maps["gradient"])
        assert reading.profile is not None
        profile = reading.profile[..., query_rows(site)]
        seen = torch.ones_like(gradient[:1, :, 0, 0], dtype=torch.bool)  # [1, B, Nk]
        if reading.padded is not None:
            seen = seen & ~reading.padded
        if self.over == "matrix":
            counted = seen.unsqueeze(-1) & seen.unsqueeze(-2)
            self.cam = (profile.unsqueeze(-2) @ self._map(attention, gradient, counted)).squeeze(-2)
            return
        if reading.explained_tokens is not None:
            seen = seen & reading.explained_tokens
        row = profile[:, :, None, None]
        self.cam = self._map(row @ attention, row @ gradient, seen.unsqueeze(-2)).squeeze(-2)

    def _map(self, attention: Tensor, gradient: Tensor, counted: Tensor) -> Tensor:
        """Heads weighted by their mean gradient over the entries that count; 0 elsewhere. [T, B, Nq, Nk]

        Entries are chosen by arithmetic: taking them out would make sizes depend on values, which a recorded pass
        cannot have.
        """
        inside = counted.unsqueeze(2)
        weight = torch.where(inside, gradient, 0.0).sum((-2, -1), keepdim=True) / inside.sum((-2, -1), keepdim=True)
        cam = (attention * weight).mean(2).clamp(min=0)
        if self.normalise:
            low = torch.where(counted, cam, torch.inf).amin((-2, -1), keepdim=True)
            high = torch.where(counted, cam, -torch.inf).amax((-2, -1), keepdim=True)
            cam = torch.where(high > low, (cam - low) / torch.where(high > low, high - low, 1.0), 0.0)
        return torch.where(counted, cam, 0.0)

    def finish(self, reading: Reading) -> Tensor:
        assert self.cam is not None
        return self.cam
