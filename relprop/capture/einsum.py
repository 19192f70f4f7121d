"""einsum as what it is made of: permutations, views and one product of two operands at a time.

So the passes after this one see a linear layer, the scores of attention or its sum over values as they are usually
written.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from relprop.capture.insertion import insert

aten = torch.ops.aten


@dataclass(frozen=True)
class _Term:
    """An operand with a label for each axis."""

    node: fx.Node
    labels: str

    def size(self, label: str) -> Any:
        return self.node.meta["val"].shape[self.labels.index(label)]

    @property
    def carrying(self) -> bool:
        return bool(self.node.meta["carrying"])


def expand_einsums(graph: fx.Graph) -> None:
    """Spell out every einsum of carrying values; one that takes a diagonal or broadcasts a sum is left as it is."""
    for node in list(graph.nodes):
        if node.target is not aten.einsum.default or not node.meta["carrying"]:
            continue
        terms, output = _parsed(node)
        if _is_plain(terms):
            _Expansion(graph, node).run(terms, output, node.kwargs.get("path"))
    graph.eliminate_dead_code()


def _parsed(node: fx.Node) -> tuple[list[_Term], str]:
    """Operands and the labels of the output, with letters for the axes that an ellipsis stands for."""
    equation, operands = str(node.args[0]).replace(" ", ""), list(node.args[1])  # type: ignore[arg-type]
    left, arrow, output = equation.partition("->")
    inputs = left.split(",")
    unused = [letter for letter in string.ascii_letters if letter not in equation]
    ranks = [n.meta["val"].ndim - len(labels.replace("...", "")) for n, labels in zip(operands, inputs, strict=True)]
    rest = "".join(unused[: max([0, *(r for r, labels in zip(ranks, inputs, strict=True) if "..." in labels)])])
    if not arrow:
        letters = sorted(set(left) - set(".,"))
        output = "..." + "".join(letter for letter in letters if left.count(letter) == 1)
    terms = [
        _Term(n, labels.replace("...", rest[len(rest) - rank :] if rank else ""))
        for n, labels, rank in zip(operands, inputs, ranks, strict=True)
    ]
    return terms, output.replace("...", rest)


def _is_plain(terms: Sequence[_Term]) -> bool:
    """Whether no operand has a label twice, and every label has one size."""
    sizes: dict[str, set[str]] = {}
    for term in terms:
        for label in term.labels:
            sizes.setdefault(label, set()).add(str(term.size(label)))
    return all(len(set(t.labels)) == len(t.labels) for t in terms) and all(len(found) == 1 for found in sizes.values())


class _Expansion:
    """The nodes that one einsum becomes, all of its provenance."""

    def __init__(self, graph: fx.Graph, node: fx.Node) -> None:
        self.graph, self.node = graph, node

    def run(self, terms: list[_Term], output: str, path: Sequence[int] | None) -> None:
        """Two operands at a time, in the order of `path` (pairs of places, results at the end) or from the left."""
        terms, steps = list(terms), iter(path or ())
        while len(terms) > 1:
            pair = (next(steps), next(steps)) if path else (0, 1)
            a, b = (terms[i] for i in pair)
            terms = [term for i, term in enumerate(terms) if i not in pair]
            asked = set(output).union(*(term.labels for term in terms))
            wanted = [*dict.fromkeys(label for label in (*output, *a.labels, *b.labels) if label in asked)]
            made = self.product(a, b, [label for label in wanted if label in a.labels + b.labels])
            terms.insert(len(terms) if path else 0, made)
        result = self.arranged(self.summed(terms[0], output), output).node
        for user in list(self.node.users):
            if user.target is aten.view.default:
                user.target = aten.reshape.default  # axes may lie in another order than einsum leaves them in
        self.node.replace_all_uses_with(result)

    def product(self, a: _Term, b: _Term, output: Sequence[str]) -> _Term:
        """Two operands multiplied, and summed over the labels that the output does not have."""
        a, b = (self.summed(term, [*other.labels, *output]) for term, other in ((a, b), (b, a)))
        summed = [label for label in a.labels if label in b.labels and label not in output]
        batch = [label for label in output if label in a.labels and label in b.labels]
        if not summed:
            return self.pointwise(a, b, output)
        if not batch and a.carrying != b.carrying:
            x, w = (a, b) if a.carrying else (b, a)
            return self.linear(x, w, summed, output)
        free = [label for label in output if label not in batch]
        if free and free[0] in b.labels:
            a, b = b, a
        return self.matmul(a, b, batch, summed, output)

    def summed(self, term: _Term, kept: Sequence[str]) -> _Term:
        axes = [i for i, label in enumerate(term.labels) if label not in kept]
        labels = "".join(label for label in term.labels if label in kept)
        shape = [term.size(label) for label in labels]
        return _Term(self.insert(aten.sum.dim_IntList, (term.node, axes), shape), labels) if axes else term

    def arranged(self, term: _Term, labels: Sequence[str]) -> _Term:
        """Axes in the order of labels."""
        order, labels = [term.labels.index(label) for label in labels], "".join(labels)
        if order == list(range(len(order))):
            return term
        return _Term(self.insert(aten.permute.default, (term.node, order), [term.size(i) for i in labels]), labels)

    def pointwise(self, a: _Term, b: _Term, output: Sequence[str]) -> _Term:
        """A product without a sum: both operands broadcast to the output."""
        made = []
        for term in (a, b):
            own = [label for label in output if label in term.labels]
            node, shape = self.arranged(term, own).node, [term.size(label) for label in own]
            for axis, label in enumerate(output):
                if label not in own:
                    shape.insert(axis, 1)
                    node = self.insert(aten.unsqueeze.default, (node, axis), shape)
            made.append(node)
        shape = [(a if label in a.labels else b).size(label) for label in output]
        return _Term(self.insert(aten.mul.Tensor, tuple(made), shape), "".join(output))

    def linear(self, x: _Term, w: _Term, summed: Sequence[str], output: Sequence[str]) -> _Term:
        rows = [label for label in x.labels if label not in summed]
        columns = [label for label in output if label in w.labels]
        left, right = self.merged(x, [*([i] for i in rows), summed]), self.merged(w, [columns, summed])
        shape = [*(x.size(label) for label in rows), _count(w, columns)]
        made = self.insert(aten.linear.default, (left, right), shape)
        return self.parted(made, [*([i] for i in rows), columns], (x, w))

    def matmul(self, a: _Term, b: _Term, batch: Sequence[str], summed: Sequence[str], output: Sequence[str]) -> _Term:
        """[batch, rows, summed] @ [batch, summed, columns]."""
        rows, columns = ([i for i in output if i in term.labels and i not in batch] for term in (a, b))
        lead = [[label] for label in batch]
        left, right = self.merged(a, [*lead, rows, summed]), self.merged(b, [*lead, summed, columns])
        shape = [*(a.size(label) for label in batch), _count(a, rows), _count(b, columns)]
        made = self.insert(aten.matmul.default, (left, right), shape)
        return self.parted(made, [*lead, rows, columns], (a, b))

    def merged(self, term: _Term, groups: Sequence[Sequence[str]]) -> fx.Node:
        """One axis for each group of labels."""
        node = self.arranged(term, [label for group in groups for label in group]).node
        shape = [term.size(label) for group in groups for label in group]
        for axis, group in reversed(list(enumerate(groups))):
            start = sum(len(other) for other in groups[:axis])
            shape[start : start + len(group)] = [_count(term, group)]
            if not group:
                node = self.insert(aten.unsqueeze.default, (node, start), shape)
            elif len(group) > 1:
                node = self.insert(aten.flatten.using_ints, (node, start, start + len(group) - 1), shape)
        return node

    def parted(self, node: fx.Node, groups: Sequence[Sequence[str]], terms: Sequence[_Term]) -> _Term:
        """The inverse of `merged`."""
        shape = list(node.meta["val"].shape)
        for axis, group in reversed(list(enumerate(groups))):
            owners = [next(t for t in terms if label in t.labels) for label in group]
            shape[axis : axis + 1] = [t.size(label) for t, label in zip(owners, group, strict=True)]
            if not group:
                node = self.insert(aten.squeeze.dim, (node, axis), shape)
            elif len(group) > 1:
                sizes = [self.size(t, label) for t, label in zip(owners, group, strict=True)]
                node = self.insert(aten.unflatten.int, (node, axis, sizes), shape)
        return _Term(node, "".join(label for group in groups for label in group))

    def size(self, term: _Term, label: str) -> Any:
        """A number, or the node of one that is free."""
        size = term.size(label)
        if isinstance(size, int):
            return size
        return self.insert(aten.sym_size.int, (term.node, term.labels.index(label)), size)

    def insert(self, target: Callable[..., Any], args: tuple[Any, ...], shape: Any) -> fx.Node:
        """A node of a shape; of a size, where that is no list."""
        like = self.node.meta["val"]
        value = like.new_empty(shape) if isinstance(shape, list) else shape
        return insert(self.graph, self.node, target, args, self.node, value)


def _count(term: _Term, labels: Sequence[str]) -> Any:
    return math.prod(term.size(label) for label in labels)
