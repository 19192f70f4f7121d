"""The op `attention_relevance`: what it computes in plain PyTorch, with maps, and how it calls its kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from relprop import native
from relprop.errors import DeviceError
from relprop.native.attention import compute_dtype, prepared
from relprop.ops.reference import stabiliser_of

ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? output, Tensor? mask, Tensor? gradient, Tensor? relevance, Tensor? row,"
    " float scale, bool causal, bool exact_output, bool[] gradients_wanted, bool[] relevances_wanted, str qk,"
    " int qk_stabiliser_kind, float qk_epsilon, int av_stabiliser_kind, float av_epsilon, str edge"
)


def attention_relevance(
    q: Tensor,  # [B, H, Nq, d]
    k: Tensor,  # [B, Hk, Nk, d]
    v: Tensor,  # [B, Hk, Nk, dv]
    output: Tensor | None,  # [B, H, Nq, dv]
    mask: Tensor | None,  # broadcastable to [B, H, Nq, Nk]
    gradient: Tensor | None,  # [T, B, H, Nq, dv]
    relevance: Tensor | None,  # [T, B, H, Nq, dv]
    row: Tensor | None,  # [T, B, Nq]
    scale: float,
    causal: bool,
    exact_output: bool,
    gradients_wanted: Sequence[bool],
    relevances_wanted: Sequence[bool],
    qk: str,
    qk_stabiliser_kind: int,
    qk_epsilon: float,
    av_stabiliser_kind: int,
    av_epsilon: float,
    edge: str,
) -> list[Tensor]:
    """What was wanted of the gradient at q, k, v, the relevance at q, k, v, and row E ("" for no edge), in this order.

    See `relprop.native.attention_relevance`. [T, B, H, Nq, d], [T, B, Hk, Nk, d], [T, B, Hk, Nk, dv], [T, B, Nk]
    """
    layer = prepared(q, k, v, output, mask, gradient, relevance, row, qk, edge or None)
    compute, seen = layer.compute, layer.tensors.get("seen")
    given = {"gradient": gradient, "relevance": relevance}
    q, k, v = q.to(compute), k.to(compute), v.to(compute)
    output, mask, gradient, relevance = (None if t is None else t.to(compute) for t in (output, mask, *given.values()))
    mask = mask if seen is None else seen.bool()
    row = layer.tensors.get("row")
    groups = q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    dots = q @ keys.mT
    attention = _probabilities(dots * scale, mask, causal)
    found: list[Tensor] = []
    maps = {"attention": attention.unsqueeze(0)}

    def give(name: str, parts: Sequence[Tensor], wanted: Sequence[bool]) -> None:
        stream = given[name]
        assert stream is not None
        folded = (parts[0], *(part.unflatten(2, (-1, groups)).sum(3) for part in parts[1:]))
        found.extend(token_by_token(part.to(stream.dtype)) for part, want in zip(folded, wanted, strict=True) if want)

    if gradient is not None:
        maps["gradient"] = at_map = gradient @ values.mT
        logits = attention * (at_map - (attention * at_map).sum(-1, keepdim=True)) * scale
        give("gradient", (logits @ keys, logits.mT @ q, attention.mT @ gradient), gradients_wanted)
    if relevance is not None:
        assert output is not None
        s = stabiliser_of(av_stabiliser_kind, av_epsilon).share(relevance, output)
        maps["relevance"] = arrived = attention * (s @ values.mT) / 2
        share = stabiliser_of(qk_stabiliser_kind, qk_epsilon).share
        at_v = values * (attention.mT @ s)
        if qk == "detached":
            give("relevance", (q, keys, at_v), (False, False, relevances_wanted[2]))
        else:
            shares = _product_relevance(qk, share, arrived, q, keys, dots)
            give("relevance", (*shares, at_v / 2), relevances_wanted)
    if edge:
        assert row is not None
        product = torch.ones((), dtype=q.dtype, device=q.device)
        for part in edge.split("_x_"):
            product = product * maps[part]
        matrix = (product if edge == "attention" else product.clamp(min=0)).mean(2)
        found.append((row.unsqueeze(-2) @ matrix).squeeze(-2))
    return found


def _probabilities(logits: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """The softmax, 0 for a query that sees no key."""
    if causal:
        logits = logits.masked_fill(~torch.ones_like(logits[0, 0], dtype=torch.bool).tril(), -torch.inf)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    blind = (logits == -torch.inf).all(-1, keepdim=True)
    return logits.softmax(-1).masked_fill(blind, 0.0)


def _product_relevance(rule: str, share: Any, arrived: Tensor, q: Tensor, k: Tensor, dots: Tensor) -> Sequence[Tensor]:
    """At q and k of the product q kᵀ."""
    if rule == "half":
        s = share(arrived, dots)
        return q * (s @ k) / 2, k * (s.mT @ q) / 2
    signs = [(q.clamp(min=0), k.clamp(min=0)), (q.clamp(max=0), k.clamp(max=0))]
    z = sum(a @ b.mT for a, b in signs)
    s = torch.where(z == 0, 0.0, share(arrived, z))  # type: ignore[arg-type]
    return sum(a * (s @ b) for a, b in signs) / 2, sum(b * (s.mT @ a) for a, b in signs) / 2


def token_by_token(part: Tensor) -> Tensor:
    """Laid out as the kernel writes it: [T, B, N, H, width] in memory."""
    return part.transpose(2, 3).contiguous().transpose(2, 3)


def on_cpu(*arguments: Any) -> list[Tensor]:
    """The compiled kernel."""
    return through(native.attention_relevance, *arguments)


def through(kernel: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> list[Tensor]:
    """A kernel with the op's arguments, by its own names."""
    output, mask, gradient, relevance, row, scale, causal, exact, gradients, relevances, qk = rest[:11]
    found = kernel(
        q,
        k,
        v,
        scale=scale,
        output=output,
        exact_output=exact,
        mask=mask,
        causal=causal,
        gradient=gradient,
        relevance=relevance,
        gradients_wanted=tuple(gradients),
        relevances_wanted=tuple(relevances),
        qk=qk,
        qk_stabiliser=rest[11:13],
        av_stabiliser=rest[13:15],
        edge=rest[15] or None,
        row=row,
    )
    return [part for part in (*found.gradients, *found.relevances, found.row) if part is not None]


def fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> list[Tensor]:
    """Shapes, dtypes and layouts of the results, from the arguments' alone."""
    names = ("k", "v", "output", "mask", "gradient", "relevance", "row")
    for name, tensor in zip(names, (k, v, *rest[:5]), strict=True):
        if tensor is not None and tensor.device != q.device:
            raise DeviceError(f"{name}: expected a tensor on {q.device}, got one on {tensor.device}")
    gradient, relevance, row = rest[2:5]
    qk, edge, found = rest[10], rest[15], []
    for stream, wanted in ((gradient, rest[8]), (relevance, rest[9])):
        if stream is None:
            continue
        if qk == "detached" and stream is relevance:
            wanted = (False, False, wanted[2])
        for tensor, want in zip((q, k, v), wanted, strict=True):
            batch, heads, rows, width = tensor.shape
            shape = (stream.shape[0], batch, rows, heads, width)
            found += [stream.new_empty(shape).transpose(2, 3)] if want else []
    if edge:
        stream = gradient if gradient is not None else relevance
        targets = row.shape[0] if edge == "attention" or stream is None else stream.shape[0]
        dtype = compute_dtype(q, gradient, relevance, row)
        found.append(q.new_empty((targets, q.shape[0], k.shape[2]), dtype=dtype))
    return found
