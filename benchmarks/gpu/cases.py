"""One case per kernel: its inputs, the kernel, the same in float64 from a formula of its own, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.machine import Machine
from relprop.kernels.activation_gradient import activation_gradient
from relprop.kernels.add_epsilon import add_epsilon
from relprop.kernels.add_gamma import add_gamma
from relprop.kernels.add_normalised import add_normalised
from relprop.kernels.attention_relevance import attention_relevance
from relprop.kernels.fanout_epsilon import fanout_epsilon
from relprop.kernels.linear_alpha_beta import linear_alpha_beta_back, linear_alpha_beta_share_out
from relprop.kernels.linear_epsilon import linear_epsilon_share_out
from relprop.kernels.norm_gradient import norm_gradient
from relprop.kernels.softmax_taylor import softmax_taylor

STABILISER = (0, 1e-9)
# float32 products, bfloat16 operands; shares are rounded to 8 bits on the way back.
TOLERANCE = {"highest": 1e-4, "ieee": 1e-4, "tf32x3": 1e-4, "high": 3e-2, "bf16": 6e-2}


@dataclass
class Case:
    """Attributes:
    op, dtype, shape: for the row.
    run: the kernels.
    exact: the same tensors in float64.
    flops: of matrix products.
    nbytes: that have to be read or written at least.
    tolerance: relative to the root mean square.
    """

    op: str
    dtype: str
    shape: str
    run: Callable[[], Any]
    exact: Callable[[], tuple[Tensor, ...]]
    flops: float
    nbytes: float
    tolerance: float


def _size(*tensors: Tensor) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors))


def linear(machine: Machine, dtype: torch.dtype, precision: str, rows: int, n: int, k: int) -> Iterator[Case]:
    """The share-out and the way back of the z+ rule, alone and with a gradient; the epsilon share-out."""
    x, w = machine.randn(rows, k, dtype=dtype, seed=1), machine.randn(n, k, dtype=dtype, seed=2)
    r, g = machine.randn(1, rows, n, seed=3), machine.randn(1, rows, n, seed=4)
    name = "bf16" if dtype == torch.bfloat16 else precision
    one, shape, tolerance = 2.0 * rows * n * k, f"{rows}x{n}x{k}", TOLERANCE[name]

    def shares() -> Tensor:
        a, b = x.double(), w.double()
        z = a.clamp(min=0) @ b.clamp(min=0).T + a.clamp(max=0) @ b.clamp(max=0).T
        return r.double() / (z + 1e-9)

    def back(p: Tensor) -> Tensor:
        a, b, p = x.double(), w.double(), p.double()
        return a.clamp(min=0) * (p @ b.clamp(min=0)) + a.clamp(max=0) * (p @ b.clamp(max=0))

    options = {"stabiliser": STABILISER, "precision": precision}
    z = x.float() @ w.float().T
    settled = r * (z.abs() > 0.5 * z.square().mean().sqrt())  # one rounding is the whole of a z near 0
    yield Case(
        "linear_alpha_beta_share_out",
        name,
        shape,
        lambda: linear_alpha_beta_share_out(r, x, w, **options)[:1],
        lambda: (shares(),),
        2 * one,
        _size(x, w, r, r),
        tolerance,
    )
    yield Case(
        "linear_epsilon_share_out",
        name,
        shape,
        lambda: (linear_epsilon_share_out(settled, x, w, **options),),
        lambda: (settled.double() / (x.double() @ w.double().T),),
        one,
        _size(x, w, r, r),
        tolerance,
    )
    yield Case(
        "linear_alpha_beta_back",
        name,
        shape,
        lambda: linear_alpha_beta_back(r, r, x, w, precision=precision)[:1],
        lambda: (back(r),),
        2 * one,
        _size(x, w, r) + 4.0 * rows * k,
        tolerance,
    )
    yield Case(
        "linear_alpha_beta_back_fused",
        name,
        shape,
        lambda: linear_alpha_beta_back(r, r, x, w, g, precision=precision),
        lambda: (back(r), g.double() @ w.double()),
        3 * one,
        _size(x, w, r, g) + 8.0 * rows * k,
        tolerance,
    )


def attention(machine: Machine, dtype: torch.dtype, precision: str, batch: int, heads: int, n: int, d: int) -> Case:
    """Both streams and the row through one layer; products q k are kept from cancelling."""
    q, k = (machine.randn(batch, heads, n, d, seed=s).abs().add(0.1).to(dtype) for s in (1, 2))
    v = machine.randn(batch, heads, n, d, dtype=dtype, seed=3)
    o = F.scaled_dot_product_attention(q.double(), k.double(), v.double()).to(dtype)
    g = machine.randn(1, batch, heads, n, d, seed=4)
    r = machine.randn(1, batch, heads, n, d, seed=5) * o.float()
    row = machine.randn(1, batch, n, seed=6).abs()
    name = "bf16" if dtype == torch.bfloat16 else precision

    def run() -> tuple[Tensor, ...]:
        found = attention_relevance(
            q,
            k,
            v,
            o,
            g,
            r,
            row=row,
            edge="gradient_x_relevance",
            precision=precision,
            qk_stabiliser=STABILISER,
            av_stabiliser=STABILISER,
        )
        return (*found.gradients, *found.relevances, found.row)  # type: ignore[return-value]

    def exact() -> tuple[Tensor, ...]:
        a, b, c, out, grad, rel = (t.double() for t in (q, k, v, o, g[0], r[0]))
        dots = a @ b.mT
        probabilities = torch.softmax(dots * d**-0.5, -1)
        s = rel / (out + torch.where(out < 0, -1e-9, 1e-9))
        map_relevance = probabilities * (s @ c.mT) / 2
        map_gradient = grad @ c.mT
        passed = probabilities * (map_gradient - (probabilities * map_gradient).sum(-1, keepdim=True)) * d**-0.5
        share = map_relevance / (dots + 1e-9)
        edge = (map_gradient * map_relevance).clamp(min=0).mean(1)
        parts = (passed @ b, passed.mT @ a, probabilities.mT @ grad)
        parts += (a * (share @ b) / 2, b * (share.mT @ a) / 2, c * (probabilities.mT @ s) / 2)
        return (*(part[None] for part in parts), torch.einsum("tbi,bij->tbj", row.double(), edge))

    # Statistics 1, query side 5, key side 7 products.
    flops = 13 * 2.0 * batch * heads * n * n * d
    return Case(
        "attention_relevance",
        name,
        f"{batch}x{heads}x{n}x{d}",
        run,
        exact,
        flops,
        _size(q, k, v, o, g, r) * 2,
        TOLERANCE[name],
    )


def elementwise(machine: Machine, dtype: torch.dtype) -> Iterator[Case]:
    """Adds, fan-out, softmax, norm and activation: bound by memory."""
    batch, tokens, width = machine.size(64, 2), machine.size(197, 5), machine.size(768, 24)
    a, b = (
        machine.randn(batch, tokens, width, dtype=dtype, seed=1),
        machine.randn(batch, tokens, width, dtype=dtype, seed=2),
    )
    a, b = a.abs() + 0.1, b.abs() + 0.1
    r, g = machine.randn(1, batch, tokens, width, seed=3), machine.randn(1, batch, tokens, width, seed=4)
    x, y, name, shape = a.double(), b.double(), str(dtype).removeprefix("torch."), f"{batch}x{tokens}x{width}"
    p = torch.softmax(x, -1).to(dtype)

    def normalised() -> tuple[Tensor, Tensor]:
        s = r.double() / (x + y)
        parts = (x * s, y * s)
        sums = [t.flatten(2).sum(-1)[..., None, None] for t in (r.double(), *parts)]
        whole = sums[1].abs() + sums[2].abs()
        return tuple(t * sums[0] * total.abs() / whole / total for t, total in zip(parts, sums[1:], strict=True))  # type: ignore[return-value]

    def gradient(function: Callable[[Tensor], Tensor]) -> tuple[Tensor]:
        leaf = x.clone().requires_grad_()
        return (torch.autograd.grad(function(leaf), leaf, g[0].double())[0][None],)

    def shares() -> tuple[Tensor, Tensor]:
        return x * r.double() / (x + y), y * r.double() / (x + y)

    two = _size(r) * 3 + _size(a, b)
    cases: list[tuple[str, Callable[[], Any], Callable[[], Any], float]] = [
        ("add_normalised", lambda: add_normalised(r, a, b, stabiliser=STABILISER)[:2], normalised, two),
        ("add_epsilon", lambda: add_epsilon(r, a, b, stabiliser=STABILISER), shares, two),
        ("add_gamma", lambda: add_gamma(r, a, b, stabiliser=STABILISER), shares, two),
        (
            "fanout_epsilon",
            lambda: (fanout_epsilon([r, g], a, stabiliser=STABILISER),),
            lambda: (r.double() + g.double(),),
            _size(r) * 3 + _size(a),
        ),
        (
            "softmax_taylor",
            lambda: (softmax_taylor(r, a, p),),
            lambda: (x * (r.double() - p.double() * r.double().sum(-1, keepdim=True)),),
            _size(r) * 2 + _size(a, p),
        ),
        (
            "norm_gradient",
            lambda: (norm_gradient(g, a),),
            lambda: gradient(lambda t: F.layer_norm(t, t.shape[-1:])),
            _size(g) * 2 + _size(a),
        ),
        (
            "activation_gradient",
            lambda: (activation_gradient(g, a, "gelu"),),
            lambda: gradient(F.gelu),
            _size(g) * 2 + _size(a),
        ),
    ]
    for op, run, exact, nbytes in cases:
        yield Case(op, name, shape, run, exact, 0.0, nbytes, 1e-4)


def cases(machine: Machine, *, large: bool) -> Iterator[Case]:
    """Every kernel; large is ViT-B/16 at batch 64, otherwise sizes that float64 checks quickly."""
    rows = machine.size(64 * 197 if large else 197, 9)
    n, k = machine.size(3072 if large else 384, 20), machine.size(768 if large else 192, 17)
    batch, heads = machine.size(64 if large else 2, 1), machine.size(12 if large else 3, 2)
    kinds = [(torch.bfloat16, "highest"), (torch.float32, "highest"), (torch.float32, "high"), (torch.float32, "ieee")]
    for dtype, precision in kinds:
        yield from linear(machine, dtype, precision, rows, n, k)
        if precision != "ieee":
            yield attention(machine, dtype, precision, batch, heads, machine.size(197, 12), machine.size(64, 16))
    for dtype in (torch.bfloat16, torch.float32):
        yield from elementwise(machine, dtype)
    if large and not machine.dry:
        yield attention(machine, torch.bfloat16, "highest", 1, 12, 4096, 64)
