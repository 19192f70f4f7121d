"""Rules of a linear layer with the library's matrix products (torch: cuBLAS), which our own kernels are held to.

It is given what a plan could give it: |w| and the streams in the operands' dtype are made beforehand, z+ leaves the
epilogue of the second product (`torch.addmm`), and one fused kernel makes shares of it or selects at the end. |x| is a
pass of its own, and what the products return goes through memory. The share-out of the gamma rule has the products of
the alpha-beta rule's, so it is not here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.gpu.case import STABILISER
from relprop.kernels.configurations import configuration
from relprop.kernels.launch import architecture_of, cdiv, jit, launch, tl
from relprop.kernels.stabiliser import share

# As our own kernels: float32 products of "highest" keep float32's bits.
FLAG = {"highest": "highest", "high": "high", "medium": "highest"}


@jit
def _share_kernel(
    out_ptr,  # [T, size]
    relevance_ptr,  # [T, size]
    z_ptr,  # [size]
    targets,
    size,
    epsilon,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    z = tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
    for _ in range(targets):
        relevance = tl.load(relevance_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, share(relevance, z, epsilon, KIND).to(out_ptr.dtype.element_ty), mask=inside)
        relevance_ptr += size
        out_ptr += size


@jit
def _select_kernel(
    out_ptr,  # [T, size]
    x_ptr,  # [size]
    product_ptr,  # [T, size]
    magnified_ptr,  # [T, size]
    targets,
    size,
    plain,
    magnified,
    BOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    for _ in range(targets):
        found = plain * x * tl.load(product_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if BOTH:
            found += magnified * tl.abs(x) * tl.load(magnified_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, found, mask=inside)
        product_ptr += size
        magnified_ptr += size
        out_ptr += size


class Library:
    """One layer's share-outs and ways back.

    Args:
        x: [M, K]
        w: [N, K]
        precision: "highest", "high" or "medium".
    """

    def __init__(self, x: Tensor, w: Tensor, precision: str) -> None:
        self.operands = torch.bfloat16 if precision == "medium" else w.dtype
        self.flag = FLAG[precision]
        self.x, self.w = x.to(self.operands), w.to(self.operands)
        self.magnitude = self.w.abs()

    def cast(self, stream: Tensor) -> Tensor:
        """A stream as the kernel above it would have written it. [T, M, N]"""
        return stream.to(self.operands)

    def product(self, stream: Tensor, weight: Tensor) -> Tensor:
        """[T, M, N] by [N, K] -> [T, M, K]"""
        with _flag(self.flag):
            return (stream.flatten(0, 1) @ weight).unflatten(0, stream.shape[:2])

    def z(self, positive: bool) -> Tensor:
        """x wᵀ, or z+ = ½(x wᵀ + |x||w|ᵀ). [M, N]"""
        with _flag(self.flag):
            y = self.x @ self.w.mT
            if not positive:
                return y
            return torch.addmm(y, self.x.abs(), self.magnitude.mT, beta=0.5, alpha=0.5)

    def share_out(self, relevance: Tensor, positive: bool) -> Tensor:
        """R / stab(z). [T, M, N] -> [T, M, N], in the operands' dtype; in float32 for float16, which overflows."""
        z, half = self.z(positive), self.operands is torch.float16
        out = torch.empty_like(relevance, dtype=torch.float32 if half else self.operands)
        chosen = configuration("elementwise", architecture_of(z.device))
        grid = (cdiv(z.numel(), chosen.tiles["BLOCK"]),)
        sizes = (len(relevance), z.numel(), STABILISER[1])
        launch(_share_kernel, grid, (out, relevance, z, *sizes), chosen, KIND=STABILISER[0])
        return out

    def back(self, p1: Tensor, p2: Tensor | None, factors: tuple[float, float]) -> Tensor:
        """f₁ x (p1 w) + f₂ |x| (p2 |w|), or the first alone. [T, M, N] -> [T, M, K], float32"""
        first = self.product(p1, self.w)
        second = first if p2 is None else self.product(p2, self.magnitude)
        out = torch.empty_like(first, dtype=torch.float32)
        chosen = configuration("elementwise", architecture_of(out.device))
        grid = (cdiv(self.x.numel(), chosen.tiles["BLOCK"]),)
        sizes = (len(first), self.x.numel(), *factors)
        launch(_select_kernel, grid, (out, self.x, first, second, *sizes), chosen, BOTH=p2 is not None)
        return out


@contextmanager
def _flag(value: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(value)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
