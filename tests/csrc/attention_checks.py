"""Attention layers of many kinds and the rules that define what their kernels answer, in float64 torch with maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from relprop.capture.ops import attention
from relprop.graph import Node, SampleAxis, Value
from relprop.methods.attention_maps import EDGES
from relprop.native.attention import AttentionStreams
from relprop.rules import (
    AttentionComposed,
    Call,
    MatmulAlphaBeta,
    MatmulHalf,
    Rule,
    SoftmaxDetached,
    SoftmaxIdentity,
    Stabiliser,
)
from relprop.rules.attention_composed import attention_gradient
from tests.rules.rule_checks import make_call

ROUGH = Stabiliser(1.0)  # keeps random products of queries and keys from amplifying float32's rounding


def random(*shape: int, seed: int) -> Tensor:
    """Normal numbers that float32 holds exactly."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


@dataclass(frozen=True)
class Case:
    """Sizes of one attention layer; `queries` by default as many as keys."""

    keys: int = 7
    queries: int = 5
    batch: int = 2
    heads: int = 3
    key_heads: int = 3
    d: int = 4
    dv: int = 6
    targets: int = 2
    mask: str = ""
    causal: bool = False
    scale: float = 0.4

    def mask_tensor(self) -> Tensor | None:
        shape = (self.batch, self.heads, self.queries, self.keys)
        if self.mask == "seen":
            seen = random(1, self.heads, *shape[2:], seed=11) > -0.5
            seen[..., 0, :] = False  # a query that sees nothing
            return seen
        if self.mask == "padding":
            lengths = torch.arange(self.batch) + self.keys - self.batch
            return (torch.arange(self.keys) < lengths[:, None])[:, None, None, :]
        if self.mask == "bias":
            bias = random(*shape, seed=12)
            bias[:, :, self.queries // 2, 1:] = -torch.inf
            bias[:, :, -1] = -torch.inf
            return bias
        if self.mask == "lowest":
            hidden = random(self.queries, self.keys, seed=13) > 0.5
            return torch.zeros(self.queries, self.keys).double().masked_fill(hidden, torch.finfo(torch.float32).min)
        return None

    def tensors(self) -> dict[str, Tensor]:
        query = (self.batch, self.heads, self.queries)
        key = (self.batch, self.key_heads, self.keys)
        q, k, v = random(*query, self.d, seed=1), random(*key, self.d, seed=2), random(*key, self.dv, seed=3)
        streams = {
            n: random(self.targets, *query, self.dv, seed=4 + i) for i, n in enumerate(("gradient", "relevance"))
        }
        row = random(self.targets, self.batch, self.queries, seed=6).abs()
        return {"q": q, "k": k, "v": v, "row": row, **streams}


CASES = {
    "one": Case(1, 1, 1, 1, 1, 1, 1, 1),
    "plain": Case(),
    "heads of 64": Case(205, 100, 1, 2, 2, 64, 64, scale=0.125),
    "heads of 256": Case(17, 63, 1, 1, 1, 256, 256, 1, scale=0.0625),
    "many keys": Case(1023, 3, 1, 1, 1, 33, 17, 1),
    "many queries": Case(3, 403, 1, 2, 1, 32, 48, 1),
    "grouped": Case(65, 49, 2, 6, 2, 16, 16, 2),
    "causal": Case(101, 101, 2, 2, 2, 32, 32, 2, causal=True),
    "causal cross": Case(41, 230, 1, 2, 1, 8, 8, 1, causal=True),
    "causal, more keys": Case(411, 50, 1, 2, 1, 8, 8, 1, causal=True),
    "seen": Case(mask="seen"),
    "padding": Case(199, 199, 2, 4, 2, 20, 20, 2, mask="padding"),
    "bias": Case(200, 50, 2, 3, 3, 32, 32, 2, mask="bias"),
    "lowest": Case(33, 21, 2, 3, 3, 32, 32, 2, mask="lowest"),
    "causal and padding": Case(61, 61, 2, 2, 2, 16, 16, 1, mask="padding", causal=True),
}
RULES: dict[str, Callable[[Stabiliser], AttentionComposed]] = {
    "half": lambda s: AttentionComposed(MatmulHalf(s), SoftmaxIdentity(), MatmulHalf(s)),
    "positive": lambda s: AttentionComposed(MatmulAlphaBeta(s), SoftmaxIdentity(), MatmulHalf(s)),
    "detached": lambda s: AttentionComposed(MatmulHalf(s), SoftmaxDetached(), MatmulHalf(s)),
}


def oracle_call(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Call:
    """The layer as the engine's rules see it."""
    mask = case.mask_tensor()
    inputs = [q, k, v] if mask is None else [q, k, v, mask]
    values = [Value(i, f"v{i}", tuple(t.shape), t.dtype, i < 3, SampleAxis(0, 1)) for i, t in enumerate(inputs)]
    output = reference_output(case, q, k, v)
    values.append(Value(4, "output", tuple(output.shape), output.dtype, True, SampleAxis(0, 1)))
    operands = (*values[:3], values[3] if mask is not None else None)
    args = (*operands, case.scale, case.causal, case.heads != case.key_heads)
    node = Node("by_hand", "attention", attention, args, {}, operands, (values[-1],))
    tensors = {**dict(enumerate(inputs)), 4: output}
    return make_call(node, tensors, {i: t.shape for i, t in tensors.items()}, torch.float64, None)


def reference_output(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """O, 0 for a query that sees nothing."""
    groups = case.heads // case.key_heads
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    logits, mask = case.scale * (q @ k.mT), case.mask_tensor()
    if case.causal:
        logits = logits.masked_fill(~torch.ones(logits.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return torch.softmax(logits, -1).nan_to_num(0.0) @ v


def edge_of(name: str, maps: dict[str, Tensor]) -> Tensor:
    """E from whole maps. [T, B, Nq, Nk]"""
    product = torch.ones(1)
    for part in EDGES[name]:
        product = product * maps[part]
    return (product if name == "attention" else product.clamp(min=0)).mean(2)


def expected(case: Case, rule: Rule, tensors: dict[str, Tensor], edge: str | None) -> dict[str, Tensor | None]:
    """Everything the kernel answers, through the rules."""
    call = oracle_call(case, *(tensors[name].double() for name in "qkv"))
    gradients = attention_gradient(call, tensors["gradient"].double())
    relevances = rule.propagate(call, tensors["relevance"].double())
    found = {f"gradient_{n}": part for n, part in zip("qkv", gradients, strict=False)}
    found |= {f"relevance_{n}": part for n, part in zip("qkv", relevances, strict=False)}
    if edge is not None:
        matrix = edge_of(edge, call.maps)
        found["row"] = (tensors["row"].double().unsqueeze(-2) @ matrix).squeeze(-2)
    return found


def options_of(case: Case, rule: AttentionComposed, dtype: torch.dtype, qk: str) -> dict[str, Any]:
    mask = case.mask_tensor()
    return {
        "scale": case.scale,
        "causal": case.causal,
        "mask": mask if mask is None or mask.dtype == torch.bool else mask.to(dtype),
        "qk": qk,
        "qk_stabiliser": rule.qk.stabiliser.code,  # type: ignore[attr-defined]
        "av_stabiliser": rule.av.stabiliser.code,  # type: ignore[attr-defined]
    }


def case_tensors(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Inputs with their output; relevance in proportion to it, as a sweep brings it."""
    tensors = case.tensors()
    tensors["output"] = reference_output(case, *(tensors[name] for name in "qkv"))
    tensors["relevance"] = tensors["relevance"] * tensors["output"]
    return {name: t.to(dtype) for name, t in tensors.items()}


def answers(kernel: Callable[..., AttentionStreams], tensors: dict[str, Tensor], **options: Any) -> dict[str, Any]:
    """A kernel's answers by name, None for what it does not give."""
    streams = {name: tensors[name] for name in ("gradient", "relevance", "output") if name in tensors}
    row = tensors["row"] if options.get("edge") else None
    found = kernel(*(tensors[name] for name in "qkv"), **streams, row=row, **options)
    named: dict[str, Any] = {f"gradient_{n}": part for n, part in zip("qkv", found.gradients, strict=True)}
    named |= {f"relevance_{n}": part for n, part in zip("qkv", found.relevances, strict=True)}
    return named if found.row is None else {**named, "row": found.row}
