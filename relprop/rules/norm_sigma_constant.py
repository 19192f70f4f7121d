"""Normalisation layers as linear maps: their statistics' spread is held constant."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from relprop.capture.ops import Region, overloads
from relprop.errors import UnsupportedOpError
from relprop.graph import Node, Value
from relprop.rules.base import Call, Relevances, Rule, register_rule
from relprop.rules.modified_gradient import ModifiedGradient
from relprop.rules.stabiliser import Stabiliser
from relprop.rules.vjp import vjp

aten = torch.ops.aten

# Norms whose statistics do not depend on the input.
_AFFINE = overloads("batch_norm _native_batch_norm_legit_no_training")


@register_rule
class NormSigmaConstant(Rule):
    """R_in = x * J^T s, s = R / stab(y), with J the Jacobian in which 1 / sigma is a constant.

    A layer or group norm's mean still depends on the input, and its bias takes its share.

    Args:
        stabiliser: of the share-out.
    Conservation:
        the bias's share is absorbed; what else a spelled-out norm adds, the ledger books under "rule".
    Source: Achtibat et al., ICML 2024, prop. 3.4, in the form of its authors' efficient implementation.
    """

    kind: ClassVar = "norm"
    name: ClassVar = "sigma_constant"
    conserves: ClassVar = False
    stabiliser: Stabiliser = Stabiliser(1e-10)

    def gradient_form(self, node: Node) -> Rule | None:
        """The gradient with 1 / sigma constant."""
        return ModifiedGradient(self, self._linearised) if self.stabiliser.is_exact else None

    def _linearised(self, call: Call, gradient: Tensor) -> Relevances:
        return (self.linearised(call, call.x, gradient), *[None] * (len(call.node.operands) - 1))

    def propagate(self, call: Call, relevance: Tensor) -> Relevances:
        """relevance: [T, ...] -> ([T, ...], None, ...)."""
        x = call.x
        s = call.share(self.stabiliser, relevance, call.y)
        if call.absorbed is not None and call.node.target is aten.layer_norm.default:
            bias = layer_norm_arguments(call.node)[2]
            if isinstance(bias, Value):
                call.absorb("bias", s * call.tensor(bias))
        if call.absorbed is not None and call.node.target is aten.group_norm.default:
            bias = group_norm_arguments(call.node)[2]
            if isinstance(bias, Value):
                call.absorb("bias", s * by_channel(call.tensor(bias), x))
        return (x * self.linearised(call, x, s), *[None] * (len(call.node.operands) - 1))

    def linearised(self, call: Call, x: Tensor, s: Tensor) -> Tensor:
        """J^T s with 1 / sigma constant. [T, *shape of x]"""
        node = call.node
        if node.target is aten.layer_norm.default:
            shape, weight, _, eps = layer_norm_arguments(node)
            axes = tuple(range(-len(shape), 0))
            inverse = torch.rsqrt(x.var(axes, unbiased=False, keepdim=True) + eps)
            scaled = s * inverse if weight is None else s * call.tensor(weight) * inverse
            return scaled - scaled.mean(axes, keepdim=True)
        if node.target is aten.group_norm.default:
            groups, weight, _, eps = group_norm_arguments(node)
            parts = x.unflatten(1, (groups, -1))
            axes = tuple(range(2, parts.ndim))
            inverse = torch.rsqrt(parts.var(axes, unbiased=False, keepdim=True) + eps)
            weighted = s if weight is None else s * by_channel(call.tensor(weight), x)
            scaled = weighted.unflatten(2, (groups, -1)) * inverse
            return (scaled - scaled.mean([axis + 1 for axis in axes], keepdim=True)).flatten(2, 3)
        if node.target is aten.rms_norm.default:
            shape, weight, eps = (*node.args[1:4], None, None)[:3]
            axes = tuple(range(-len(shape), 0))
            eps = torch.finfo(x.dtype).eps if eps is None else eps
            inverse = torch.rsqrt(x.square().mean(axes, keepdim=True) + eps)
            return s * inverse if weight is None else s * call.tensor(weight) * inverse
        if node.target in _AFFINE:
            passed = vjp(call, s)[0]
            assert passed is not None
            return passed
        if isinstance(node.target, Region):
            constants = [call.tensors[v.index] for v in node.operands[1:] if v is not None]
            with torch.enable_grad():
                leaf = x if x.requires_grad else x.detach().requires_grad_()
                y = node.target.with_constant_statistics(leaf, *constants)
                rows = [torch.autograd.grad(y, leaf, g, retain_graph=True, create_graph=x.requires_grad) for g in s]
            return torch.stack([row[0] for row in rows])
        raise UnsupportedOpError(
            f"norm rule sigma_constant: expected a layer, group or RMS norm, got {node.describe()}"
        )


def layer_norm_arguments(node: Node) -> tuple[Any, Value | None, Value | None, float]:
    """Normalised shape, weight, bias and epsilon of a layer norm; a capture leaves trailing defaults out."""
    given = node.args[1:5]
    return (*given, *(None, None, 1e-5)[len(given) - 1 :])


def group_norm_arguments(node: Node) -> tuple[int, Value | None, Value | None, float]:
    """Number of groups, weight, bias and epsilon of a group norm."""
    given = node.args[1:5]
    return (*given, *(None, None, 1e-5)[len(given) - 1 :])


def by_channel(values: Tensor, x: Tensor) -> Tensor:
    """One value per channel [C] beside x [B, C, ...]."""
    return values.reshape(-1, *[1] * (x.ndim - 2))
