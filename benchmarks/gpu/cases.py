"""One case per kernel: its inputs, the Triton and the CUDA kernel, the same in float64, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.machine import Machine
from relprop import native_cuda
from relprop.backends.cuda import back_product, share_out_product
from relprop.kernels.activation_gradient import activation_gradient
from relprop.kernels.add_epsilon import add_epsilon
from relprop.kernels.add_gamma import add_gamma
from relprop.kernels.add_normalised import add_normalised
from relprop.kernels.attention_relevance import attention_relevance
from relprop.kernels.fanout_epsilon import fanout_epsilon
from relprop.kernels.linear_alpha_beta import linear_alpha_beta_back, linear_alpha_beta_share_out
from relprop.kernels.linear_back import linear_back
from relprop.kernels.linear_back_add import linear_back_add
from relprop.kernels.linear_back_gated import linear_back_gated
from relprop.kernels.linear_epsilon import linear_epsilon_share_out
from relprop.kernels.norm_gradient import norm_gradient
from relprop.kernels.softmax_taylor import softmax_taylor

STABILISER = (0, 1e-9)
# float32 products, bfloat16 operands; shares are rounded to 8 bits on the way back.
TOLERANCE = {"highest": 1e-4, "ieee": 1e-4, "tf32x3": 1e-4, "high": 3e-2, "bf16": 6e-2, "fp16": 3e-2}
_CUDA = ("highest", "high", "medium")  # precisions that the CUDA kernels know
Runs = dict[str, Callable[[], Any]]


@dataclass
class Case:
    """Attributes:
    op, dtype, shape: for the row.
    runs: the kernels, by backend.
    exact: the same tensors in float64.
    flops: of matrix products.
    nbytes: that have to be read or written at least.
    tolerance: relative to the root mean square.
    """

    op: str
    dtype: str
    shape: str
    runs: Runs
    exact: Callable[[], tuple[Tensor, ...]]
    flops: float
    nbytes: float
    tolerance: float


def _name(dtype: torch.dtype, precision: str) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, precision)


def _size(*tensors: Tensor) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors))


def linear(machine: Machine, dtype: torch.dtype, precision: str, rows: int, n: int, k: int) -> Iterator[Case]:
    """The share-out and the way back of the z+ rule, alone and with a gradient; the epsilon share-out."""
    x, w = machine.randn(rows, k, dtype=dtype, seed=1), machine.randn(n, k, dtype=dtype, seed=2)
    r, g = machine.randn(1, rows, n, seed=3), machine.randn(1, rows, n, seed=4)
    name = _name(dtype, precision)
    one, shape, tolerance = 2.0 * rows * n * k, f"{rows}x{n}x{k}", TOLERANCE[name]

    def shares() -> Tensor:
        a, b = x.double(), w.double()
        z = a.clamp(min=0) @ b.clamp(min=0).T + a.clamp(max=0) @ b.clamp(max=0).T
        return r.double() / (z + 1e-9)

    def back(p: Tensor) -> Tensor:
        a, b, p = x.double(), w.double(), p.double()
        return a.clamp(min=0) * (p @ b.clamp(min=0)) + a.clamp(max=0) * (p @ b.clamp(max=0))

    options = {"stabiliser": STABILISER, "precision": precision}
    cuda = {"stabiliser": STABILISER, "product": share_out_product(dtype, precision)} if precision in _CUDA else {}
    product = back_product(dtype, precision) if cuda else ""
    y = x @ w.T if cuda.get("product") == "float32" else None
    Back = native_cuda.Back
    h = machine.randn(rows, k, dtype=dtype, seed=5)

    def runs(triton: Callable[[], Any], other: Callable[[], Any] | None) -> Runs:
        return {"triton": triton, "cuda": other} if cuda and other is not None else {"triton": triton}

    def slopes() -> Tensor:
        leaf = h.double().requires_grad_()
        return torch.autograd.grad(F.gelu(leaf).sum(), leaf)[0]

    z = x.float() @ w.float().T
    settled = r * (z.abs() > 0.5 * z.square().mean().sqrt())  # one rounding is the whole of a z near 0
    yield Case(
        "linear_alpha_beta_share_out",
        name,
        shape,
        runs(
            lambda: linear_alpha_beta_share_out(r, x, w, **options)[:1],
            lambda: native_cuda.linear_alpha_beta_share_out(r, x, w, y, None, **cuda)[:1],
        ),
        lambda: (shares(),),
        2 * one,
        _size(x, w, r, r),
        tolerance,
    )
    yield Case(
        "linear_epsilon_share_out",
        name,
        shape,
        runs(
            lambda: (linear_epsilon_share_out(settled, x, w, **options),),
            lambda: (native_cuda.linear_epsilon_share_out(settled, x, w, y, None, **cuda),),
        ),
        lambda: (settled.double() / (x.double() @ w.double().T),),
        one,
        _size(x, w, r, r),
        tolerance,
    )
    yield Case(
        "linear_alpha_beta_back",
        name,
        shape,
        runs(
            lambda: linear_alpha_beta_back(r, r, x, w, precision=precision)[:1],
            lambda: native_cuda.linear_back([Back(r, r, 0.5, 0.5)], x, w, product=product),
        ),
        lambda: (back(r),),
        2 * one,
        _size(x, w, r) + 4.0 * rows * k,
        tolerance,
    )
    yield Case(
        "linear_alpha_beta_back_fused",
        name,
        shape,
        runs(
            lambda: linear_alpha_beta_back(r, r, x, w, g, precision=precision),
            lambda: native_cuda.linear_back([Back(r, r, 0.5, 0.5), Back(g)], x, w, product=product),
        ),
        lambda: (back(r), g.double() @ w.double()),
        3 * one,
        _size(x, w, r, g) + 8.0 * rows * k,
        tolerance,
    )
    yield Case(
        "linear_back_activation",
        name,
        shape,
        runs(
            lambda: linear_back(None, None, None, w, g, activation="gelu", preactivation=h, precision=precision)[1:],
            None,
        ),
        lambda: (slopes() * (g.double() @ w.double()),),
        one,
        _size(w, g, h) + 4.0 * rows * k,
        tolerance,
    )
    f = F.gelu(h)
    yield Case(
        "linear_back_gated",
        name,
        shape,
        runs(lambda: linear_back_gated(g, w, h, f, x, activation="gelu", precision=precision), None),
        lambda: (x.double() * slopes() * (g.double() @ w.double()), f.double() * (g.double() @ w.double())),
        one,
        _size(w, g, h, f, x) + 8.0 * rows * k,
        tolerance,
    )


def residual(machine: Machine, dtype: torch.dtype, precision: str, batch: int, tokens: int, n: int, k: int) -> Case:
    """The way back fused with the fan-out and the normalised add below it; parts are positive, so nothing cancels."""
    name, shape = _name(dtype, precision), (batch, tokens, k)
    x, a, b = (machine.randn(*shape, dtype=dtype, seed=s).abs() + 0.1 for s in (1, 2, 3))
    w, p = machine.randn(n, k, dtype=dtype, seed=4), machine.randn(1, batch, tokens, n, seed=5) / n
    g, other = machine.randn(1, batch, tokens, n, seed=6), machine.randn(1, *shape, seed=7) + 4.0

    def run() -> tuple[Tensor, ...]:
        given = (p, p, x, w, other, x, a, b, g)
        found = linear_back_add(*given, plain=0.5, magnified=0.5, stabiliser=STABILISER, precision=precision)
        part_a, part_b, scales, passed = found
        assert passed is not None
        return part_a * scales[..., 0, None, None], part_b * scales[..., 1, None, None], passed

    def exact() -> tuple[Tensor, ...]:
        c, d, e, f, q, o = (t.double() for t in (x, w, a, b, p, other))
        arrived = 0.5 * (c * (q @ d) + c.abs() * (q @ d.abs())) + o
        parts = (e * arrived / (e + f), f * arrived / (e + f))
        sums = [t.flatten(2).sum(-1)[..., None, None] for t in (arrived, *parts)]
        whole = sums[1].abs() + sums[2].abs()
        scaled = (t * sums[0] * total.abs() / whole / total for t, total in zip(parts, sums[1:], strict=True))
        return (*scaled, g.double() @ d)

    flops = 3 * 2.0 * batch * tokens * n * k
    nbytes = _size(x, w, a, b, p, g) + 4 * _size(other)
    return Case(
        "linear_back_add", name, f"{batch}x{tokens}x{n}x{k}", {"triton": run}, exact, flops, nbytes, TOLERANCE[name]
    )


def attention(machine: Machine, dtype: torch.dtype, precision: str, batch: int, heads: int, n: int, d: int) -> Case:
    """Both streams and the row through one layer; products q k are kept from cancelling."""
    q, k = (machine.randn(batch, heads, n, d, seed=s).abs().add(0.1).to(dtype) for s in (1, 2))
    v = machine.randn(batch, heads, n, d, dtype=dtype, seed=3)
    o = F.scaled_dot_product_attention(q.double(), k.double(), v.double()).to(dtype)
    g = machine.randn(1, batch, heads, n, d, seed=4)
    r = machine.randn(1, batch, heads, n, d, seed=5) * o.float()
    row = machine.randn(1, batch, n, seed=6).abs()
    name = _name(dtype, precision)

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

    def run_cuda() -> tuple[Tensor, ...]:
        found = native_cuda.attention_relevance(
            q,
            k,
            v,
            scale=d**-0.5,
            output=o,
            exact_output=False,
            gradient=g,
            relevance=r,
            row=row,
            edge="gradient_x_relevance",
            product="float32" if precision == "highest" else "tfloat32",
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
        {"triton": run, "cuda": run_cuda},
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
    flat = (r.flatten(2), a.flatten(1), b.flatten(1))
    option: dict[str, Any] = {"stabiliser": STABILISER}
    cases: list[tuple[str, Callable[[], Any], Callable[[], Any], Callable[[], Any], float]] = [
        (
            "add_normalised",
            lambda: add_normalised(r, a, b, **option)[:2],
            lambda: [t.view(r.shape) for t in native_cuda.add_normalised(*flat, **option)],
            normalised,
            two,
        ),
        (
            "add_epsilon",
            lambda: add_epsilon(r, a, b, **option),
            lambda: native_cuda.add_epsilon(r, a, b, **option),
            shares,
            two,
        ),
        (
            "add_gamma",
            lambda: add_gamma(r, a, b, **option),
            lambda: native_cuda.add_gamma(r, a, b, gamma=1.0, **option),
            shares,
            two,
        ),
        (
            "fanout_epsilon",
            lambda: (fanout_epsilon([r, g], a, **option),),
            lambda: (native_cuda.fanout_epsilon([r, g], a, **option),),
            lambda: (r.double() + g.double(),),
            _size(r) * 3 + _size(a),
        ),
        (
            "softmax_taylor",
            lambda: (softmax_taylor(r, a, p),),
            lambda: (native_cuda.softmax_taylor(r, a, p),),
            lambda: (x * (r.double() - p.double() * r.double().sum(-1, keepdim=True)),),
            _size(r) * 2 + _size(a, p),
        ),
        (
            "norm_gradient",
            lambda: (norm_gradient(g, a),),
            lambda: (native_cuda.norm_gradient(g, a, None, epsilon=1e-5, norm="layer"),),
            lambda: gradient(lambda t: F.layer_norm(t, t.shape[-1:])),
            _size(g) * 2 + _size(a),
        ),
        (
            "activation_gradient",
            lambda: (activation_gradient(g, a, "gelu"),),
            lambda: (native_cuda.activation_gradient(g, a, activation="gelu"),),
            lambda: gradient(F.gelu),
            _size(g) * 2 + _size(a),
        ),
    ]
    for op, triton, cuda, exact, nbytes in cases:
        yield Case(op, name, shape, {"triton": triton, "cuda": cuda}, exact, 0.0, nbytes, 1e-4)


def cases(machine: Machine, *, large: bool) -> Iterator[Case]:
    """Every kernel; large is ViT-B/16 at batch 64, otherwise sizes that float64 checks quickly."""
    rows = machine.size(64 * 197 if large else 197, 9)
    n, k = machine.size(3072 if large else 384, 20), machine.size(768 if large else 192, 17)
    batch, heads = machine.size(64 if large else 2, 1), machine.size(12 if large else 3, 2)
    half = [(torch.bfloat16, "highest"), (torch.float16, "highest")]
    for dtype, precision in [*half, *((torch.float32, p) for p in ("highest", "high", "ieee"))]:
        yield from linear(machine, dtype, precision, rows, n, k)
        yield residual(machine, dtype, precision, batch, machine.size(197, 5), n, machine.size(k, 16))
        if precision != "ieee":
            yield attention(machine, dtype, precision, batch, heads, machine.size(197, 12), machine.size(64, 16))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield from elementwise(machine, dtype)
    if large and not machine.dry:
        yield attention(machine, torch.bfloat16, "highest", 1, 12, 4096, 64)
