"""Which tokens each attention layer's queries and keys are, so that a row can walk from layer to layer.

Where all layers attend over one sequence nothing needs to be found out. Else (class attention over a part of the
tokens, attention pooling by a learned query) every layer's queries and keys are traced along their token axis to the
values that they come from: embedded patches, class tokens, learned queries.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from relprop.capture import ops
from relprop.capture.hoist import kept_axis
from relprop.graph import Graph, Node, TokenSpace, Value

aten = torch.ops.aten

PER_TOKEN = ("linear", "norm", "activation", "add", "mul", "fanout", "softmax")


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `stop` (None: the last) of a value along an axis."""

    origin: Value
    axis: int
    start: int = 0
    stop: int | None = None

    @property
    def size(self) -> int | None:
        """How many, None where that depends on the call."""
        end = self.origin.shape[self.axis] if self.stop is None else self.stop
        return end - self.start if isinstance(end, int) else None


def find_tokens(graph: Graph) -> TokenSpace:
    """Mark softmax layers that mix tokens as attention layers, and place every layer's queries and keys.

    Sets the attributes "query_rows" and "key_rows" of the layers: slices of the row of all tokens, learned queries at
    its end.
    """
    _mark_softmax_sites(graph)
    sites = graph.attention_sites()
    if not sites or _share_one_sequence(sites):
        return TokenSpace(sites[0] if sites else None)
    odd = [(site, reason) for site in sites if (reason := _reason_against(site))]
    if odd:
        return TokenSpace(None, problems=tuple(odd))
    return _placed(sites)


def _mark_softmax_sites(graph: Graph) -> None:
    """A softmax over products of activations whose result multiplies activations, also with heads mixed between.

    The second product, whose outputs are the heads', gets the attribute "heads", of any rank.
    """
    for node in graph.nodes:
        if node.kind != "matmul" or not node.carrying:
            continue
        softmax = _climbed(node.operands[0], "softmax")
        if softmax is None or softmax.args[1] not in (-1, softmax.outputs[0].rank - 1):
            continue
        if _has_scores(softmax.operands[0]):
            node.attributes["heads"] = True
            softmax.attributes["site"] = softmax.outputs[0].rank == 4


def _has_scores(value: Value | None) -> bool:
    """Whether a product of two activations is among the summands that a softmax takes; others say where tokens are."""
    node = _climbed(value, "matmul", "add")
    if node is None or node.kind == "matmul":
        return node is not None and all(v is not None and v.carrying for v in node.operands[:2])
    return any(_has_scores(v) for v in node.operands if v is not None and v.carrying)


def _climbed(value: Value | None, *kinds: str) -> Node | None:
    """The node of one of these kinds that a value comes from through operations on one carrying value."""
    while value is not None and value.producer is not None:
        node = value.producer
        if node.kind in kinds:
            return node
        carrying = [v for v in node.operands if v is not None and v.carrying]
        if len(carrying) != 1 or node.kind not in (*PER_TOKEN, "movement"):
            return None
        value = carrying[0]
    return None


def _share_one_sequence(sites: list[Node]) -> bool:
    """Whether every layer's queries and keys are the same tokens, but for rows that were hoisted."""
    if any(site.kind != "attention" or _reason_against(site) for site in sites):
        return False
    for site in sites:
        q, k = site.operands[:2]
        assert q is not None and k is not None
        if not q.carrying or ("query_rows" not in site.attributes and str(q.shape[-2]) != str(k.shape[-2])):
            return False
    return len({str(site.operands[1].shape[-2]) for site in sites if site.operands[1] is not None}) == 1


def _reason_against(site: Node) -> str:
    """Why a layer's keys cannot be the tokens of a sample."""
    keys = site.outputs[0] if site.kind == "softmax" else site.operands[1]
    assert keys is not None
    if not keys.carrying:
        return "its keys do not depend on the input"
    if keys.sample is None or keys.sample.axis != 0 or keys.rank > 4:
        return f"samples are not on the first axis of its keys {keys.describe()}"
    factor = keys.sample.factor
    if factor is None or (keys.rank == 4 and factor != 1):
        return f"it attends within {'several' if factor is None else factor} windows of each sample"
    return ""


def _placed(sites: list[Node]) -> TokenSpace:
    """Slices for every layer, in a row that starts with the keys of the layer that sees most tokens."""
    found: dict[Node, tuple[list[Span], list[Span]]] = {}
    for site in sites:
        if site.kind == "softmax":
            ends = ((site.outputs[0], 2), (site.outputs[0], 3))
        else:
            q, k = site.operands[:2]
            assert q is not None and k is not None
            ends = ((q, q.rank - 2), (k, k.rank - 2))
        found[site] = (_trace(*ends[0]), _trace(*ends[1]))
    carrying = {
        span.origin.index for pair in found.values() for spans in pair for span in spans if span.origin.carrying
    }
    if len(carrying) != 1:
        return TokenSpace(
            None, problems=tuple((site, "its tokens are not those of the other layers") for site in sites)
        )
    covering = max(sites, key=lambda site: len(found[site][1]))
    row = found[covering][1]
    extra: list[Span] = []
    for queries, keys in found.values():
        for span in (*queries, *keys):
            if not span.origin.carrying and not any(_inside(span, other) for other in (*row, *extra)):
                extra.append(span)
    if any(span.size is None for span in extra):
        return TokenSpace(None, problems=((covering, "its learned queries have no fixed number"),))
    rows = {site: tuple(_slice_of(spans, row, extra) for spans in pair) for site, pair in found.items()}
    lost = [(site, "its tokens are not a run of the others'") for site, pair in rows.items() if None in pair]
    if lost:
        return TokenSpace(None, problems=tuple(lost))
    for site, (queries_at, keys_at) in rows.items():
        site.attributes["query_rows"], site.attributes["key_rows"] = queries_at, keys_at
    return TokenSpace(covering, extra=sum(span.size or 0 for span in extra))


def _inside(span: Span, other: Span) -> bool:
    if (span.origin, span.axis) != (other.origin, other.axis) or span.start < other.start:
        return False
    return other.stop is None or (span.stop is not None and span.stop <= other.stop)


def _slice_of(spans: list[Span], row: list[Span], extra: list[Span]) -> tuple[int, int | None] | None:
    """Start and stop of adjoining spans in the row, None where they do not adjoin. Extra tokens count from the end."""
    places = [_place(span, row, extra) for span in spans]
    if not places or None in places:
        return None
    for (_, stop), (start, _) in itertools.pairwise(places):  # type: ignore[misc]
        if stop != start:
            return None
    return places[0][0], places[-1][1]  # type: ignore[index]


def _place(span: Span, row: list[Span], extra: list[Span]) -> tuple[int, int | None] | None:
    after = sum(other.size or 0 for other in extra)
    at: int | None = 0
    for i, other in enumerate((*row, *extra)):
        if i == len(row):
            at = -after
        if _inside(span, other):
            if at is None:
                return None
            start = at + span.start - other.start
            last = i == len(row) - 1 and span.stop == other.stop
            if last:
                return start, -after if after else None
            if span.size is None:
                return None
            return start, (start + span.size) or None
        at = None if at is None or other.size is None else at + other.size
    return None


def _trace(value: Value, axis: int | None) -> list[Span]:
    """Where the tokens along an axis come from. axis: None for a single token whose axis was dropped."""
    while True:
        node = value.producer
        above = None if node is None or not value.carrying else _above(node, value, axis)
        if isinstance(above, list):
            return _joined(above)
        if above is None:
            size = 1 if axis is None else value.shape[axis]
            return [Span(value, axis or 0, 0, size if isinstance(size, int) else None)]
        value, axis = above


def _joined(spans: list[Span]) -> list[Span]:
    """Neighbouring spans of one value as one."""
    found: list[Span] = []
    for span in spans:
        before = found[-1] if found else None
        if before is not None and (before.origin, before.axis, before.stop) == (span.origin, span.axis, span.start):
            found[-1] = Span(before.origin, before.axis, before.start, span.stop)
        else:
            found.append(span)
    return found


def _above(node: Node, value: Value, axis: int | None) -> tuple[Value, int | None] | list[Span] | None:
    """One operation up: the value and axis that the tokens come from; spans where they part; None where they begin."""
    if node.kind in ("attention", "matmul"):
        right = node.kind == "matmul" and axis == value.rank - 1
        operand = node.operands[1 if right else 0]
        return None if operand is None or axis is None else (operand, axis)
    if node.kind == "select":
        operand = node.operands[0]
        dropped = node.args[1] % (value.rank + 1)
        assert operand is not None
        return operand, dropped if axis is None else axis + (axis >= dropped)
    if node.kind in PER_TOKEN:
        return _same_tokens(node, value, axis)
    return _moved(node, value, axis) if node.kind == "movement" else None


def _same_tokens(node: Node, value: Value, axis: int | None) -> tuple[Value, int | None] | None:
    """The operand made first: around a branch that is the skip connection."""
    if node.kind == "linear" and axis == value.rank - 1:
        return None
    fitting = [
        v
        for v in node.operands
        if v is not None
        and v.carrying
        and v.rank == value.rank
        and (axis is None or statically_known_true(v.shape[axis] == value.shape[axis]))
    ]
    return (min(fitting, key=_age), axis) if fitting else None


def _age(value: Value) -> int:
    """Position of the value that a fan-out copies; values are numbered in the order of the graph."""
    while value.producer is not None and value.producer.kind == "fanout":
        source = value.producer.operands[0]
        assert source is not None
        value = source
    return value.index


def _moved(node: Node, value: Value, axis: int | None) -> tuple[Value, int | None] | list[Span] | None:
    source, target = node.operands[0], node.target
    if source is None or axis is None:
        return None
    if target in (aten.to.dtype, aten.contiguous.default, aten.clone.default, aten.masked_fill.Scalar):
        return source, axis
    if target in (aten.cat.default, aten.concat.default):
        return _parts(node, value, axis)
    if target is aten.slice.Tensor:
        return _cut(node, source, axis)
    if target is aten.transpose.int:
        a, b = (int(i) % value.rank for i in node.args[1:3])
        return source, {a: b, b: a}.get(axis, axis)
    if target is aten.permute.default:
        return source, int(node.args[1][axis]) % value.rank
    if target is aten.unbind.int:
        dropped = (node.args[1] if len(node.args) > 1 else 0) % source.rank
        return source, axis + (axis >= dropped)
    if target is aten.unsqueeze.default:
        made = int(node.args[1]) % value.rank
        return source, None if axis == made else axis - (axis > made)
    if target in ops.RESHAPES:
        kept = kept_axis(source.shape, value.shape, axis)
        if kept is not None:
            return source, kept
        return (source, None) if value.shape[axis] == 1 else None
    if target in (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default):
        return (source, axis) if statically_known_true(source.shape[axis] == value.shape[axis]) else None
    return None


def _parts(node: Node, value: Value, axis: int) -> tuple[Value, int] | list[Span]:
    """Concatenated tokens, part by part; along another axis, those of the first carrying part."""
    along = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % value.rank
    values: Sequence[Value] = node.args[0]
    if along != axis:
        return next(v for v in values if v.carrying), axis
    return [span for part in values for span in _trace(part, axis)]


def _cut(node: Node, source: Value, axis: int) -> tuple[Value, int] | list[Span] | None:
    """A slice: its part of the source's tokens, where that can be told."""
    defaults: tuple[Any, ...] = (0, None, None, 1)
    along, start, stop, step = (*node.args[1:], *defaults[len(node.args) - 1 :])
    if along % source.rank != axis:
        return source, axis
    spans = _trace(source, axis)
    start, stop = start or 0, None if stop is None or stop >= 2**62 else stop
    if step != 1 or not isinstance(start, int) or not isinstance(stop, int | None) or start < 0 or (stop or 1) < 0:
        return None
    found: list[Span] = []
    at = 0
    for span in spans:
        size = span.size
        if size is None and span is not spans[-1]:
            return None
        low, high = max(start - at, 0), stop - at if stop is not None else None
        if (high is None or high > 0) and (size is None or low < size):
            end = span.stop if high is None or (size is not None and high >= size) else span.start + high
            found.append(Span(span.origin, span.axis, span.start + low, end))
        if size is not None:
            at += size
    return found
