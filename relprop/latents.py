"""Relevance inside a model: at the output or input of any module, at attention heads, along directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor

from relprop.errors import OptionError, ShapeError, UnsupportedTopologyError, unknown_name
from relprop.graph import Graph, Node, Value

HEADS = ":heads"
INPUT = ":input"
CALL = "@"  # of a module that is called several times: "path@0", "path@1"


@dataclass(frozen=True)
class Latent:
    """One value inside the model, of the pass that explained the output.

    Attributes:
        activation: [B, ...]
        coefficient: relevance per unit of activation, so that relevance = activation * coefficient. [B, (T), ...]
        relevance: of every element: a neuron, or a channel of a head. [B, (T), ...]
        several: whether there is an axis of targets.
    """

    activation: Tensor
    coefficient: Tensor
    relevance: Tensor
    several: bool

    def per_token(self) -> Tensor:
        """Summed over channels: [B, (T), N] for a sequence [B, N, C], [B, (T), H, N] for heads.

        Heads of attention within W > 1 windows of a sample have one axis more, [B, (T), W, H, N] with N tokens in a
        window; where a layer's one window is the whole image, as in Swin's last stage, they have none.
        """
        return self.relevance.sum(-1)

    def directions(self, encode: Callable[[Tensor], Tensor], decoder: Tensor) -> Tensor:
        """Relevance of features whose weighted directions add up to the activation, such as a sparse autoencoder's.

        Args:
            encode: from the activation [..., C] to how strongly each feature is present. [..., K]
            decoder: the features' directions. [K, C]
        Returns:
            code_k * <direction_k, coefficient>. [B, (T), ..., K]
        Raises:
            ShapeError: the directions do not fit the activation.
        """
        if decoder.ndim != 2 or decoder.shape[1] != self.activation.shape[-1]:
            raise ShapeError(
                f"directions: expected a decoder [K, {self.activation.shape[-1]}], got {list(decoder.shape)}"
            )
        codes = encode(self.activation)
        codes = codes.unsqueeze(1) if self.several else codes
        return codes * (self.coefficient @ decoder.T.to(self.coefficient.dtype))


def module_patterns(latents: Any) -> tuple[str, ...]:
    """What `latents` of `compile` asks for: several patterns, or one.

    Raises:
        OptionError: no strings.
    """
    found = (latents,) if isinstance(latents, str) else latents
    if not isinstance(found, Iterable):
        raise OptionError(f"latents: expected module paths, got {latents!r}")
    found = tuple(found)
    for pattern in found:
        if not isinstance(pattern, str):
            raise OptionError(f"latents: expected module paths, got {pattern!r}")
    return found


def latent_values(graph: Graph, patterns: Iterable[str]) -> dict[str, Value]:
    """The values that module paths stand for.

    Args:
        patterns: module paths, as in `fnmatch`, for modules' outputs; with ":input" for what goes into them, with
            ":heads" for the outputs of the attention heads inside them, before they are joined. A module that is called
            several times has a value for each call, "path@0", "path@1" and so on, and its path stands for all of them.
    Raises:
        UnknownNameError: a pattern fits no module that handles relevance. UnsupportedTopologyError: the output or input
            of a module that has several; heads where none can be told.
    """
    patterns = list(patterns)
    if not patterns:
        return {}
    around = Paths(graph)
    heads = {around.own(node): [node.outputs[0]] for node in graph.nodes if _has_heads(node)}
    known = {"": _leaving(graph, around), HEADS: heads, INPUT: {}}
    if any(pattern.endswith(INPUT) for pattern in patterns):
        known[INPUT] = _entering(graph, around)
    found: dict[str, Value] = {}
    for pattern in patterns:
        suffix = next((end for end in (HEADS, INPUT) if pattern.endswith(end)), "")
        hits = {path + suffix: values for path, values in known[suffix].items() if _fits(path, pattern, suffix)}
        if not hits:
            raise _unknown(graph, pattern, suffix, known[suffix])
        found |= {latent: _only(values, latent) for latent, values in hits.items()}
    return found


def _has_heads(node: Node) -> bool:
    wanted = node.kind == "attention" or bool(node.attributes.get("heads"))
    return wanted and node.carrying and bool(node.module) and len(node.outputs) == 1


def _fits(path: str, pattern: str, suffix: str) -> bool:
    """Whether a pattern means a module, or this one of its calls."""
    wanted = pattern.removesuffix(suffix)
    return fnmatch(path, wanted) or fnmatch(path.partition(CALL)[0], wanted)


def _unknown(graph: Graph, pattern: str, suffix: str, known: Iterable[str]) -> Exception:
    """Why nothing fits a pattern."""
    names = [path + suffix for path in known]
    if suffix != HEADS or names:
        return unknown_name("latent", pattern, names)
    others = sorted(
        {node.module or "the model itself" for node in graph.nodes if node.kind == "softmax" and node.carrying}
    )
    return UnsupportedTopologyError(
        f"latents: expected attention heads for {pattern!r}, got a model in which no softmax over products of queries"
        f" and keys multiplies values; softmax in {', '.join(others) or 'no module'}"
    )


def check_calls(graph: Graph, path: str) -> None:
    """Raises UnsupportedTopologyError where a module is called several times, so that it has no one output or input."""
    if any(path in node.later_calls for node in graph.nodes):
        raise UnsupportedTopologyError(
            f"latents: expected a module that is called once, got {path}, called several times"
        )


def _only(values: list[Value], latent: str) -> Value:
    if len(values) > 1:
        end = "input" if latent.endswith(INPUT) else "output"
        raise UnsupportedTopologyError(
            f"latents: expected a module with one {end} that carries relevance, got {latent} with {len(values)}"
        )
    return values[0]


class Paths:
    """The modules around a node, outermost first; of one that is called several times, which call."""

    def __init__(self, graph: Graph) -> None:
        self.recurring = {path for node in graph.nodes for path in node.later_calls}
        self.called = {path for node in graph.nodes for path in node.calls}

    def __call__(self, node: Node) -> list[str]:
        parts = node.module.split(".") if node.module else []
        return [self._named(node, ".".join(parts[:depth])) for depth in range(1, len(parts) + 1)]

    def inside(self, node: Node) -> list[str]:
        """Those whose call the node is part of, and those that are never called, as lists."""
        outside = self.called - node.calls
        return [path for path in self(node) if path.partition(CALL)[0] not in outside]

    def own(self, node: Node) -> str:
        """The innermost of them, empty where the model itself has the node."""
        return self._named(node, node.module)

    def _named(self, node: Node, path: str) -> str:
        return f"{path}{CALL}{node.later_calls.get(path, 0)}" if path in self.recurring else path


def _leaving(graph: Graph, around: Paths) -> dict[str, list[Value]]:
    """The carrying values that each module makes and that are used outside it, or else the last one that it makes."""
    made: dict[str, list[Value]] = {}
    uses: list[tuple[Value, list[str]]] = []
    for node in graph.nodes:
        if not node.carrying or node.kind == "fanout":
            continue
        within = around.inside(node)
        uses += [(value, within) for value in node.operands if value is not None and value.carrying]
        if len(node.outputs) == 1:
            made |= {path: [node.outputs[0]] for path in around(node)}
    used: dict[str, list[Value]] = {}
    for value, within in (*uses, (graph.output, [])):
        value = _before_fanout(value)
        outer = around.inside(value.producer) if value.producer is not None else []
        for path in outer:
            if path not in within and value not in used.setdefault(path, []):
                used[path].append(value)
    return made | used


def _before_fanout(value: Value) -> Value:
    """What a value was before it was handed out to its uses."""
    while value.producer is not None and value.producer.kind == "fanout":
        (value,) = (v for v in value.producer.operands if v is not None)
    return value


def _entering(graph: Graph, around: Paths) -> dict[str, list[Value]]:
    """The carrying values that go into each module, in the order of their first use."""
    users: dict[Node, list[Node]] = {}  # of what a fan-out hands on
    for node in reversed(graph.nodes):
        for value in node.operands:
            if value is not None and value.producer is not None and value.producer.kind == "fanout":
                users.setdefault(value.producer, []).extend(users.get(node, [node]))
    found: dict[str, list[Value]] = {}
    for node in graph.nodes:
        carrying = [v for v in node.operands if v is not None and v.carrying and node.kind != "fanout"]
        for path in around(node):
            for value in (_handed_to(path, v, users, around) for v in carrying):
                inside = value.producer is not None and path in around(value.producer)
                if not inside and value not in found.setdefault(path, []):
                    found[path].append(value)
    return {path: values for path, values in found.items() if values}


def _handed_to(path: str, value: Value, users: dict[Node, list[Node]], around: Paths) -> Value:
    """What a value was before it was handed out inside a module."""
    fanout = value.producer
    while fanout is not None and fanout.kind == "fanout" and all(path in around(user) for user in users[fanout]):
        (value,) = (v for v in fanout.operands if v is not None)
        fanout = value.producer
    return value


def make_latent(value: Value, activation: Tensor, stream: Tensor, gradient_form: bool, several: bool) -> Latent:
    """A latent from a stream [T, *shape]: relevance, or a modified gradient."""
    activation = activation.to(stream.dtype)
    relevance = activation * stream if gradient_form else stream
    nonzero = torch.where(activation == 0, 1.0, activation)
    coefficient = stream if gradient_form else torch.where(activation == 0, 0.0, stream / nonzero)
    factor = value.sample.factor if value.sample is not None and value.sample.axis == 0 else 1
    if factor is not None and factor > 1:  # heads that share the batch axis
        activation = activation.unflatten(0, (-1, factor))
        relevance, coefficient = (t.unflatten(1, (-1, factor)) for t in (relevance, coefficient))
    relevance, coefficient = (t.transpose(0, 1) if several else t[0] for t in (relevance, coefficient))
    return Latent(activation, coefficient, relevance, several)
