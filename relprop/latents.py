"""Relevance inside a model: at the output or input of any module, at attention heads, along directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor

from relprop.errors import OptionError, ShapeError, UnsupportedTopologyError, unknown_name
from relprop.graph import Graph, Node, Value

HEADS = ":heads"
INPUT = ":input"


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
        """Summed over channels: [B, (T), N] for a sequence [B, N, C], [B, (T), H, N] for heads."""
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


def latent_values(graph: Graph, patterns: Iterable[str]) -> dict[str, Value]:
    """The values that module paths stand for.

    Args:
        patterns: module paths, as in `fnmatch`, for modules' outputs (of the last call, where there are several);
            with ":input" for what goes into them, with ":heads" for the outputs of the attention heads inside them,
            before they are joined.
    Raises:
        OptionError, UnknownNameError: a pattern fits no module that handles relevance. UnsupportedTopologyError: the
            input of a module that has several inputs, or several calls.
    """
    known: dict[str, dict[str, Value]] = {"": {}, HEADS: {}, INPUT: {}}
    for node in graph.nodes:
        if not node.carrying or node.kind == "fanout" or not node.module or len(node.outputs) != 1:
            continue
        known[""] |= dict.fromkeys(_enclosing(node), node.outputs[0])
        if node.kind == "attention":
            known[HEADS][node.module] = node.outputs[0]
    patterns = list(patterns)
    entering = _entering(graph) if any(str(pattern).endswith(INPUT) for pattern in patterns) else {}
    known[INPUT] = {path: values[0] for path, values in entering.items()}
    found: dict[str, Value] = {}
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise OptionError(f"latents: expected module paths, got {pattern!r}")
        suffix = next((end for end in (HEADS, INPUT) if pattern.endswith(end)), "")
        hits = {p + suffix: value for p, value in known[suffix].items() if fnmatch(p, pattern.removesuffix(suffix))}
        if not hits:
            raise unknown_name("latent", pattern, [path + suffix for path in known[suffix]])
        if suffix == INPUT:
            _check_inputs(graph, {path: entering[path.removesuffix(INPUT)] for path in hits})
        found |= hits
    return found


def check_calls(graph: Graph, path: str) -> None:
    """Raises UnsupportedTopologyError where a module is called several times, so that it has no one output or input."""
    if any(path in node.called_again for node in graph.nodes):
        raise UnsupportedTopologyError(
            f"latents: expected a module that is called once, got {path}, called several times"
        )


def _check_inputs(graph: Graph, entering: dict[str, list[Value]]) -> None:
    for latent, values in entering.items():
        check_calls(graph, latent.removesuffix(INPUT))
        if len(values) > 1:
            raise UnsupportedTopologyError(
                f"latents: expected a module with one input that carries relevance, got {latent} with {len(values)}"
            )


def _enclosing(node: Node) -> list[str]:
    """The modules around a node, outermost first."""
    parts = node.module.split(".") if node.module else []
    return [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def _entering(graph: Graph) -> dict[str, list[Value]]:
    """The carrying values that go into each module, in the order of their first use."""
    users: dict[Node, list[Node]] = {}  # of what a fan-out hands on
    for node in reversed(graph.nodes):
        for value in node.operands:
            if value is not None and value.producer is not None and value.producer.kind == "fanout":
                users.setdefault(value.producer, []).extend(users.get(node, [node]))
    found: dict[str, list[Value]] = {}
    for node in graph.nodes:
        carrying = [v for v in node.operands if v is not None and v.carrying and node.kind != "fanout"]
        for path in _enclosing(node):
            for value in (_handed_to(path, v, users) for v in carrying):
                inside = value.producer is not None and path in _enclosing(value.producer)
                if not inside and value not in found.setdefault(path, []):
                    found[path].append(value)
    return {path: values for path, values in found.items() if values}


def _handed_to(path: str, value: Value, users: dict[Node, list[Node]]) -> Value:
    """What a value was before it was handed out inside a module."""
    fanout = value.producer
    while fanout is not None and fanout.kind == "fanout" and all(path in _enclosing(user) for user in users[fanout]):
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
