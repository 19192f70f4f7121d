"""Floating-point operations and bytes of a step, counted from shapes, and the time that ceilings allow it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from relprop.graph import Node, Value
from relprop.rules import Gradient, ModifiedGradient, Rule
from relprop.rules.attention_composed import AttentionComposed
from relprop.rules.linear_alpha_beta import LinearAlphaBeta
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
    """How many of the forward pass's products one reverse step of one stream makes."""
    if node.kind in ("linear", "conv"):
        if isinstance(rule, LinearAlphaBeta):
            return 3 if rule.joint else 4
        if isinstance(rule, (LinearGamma,)):
            return 3
        if isinstance(rule, LinearZBox):
            return 5
        return 2 if isinstance(rule, LinearFlat) else 1
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
        flops: of matrix products.
        nbytes: that are read or written at least once. Data movement is taken to be free.
        seconds: what the ceilings allow.
    """

    phase: str
    node: Node
    streams: str
    flops: float
    nbytes: float
    seconds: float

    def bound(self, ceilings: Ceilings) -> str:
        """What decides the time."""
        parts = {
            "rate": self.flops / ceilings.flops,
            "bandwidth": self.nbytes / ceilings.bandwidth,
            "launch": ceilings.launch,
        }
        return max(parts, key=lambda name: parts[name])


def predict(
    program: Program, ceilings: Ceilings, batch: int, targets: int = 1, stream_bytes: int = 4
) -> list[StepCost]:
    """Every step's cost, forward steps first.

    Args:
        stream_bytes: of one element of a stream.
    """
    return [
        StepCost(phase, node, streams, flops, nbytes, _seconds(flops, nbytes, ceilings))
        for phase, node, streams, flops, nbytes in _steps(program, batch, targets, stream_bytes)
    ]


def _seconds(flops: float, nbytes: float, ceilings: Ceilings) -> float:
    if not flops and not nbytes:
        return 0.0
    return max(flops / ceilings.flops, nbytes / ceilings.bandwidth, ceilings.launch)


def _steps(
    program: Program, batch: int, targets: int, stream_bytes: int
) -> Iterator[tuple[str, Node, str, float, float]]:
    symbols = program.batch_symbols
    for step in program.forward:
        node = step.node
        moved = () if node.kind in _FREE else (*node.operands, *node.outputs)
        flops = batch * forward_flops(node, symbols)
        yield "forward", node, "", float(flops), float(nbytes([*dict.fromkeys(moved)], symbols, batch))
    for back in program.reverse:
        work = sum(
            batch * targets * forward_flops(back.node, symbols) * products(back.node, s.rule, s.stream, s.wanted)
            for s in back.streams
        )
        read = _reverse_bytes(back, symbols, batch, targets * stream_bytes)
        yield "reverse", back.node, " + ".join(s.stream for s in back.streams), float(work), float(read)


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
