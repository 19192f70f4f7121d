"""What a tested family is, and the README's table of models: python -m tests.families.catalogue rewrites it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import relprop
from benchmarks.tables import README, table

Inputs = dict[str, Any]  # keyword arguments of the model's forward

# Methods that walk one row of tokens through the attention layers, or read one layer's map.
OF_ONE_SEQUENCE = frozenset(
    {
        "transformer_attribution",
        "relevance_rollout",
        "last_layer",
        "second_layer",
        "last_layer_attention",
        "raw_attention",
        "attention_rollout",
        "attention_gradcam",
    }
)


def methods_cell(refuses: frozenset[str], why: str = "") -> str:
    """A row's last cell: which methods answer, and why others do not."""
    answering = [f"`{name}`" for name in relprop.methods() if name not in refuses]
    refused = [f"`{name}`" for name in relprop.methods() if name in refuses]
    if not refused:
        return "all"
    found = f"all but {', '.join(refused)}" if len(refused) < len(answering) else ", ".join(answering)
    return f"{found}; {why}" if why else found


@dataclass(frozen=True)
class Row:
    """One row of the README's table."""

    title: str
    stock: str
    methods: str


@dataclass(frozen=True)
class Family:
    """One stock class, built small with random weights: one row of the README's table, one set of tests.

    Attributes:
        name: the test's id.
        title: the row's first cell.
        stock: the public class or function that builds it.
        small: the model of the tests, random weights, in evaluation mode.
        inputs: a batch of inputs of that model.
        refusal: where methods that walk through attention layers do not apply, words of the refusal.
        refuses: the methods that do not apply, each by an error that says so.
        why: words of that for the README.
        quick: whether it is among the few of `make test`.
        full: the model at its published size with its inputs, for benchmarks/families.py.
        output: which output is explained, as `relprop.compile` takes it.
        target: what is explained.
    """

    name: str
    title: str
    stock: str
    small: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    refusal: str = ""
    refuses: frozenset[str] = frozenset()
    why: str = ""
    quick: bool = False
    full: Callable[[], tuple[nn.Module, Callable[[int], Inputs]]] | None = None
    output: str | int | Callable[..., Any] | None = None
    target: Any = 1

    @property
    def row(self) -> Row:
        """Of the README's table."""
        return Row(self.title, self.stock, methods_cell(self.refuses, self.why))


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with weights that use every branch: initial values of 0 or 1e-6 would hide what they scale."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            nn.init.normal_(parameter, std=min(0.12, fan_in**-0.5))
        else:
            nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return model.eval()


def images(size: int, name: str = "x") -> Callable[[int], Inputs]:
    """Batches of square images of fixed random numbers: the first samples of a larger batch are the smaller one."""

    def make(batch: int) -> Inputs:
        generator = torch.Generator().manual_seed(size)
        stack: list[Tensor] = [torch.randn(3, size, size, generator=generator) for _ in range(batch)]
        return {name: torch.stack(stack)}

    return make


def rows() -> dict[str, Row]:
    """The row of every tested family by its name, in the order of the README's table."""
    from tests.families.text_models import FAMILIES
    from tests.families.vision_models import VISION

    text = {name: family.row for name, family in FAMILIES.items()}
    return {**{family.name: family.row for family in VISION}, **text}


def models_table() -> str:
    """The README's table: one row per family."""
    cells = [[row.title, f"`{row.stock}`", row.methods] for row in rows().values()]
    return table(["model", "stock class", "methods"], cells)


def rendered(text: str) -> str:
    """The README's text with the table made anew."""
    pattern = re.compile("(<!-- models -->\n).*?(\n<!-- end models -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit("README.md: expected the markers <!-- models --> and <!-- end models -->")
    return pattern.sub(lambda match: f"{match[1]}{models_table()}{match[2]}", text)


if __name__ == "__main__":
    README.write_text(rendered(README.read_text(encoding="utf-8")), encoding="utf-8")
