"""The ledger: what each step of the relevance pass received, handed on and kept."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from relprop.graph import Node, Value


@dataclass(frozen=True)
class LedgerEntry:
    """One step, per target and sample; all tensors [T, B], float64, in units of the explained score.

    Attributes:
        step, kind, rule, module: which step it was.
        arriving: relevance at the operation's output.
        passed: relevance handed on towards the input.
        absorbed: relevance kept, by cause: "bias", "epsilon", "constant" (class token, position embedding), "rule"
            (rules that do not conserve).
        amplification: sum |passed on| / sum |arriving|.
        cancellation: of a residual add (sum |a| + sum |b|) / sum |a + b|, from 1 for branches that never oppose each
            other; None elsewhere. [1, B]
        branch: of a residual add what its branch (not the stream itself) was handed. [T, B]
        branch_module: the module that the branch comes from.
    """

    step: str
    kind: str
    rule: str
    module: str
    arriving: Tensor
    passed: Tensor
    absorbed: dict[str, Tensor]
    amplification: Tensor
    cancellation: Tensor | None = None
    branch: Tensor | None = None
    branch_module: str = ""

    @property
    def rounding(self) -> Tensor:
        """What the sums of the step miss. [T, B]"""
        return self.arriving - self.passed - sum(self.absorbed.values(), torch.zeros_like(self.arriving))


@dataclass(frozen=True)
class LayerBooks:
    """A layer's steps together; all tensors [T, B], in units of the explained score.

    Attributes:
        name: module path of the layer ("blocks.5"), or names of steps outside of any module.
        arriving: relevance on its way before the layer: the seed less all that was absorbed above.
        absorbed: kept in the layer, by cause.
        branches: what goes through a branch of the layer beside the residual stream, by its module inside the layer
            ("attn", "mlp"); what went through one comes back to the stream, so two can have the same relevance.
    """

    name: str
    arriving: Tensor
    absorbed: dict[str, Tensor]
    branches: dict[str, Tensor]


@dataclass
class Ledger:
    """The books of one relevance pass.

    Attributes:
        seed: relevance that the pass started with. [T, B]
        frontier: relevance where the pass ended: the first attention map for a row walk, the pixels for `full`. [T, B]
        entries: one per step, from the output down.
    """

    seed: Tensor
    frontier: Tensor
    entries: list[LedgerEntry] = field(default_factory=list)

    @property
    def absorbed(self) -> dict[str, Tensor]:
        """Everything kept along the way, by cause. Each [T, B]"""
        total: dict[str, Tensor] = {}
        for entry in self.entries:
            for cause, amount in entry.absorbed.items():
                total[cause] = total[cause] + amount if cause in total else amount
        return total

    @property
    def imbalance(self) -> Tensor:
        """seed - frontier - absorbed: zero up to rounding. [T, B]"""
        return self.seed - self.frontier - sum(self.absorbed.values(), torch.zeros_like(self.seed))

    def by_layer(self) -> list[LayerBooks]:
        """The books layer by layer, from the output down.

        A layer is a module path up to its first number ("blocks.5", "bert.encoder.layer.3"); other modules go by one
        or two names ("norm", "bert.embeddings"), and steps outside of all modules by their own, where they keep
        anything.
        """
        numbers = [index for entry in self.entries if (index := first_number(entry.module)) is not None]
        depth = max(1, min([2, *numbers]))
        groups: list[tuple[str, list[LedgerEntry]]] = []
        places: dict[str, list[LedgerEntry]] = {}
        for entry in self.entries:
            name = layer_name(entry.module, depth)
            if name in places and name:
                places[name].append(entry)
            elif groups and not name and not groups[-1][0]:
                groups[-1][1].append(entry)
            else:
                places[name] = [entry]
                groups.append((name, places[name]))
        found, arriving = [], self.seed
        for name, entries in groups:
            absorbed = Ledger(self.seed, self.frontier, entries).absorbed
            kept = sum(absorbed.values(), torch.zeros_like(self.seed))
            negligible = 1e-5 * float(self.seed.abs().max())
            if name or float(kept.abs().max()) > negligible:
                steps = [e.step for e in entries if any(float(t.abs().max()) > negligible for t in e.absorbed.values())]
                found.append(LayerBooks(name or ", ".join(steps[:2]), arriving, absorbed, _branches(name, entries)))
            arriving = arriving - kept
        return found

    def worst(self, count: int = 5) -> list[LedgerEntry]:
        """The steps that amplified most, where conditioning was lost."""
        return sorted(self.entries, key=lambda e: -float(e.amplification.max()))[:count]

    def residual_sites(self) -> list[LedgerEntry]:
        """The residual adds, from the input up."""
        return [entry for entry in reversed(self.entries) if entry.cancellation is not None]

    def conditioning(self) -> str:
        """Where the pass is ill-conditioned: cancellation C and amplification A of every residual add, as a table."""
        rows = [f"{'step':<28} {'C median':>10} {'C worst':>10} {'A median':>10} {'A worst':>10}  module"]
        for e in self.residual_sites():
            assert e.cancellation is not None
            figures = [f(t).item() for t in (e.cancellation, e.amplification) for f in (torch.median, torch.max)]
            rows.append(f"{e.step[:28]:<28} {' '.join(f'{x:>10.4g}' for x in figures)}  {e.module}")
        return "\n".join(rows)

    def __str__(self) -> str:
        rows = [f"{'step':<28} {'rule':<26} {'arriving':>12} {'passed':>12} {'absorbed':>12} {'amplified':>10}  module"]
        for e in self.entries:
            kept = sum(e.absorbed.values(), torch.zeros_like(e.arriving))
            sums = " ".join(f"{float(t.mean()):>12.5g}" for t in (e.arriving, e.passed, kept))
            amplified = float(e.amplification.mean())
            rows.append(f"{e.step[:28]:<28} {e.rule[:26]:<26} {sums} {amplified:>10.4g}  {e.module}")
        causes = (
            ", ".join(f"{cause} {float(amount.mean()):.4g}" for cause, amount in self.absorbed.items()) or "nothing"
        )
        rows.append(
            f"seed {float(self.seed.mean()):.6g} = frontier {float(self.frontier.mean()):.6g} + absorbed ({causes});"
            f" imbalance {float(self.imbalance.abs().max()):.2g} (means over targets and samples)"
        )
        return "\n".join(rows)


def _branches(layer: str, entries: list[LedgerEntry]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for entry in entries:
        if entry.branch is not None:
            inside = entry.branch_module.removeprefix(layer).strip(".").split(".")[0] or "branch"
            found[inside] = found[inside] + entry.branch if inside in found else entry.branch
    return found


def first_number(module: str) -> int | None:
    """Where the first number stands in a module path."""
    return next((i for i, part in enumerate(module.split(".")) if part.isdecimal()), None)


def layer_name(module: str, depth: int) -> str:
    """A module path up to its first number, or `depth` names."""
    number = first_number(module)
    return ".".join(module.split(".")[: depth if number is None else number + 1])


def book(
    node: Node,
    rule: str,
    conserves: bool,
    arriving: list[tuple[Tensor, Tensor]],
    passed: list[tuple[Tensor, Tensor]],
    absorbed: dict[str, Tensor],
    cancellation: Tensor | None = None,
) -> LedgerEntry:
    """An entry from (sum, sum of magnitudes) pairs [T, B] at the outputs and the inputs of a step."""
    branch = branch_of(node) if len(passed) == len(node.operands) else None
    total_in = sum((pair[0] for pair in arriving), torch.zeros(1, 1, dtype=torch.float64, device=arriving[0][0].device))
    total_out = sum((pair[0] for pair in passed), torch.zeros_like(total_in))
    size_in = sum((pair[1] for pair in arriving), torch.zeros_like(total_in))
    size_out = sum((pair[1] for pair in passed), torch.zeros_like(total_in))
    causes = dict(absorbed)
    if not conserves:
        rest = total_in - total_out - sum(causes.values(), torch.zeros_like(total_in))
        causes["rule"] = causes.get("rule", torch.zeros_like(rest)) + rest
    amplification = torch.where(size_in > 0, size_out / torch.where(size_in > 0, size_in, 1.0), 0.0)
    return LedgerEntry(
        node.name,
        node.kind,
        rule,
        node.module,
        total_in,
        total_out.expand_as(total_in),
        causes,
        amplification,
        cancellation,
        None if branch is None else passed[branch][0],
        "" if branch is None else module_of(node.operands[branch]),
    )


def branch_of(node: Node) -> int | None:
    """Which operand of a residual add is the branch: the other is the stream itself, as it was before the branch."""
    if not node.is_residual:
        return None
    stream = [_is_the_stream(value) for value in node.operands]
    return stream.index(False) if sorted(stream) == [False, True] else None


def _is_the_stream(value: Value | None) -> bool:
    """Whether it is one of several uses of a value, or tokens selected from one."""
    while value is not None and value.producer is not None and value.producer.kind == "movement":
        value = value.producer.operands[0]
    return value is not None and value.producer is not None and value.producer.kind == "fanout"


def module_of(value: Value | None) -> str:
    """The module that made a value."""
    return "" if value is None or value.producer is None else value.producer.module


def cancellation(value: Value, a: Tensor, b: Tensor, batch: int) -> Tensor:
    """(sum |a| + sum |b|) / sum |a + b| per sample, for the sum `value`. [1, B]"""
    total = a + b
    sizes = [
        value.per_sample(t.abs().expand_as(total)[None], batch).sum(-1, dtype=torch.float64) for t in (a, b, total)
    ]
    return (sizes[0] + sizes[1]) / torch.where(sizes[2] > 0, sizes[2], torch.inf)
