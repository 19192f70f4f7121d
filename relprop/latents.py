"""Relevance inside a model: at the output of any module, at attention heads, along directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor

from relprop.errors import OptionError, ShapeError, unknown_name
from relprop.graph import Graph, Value

HEADS = ":heads"


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
        patterns: module paths, as in `fnmatch`, for modules' outputs; with ":heads" for the outputs of the attention
            heads inside them, before they are joined.
    Raises:
        OptionError, UnknownNameError: a pattern fits no module that handles relevance.
    """
    modules: dict[str, Value] = {}
    heads: dict[str, Value] = {}
    for node in graph.nodes:
        if not node.carrying or node.kind == "fanout" or not node.module or len(node.outputs) != 1:
            continue
        parts = node.module.split(".")
        for depth in range(1, len(parts) + 1):
            modules[".".join(parts[:depth])] = node.outputs[0]
        if node.kind == "attention":
            heads[node.module] = node.outputs[0]
    found: dict[str, Value] = {}
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise OptionError(f"latents: expected module paths, got {pattern!r}")
        wanted, known = (pattern.removesuffix(HEADS), heads) if pattern.endswith(HEADS) else (pattern, modules)
        suffix = HEADS if known is heads else ""
        hits = {path + suffix: value for path, value in known.items() if fnmatch(path, wanted)}
        if not hits:
            raise unknown_name("latent", pattern, [path + suffix for path in known])
        found |= hits
    return found


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
