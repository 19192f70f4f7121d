"""Rematerialisation: values that the reverse sweep makes again from kept ones, as they cost little to compute.

An activation's output is as wide as its input, the widest of a Transformer's, and the sweep needs both: the next linear
layer's rule reads the output, the activation's own the input. The same holds for a normalisation. Their forward costs
next to nothing beside the products around them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import inf

from relprop.graph import Graph, Node, leaves

CHEAP = ("activation", "norm")
_VIEWS = ("movement", "fanout", "select")


def rematerialised(
    graph: Graph, reads: Sequence[Collection[int]], kept: Collection[int], outside: Collection[int]
) -> list[Node]:
    """Operations whose outputs are freed in the forward pass and made again before the sweep first reads them.

    Args:
        reads: indices of values that each reverse step reads; a value may be freed after the last of them.
        kept: of those that something else asks for. outside: of inputs, parameters and constants.
    """
    first: dict[int, int] = {}
    last: dict[int, float] = dict.fromkeys(outside, inf)
    for i, indices in enumerate(reads):
        for index in indices:
            first.setdefault(index, i)
            last[index] = inf if index in graph.parameters else i
    consumers, found = graph.consumers(), []
    again: set[int] = set()
    for node in graph.nodes:
        value = node.outputs[0]
        if node.kind not in CHEAP or len(node.outputs) > 1 or value.index not in first or value.index in kept:
            continue
        viewed = any(user.kind in _VIEWS for user in consumers.get(value.index, ()))  # a view keeps its memory
        operands = {operand.index for operand in leaves((node.args, node.kwargs))}
        there = all(last.get(index, -1) >= first[value.index] for index in operands - again)
        if not viewed and there and not operands & again:
            found.append(node)
            again.add(value.index)
    return found
