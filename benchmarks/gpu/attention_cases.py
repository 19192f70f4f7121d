"""Attention layers of every kind: masks, causal, grouped heads, cross attention, head sizes, rules, targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.case import STABILISER, TOLERANCE, Case, name_of, size_of
from benchmarks.gpu.machine import Machine
from relprop import native_cuda
from relprop.cost import tiled_attention_products
from relprop.kernels.attention_relevance import attention_relevance

_CUDA_QK = {"half": "half", "alpha_beta": "positive", "none": "detached"}


@dataclass(frozen=True)
class Layer:
    """Sizes of a layer and which of its forms it is; `keys` 0 for as many as queries, `key_heads` 0 for all heads."""

    batch: int
    heads: int
    queries: int
    d: int = 64
    variant: str = ""
    keys: int = 0
    key_heads: int = 0
    targets: int = 1
    mask: str = ""
    causal: bool = False
    qk: str = "half"
    edge: str = "gradient_x_relevance"

    @property
    def key_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.key_heads or self.heads, self.keys or self.queries, self.d

    def mask_of(self, machine: Machine) -> Tensor | None:
        """Padding at the end of every sample but the first, or a bias of every head."""
        keys = self.key_shape[2]
        if self.mask == "padding":
            lengths = keys - torch.arange(self.batch, device=machine.device) * (keys // (2 * self.batch)) - 1
            return (torch.arange(keys, device=machine.device) < lengths[:, None])[:, None, None, :]
        return machine.randn(1, self.heads, self.queries, keys, seed=7) if self.mask == "bias" else None


def _per_head(layer: Layer, tensor: Tensor) -> Tensor:
    """Keys or values in float64, one per query head."""
    return tensor.double().repeat_interleave(layer.heads // layer.key_shape[1], 1)


def _per_group(layer: Layer, tensor: Tensor) -> Tensor:
    """What arrived at the copies of a key head, added. [T, B, H, N, d] -> [T, B, Hk, N, d]"""
    return tensor.unflatten(2, (layer.key_shape[1], -1)).sum(3)


def exact(
    layer: Layer, q: Tensor, k: Tensor, v: Tensor, o: Tensor, g: Tensor, r: Tensor, row: Tensor, mask: Tensor | None
) -> tuple[Tensor, ...]:
    """Both streams and the row with maps in float64."""
    a, b, c = q.double(), _per_head(layer, k), _per_head(layer, v)
    dots = a @ b.mT
    logits = dots * layer.d**-0.5
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.double()
    if layer.causal:
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        logits = logits.masked_fill(later, -torch.inf)
    probabilities = torch.softmax(logits, -1)
    out = o.double()
    s = r.double() / (out + torch.where(out < 0, -1e-9, 1e-9))
    map_relevance = probabilities * (s @ c.mT) / 2
    map_gradient = g.double() @ c.mT
    passed = probabilities * (map_gradient - (probabilities * map_gradient).sum(-1, keepdim=True)) * layer.d**-0.5
    gradients = (
        passed @ b,
        _per_group(layer, passed.mT @ a),
        _per_group(layer, probabilities.mT @ g.double()),
    )
    if layer.qk == "none":  # v gets everything
        relevances: tuple[Tensor, ...] = (_per_group(layer, c * (probabilities.mT @ s)),)
    elif layer.qk == "alpha_beta":
        up, down = [t.clamp(min=0) for t in (a, b)], [t.clamp(max=0) for t in (a, b)]
        share = map_relevance / (up[0] @ up[1].mT + down[0] @ down[1].mT + 1e-9)
        query = sum(x * (share @ y) for x, y in (up, down)) / 2
        key = sum(y * (share.mT @ x) for x, y in (up, down)) / 2
        relevances = (query, _per_group(layer, key), _per_group(layer, c * (probabilities.mT @ s) / 2))
    else:
        share = map_relevance / (dots + 1e-9)
        query, key = a * (share @ b) / 2, b * (share.mT @ a) / 2
        relevances = (query, _per_group(layer, key), _per_group(layer, c * (probabilities.mT @ s) / 2))
    factors = {"gradient": map_gradient, "relevance": map_relevance, "attention": probabilities[None]}
    first, *second = (factors[name] for name in layer.edge.split("_x_"))
    edge = (first * second[0] if second else first).clamp(min=0).mean(2)
    return (*gradients, *relevances, torch.einsum("tbi,tbij->tbj", row.double(), edge))


def attention(machine: Machine, dtype: torch.dtype, precision: str, layer: Layer) -> Case:
    """Both streams and the row through one layer; products q k are kept from cancelling."""
    full = (layer.batch, layer.heads, layer.queries, layer.d)
    q, k = machine.randn(*full, seed=1), machine.randn(*layer.key_shape, seed=2)
    if layer.qk == "half":
        q, k = q.abs() + 0.1, k.abs() + 0.1
    q, k = q.to(dtype), k.to(dtype)
    v, mask = machine.randn(*layer.key_shape, dtype=dtype, seed=3), layer.mask_of(machine)
    grouped = layer.key_shape[1] != layer.heads
    mask64 = mask if mask is None or mask.dtype == torch.bool else mask.double()
    o = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), mask64, is_causal=layer.causal, enable_gqa=grouped
    ).to(dtype)
    g = machine.randn(layer.targets, *full, seed=4)
    r = machine.randn(layer.targets, *full, seed=5) * o.float()
    row = machine.randn(layer.targets, layer.batch, layer.queries, seed=6).abs()
    name, passed = name_of(dtype, precision), (layer.qk != "none",) * 2 + (True,)
    shared: dict[str, Any] = {"mask": mask, "causal": layer.causal, "row": row, "edge": layer.edge}
    shared |= {"qk_stabiliser": STABILISER, "av_stabiliser": STABILISER}

    def parts(found: Any) -> tuple[Tensor, ...]:
        relevances = found.relevances[2:] if layer.qk == "none" else found.relevances
        return (*found.gradients, *relevances, found.row)

    def run() -> tuple[Tensor, ...]:
        options = {"qk": layer.qk, "precision": precision, "relevances_wanted": passed}
        return parts(attention_relevance(q, k, v, o, g, r, **shared, **options))

    def run_cuda() -> tuple[Tensor, ...]:
        product = "float32" if precision == "highest" else "tfloat32"
        options = {"scale": layer.d**-0.5, "qk": _CUDA_QK[layer.qk], "product": product}
        return parts(
            native_cuda.attention_relevance(
                q, k, v, output=o, exact_output=False, gradient=g, relevance=r, **shared, **options
            )
        )

    maps = layer.edge.split("_x_")
    products = tiled_attention_products((True,) * 3, passed, layer.qk, maps, layer.d, layer.targets)
    flops = 2.0 * products * layer.batch * layer.heads * layer.queries * layer.key_shape[2] * layer.d
    return Case(
        "attention_relevance",
        name,
        "x".join(str(size) for size in (layer.targets, *full[:3], layer.key_shape[2], layer.d)),
        {"triton": run, "cuda": run_cuda},
        lambda: exact(layer, q, k, v, o, g, r, row, mask),
        flops / 2 if layer.causal else flops,  # half of the map
        size_of(q, k, v, o, g, r) * 2,
        TOLERANCE[name],
        layer.variant,
    )


def variants(base: Layer, machine: Machine) -> Iterator[Layer]:
    """The forms of a layer."""
    for mask in ("padding", "bias"):
        yield replace(base, variant=mask, mask=mask)
    yield replace(base, variant="causal", causal=True)
    grouped = replace(base, heads=2 * base.heads, key_heads=base.heads)
    yield replace(grouped, variant="grouped")
    yield replace(grouped, variant="causal_grouped", causal=True)
    yield replace(base, variant="cross", keys=machine.size(base.queries // 2 + 3, 7))
    for qk in ("alpha_beta", "none"):
        yield replace(base, variant=qk, qk=qk)
    for d in (32, 128, 256):
        yield replace(base, variant=f"d{d}", d=d, batch=1)
    yield replace(base, variant="targets", targets=3)
    yield replace(base, variant="relevance", edge="relevance")
    yield replace(base, variant="gradient_x_attention", edge="gradient_x_attention")
