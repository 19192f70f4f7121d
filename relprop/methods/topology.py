"""What a read-out must know of a model's structure: its attention layers, and which tokens the output reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from relprop.errors import UnsupportedTopologyError
from relprop.graph import Graph, Node, Value, depends_on_input
from relprop.rules import Call, make_rule
from relprop.rules.base import unbroadcast
from relprop.weights import Derive

aten = torch.ops.aten

GRADIENT = make_rule("any", "gradient")


def self_attention_sites(graph: Graph, method: str) -> list[Node]:
    """Attention layers over one common sequence of tokens, first to last.

    Raises:
        UnsupportedTopologyError: there is none, or they do not share one sequence.
    """
    sites = graph.attention_sites()
    if not sites:
        raise UnsupportedTopologyError(
            f"method {method!r} reads attention maps: expected a model with attention layers, got none that"
            " torch.export shows as attention (softmax between two products of activations)"
        )
    if graph.tokens.covering is None:
        named = "\n".join(f"  {site.describe()}: {reason}" for site, reason in graph.tokens.problems)
        raise UnsupportedTopologyError(
            f"method {method!r} walks a row of tokens through the attention layers: expected layers that attend over"
            f" tokens of one sequence, got\n{named}\nMethods 'full' and 'gradient_x_input' explain such a model at its"
            " input, and Engine.trace gives each layer's own maps"
        )
    return sites


def by_head(site: Node, maps: Tensor) -> Tensor:
    """A site's map as [T, B, H, Nq, Nk], also where heads share the batch axis."""
    if maps.ndim == 5:
        return maps
    sample = site.outputs[0].sample
    assert sample is not None
    return maps.reshape(maps.shape[0], -1, sample.factor or 1, *maps.shape[-2:])


def query_rows(site: Node) -> slice:
    """Which tokens of the row a site computes queries for."""
    return slice(*site.attributes.get("query_rows", (0, None)))


def key_rows(site: Node) -> slice:
    """Which tokens of the row a site's keys are."""
    return slice(*site.attributes.get("key_rows", (0, None)))


def queries_are_tokens(site: Node) -> bool:
    """Whether a site's queries are tokens that keep themselves, not learned ones that only gather."""
    return query_rows(site).start >= 0 or "key_rows" not in site.attributes


def number_of_keys(site: Node, shapes: dict[int, torch.Size]) -> int:
    """How many tokens a site sees."""
    keys, axis = (site.outputs[0], -1) if site.kind == "softmax" else (site.operands[1], -2)
    assert keys is not None
    return int(shapes[keys.index][axis])


@dataclass(frozen=True)
class Mask:
    """What hides keys from queries: additive, or True where they see (`hides`: where they do not)."""

    value: Value
    hides: bool = False

    def hidden(self, stored: Tensor) -> Tensor:
        """True where a query does not see a key; additive masks hide by minus infinity, the lowest number, or -1e4."""
        if stored.dtype == torch.bool:
            return stored if self.hides else ~stored
        return stored <= -1e4


def mask_of(site: Node) -> Mask | None:
    """What hides keys from queries, where it is an operand of its own or the last addition to the scores."""
    if site.kind == "attention":
        value = site.operands[3]
        return None if value is None else Mask(value)
    scores = site.operands[0]
    while scores is not None and scores.producer is not None:
        node = scores.producer
        if node.target is aten.masked_fill.Scalar:
            return Mask(node.args[1], hides=True)
        if node.kind == "add" and node.role == "mask":
            return Mask(next(v for v in node.operands if v is not None and not v.carrying))
        if node.kind != "movement":
            return None
        scores = node.operands[0]
    return None


def padded_tokens(
    graph: Graph, tensors: dict[int, Any], shapes: dict[int, torch.Size], batch: int, length: int | None = None
) -> Tensor | None:
    """Tokens that masks hide from every query of every attention layer; None where a layer hides none. [B, N], bool

    Args:
        length: look only at layers over that many tokens.
    """
    found: Tensor | None = None
    for site in graph.attention_sites():
        keys = number_of_keys(site, shapes)
        if length is not None and keys != length:
            continue
        mask, sample = mask_of(site), site.outputs[0].sample
        stored = None if mask is None else tensors.get(mask.value.index)
        if mask is None or stored is None:
            return None
        hidden = mask.hidden(stored)
        lead = hidden.shape[0] if hidden.ndim > 2 else 1
        factor = 1 if sample is None else sample.factor or 1
        if factor > 1 and lead > 1:
            lead //= factor
        hidden = hidden.reshape(lead, -1, hidden.shape[-1]).all(1).expand(batch, keys)
        found = hidden if found is None else found & hidden
    return found


def residual_tokens(graph: Graph, site: Node) -> Value | None:
    """The token sequence [B, N, C] that a first attention layer reads: the value before its norm and projections."""
    scores = site.kind == "softmax"
    value = site.outputs[0] if scores else site.operands[1]
    length = str(value.shape[-1 if scores else -2]) if value is not None else ""
    found = None
    while value is not None and value.producer is not None:
        if value.rank == 3 and str(value.shape[1]) == length:
            found = value
        node = value.producer
        if node.kind in ("add", "embedding") and found is not None:
            return found
        value = next((v for v in node.operands if v is not None and v.carrying), None)
    return found


def explained_tokens(graph: Graph, site: Node, lengths: Any) -> list[bool]:
    """Per token of the sequence: does it come from an explained input? Class and register tokens do not.

    Args:
        lengths: function from a value's index to its run-time shape.
    """
    return [origin is not None for origin in token_origins(graph, graph.tokens.covering or site, lengths)]


def token_origins(graph: Graph, site: Node, lengths: Any) -> list[str | None]:
    """Per token of the sequence that a first attention layer reads, the placeholder of the input that it comes from.

    None for class and register tokens, "" where no input is found. Empty where the sequence is not put together of
    parts: all of its tokens come from one input, or from inputs that are summed.

    Args:
        lengths: function from a value's index to its run-time shape.
    """
    value: Value | None = residual_tokens(graph, site)
    while value is not None and value.producer is not None:
        node = value.producer
        if node.kind == "movement" and isinstance(node.args[0], list) and value.rank == 3:
            axis = node.args[1] if len(node.args) > 1 else 0
            if axis % 3 == 1:
                origins: list[str | None] = []
                for part in node.args[0]:
                    origins += _part_origins(graph, part, int(lengths(part.index)[1]), lengths)
                return origins
        value = next((v for v in node.operands if v is not None and v.carrying), None)
        if value is not None and value.rank < 3:
            break
    return []


def _part_origins(graph: Graph, part: Value, size: int, lengths: Any) -> list[str | None]:
    """Of one operand of the concatenation that builds the sequence; it may be a concatenation itself."""
    if not part.carrying:
        return [None] * size
    node = part.producer
    while node is not None and node.kind in ("add", "fanout", "norm"):
        value = next((v for v in node.operands if v is not None and v.carrying), None)
        node = value.producer if value is not None else None
    if node is not None and node.kind == "movement" and isinstance(node.args[0], list):
        origins: list[str | None] = []
        for inner in node.args[0]:
            origins += _part_origins(graph, inner, int(lengths(inner.index)[1]), lengths)
        if len(origins) == size:
            return origins
    return [_origin(graph, part)] * size


def _origin(graph: Graph, value: Value | None) -> str:
    """The placeholder that a carrying value is made of, "" where none is found."""
    names = {v.index: name for name, v in graph.inputs.items()}
    while value is not None and value.index not in names:
        node = value.producer
        if node is None:
            return ""
        carrying = [v for v in node.operands if v is not None and v.carrying]
        ids = node.operands[1] if node.kind == "embedding" else next((v for v in node.operands if v is not None), None)
        value = carrying[0] if carrying else ids
    return "" if value is None else names[value.index]


def patch_grid(
    graph: Graph, patches: int, size: tuple[int, int], shapes: Mapping[int, torch.Size]
) -> tuple[int, int] | None:
    """Rows and columns of an image's patches: of a convolution that makes them, else of squares that fill the image.

    Args:
        size: of the image, in pixels.
    """
    for node in graph.nodes:
        if node.kind == "conv" and node.outputs[0].rank == 4:
            rows, columns = shapes[node.outputs[0].index][-2:]
            if rows * columns == patches:
                return int(rows), int(columns)
    side = math.isqrt(size[0] * size[1] // patches) if patches else 0
    if side and size[0] % side == 0 and size[1] % side == 0 and (size[0] // side) * (size[1] // side) == patches:
        return size[0] // side, size[1] // side
    return None


def profile_nodes(graph: Graph, sites: Sequence[Node]) -> list[Node]:
    """The operations between attention layers and the output, output last."""
    reached = {value.index for site in sites for value in site.outputs}
    found = []
    for node in graph.nodes:
        if node.carrying and any(value is not None and value.index in reached for value in node.operands):
            reached |= {value.index for value in node.outputs}
            found.append(node)
    return found


def read_profile(graph: Graph, tensors: dict[int, Any], shapes: dict[int, torch.Size], seed: Tensor) -> Tensor:
    """How much the seeded outputs read of each token after the last attention layer, adding up to 1. [T or 1, B, N + E]

    One where a single class token is read, 1 / N each for a mean over tokens. Found by sending a constant back from
    the outputs that are explained through selections and pools alone: every other operation hands it on unchanged, so
    what arrives at the last attention layer tells tokens apart by how they are read, not by what they say. E learned
    queries stand after the N tokens.

    Args:
        seed: of the reverse sweep; where it is 0 nothing is asked of the output. [T, *output shape]
    Raises:
        UnsupportedTopologyError: tokens are mixed after the last attention layer in a way that is no pool.
    """
    site = graph.attention_sites()[-1]
    assert graph.tokens.covering is not None
    length = number_of_keys(graph.tokens.covering, shapes) + graph.tokens.extra
    rows = query_rows(site)
    if len(range(*rows.indices(length))) == 1:
        profile = seed.new_zeros(1, seed.shape[1], length)
        profile[..., rows] = 1.0
        return profile
    (read,) = tokens_read(graph, tensors, shapes, seed, (site,)).values()
    profile = seed.new_zeros(len(seed), seed.shape[1], length)
    profile[..., rows] = read
    return profile


def tokens_read(
    graph: Graph, tensors: dict[int, Any], shapes: dict[int, torch.Size], seed: Tensor, sites: Sequence[Node]
) -> dict[Node, Tensor]:
    """How much the seeded outputs read of each query of some last attention layers, see `read_profile`.

    Returns:
        for each layer, adding up to 1 where anything is read. [T, B, Nq]
    """
    return {site: _read_after(site, graph, tensors, shapes, seed) for site in sites}


def _read_after(
    site: Node, graph: Graph, tensors: dict[int, Any], shapes: dict[int, torch.Size], seed: Tensor
) -> Tensor:
    streams = {graph.output.index: (seed != 0).to(seed.dtype)}
    for node in reversed(profile_nodes(graph, (site,))):
        parts = [streams.pop(v.index, None) for v in node.outputs]
        given = [part for part in parts if part is not None]
        if not given:
            continue
        carrying = tuple(v is not None and v.carrying for v in node.operands)
        call = Call(node, tensors, shapes, carrying, seed.dtype, Derive())
        for value, part in zip(node.operands, _unmixed(graph, node, call, parts, given), strict=False):
            if value is not None and value.carrying and part is not None:
                streams[value.index] = streams[value.index] + part if value.index in streams else part
    arrived = streams[site.outputs[0].index]
    per_token = arrived.reshape(len(seed), seed.shape[1], -1, *arrived.shape[-2:]).mean((2, 4))
    total = per_token.sum(-1, keepdim=True)
    return per_token / torch.where(total == 0, 1.0, total)


def over_features(node: Node) -> bool:
    """Whether a softmax runs over what a linear layer made of each token, as a router of experts does."""
    value = node.operands[0]
    if value is None or node.args[1] not in (-1, value.rank - 1):
        return False
    while value is not None and value.producer is not None:
        above = value.producer
        if above.kind == "linear":
            return True
        if above.kind not in ("add", "mul", "activation") and above.target is not aten.to.dtype:
            return False
        value = next((v for v in above.operands if v is not None and v.carrying), None)
    return False


def _unmixed(graph: Graph, node: Node, call: Call, parts: list[Tensor | None], given: list[Tensor]) -> Any:
    """A constant sent back through one operation."""
    carrying = [v is not None and v.carrying for v in node.operands]
    if node.kind == "linear":
        shape = (len(given[0]), *call.shape(0))
        return (given[0].mean(-1, keepdim=True).expand(shape),)
    if node.kind == "matmul" and sum(carrying) == 1:
        at = carrying.index(True)
        spread = given[0].mean(-2 if at else -1, keepdim=True).expand(len(given[0]), *call.shape(at))
        return (None, spread) if at else (spread, None)
    if node.kind == "softmax" and over_features(node):
        return (given[0].mean(-1, keepdim=True).expand(len(given[0]), *call.shape(0)),)
    if node.kind in ("norm", "activation"):
        return (given[0],)
    if node.kind == "matmul":
        rows = given[0].mean(-1, keepdim=True).expand(len(given[0]), *call.shape(0))
        if given[0].ndim > 3:
            return rows, None
        return rows, given[0].mean(-2, keepdim=True).expand(len(given[0]), *call.shape(1))  # samples with samples
    if node.kind == "fanout":
        return (sum(given[1:], given[0]),)
    constants = [v for v in node.operands if v is not None and not v.carrying]
    if node.kind == "mul" and any(depends_on_input(graph, v) for v in constants):
        return GRADIENT.propagate(call, given[0])  # a mask says which tokens are read
    if node.kind in ("add", "mul"):
        return tuple(unbroadcast(given[0], call.shape(i)) if c else None for i, c in enumerate(carrying))
    if node.kind in ("movement", "select", "pool"):
        return GRADIENT.propagate(call, tuple(parts) if len(parts) > 1 else given[0])
    raise UnsupportedTopologyError(
        f"the tokens that the output reads: expected selections and pools after the last attention layer, got"
        f" {node.describe()}"
    )
