"""Adds, fan-out, softmax, norms, activations and what stands between attention's products: bound by memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.case import STABILISER, Case, size_of
from benchmarks.gpu.machine import Machine
from relprop import native_cuda
from relprop.kernels.activation_gradient import activation_gradient
from relprop.kernels.add_epsilon import add_epsilon
from relprop.kernels.add_gamma import add_gamma
from relprop.kernels.add_normalised import add_normalised
from relprop.kernels.fanout_epsilon import fanout_epsilon
from relprop.kernels.norm_gradient import norm_gradient
from relprop.kernels.norm_sigma_constant import norm_sigma_constant
from relprop.kernels.softmax_taylor import softmax_taylor

Run = Callable[[], Any]
_TOLERANCE = 1e-4
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
_OPTIONS: dict[str, Any] = {"stabiliser": STABILISER}


class _Tensors:
    """Two positive branches, so that no sum cancels, and T targets' streams."""

    def __init__(self, machine: Machine, dtype: torch.dtype, targets: int) -> None:
        shape = (machine.size(64, 2), machine.size(197, 5), machine.size(768, 24))
        self.a, self.b = (machine.randn(*shape, dtype=dtype, seed=s).abs() + 0.1 for s in (1, 2))
        self.r, self.g = (machine.randn(targets, *shape, seed=s) for s in (3, 4))
        self.dtype = str(dtype).removeprefix("torch.")
        self.shape = "x".join(str(size) for size in (targets, *shape))
        self.variant = "targets" if targets > 1 else ""

    def case(self, op: str, triton: Run | None, cuda: Run | None, exact: Run, nbytes: float, variant: str = "") -> Case:
        runs = {name: run for name, run in (("triton", triton), ("cuda", cuda)) if run is not None}
        variant = variant or self.variant
        return Case(op, self.dtype, self.shape, runs, exact, 0.0, nbytes, _TOLERANCE, variant)


def _normalised(r: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    s = r.double() / (a.double() + b.double())
    parts = (a.double() * s, b.double() * s)
    sums = [t.flatten(2).sum(-1)[..., None, None] for t in (r.double(), *parts)]
    whole = sums[1].abs() + sums[2].abs()
    return tuple(t * sums[0] * total.abs() / whole / total for t, total in zip(parts, sums[1:], strict=True))


def adds(given: _Tensors) -> Iterator[Case]:
    """Residual adds and the fan-out."""
    r, g, a, b = given.r, given.g, given.a, given.b
    flat = (r.flatten(2), a.flatten(1), b.flatten(1))
    both = size_of(r) * 3 + size_of(a, b)

    def shares() -> tuple[Tensor, Tensor]:
        x, y = a.double(), b.double()
        return x * r.double() / (x + y), y * r.double() / (x + y)

    yield given.case(
        "add_normalised",
        lambda: add_normalised(r, a, b, **_OPTIONS)[:2],
        lambda: [t.view(r.shape) for t in native_cuda.add_normalised(*flat, **_OPTIONS)],
        lambda: _normalised(r, a, b),
        both,
    )
    shared = b[:1]
    if not given.variant:
        yield given.case(
            "add_normalised",
            lambda: add_normalised(r, a, shared, **_OPTIONS)[:2],
            lambda: [t.view(r.shape) for t in native_cuda.add_normalised(*flat[:2], shared.flatten(1), **_OPTIONS)],
            lambda: _normalised(r, a, shared),
            size_of(r) * 3 + size_of(a),
            "shared",
        )
    yield given.case(
        "add_epsilon",
        lambda: add_epsilon(r, a, b, **_OPTIONS),
        lambda: native_cuda.add_epsilon(r, a, b, **_OPTIONS),
        shares,
        both,
    )
    yield given.case(
        "add_gamma",
        lambda: add_gamma(r, a, b, **_OPTIONS),
        lambda: native_cuda.add_gamma(r, a, b, gamma=1.0, **_OPTIONS),
        shares,
        both,
    )
    yield given.case(
        "fanout_epsilon",
        lambda: (fanout_epsilon([r, g], a, **_OPTIONS),),
        lambda: (native_cuda.fanout_epsilon([r, g], a, **_OPTIONS),),
        lambda: (r.double() + g.double(),),
        size_of(r) * 3 + size_of(a),
    )


def rows(given: _Tensors) -> Iterator[Case]:
    """What works along the last axis, and activations."""
    r, g, a, b = given.r, given.g, given.a, given.b
    p = torch.softmax(a.double(), -1).to(a.dtype)
    w = b[0, 0].contiguous()

    def gradient(function: Callable[[Tensor], Tensor]) -> tuple[Tensor]:
        leaf = a.double().expand(g.shape).clone().requires_grad_()
        return (torch.autograd.grad(function(leaf), leaf, g.double())[0],)

    yield given.case(
        "softmax_taylor",
        lambda: (softmax_taylor(r, a, p),),
        lambda: (native_cuda.softmax_taylor(r, a, p),),
        lambda: (a.double() * (r.double() - p.double() * r.double().sum(-1, keepdim=True)),),
        size_of(r) * 2 + size_of(a, p),
    )
    for kind in ("layer", "rms"):
        norm: Callable[..., Tensor] = F.layer_norm if kind == "layer" else F.rms_norm
        yield given.case(
            "norm_gradient",
            lambda kind=kind: (norm_gradient(g, a, w, kind=kind),),  # type: ignore[misc]
            lambda kind=kind: (native_cuda.norm_gradient(g, a, w, epsilon=1e-5, norm=kind),),  # type: ignore[misc]
            lambda norm=norm: gradient(lambda t: norm(t, t.shape[-1:], weight=w.double(), eps=1e-5)),  # type: ignore[misc]
            size_of(g) * 2 + size_of(a),
            f"{kind}_targets" if given.variant else kind,
        )
        yield _constant(given, kind, w)
    for name, function in _ACTIVATIONS.items():
        yield given.case(
            "activation_gradient",
            lambda name=name: (activation_gradient(g, a, name),),  # type: ignore[misc]
            lambda name=name: (native_cuda.activation_gradient(g, a, activation=name),),  # type: ignore[misc]
            lambda function=function: gradient(function),  # type: ignore[misc]
            size_of(g) * 2 + size_of(a),
            f"{name}_targets" if given.variant else name,
        )


def _constant(given: _Tensors, kind: str, w: Tensor) -> Case:
    """A norm whose 1 / sigma is constant, where its output is not near 0."""
    x = given.a.double()
    centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    slope = (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    y = (centred * slope * w.double()).to(given.a.dtype)
    r = given.r * y.float()

    def exact() -> tuple[Tensor]:
        passed = torch.where(y == 0, 0.0, r.double() / y.double()) * w.double()
        passed = passed - passed.mean(-1, keepdim=True) if kind == "layer" else passed
        return (x * slope * passed,)

    return given.case(
        "norm_sigma_constant",
        lambda: (norm_sigma_constant(r, given.a, y, w, kind=kind, **_OPTIONS),),
        None,
        exact,
        size_of(r) * 2 + size_of(given.a, y),
        f"{kind}_targets" if given.variant else kind,
    )


def elementwise(machine: Machine, dtype: torch.dtype, targets: int = 1) -> Iterator[Case]:
    """Everything that no matrix product is in."""
    given = _Tensors(machine, dtype, targets)
    yield from adds(given)
    yield from rows(given)


def maps(machine: Machine, dtype: torch.dtype, targets: int) -> Iterator[Case]:
    """What stands between attention's products where its maps are made: CUDA's alone."""
    shape = (machine.size(16, 2), machine.size(12, 3), machine.size(197, 7), machine.size(197, 9))
    attention = torch.softmax(machine.randn(*shape, seed=1), -1).to(dtype)
    dots = (machine.randn(*shape, seed=2).abs() + 0.1).to(dtype)
    sv, r = (machine.randn(targets, *shape, seed=seed) for seed in (3, 4))
    name, text = str(dtype).removeprefix("torch."), "x".join(str(size) for size in (targets, *shape))

    def case(op: str, run: Run, exact: Run, nbytes: float) -> Case:
        return Case(op, name, text, {"cuda": run}, exact, 0.0, nbytes, _TOLERANCE)

    def shared() -> tuple[Tensor, Tensor]:
        passed = attention.double() * sv.double() / 2
        return passed / dots.double(), passed

    yield case(
        "matmul_half_share",
        lambda: (native_cuda.share(r, dots, **_OPTIONS),),
        lambda: (r.double() / dots.double(),),
        size_of(r, r, dots),
    )
    yield case(
        "matmul_half_attention_shares",
        lambda: native_cuda.attention_shares(attention, sv, dots, want_relevance=True, **_OPTIONS),
        shared,
        size_of(attention, sv, sv, sv, dots),
    )
