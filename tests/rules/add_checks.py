"""Adds for the tests of their rules: every way to write one, and its two summands written out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.rules.rule_checks import Op, Parts, module_of, random


@dataclass(frozen=True)
class Case:
    """One add, the shapes of one sample's inputs, and its summands with their signs as the inputs and constants."""

    function: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    summands: Callable[..., tuple[Tensor, Tensor]]
    constants: dict[str, Tensor] = field(default_factory=dict)

    @property
    def carrying(self) -> int:
        return len(self.shapes)


POSITION = random(1, 3, 7, seed=5)
BIAS = random(7, seed=6)

CASES = {
    "residual": Case(lambda a, b: a + b, ((3, 63), (3, 63)), lambda a, b: (a, b)),
    "one": Case(lambda a, b: a + b, ((1,), (1,)), lambda a, b: (a, b)),
    "difference": Case(lambda a, b: a - b, ((3, 7), (3, 7)), lambda a, b: (a, -b)),
    "scaled": Case(lambda a, b: torch.add(a, b, alpha=0.5), ((3, 7), (3, 7)), lambda a, b: (a, 0.5 * b)),
    "scaled-difference": Case(lambda a, b: torch.sub(a, b, alpha=3), ((7,), (7,)), lambda a, b: (a, -3 * b)),
    "broadcast": Case(lambda a, b: a + b, ((3, 7), (1, 7)), lambda a, b: (a, b.expand_as(a))),
    "broadcast-both": Case(lambda a, b: a + b, ((3, 1), (1, 7)), lambda a, b: (a.expand(-1, 3, 7), b.expand(-1, 3, 7))),
    "positional": Case(
        lambda a, position: a + position, ((3, 7),), lambda a: (a, POSITION.expand_as(a)), {"position": POSITION}
    ),
    "bias": Case(lambda a, bias: bias + a, ((3, 7),), lambda a: (BIAS.expand_as(a), a), {"bias": BIAS}),
    "offset": Case(lambda a: a + 2.5, ((3, 7),), lambda a: (a, torch.full_like(a, 2.5))),
    "number-less": Case(lambda a: a - 2.5, ((3, 7),), lambda a: (a, torch.full_like(a, -2.5))),
}


@functools.cache
def add_op(name: str) -> Op:
    case = CASES[name]
    constants = {key: tensor.clone() for key, tensor in case.constants.items()}
    inputs = [random(2, *shape) for shape in case.shapes]
    return Op(module_of(case.function, case.carrying, **constants), *inputs, kind="add")


def operands(name: str, batch: int, zeros: bool = True) -> list[Tensor]:
    return [random(batch, *shape, seed=batch + i, zeros=zeros) for i, shape in enumerate(CASES[name].shapes)]


def handed_out(name: str, parts: tuple[Tensor, Tensor], inputs: tuple[Tensor, ...]) -> Parts:
    """The summands' parts [T, B, ...] as the operands of the node receive them: constants nothing."""
    found: list[Tensor | None] = []
    if name == "bias":
        return None, parts[1]
    for part, like in zip(parts, inputs, strict=False):
        for axis, size in enumerate(like.shape):
            if size == 1:
                part = part.sum(axis + 1, keepdim=True)
        found.append(part)
    if name == "positional":
        found.append(None)
    return tuple(found)


def settled(name: str) -> Callable[..., Tensor]:
    """Outputs whose summands do not cancel."""

    def of(*inputs: Tensor) -> Tensor:
        a, b = CASES[name].summands(*inputs)
        return (a + b).abs() > (a.abs() + b.abs()) / 50

    return of
