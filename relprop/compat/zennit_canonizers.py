"""Canonizers: what a composite of zennit changes of the model before its rules are assigned, on a copy of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from relprop.compat.engines import Engines
from relprop.errors import OptionError
from relprop.plans import fingerprint

_BEFORE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class SequentialMergeBatchNorm:
    """`zennit.canonizers.SequentialMergeBatchNorm`: a batch norm is merged into the linear layer or convolution before.

    Before means among the model's innermost modules, in the order in which they were assigned. The batch norm stays,
    with mean 0 and variance 1, so that it still divides by sqrt(1 + eps), as zennit's does.
    """

    def apply(self, root_module: nn.Module) -> list[Merged]:
        """Change a module. What comes back can undo it."""
        innermost = list(_innermost(root_module))
        return [_merge(*pair) for pair in pairwise(innermost) if isinstance(pair[0], _BEFORE) and _is_norm(pair[1])]


@dataclass(frozen=True)
class Merged:
    """What two modules were before the second was merged into the first."""

    tensors: tuple[tuple[nn.Module, dict[str, Any], dict[str, Any]], ...]

    def remove(self) -> None:
        """Give both their parameters and buffers back."""
        for module, parameters, buffers in self.tensors:
            module._parameters.update(parameters)
            module._buffers.update(buffers)


def _innermost(module: nn.Module) -> Iterator[nn.Module]:
    """A module that stands in several places comes several times."""
    children = list(module.children())
    if not children:
        yield module
    for child in children:
        yield from _innermost(child)


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _NORMS) and module.running_mean is not None


@torch.no_grad()
def _merge(before: Any, norm: Any) -> Merged:
    merged = Merged(tuple((module, dict(module._parameters), dict(module._buffers)) for module in (before, norm)))
    mean, zeros, ones = norm.running_mean, torch.zeros_like(norm.running_mean), torch.ones_like(norm.running_var)
    scale = (norm.weight if norm.affine else ones) / (norm.running_var + norm.eps) ** 0.5
    shift = norm.bias if norm.affine else zeros
    bias = zeros if before.bias is None else before.bias
    before.bias = nn.Parameter((bias - mean) * scale + shift)
    before.weight = nn.Parameter(before.weight * scale.reshape(-1, *[1] * (before.weight.ndim - 1)))
    norm.running_mean, norm.running_var = zeros, ones
    if norm.affine:
        norm.weight, norm.bias = nn.Parameter(ones.clone()), nn.Parameter(zeros.clone())
    return merged


def checked(canonizers: Sequence[Any] | None) -> tuple[Any, ...]:
    """Canonizers as a composite is given them.

    Raises:
        OptionError: something else.
    """
    given = tuple(canonizers) if isinstance(canonizers, Sequence) else () if canonizers is None else (canonizers,)
    for canonizer in given:
        if isinstance(canonizer, type) or not callable(getattr(canonizer, "apply", None)):
            raise OptionError(
                "canonizers: expected a list of zennit's canonizers or of relprop.compat.zennit's"
                f" SequentialMergeBatchNorm(), got {canonizer!r} among them"
            )
    return given


class Canonical:
    """Engines of a model as canonizers leave it: of a copy, made anew where the canonizers or the weights are others.

    Args:
        engines: makes them for a model.
    """

    def __init__(self, model: nn.Module, engines: Callable[[nn.Module], Engines]) -> None:
        self._model, self._engines = model, engines
        self._made: tuple[Any, Engines] = None, engines(model)

    def __call__(self, canonizers: Sequence[Any]) -> Engines:
        state = (tuple(canonizers), fingerprint(self._model), _weights(self._model)) if canonizers else None
        if state != self._made[0]:
            self._made = state, self._engines(self._canonised(canonizers))
        return self._made[1]

    def _canonised(self, canonizers: Sequence[Any]) -> nn.Module:
        if not canonizers:
            return self._model
        changed = copy.deepcopy(self._model)
        before = set(changed.modules())
        for canonizer in canonizers:
            canonizer.apply(changed)
        for added in set(changed.modules()) - before:  # modules are made in training mode
            added.training = changed.training
        return changed


def _weights(model: nn.Module) -> list[tuple[int, int]]:
    """What shows that weights were changed or replaced."""
    tensors = (*model.parameters(), *model.buffers())
    return [(tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version) for tensor in tensors]
