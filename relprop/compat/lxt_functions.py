"""Modified gradients that are themselves differentiable: the autograd functions of `relprop.compat.lxt_gradients`.

Each has two derivatives. A backward pass from a score is a relevance pass and takes the modified one, in which slopes,
spreads and factors are constants. Recorded with `create_graph=True`, relevance is a function of those constants too,
and they are functions of weights and inputs with derivatives of their own. A backward pass through recorded relevance
therefore takes the plain derivative of everything that the model computed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class _Recorded(torch.autograd.Function):
    """The identity; its node in a graph says that a relevance pass was recorded there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0]


_NODES: WeakSet[Any] = WeakSet()
_LOCK = threading.Lock()
_DECIDED = threading.local()


def _recorded(x: Tensor) -> Tensor:
    """A value that a backward pass depends on, noted where the pass is recorded."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    y = _Recorded.apply(x)  # type: ignore[no-untyped-call]
    with _LOCK:
        _NODES.add(y.grad_fn)
    return y  # type: ignore[no-any-return]


def _derives_relevance() -> bool:
    """Whether the backward pass under way goes through recorded relevance."""
    task = torch._C._current_graph_task_id()
    if task < 0 or not _NODES:
        return False
    if getattr(_DECIDED, "task", None) != task:
        with _LOCK:
            nodes = list(_NODES)
        _DECIDED.task, _DECIDED.answer = task, any(map(torch._C._will_engine_execute_node, nodes))
    return bool(_DECIDED.answer)


def _note(gradients: Sequence[Tensor | None], _: Any) -> Any:
    if not torch.is_grad_enabled():
        return None
    return tuple(g if g is None or not g.requires_grad else _recorded(g) * 1.0 for g in gradients)


def noted(result: Any) -> Any:
    """The result of an operation that keeps its gradient, whose recorded pass says so as those of this module do."""
    for leaf in pytree.tree_leaves(result):
        if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
            leaf.grad_fn.register_hook(_note)
    return result


def _autocast(x: Tensor) -> Callable[[], Any]:
    """What autocast does now, to do it again: a backward pass runs outside of the forward pass's block."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind):
        return contextlib.nullcontext
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    return lambda: torch.autocast(kind, dtype, enabled)


class _Slope(torch.autograd.Function):
    """An activation with the slope f / source for a derivative by the source, 0 at 0.

    It is f(source, *operands) if the source is its `own` argument, else f(*operands) of what was computed from it.
    """

    @staticmethod
    def forward(ctx: Any, f: Callable[..., Tensor], own: bool, source: Tensor, *operands: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.f, ctx.own, ctx.autocast = f, own, _autocast(source)
        ctx.save_for_backward(source, *operands)
        return f(source, *operands) if own else f(*operands)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        f, needed = ctx.f, ctx.needs_input_grad[2:]
        if gradient is None:
            return None, None, *[None] * len(needed)
        source, *operands = ctx.saved_tensors
        with torch._C.DisableTorchFunction(), ctx.autocast():  # type: ignore[attr-defined]
            if not _derives_relevance():
                by_source = gradient * _recorded(_slope(f, ctx.own, source, operands)) if needed[0] else None
                return None, None, by_source, *[None] * len(operands)
            if ctx.own:
                return None, None, *_plain_gradients(f, [source, *operands], needed, gradient)
            return None, None, None, *_plain_gradients(f, operands, needed[1:], gradient)


def _slope(f: Callable[..., Tensor], own: bool, source: Tensor, operands: list[Tensor]) -> Tensor:
    # f itself keeps away from 0 where it can, as its derivative there may be infinite: that times 0 is no number.
    zero = source == 0
    safe = torch.where(zero, 1.0, source)
    y = f(safe, *operands) if own else f(*operands)
    return torch.where(zero, 0.0, y / safe).to(y.dtype)


def _plain_gradients(
    f: Callable[..., Tensor], values: list[Tensor], needed: Sequence[bool], gradient: Tensor
) -> list[Tensor | None]:
    recording = torch.is_grad_enabled()
    with torch.enable_grad():
        values = [
            value if not need else _recorded(value) if recording else value.detach().requires_grad_()
            for value, need in zip(values, needed, strict=True)
        ]
        wanted = [value for value, need in zip(values, needed, strict=True) if need]
        found = iter(torch.autograd.grad(f(*values), wanted, gradient, create_graph=recording))
    return [next(found) if need else None for need in needed]


def slope(f: Callable[..., Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
    """An activation f(x, *parameters), with the gradient f / x."""
    return _Slope.apply(f, True, x, *parameters)  # type: ignore[no-untyped-call, no-any-return]


def joint_slope(f: Callable[..., Tensor], source: Tensor, *operands: Tensor) -> Tensor:
    """An activation f(*operands) of what was computed from a source, with the gradient f / source."""
    return _Slope.apply(f, False, source, *operands)  # type: ignore[no-untyped-call, no-any-return]


class _Scale(torch.autograd.Function):
    """The identity, with its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.factor = factor
        return x.detach()  # no view: the model may write to it

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        with torch._C.DisableTorchFunction():  # type: ignore[attr-defined]
            if gradient is None or _derives_relevance():
                return gradient, None
            if ctx.factor == 0.0:
                return None, None
            plain = ctx.factor == 1.0 and not torch.is_grad_enabled()
            return gradient if plain else _recorded(gradient) * ctx.factor, None


def scaled(x: Tensor, factor: float) -> Tensor:
    """The same values, for an operation whose gradient by them counts by a factor; 0 holds them constant."""
    return _Scale.apply(x, factor)  # type: ignore[no-untyped-call, no-any-return]


class _HeldSoftmax(torch.autograd.Function):
    """A softmax that is a constant."""

    @staticmethod
    def forward(ctx: Any, f: Callable[[Tensor], Tensor], x: Tensor, dim: int) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.dim, y = dim, f(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        if gradient is None or not _derives_relevance():
            return None, None, None
        y = _recorded(ctx.saved_tensors[0])
        with torch._C.DisableTorchFunction():  # type: ignore[attr-defined]
            return None, y * (gradient - (gradient * y).sum(ctx.dim, keepdim=True)), None


def held_softmax(f: Callable[[Tensor], Tensor], x: Tensor, dim: int | None) -> Tensor:
    """A softmax f(x) over an axis, without a gradient."""
    if dim is None:
        dim = 0 if x.ndim in (0, 1, 3) else 1  # as torch chooses it
    return _HeldSoftmax.apply(f, x, dim)  # type: ignore[no-untyped-call, no-any-return]


class _Normalised(torch.autograd.Function):
    """x / spread, its mean removed first if `centred`, and 1 / spread, which the derivative holds constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axes: tuple[int, ...], eps: float, centred: bool) -> tuple[Tensor, Tensor]:
        precise = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        precise = precise - precise.mean(axes, keepdim=True) if centred else precise
        scale = torch.rsqrt(precise.square().mean(axes, keepdim=True) + eps)
        y = (precise * scale).to(x.dtype)
        ctx.set_materialize_grads(False)
        ctx.axes, ctx.centred = axes, centred
        ctx.save_for_backward(y, scale)
        return y, scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        if all(gradient is None for gradient in gradients):
            return None, None, None, None
        y, scale = (_recorded(saved) for saved in ctx.saved_tensors)
        with torch._C.DisableTorchFunction():  # type: ignore[attr-defined]
            if _derives_relevance():
                passed = _normalised_gradient(y.to(scale.dtype), scale, gradients, ctx.axes)
            else:
                assert gradients[0] is not None
                passed = gradients[0].to(scale.dtype) * scale
            passed = passed - passed.mean(ctx.axes, keepdim=True) if ctx.centred else passed
            return passed.to(y.dtype), None, None, None


def _normalised_gradient(y: Tensor, scale: Tensor, gradients: Sequence[Tensor | None], axes: tuple[int, ...]) -> Tensor:
    """The plain gradient of y = x scale and of scale(x) = (mean(x^2) + eps)^-1/2."""
    by_y, by_scale = gradients
    spread = torch.zeros_like(scale) if by_scale is None else by_scale * scale * scale.numel() / max(y.numel(), 1)
    if by_y is None:
        return -scale * spread * y
    by_y = by_y.to(scale.dtype)
    return scale * (by_y - y * ((by_y * y).mean(axes, keepdim=True) + spread))


def normalised(x: Tensor, axes: tuple[int, ...], eps: float, centred: bool) -> Tensor:
    """A layer norm without weights, its mean following the input and its spread held constant."""
    return _Normalised.apply(x, axes, eps, centred)[0]  # type: ignore[no-untyped-call, no-any-return]
