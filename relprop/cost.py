"""Floating-point operations and bytes of a step, counted from shapes, and the time that ceilings allow it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from relprop.graph import Node, Value
from relprop.rules import Gradient, ModifiedGradient, Rule
from relprop.rules.attention_composed import AttentionComposed
from relprop.rules.linear_alpha_beta import LinearAlphaBeta
from relprop.rules.linear_epsilon import LinearEpsilon
from relprop.rules.linear_flat import LinearFlat
from relprop.rules.linear_gamma import LinearGamma
from relprop.rules.linear_z_box import LinearZBox

if TYPE_CHECKING:
    from relprop.program import Program, ReverseStep


def sizes(value: Value, batch_symbols: frozenset[Any], batch: int = 1) -> list[int]:
    """Sizes at a batch, other free sizes as in the example."""
    result = []
    for size in value.shape:
        if isinstance(size, torch.SymInt):
            one = {s: batch for s in size.node.expr.free_symbols & batch_symbols}
            expression = size.node.expr.subs(one)
            hints = size.node.shape_env.backed_var_to_val if hasattr(size.node.shape_env, "backed_var_to_val") else {}
            hints = hints or getattr(size.node.shape_env, "var_to_val", {})
            result.append(int(expression.subs({s: hints[s] for s in expression.free_symbols})))
        else:
            result.append(int(size))
    return result


def forward_flops(node: Node, batch_symbols: frozenset[Any]) -> int:
    """Of the matrix products; two per multiply-add."""
    if node.kind in ("linear", "conv"):
        weight = node.operands[1]
        assert weight is not None
        out = sizes(node.outputs[0], batch_symbols)
        if node.kind == "linear":
            return 2 * prod(out) * sizes(weight, batch_symbols)[1]
        return 2 * prod(out) * prod(sizes(weight, batch_symbols)[1:])
    if node.kind == "matmul":
        a = node.operands[0]
        assert a is not None
        return 2 * prod(sizes(node.outputs[0], batch_symbols)) * sizes(a, batch_symbols)[-1]
    if node.kind == "attention":
        q, k = node.operands[0], node.operands[1]
        assert q is not None and k is not None
        return 4 * prod(sizes(q, batch_symbols)) * sizes(k, batch_symbols)[-2]
    return 0


def products(node: Node, rule: Rule, stream: str, wanted: Sequence[bool]) -> float:
    """How many of the forward pass's products a method needs for one stream through one operation."""
    if node.kind in ("linear", "conv"):
        return share_out_products(rule, True) + back_products(rule)
    if isinstance(rule, (Gradient, ModifiedGradient)):
        stream = "gradient"
    if node.kind == "matmul":
        return 1 if stream == "gradient" else 3
    if node.kind == "attention":
        # Two products make the forward: each of the products below counts one half.
        if stream == "gradient":
            factors = getattr(rule, "factors", None) or (1.0, 1.0, 1.0)
            made = [want and factor != 0.0 for want, factor in zip(wanted[:3], factors, strict=False)]
            return (1 + any(made[:2]) + sum(made)) / 2
        one = isinstance(rule, AttentionComposed) and rule.qk.name == "alpha_beta"
        detached = isinstance(rule, AttentionComposed) and rule.softmax.name == "detached"
        through = 0 if detached else (1 + one) * sum(wanted[:2]) + one * any(wanted[:2])
        return (1 + 1 + wanted[2] + through) / 2
    return 0


def share_out_products(rule: Rule, known: bool) -> int:
    """Products of a linear layer's size that share relevance out, once for all targets.

    Args:
        known: whether x w is there from the forward pass, not rounded to less than the streams.
    """
    if isinstance(rule, LinearAlphaBeta) and not rule.joint:
        return 2 + 2 * (rule.beta != 0)
    if isinstance(rule, LinearFlat):
        return 1
    own = 2 if isinstance(rule, LinearZBox) else int(isinstance(rule, (LinearAlphaBeta, LinearGamma)))
    return own + (not known if own or isinstance(rule, LinearEpsilon) else 0)


def back_products(rule: Rule) -> int:
    """Products of a linear layer's size on the way back, for each target."""
    if isinstance(rule, LinearAlphaBeta) and not rule.joint:
        return 2 + 2 * (rule.beta != 0)
    return 3 if isinstance(rule, LinearZBox) else 2 if isinstance(rule, (LinearAlphaBeta, LinearGamma)) else 1


def tiled_attention_products(
    gradient: Sequence[bool], relevance: Sequence[bool], qk: str, maps: Collection[str], largest: int, targets: int = 1
) -> int:
    """Products of the size of q k that attention's kernels make in tiles, without a map of N x N.

    Statistics make one; queries' and keys' sides make q k again, and each its own maps, for each target. Keys and
    values go in launches of their own where their sums do not fit into registers together. That heads of more channels
    than 128, or than 64 in float32, repeat more is not counted.

    Args:
        gradient, relevance: whether the stream is passed to q, k and v; empty for no stream.
        qk: "half", "alpha_beta" or "none".
        maps: that the read-out's row walks: "gradient", "relevance", "attention".
        largest: the head's channels.
    """
    through = 4 if qk == "alpha_beta" else 1  # z's two products and two sums, or one sum
    gradient, relevance = (tuple(wanted) or (False,) * 3 for wanted in (gradient, relevance))
    shared = tuple(want and qk != "none" for want in relevance[:2])
    queries = 2 * gradient[0] + (1 + through) * shared[0]
    map_gradient, map_relevance = gradient[1] or "gradient" in maps, shared[1] or "relevance" in maps
    keys = map_gradient + gradient[1] + map_relevance + through * shared[1]
    values = gradient[2] + relevance[2]
    apart = largest > 64 or qk == "alpha_beta"
    again = bool(queries) + (bool(keys or maps) + bool(values) if apart else bool(keys or maps or values))
    return 1 + targets * (again + queries + keys + values)


def nbytes(values: Sequence[Value | None], batch_symbols: frozenset[Any], batch: int = 1) -> int:
    """Bytes of values read or written once."""
    return sum(prod(sizes(v, batch_symbols, batch)) * v.dtype.itemsize for v in values if v is not None and v.shape)


@dataclass(frozen=True)
class Ceilings:
    """What a device can do at best.

    Attributes:
        name: of the device and the dtype of its products.
        source: where the numbers come from.
        flops: of matrix products, per second.
        bandwidth: bytes read or written per second.
        launch: seconds that a step takes however small it is.
    """

    name: str
    source: str
    flops: float
    bandwidth: float
    launch: float = 0.0


H200 = Ceilings(
    "assumed for an NVIDIA H200, bfloat16",
    "assumed: four fifths of the datasheet's dense bfloat16 rate, nine tenths of its bandwidth, 3 us for a launch in a"
    " CUDA graph",
    788e12,
    4.3e12,
    3e-6,
)


@dataclass(frozen=True)
class StepCost:
    """One step's cost for a batch.

    Attributes:
        phase: "forward" or "reverse".
        node: the operation.
        streams: that go through it, as "gradient + relevance"; empty in the forward pass.
        flops: of the matrix products that the method needs.
        executed: of those that the kernels make: also x w of a layer whose output was rounded to less than the
            streams, and q k wherever attention is made again in tiles; what several targets share is made once.
        nbytes: that are read or written at least once. Data movement is taken to be free.
        seconds: what the ceilings allow.
    """

    phase: str
    node: Node
    streams: str
    flops: float
    executed: float
    nbytes: float
    seconds: float

    def bound(self, ceilings: Ceilings) -> str:
        """What decides the time."""
        parts = {
            "rate": self.executed / ceilings.flops,
            "bandwidth": self.nbytes / ceilings.bandwidth,
            "launch": ceilings.launch,
        }
        return max(parts, key=lambda name: parts[name])


def predict(
    program: Program,
    ceilings: Ceilings,
    batch: int,
    targets: int = 1,
    stream_bytes: int = 4,
    kernels: str | None = None,
) -> list[StepCost]:
    """Every step's cost, forward steps first.

    Args:
        stream_bytes: of one element of a stream.
        kernels: the backend whose kernels take attention layers; the plan's own by default.
    """
    return [
        StepCost(phase, node, streams, flops, executed, nbytes, _seconds(executed, nbytes, ceilings))
        for phase, node, streams, flops, executed, nbytes in _steps(program, batch, targets, stream_bytes, kernels)
    ]


def _seconds(flops: float, nbytes: float, ceilings: Ceilings) -> float:
    if not flops and not nbytes:
        return 0.0
    return max(flops / ceilings.flops, nbytes / ceilings.bandwidth, ceilings.launch)


def _steps(
    program: Program, batch: int, targets: int, stream_bytes: int, kernels: str | None
) -> Iterator[tuple[str, Node, str, float, float, float]]:
    symbols = program.batch_symbols
    for step in program.forward:
        node = step.node
        moved = () if node.kind in _FREE else (*node.operands, *node.outputs)
        flops = batch * forward_flops(node, symbols)
        yield "forward", node, "", float(flops), float(flops), float(nbytes([*dict.fromkeys(moved)], symbols, batch))
    for back in program.reverse:
        once = batch * forward_flops(back.node, symbols)
        work = once * targets * sum(products(back.node, s.rule, s.stream, s.wanted) for s in back.streams)
        executed = once * _executed(back, targets, stream_bytes, kernels)
        read = _reverse_bytes(back, symbols, batch, targets * stream_bytes)
        names = " + ".join(s.stream for s in back.streams)
        yield "reverse", back.node, names, float(work), float(executed), float(read)


def _executed(step: ReverseStep, targets: int, stream_bytes: int, kernels: str | None) -> float:
    """How many of the forward pass's products a step's kernels make for all targets."""
    node, out = step.node, step.node.outputs[0]
    if node.kind in ("linear", "conv"):
        known = out.sums in step.tensors or out.dtype.itemsize >= stream_bytes
        return sum(share_out_products(s.rule, known) + targets * back_products(s.rule) for s in step.streams)
    own = None if step.joint is None else step.joint.backend.split()[0]
    if node.kind == "attention" and step.streams and (kernels or own) in _TILED:
        return _tiled(step, targets) / 2  # two products make the forward
    return targets * sum(products(node, s.rule, s.stream, s.wanted) for s in step.streams)


# Backends whose attention kernels make the maps again in tiles, on the side of the queries and on that of the keys.
_TILED = ("triton", "cuda")


def _tiled(step: ReverseStep, targets: int) -> int:
    wanted: dict[str, tuple[bool, ...]] = {"gradient": (), "relevance": ()}
    qk = "half"
    for stream in step.streams:
        rule, reached = stream.rule, stream.wanted[:3]
        if isinstance(rule, AttentionComposed):
            qk = "none" if rule.softmax.name == "detached" else rule.qk.name
            wanted["relevance"] = reached
        else:
            factors = getattr(rule, "factors", None) or (1.0, 1.0, 1.0)
            wanted["gradient"] = tuple(want and factor != 0.0 for want, factor in zip(reached, factors, strict=True))
    heads = [value for value in step.node.operands[:3:2] if value is not None]
    largest = max(int(value.shape[-1]) for value in heads)
    return tiled_attention_products(wanted["gradient"], wanted["relevance"], qk, step.maps, largest, targets)


# Views, mostly; a copy that one of them makes is not counted.
_FREE = ("movement", "fanout", "select")


def _reverse_bytes(step: ReverseStep, symbols: frozenset[Any], batch: int, stream_bytes: int) -> int:
    """Saved tensors once, and every stream where it arrives and where it goes."""
    node = step.node
    if node.kind in _FREE and node.kind != "fanout":
        return 0
    values = {v.index: v for v in (*node.operands, *node.outputs) if v is not None}
    saved = [values[i] for i in step.tensors if i in values]
    if node.kind == "linear" and node.operands[1] not in saved:
        saved.append(node.operands[1])  # type: ignore[arg-type]
    through = [
        value
        for stream in step.streams
        for value in (*node.outputs, *(v for v, want in zip(node.operands, stream.wanted, strict=True) if want))
        if value is not None and value.carrying
    ]
    saved += [v for made in step.remakes for v in (*made.node.operands, *made.node.outputs) if v is not None]
    elements = sum(prod(sizes(v, symbols, batch)) for v in through)
    return nbytes(saved, symbols, batch) + stream_bytes * elements
