"""What a read-out must know of a model's structure: its attention layers, and which tokens the output reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from relprop.errors import UnsupportedTopologyError
from relprop.graph import Graph, Node, Value
from relprop.rules import Call, make_rule
from relprop.rules.base import unbroadcast
from relprop.weights import Derive

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
    odd = [site for site in sites if not _is_global_self_attention(site)]
    lengths = {str(site.operands[1].shape[-2]) for site in sites if site.operands[1] is not None}
    if odd or len(lengths) > 1:
        named = "\n".join(f"  {site.describe()}" for site in odd or sites)
        raise UnsupportedTopologyError(
            f"method {method!r} walks through self-attention layers over one sequence of tokens: expected query and key"
            f" tokens to be that sequence in every layer, got {len(lengths)} sequence length(s) and\n{named}"
        )
    return sites


def _is_global_self_attention(site: Node) -> bool:
    q, k = site.operands[0], site.operands[1]
    assert q is not None and k is not None
    if not (q.carrying and k.carrying) or k.sample is None or k.sample.axis != 0:
        return False
    if k.rank == 4 and k.sample.factor != 1:  # windows share the batch axis
        return False
    rows = site.attributes.get("query_rows")
    return rows is not None or str(q.shape[-2]) == str(k.shape[-2])


def by_head(site: Node, maps: Tensor) -> Tensor:
    """A site's map as [T, B, H, Nq, Nk], also where heads share the batch axis."""
    if maps.ndim == 5:
        return maps
    sample = site.outputs[0].sample
    assert sample is not None
    return maps.reshape(maps.shape[0], -1, sample.factor, *maps.shape[-2:])


def query_rows(site: Node, length: int) -> slice:
    """Which of the sequence's tokens a site computes queries for."""
    start, stop = site.attributes.get("query_rows", (0, length))
    return slice(start, min(stop, length))


def residual_tokens(graph: Graph, site: Node) -> Value | None:
    """The token sequence [B, N, C] that a first attention layer reads: the value before its norm and projections."""
    value = site.operands[1]
    length = str(value.shape[-2]) if value is not None else ""
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
    value: Value | None = residual_tokens(graph, site)
    while value is not None and value.producer is not None:
        node = value.producer
        if node.kind == "movement" and isinstance(node.args[0], list) and value.rank == 3:
            axis = node.args[1] if len(node.args) > 1 else 0
            if axis % 3 == 1:
                flags: list[bool] = []
                for part in node.args[0]:
                    size = int(lengths(part.index)[1])
                    flags += explained_part(part, size, lengths)
                return flags
        value = next((v for v in node.operands if v is not None and v.carrying), None)
        if value is not None and value.rank < 3:
            break
    return []


def explained_part(part: Value, size: int, lengths: Any) -> list[bool]:
    """One operand of the concatenation that builds the sequence; it may be a concatenation itself."""
    if not part.carrying:
        return [False] * size
    node = part.producer
    while node is not None and node.kind in ("add", "fanout", "norm"):
        value = next((v for v in node.operands if v is not None and v.carrying), None)
        node = value.producer if value is not None else None
    if node is not None and node.kind == "movement" and isinstance(node.args[0], list):
        flags: list[bool] = []
        for inner in node.args[0]:
            flags += explained_part(inner, int(lengths(inner.index)[1]), lengths)
        if len(flags) == size:
            return flags
    return [True] * size


def profile_nodes(graph: Graph, site: Node | None = None) -> list[Node]:
    """The operations between an attention layer, the last by default, and the output, output last."""
    at = graph.nodes.index(site or graph.attention_sites()[-1])
    return [node for node in graph.nodes[at + 1 :] if node.carrying]


def read_profile(
    graph: Graph,
    tensors: dict[int, Any],
    shapes: dict[int, torch.Size],
    seed: Tensor,
    site: Node | None = None,
) -> Tensor:
    """How much the seeded outputs read of each token after the last attention layer, adding up to 1. [T or 1, B, N]

    One where a single class token is read, 1 / N each for a mean over tokens. Found by sending a constant back from
    the outputs that are explained through selections and pools alone: every other operation hands it on unchanged, so
    what arrives at the last attention layer tells tokens apart by how they are read, not by what they say.

    Args:
        seed: of the reverse sweep; where it is 0 nothing is asked of the output. [T, *output shape]
        site: the attention layer, the last by default.
    Raises:
        UnsupportedTopologyError: tokens are mixed after the last attention layer in a way that is no pool.
    """
    site = site or graph.attention_sites()[-1]
    output = site.outputs[0]
    batch = seed.shape[1]
    tokens = site.operands[1 if "query_rows" in site.attributes else 0]
    length = shapes[tokens.index][-2]  # type: ignore[union-attr]
    rows = query_rows(site, length)
    if len(range(*rows.indices(length))) == 1:
        profile = seed.new_zeros(1, batch, length)
        profile[..., rows] = 1.0
        return profile
    streams = {graph.output.index: (seed != 0).to(seed.dtype)}
    for node in reversed(profile_nodes(graph, site)):
        parts = [streams.pop(v.index, None) for v in node.outputs]
        given = [part for part in parts if part is not None]
        if not given:
            continue
        carrying = tuple(v is not None and v.carrying for v in node.operands)
        call = Call(node, tensors, shapes, carrying, seed.dtype, Derive())
        for value, part in zip(node.operands, _unmixed(graph, node, call, parts, given), strict=False):
            if value is not None and value.carrying and part is not None:
                streams[value.index] = streams[value.index] + part if value.index in streams else part
    arrived = streams[output.index]
    per_token = arrived.reshape(len(seed), batch, -1, *arrived.shape[-2:]).mean((2, 4))
    profile = seed.new_zeros(len(seed), batch, length)
    profile[..., rows] = per_token / per_token.sum(-1, keepdim=True)
    return profile


def _unmixed(graph: Graph, node: Node, call: Call, parts: list[Tensor | None], given: list[Tensor]) -> Any:
    """A constant sent back through one operation."""
    carrying = [v is not None and v.carrying for v in node.operands]
    if node.kind == "linear":
        shape = (len(given[0]), *call.shape(0))
        return (given[0].mean(-1, keepdim=True).expand(shape),)
    if node.kind in ("norm", "activation"):
        return (given[0],)
    if node.kind == "fanout":
        return (sum(given[1:], given[0]),)
    constants = [v for v in node.operands if v is not None and not v.carrying]
    if node.kind == "mul" and any(v.index not in graph.parameters for v in constants):
        return GRADIENT.propagate(call, given[0])  # a mask says which tokens are read
    if node.kind in ("add", "mul"):
        return tuple(unbroadcast(given[0], call.shape(i)) if c else None for i, c in enumerate(carrying))
    if node.kind in ("movement", "select", "pool"):
        return GRADIENT.propagate(call, tuple(parts) if len(parts) > 1 else given[0])
    raise UnsupportedTopologyError(
        f"the tokens that the output reads: expected selections and pools after the last attention layer, got"
        f" {node.describe()}"
    )
