"""LXT's way of working, without patched classes: the model's own backward pass carries relevance.

>>> from relprop.demo import bundled_scenes, load_model, preprocess
>>> model, x = load_model(), preprocess(bundled_scenes()["scene_3_7"].image[None])
>>> from relprop.compat import lxt
>>> with lxt.attnlrp(model):
...     logits = model(x.requires_grad_())
...     logits[0, 3].backward()
>>> relevance = x * x.grad

Inside the block this one model, in this thread, runs with AttnLRP's modified gradients. Nothing else changes: other
models of the same class, other threads, and the model itself after the block. As it is plain autograd, hooks see
relevance's gradients, parameters get theirs, and losses on relevance can be trained with `create_graph=True` (under
`torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`: torch has no second derivative of fused attention).

Rules come from a composite of relprop: what `relprop.explain(model, x, method="attnlrp")` gives is the same, from
compiled kernels; use that where nothing but the relevance is needed.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from relprop.composites import Composite, find_composite
from relprop.errors import ModelStateError, OptionError, UnsupportedOpError

__all__ = ["attnlrp", "cp_lrp", "libragrad", "modified_gradients"]

Model = TypeVar("Model", bound=nn.Module)
_Wrap: TypeAlias = Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]


@contextlib.contextmanager
def modified_gradients(model: Model, composite: str | Composite = "attnlrp") -> Iterator[Model]:
    """Within the block, backward passes through this model are relevance passes: R = x * x.grad.

    Args:
        model: only calls of it in this thread are affected.
        composite: "attnlrp", "cp_lrp", "libragrad", or one with their rules.
    Raises:
        OptionError: a composite with rules that are no modified gradients here.
        ModelStateError: gradient checkpointing, whose second forward pass would run without the rules.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    rules = _Rules(find_composite(composite))
    for name, module in model.named_modules():
        if getattr(module, "gradient_checkpointing", False) and module.training:
            raise ModelStateError(
                f"{name or type(model).__name__}: expected no gradient checkpointing, got it switched on"
            )
    spelled_out = [module for module in model.modules() if type(module).__module__.startswith(_ACTIVATION_FILES)]
    with contextlib.ExitStack() as patched:
        patched.enter_context(_PATCHES.applied(model, _in_mode))
        for module in spelled_out:
            patched.enter_context(_PATCHES.applied(module, _as_activation))
        token = _ACTIVE.set(MappingProxyType({**_ACTIVE.get(), id(model): rules}))
        try:
            yield model
        finally:
            _ACTIVE.reset(token)


def attnlrp(model: Model) -> Any:
    """AttnLRP (Achtibat et al., ICML 2024), as LXT's efficient implementation has it; see `modified_gradients`."""
    return modified_gradients(model, "attnlrp")


def cp_lrp(model: Model) -> Any:
    """CP-LRP (Ali et al., ICML 2022): softmax and gates held constant; see `modified_gradients`."""
    return modified_gradients(model, "cp_lrp")


def libragrad(model: Model) -> Any:
    """LibraGrad (Mehri et al., CVPR 2025); see `modified_gradients`."""
    return modified_gradients(model, "libragrad")


class _Rules:
    """What a composite says about the operations that do not keep their gradient."""

    def __init__(self, composite: Composite) -> None:
        wanted = {
            ("linear", ""): ("epsilon",),
            ("matmul", ""): ("half",),
            ("softmax", ""): ("taylor", "detached"),
            ("add", "residual"): ("epsilon",),
            ("mul", "gate"): ("half", "detached_gate"),
            ("norm", ""): ("sigma_constant",),
            ("activation", ""): ("slope",),
        }
        names = {}
        for (kind, role), known in wanted.items():
            rule = composite.rule_for(kind, role)
            name = None if rule is None else rule.name
            if name not in known:
                raise OptionError(
                    f"composite {composite.name!r}: expected {kind} rule {' or '.join(known)}, got {name}"
                )
            names[kind] = name
        self.softmax_detached = names["softmax"] == "detached"
        self.gate_detached = names["mul"] == "detached_gate"


_ACTIVE: ContextVar[MappingProxyType[int, _Rules]] = ContextVar("relprop_lxt", default=MappingProxyType({}))

# Activations that their modules spell out of several operations.
_ACTIVATION_FILES = ("transformers.activations", "timm.layers.activations")


class _Patches:
    """Forwards of single modules, replaced while at least one block wants it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.counts: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()

    @contextlib.contextmanager
    def applied(self, module: nn.Module, wrap: _Wrap) -> Iterator[None]:
        with self.lock:
            self.counts[module] = self.counts.get(module, 0) + 1
            if self.counts[module] == 1:
                own = module.__dict__.get("forward")
                forward = wrap(module, module.forward)
                forward.replaced = own  # type: ignore[attr-defined]
                module.__dict__["forward"] = forward
        try:
            yield
        finally:
            with self.lock:
                self.counts[module] -= 1
                if self.counts[module] == 0:
                    own = module.__dict__.pop("forward").replaced
                    if own is not None:
                        module.__dict__["forward"] = own


_PATCHES = _Patches()


def _in_mode(model: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """The model's forward, with the rules where the calling thread asked for them."""
    key = id(model)

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        rules = _ACTIVE.get().get(key)
        if rules is None or torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        with _Relevance(rules, pytree.tree_leaves((args, kwargs))):
            return forward(*args, **kwargs)

    return run


def _as_activation(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A whole module as one activation, inside a pass with rules."""

    @functools.wraps(forward)
    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        mode = _current_mode()
        if mode is None:
            return forward(x, *args, **kwargs)
        with torch._C.DisableTorchFunction():
            result = _Slope.apply(functools.partial(forward, *args, **kwargs), x)  # type: ignore[no-untyped-call]
        return mode.mark(result, nonlinear=True)

    return run


def _current_mode() -> _Relevance | None:
    stack = torch.overrides._get_current_function_mode_stack()
    return next((mode for mode in reversed(stack) if isinstance(mode, _Relevance)), None)


class _Slope(torch.autograd.Function):
    """f(x), with the slope f(x) / x for a derivative, 0 at 0."""

    @staticmethod
    def forward(ctx: Any, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with torch.no_grad():
            y = f(x)
            ctx.save_for_backward(torch.where(x == 0, 0.0, y / torch.where(x == 0, 1.0, x)).to(y.dtype))
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (slope,) = ctx.saved_tensors
        return None, gradients[0] * slope


class _Scale(torch.autograd.Function):
    """The identity, with its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * ctx.factor, None


def _scaled(x: Tensor, factor: float) -> Tensor:
    if factor == 0.0:
        return x.detach()
    return x if factor == 1.0 else _Scale.apply(x, factor)  # type: ignore[no-untyped-call, no-any-return]


def _names(names: str) -> frozenset[str]:
    return frozenset(names.split())


_SLOPES = _names(
    "gelu silu silu_ relu relu_ relu6 sigmoid sigmoid_ tanh tanh_ mish softplus elu elu_ selu celu leaky_relu"
    " leaky_relu_ hardtanh hardswish hardsigmoid logsigmoid exp log log1p erf reciprocal abs square pow __pow__ sin cos"
    " clamp clamp_min clamp_max"
)
_PRODUCTS = _names("mul __mul__ __rmul__ mul_ __imul__ multiply")
_MATMULS = _names("matmul bmm mm einsum __matmul__ __rmatmul__")
_QUOTIENTS = _names("div __truediv__ div_ __itruediv__ true_divide divide")
_SPREADS = _names("rsqrt sqrt norm vector_norm linalg_vector_norm std")  # what norms divide by
_DROPOUTS = _names("dropout dropout_ dropout1d dropout2d dropout3d alpha_dropout feature_dropout")
_WITHOUT_RULE = _names("glu cosine_similarity bilinear cross prod cumprod")


class _Relevance(TorchFunctionMode):
    """Calls of torch within one forward pass, with the gradients that rules ask for.

    Which tensors carry relevance is followed from the inputs on, as products with parameters keep their gradient.
    """

    def __init__(self, rules: _Rules, inputs: list[Any]) -> None:
        super().__init__()
        self.rules = rules
        self.carrying: Any = WeakTensorKeyDictionary()  # to whether it is the result of a non-linearity
        floating = [x for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
        for x in [x for x in floating if x.requires_grad] or floating:
            self.carrying[x] = False

    def mark(self, result: Any, nonlinear: bool = False) -> Any:
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                self.carrying[leaf] = nonlinear
        return result

    def carries(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value in self.carrying

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("embedding", "embedding_bag"):
            return self.mark(func(*args, **kwargs))
        if name in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if not any(self.carries(leaf) for leaf in pytree.tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if name == "detach" or _reads(func, "data"):
            return func(*args, **kwargs)
        handler = self._handler(name)
        return handler(func, args, kwargs) if handler is not None else self.mark(func(*args, **kwargs))

    def _handler(self, name: str) -> Callable[..., Any] | None:
        if name in _SLOPES:
            return self._slope
        if name in _PRODUCTS:
            return self._product
        if name in _MATMULS:
            return self._matmul
        if name in _QUOTIENTS:
            return self._quotient
        if name in _SPREADS:
            return lambda func, args, kwargs: func(*args, **kwargs).detach()
        if name in _WITHOUT_RULE:
            raise UnsupportedOpError(
                f"modified gradients: expected operations with a rule, got torch function {name!r}"
            )
        return {
            "softmax": self._softmax,
            "layer_norm": self._layer_norm,
            "rms_norm": self._rms_norm,
            "group_norm": self._group_norm,
            "normalize": self._normalize,
            "scaled_dot_product_attention": self._attention,
            "multi_head_attention_forward": self._attention,
            "baddbmm": self._baddbmm,
        }.get(name)

    def _slope(self, func: Any, args: Any, kwargs: Any) -> Any:
        x, rest = _first(args, kwargs)
        if func.__name__ in ("pow", "__pow__") and not self.carries(x):
            return self.mark(func(*args, **kwargs))
        if not self.carries(x):
            return func(*args, **kwargs)
        rest[1].pop("inplace", None)
        plain = func if not func.__name__.endswith("_") or func.__name__.endswith("__") else _out_of_place(func)
        return self.mark(_Slope.apply(lambda t: plain(t, *rest[0], **rest[1]), x), nonlinear=True)  # type: ignore

    def _product(self, func: Any, args: Any, kwargs: Any) -> Any:
        a, b = args[0], args[1] if len(args) > 1 else kwargs["other"]
        if not (self.carries(a) and self.carries(b)):
            return self.mark(func(*args, **kwargs))
        if func.__name__ in ("mul_", "__imul__"):
            func = torch.mul
        if self.rules.gate_detached:
            gate = 1 if self.carrying[b] and not self.carrying[a] else 0
            a, b = (_scaled(t, 0.0 if i == gate else 1.0) for i, t in enumerate((a, b)))
        else:
            a, b = _scaled(a, 0.5), _scaled(b, 0.5)
        return self.mark(func(a, b))

    def _matmul(self, func: Any, args: Any, kwargs: Any) -> Any:
        operands = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if self.carries(leaf)]
        factor = 1.0 / len(operands)
        args, kwargs = pytree.tree_map(lambda t: _scaled(t, factor) if self.carries(t) else t, (args, kwargs))
        return self.mark(func(*args, **kwargs))

    def _baddbmm(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self.carries(args[1]) and self.carries(args[2]):
            args = (args[0], _scaled(args[1], 0.5), _scaled(args[2], 0.5), *args[3:])
        return self.mark(func(*args, **kwargs))

    def _quotient(self, func: Any, args: Any, kwargs: Any) -> Any:
        if len(args) > 1 and self.carries(args[1]):
            args = (args[0], args[1].detach(), *args[2:])
        return self.mark(func(*args, **kwargs))

    def _softmax(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self.rules.softmax_detached:
            return func(*args, **kwargs).detach()
        return self.mark(func(*args, **kwargs))

    def _attention(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Queries and keys pass two products of activations, values one; projections before them are linear."""
        names = ("query", "key", "value")
        given = {**dict(zip(names, args, strict=False)), **{k: kwargs[k] for k in names if k in kwargs}}
        q, k, v = (given[name] for name in names)
        if self.rules.softmax_detached:
            factors = (0.0, 0.0, 1.0)
        else:
            both = self.carries(q) and self.carries(k)
            scores = self.carries(q) or self.carries(k)
            part = 0.5 if scores and self.carries(v) else 1.0
            factors = (part / 2 if both else part, part / 2 if both else part, part)
        q, k, v = (_scaled(t, f) if self.carries(t) else t for t, f in zip((q, k, v), factors, strict=True))
        kwargs = {k_: v_ for k_, v_ in kwargs.items() if k_ not in names}
        if func.__name__ == "scaled_dot_product_attention":
            kwargs, args = _without_dropout(args, kwargs)
        return self.mark(func(q, k, v, *args[3:], **kwargs))

    def _layer_norm(self, func: Any, args: Any, kwargs: Any) -> Any:
        x, shape, weight, bias, eps = _arguments(args, kwargs, ("input", "normalized_shape", "weight", "bias", "eps"))
        return self.mark(_normalised(x, _last(shape), weight, bias, 1e-5 if eps is None else eps, centred=True))

    def _rms_norm(self, func: Any, args: Any, kwargs: Any) -> Any:
        x, shape, weight, eps = _arguments(args, kwargs, ("input", "normalized_shape", "weight", "eps"))
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        return self.mark(_normalised(x, _last(shape), weight, None, eps, centred=False))

    def _group_norm(self, func: Any, args: Any, kwargs: Any) -> Any:
        x, groups, weight, bias, eps = _arguments(args, kwargs, ("input", "num_groups", "weight", "bias", "eps"))
        apart = x.unflatten(1, (groups, -1))
        axes = tuple(range(2, apart.ndim))
        y = _normalised(apart, axes, None, None, 1e-5 if eps is None else eps, centred=True).flatten(1, 2)
        lead = (-1, *[1] * (x.ndim - 2))
        y = y if weight is None else y * weight.view(lead)
        return self.mark(y if bias is None else y + bias.view(lead))

    def _normalize(self, func: Any, args: Any, kwargs: Any) -> Any:
        x, p, dim, eps = _arguments(args, kwargs, ("input", "p", "dim", "eps"))
        p, dim, eps = 2.0 if p is None else p, 1 if dim is None else dim, 1e-12 if eps is None else eps
        return self.mark(x / x.detach().norm(p, dim, keepdim=True).clamp_min(eps))


def _normalised(
    x: Tensor, axes: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool
) -> Tensor:
    """A layer norm, its mean following the input and its spread held constant."""
    precise = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    precise = precise - precise.mean(axes, keepdim=True) if centred else precise
    y = (precise * torch.rsqrt(precise.square().mean(axes, keepdim=True) + eps).detach()).to(x.dtype)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _last(shape: Any) -> tuple[int, ...]:
    return tuple(range(-len(shape), 0))


def _arguments(args: Any, kwargs: Any, names: tuple[str, ...]) -> list[Any]:
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return [given.get(name) for name in names]


def _first(args: Any, kwargs: Any) -> tuple[Any, tuple[Any, dict[str, Any]]]:
    if args:
        return args[0], (args[1:], dict(kwargs))
    rest = dict(kwargs)
    return rest.pop("input"), ((), rest)


def _out_of_place(func: Any) -> Any:
    return getattr(torch, func.__name__[:-1], None) or getattr(nn.functional, func.__name__[:-1])


def _without_dropout(args: Any, kwargs: Any) -> tuple[dict[str, Any], Any]:
    if len(args) > 4:
        args = (*args[:4], 0.0, *args[5:])
    if "dropout_p" in kwargs:
        kwargs = {**kwargs, "dropout_p": 0.0}
    return kwargs, args


def _reads(func: Any, attribute: str) -> bool:
    """Whether a call of torch reads an attribute of a tensor."""
    return getattr(getattr(func, "__self__", None), "__name__", "") == attribute
