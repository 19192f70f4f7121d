"""Rules as modified gradients: R = x g at every value, with g walked down like a gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from relprop.graph import Node
from relprop.rules.base import Call, Relevances, Rule

Form = Callable[[Call, Tensor], Relevances]


@dataclass(frozen=True)
class ModifiedGradient(Rule):
    """What a rule does to g = R / x, where that is not the plain gradient.

    Args:
        rule: the rule of R.
        form: what it does to g.
        inputs, output: what of the operation it reads.
        factors: of an attention step whose result is the gradient's times a factor per operand; kernels read them.
    """

    rule: Rule
    form: Form
    inputs: bool = True
    output: bool = False
    factors: tuple[float, float, float] | None = None
    kind: ClassVar = "any"
    name: ClassVar = "modified_gradient"
    conserves: ClassVar = False

    def needs(self, node: Node) -> tuple[bool, bool]:
        """What the form reads."""
        return self.inputs, self.output

    def describe(self) -> str:
        """The rule of R, as a gradient."""
        return f"{self.rule.describe()} as gradient"

    def propagate(self, call: Call, relevance: Tensor) -> Relevances:
        """g: [T, *output shape] -> [T, *operand shape] per operand."""
        return self.form(call, relevance)


def scaled(parts: Relevances, factors: tuple[float, ...]) -> Relevances:
    """Parts times a factor each."""
    return tuple(
        part if part is None or factor == 1.0 else part * factor for part, factor in zip(parts, factors, strict=False)
    )
