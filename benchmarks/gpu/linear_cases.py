"""Linear layers: share-outs and ways back of every rule, alone and fused with what lies below; our kernels' and the
library's products side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.case import CUDA_PRECISIONS, STABILISER, TOLERANCE, Case, Runs, name_of, size_of
from benchmarks.gpu.library import FLAG, Library
from benchmarks.gpu.machine import Machine
from relprop import native_cuda
from relprop.backends.cuda import back_product, share_out_product
from relprop.cost import back_products, share_out_products
from relprop.kernels.linear_alpha_beta import linear_alpha_beta_back, linear_alpha_beta_share_out
from relprop.kernels.linear_back import linear_back
from relprop.kernels.linear_back_add import linear_back_add
from relprop.kernels.linear_back_gated import linear_back_gated
from relprop.kernels.linear_epsilon import linear_epsilon_back, linear_epsilon_share_out
from relprop.kernels.linear_gamma import linear_gamma_back, linear_gamma_share_out
from relprop.rules import LinearAlphaBeta, LinearEpsilon, LinearGamma

Back = native_cuda.Back
GAMMA = 0.25
ALPHA_BETA, EPSILON, GAMMA_RULE = LinearAlphaBeta(), LinearEpsilon(), LinearGamma(gamma=GAMMA)


class _Layer:
    """One layer's tensors and the rules' formulas in float64."""

    def __init__(
        self, machine: Machine, dtype: torch.dtype, precision: str, rows: int, n: int, k: int, targets: int
    ) -> None:
        self.x, self.w = machine.randn(rows, k, dtype=dtype, seed=1), machine.randn(n, k, dtype=dtype, seed=2)
        self.r, self.g = machine.randn(targets, rows, n, seed=3), machine.randn(targets, rows, n, seed=4)
        self.h = machine.randn(rows, k, dtype=dtype, seed=5)
        self.name, self.precision, self.targets = name_of(dtype, precision), precision, targets
        self.shape, self.one = f"{targets}x{rows}x{n}x{k}", 2.0 * rows * n * k
        self.in_cuda = precision in CUDA_PRECISIONS
        share = share_out_product(dtype, precision) if self.in_cuda else ""
        self.cuda = {"stabiliser": STABILISER, "product": share}
        self.back_product = back_product(dtype, precision) if self.in_cuda else ""
        self.y = self.x @ self.w.T if share == "float32" else None
        # Of one target, and once for the precisions that the library does not tell apart.
        self.library = Library(self.x, self.w, precision) if targets == 1 and precision in FLAG else None
        z = self.x.float() @ self.w.float().T
        # One rounding is the whole of a z near 0, and of its sign.
        self.settled = self.r * (z.abs() > 0.5 * z.square().mean().sqrt())

    def signed(self) -> tuple[Tensor, Tensor]:
        """z+ and z-. [M, N] each"""
        a, b = self.x.double(), self.w.double()
        positive = a.clamp(min=0) @ b.clamp(min=0).T + a.clamp(max=0) @ b.clamp(max=0).T
        return positive, a @ b.T - positive

    def select(self, p1: Tensor, p2: Tensor, plain: float, magnified: float) -> Tensor:
        a, b = self.x.double(), self.w.double()
        return plain * a * (p1.double() @ b) + magnified * a.abs() * (p2.double() @ b.abs())

    def gamma_shares(self) -> tuple[Tensor, Tensor]:
        positive, negative = self.signed()
        y = positive + negative
        s = self.settled.double() / (y + GAMMA * torch.where(y > 0, positive, negative))
        return s, s * y.sign()

    def opposed_shares(self) -> tuple[Tensor, Tensor]:
        positive, negative = (self.r.double() / z for z in self.signed())
        return 2 * positive - negative, 2 * positive + negative

    def slopes(self) -> Tensor:
        leaf = self.h.double().requires_grad_()
        return torch.autograd.grad(F.gelu(leaf).sum(), leaf)[0]

    def case(
        self,
        op: str,
        triton: Callable[[], Any],
        cuda: Callable[[], Any] | None,
        exact: Callable[[], tuple[Tensor, ...]],
        products: float,
        nbytes: float,
        variant: str = "",
        library: Callable[[Library], Any] | None = None,
    ) -> Case:
        runs: Runs = {"triton": triton}
        if self.in_cuda and cuda is not None:
            runs["cuda"] = cuda
        if self.library is not None and library is not None:
            runs["library"] = partial(library, self.library)
        name = variant or ("targets" if self.targets > 1 else "")
        return Case(op, self.name, self.shape, runs, exact, products * self.one, nbytes, TOLERANCE[self.name], name)


def share_outs(layer: _Layer) -> Iterator[Case]:
    """R to shares; every product is one of |x||w|ᵀ and x wᵀ, whatever the number of targets."""
    x, w, r, y, settled = layer.x, layer.w, layer.r, layer.y, layer.settled
    triton = {"stabiliser": STABILISER, "precision": layer.precision}
    once = size_of(x, w, r, r)

    def through(kernel: Callable[..., Any], arrived: Tensor, **options: Any) -> Callable[[], Any]:
        return lambda: kernel(arrived, x, w, y, None, **layer.cuda, **options)

    plain = through(native_cuda.linear_alpha_beta_share_out, r)
    yield layer.case(
        "linear_alpha_beta_share_out",
        lambda: linear_alpha_beta_share_out(r, x, w, **triton)[:1],
        lambda: plain()[:1],
        lambda: (r.double() / layer.signed()[0],),
        share_out_products(ALPHA_BETA, False),
        once,
        library=lambda own: (own.share_out(r, positive=True),),
    )
    epsilon = through(native_cuda.linear_epsilon_share_out, settled)
    yield layer.case(
        "linear_epsilon_share_out",
        lambda: (linear_epsilon_share_out(settled, x, w, **triton),),
        lambda: (epsilon(),),
        lambda: (settled.double() / (x.double() @ w.double().T),),
        share_out_products(EPSILON, False),
        once,
        library=lambda own: (own.share_out(settled, positive=False),),
    )
    yield layer.case(
        "linear_gamma_share_out",
        lambda: linear_gamma_share_out(settled, x, w, gamma=GAMMA, **triton),
        through(native_cuda.linear_gamma_share_out, settled, gamma=GAMMA),
        layer.gamma_shares,
        share_out_products(GAMMA_RULE, False),
        once + size_of(r),
    )
    if layer.targets == 1:
        yield layer.case(
            "linear_alpha_beta_share_out",
            lambda: linear_alpha_beta_share_out(r, x, w, alpha=2.0, beta=1.0, **triton),
            through(native_cuda.linear_alpha_beta_share_out, r, alpha=2.0, beta=1.0),
            layer.opposed_shares,
            share_out_products(ALPHA_BETA, False),
            once + size_of(r),
            "alpha2_beta1",
        )


def ways_back(layer: _Layer) -> Iterator[Case]:
    """Shares to R, with and without a gradient that rides along."""
    x, w, r, g, targets = layer.x, layer.w, layer.r, layer.g, layer.targets
    triton = {"precision": layer.precision}
    written = 4.0 * targets * x.numel()
    cast_r, cast_g = (t if layer.library is None else layer.library.cast(t) for t in (r, g))

    def through(*backs: Back) -> Callable[[], Any]:
        return lambda: native_cuda.linear_back(backs, x, w, product=layer.back_product)

    def gradient() -> Tensor:
        return g.double() @ w.double()

    yield layer.case(
        "linear_alpha_beta_back",
        lambda: linear_alpha_beta_back(r, r, x, w, **triton)[:1],
        through(Back(r, r, 0.5, 0.5)),
        lambda: (layer.select(r, r, 0.5, 0.5),),
        back_products(ALPHA_BETA) * targets,
        size_of(x, w, r) + written,
        library=lambda own: (own.back(cast_r, cast_r, (0.5, 0.5)),),
    )
    yield layer.case(
        "linear_alpha_beta_back",
        lambda: linear_alpha_beta_back(r, r, x, w, g, **triton),
        through(Back(r, r, 0.5, 0.5), Back(g)),
        lambda: (layer.select(r, r, 0.5, 0.5), gradient()),
        (back_products(ALPHA_BETA) + 1) * targets,
        size_of(x, w, r, g) + 2 * written,
        "fused_targets" if targets > 1 else "fused",
        library=lambda own: (own.back(cast_r, cast_r, (0.5, 0.5)), own.product(cast_g, own.w)),
    )
    yield layer.case(
        "linear_epsilon_back",
        lambda: linear_epsilon_back(r, x, w, **triton)[:1],
        through(Back(r, None, 1.0)),
        lambda: (layer.select(r, r, 1.0, 0.0),),
        back_products(EPSILON) * targets,
        size_of(x, w, r) + written,
        library=lambda own: (own.back(cast_r, None, (1.0, 0.0)),),
    )
    yield layer.case(
        "linear_gamma_back",
        lambda: linear_gamma_back(r, g, x, w, gamma=GAMMA, **triton)[:1],
        through(Back(r, g, 1 + GAMMA / 2, GAMMA / 2)),
        lambda: (layer.select(r, g, 1 + GAMMA / 2, GAMMA / 2),),
        back_products(GAMMA_RULE) * targets,
        size_of(x, w, r, g) + written,
        library=lambda own: (own.back(cast_r, cast_g, (1 + GAMMA / 2, GAMMA / 2)),),
    )
    yield layer.case(
        "linear_back",
        lambda: linear_back(None, None, None, w, g, **triton)[1:],
        lambda: native_cuda.linear_back([Back(g)], None, w, product=layer.back_product),
        lambda: (gradient(),),
        targets,
        size_of(w, g) + written,
        library=lambda own: (own.product(cast_g, own.w),),
    )


def fused(layer: _Layer) -> Iterator[Case]:
    """The gradient's way back with what stands below the layer: Triton's alone."""
    x, w, g, h = layer.x, layer.w, layer.g, layer.h
    options: dict[str, Any] = {"activation": "gelu", "precision": layer.precision}
    written, f = 4.0 * x.numel(), F.gelu(h)

    def gradient() -> Tensor:
        return g.double() @ w.double()

    yield layer.case(
        "linear_back",
        lambda: linear_back(None, None, None, w, g, preactivation=h, **options)[1:],
        None,
        lambda: (layer.slopes() * gradient(),),
        1,
        size_of(w, g, h) + written,
        "activation",
    )
    yield layer.case(
        "linear_back_gated",
        lambda: linear_back_gated(g, w, h, f, x, **options),
        None,
        lambda: (x.double() * layer.slopes() * gradient(), f.double() * gradient()),
        1,
        size_of(w, g, h, f, x) + 2 * written,
    )


def linear(
    machine: Machine, dtype: torch.dtype, precision: str, rows: int, n: int, k: int, targets: int = 1
) -> Iterator[Case]:
    """Every kernel of a linear layer."""
    layer = _Layer(machine, dtype, precision, rows, n, k, targets)
    yield from share_outs(layer)
    yield from ways_back(layer)
    if targets == 1:
        yield from fused(layer)


def residual(machine: Machine, dtype: torch.dtype, precision: str, batch: int, tokens: int, n: int, k: int) -> Case:
    """The way back fused with the fan-out and the normalised add below it; parts are positive, so nothing cancels."""
    name, shape = name_of(dtype, precision), (batch, tokens, k)
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

    flops = (back_products(ALPHA_BETA) + 1) * 2.0 * batch * tokens * n * k
    nbytes = size_of(x, w, a, b, p, g) + 4 * size_of(other)
    return Case(
        "linear_back_add", name, f"{batch}x{tokens}x{n}x{k}", {"triton": run}, exact, flops, nbytes, TOLERANCE[name]
    )
