"""The gradients that AttnLRP asks for, operation by operation: what `relprop.compat.lxt` runs a model's calls in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from relprop.compat.lxt_functions import held_softmax, joint_slope, normalised, noted, scaled, slope
from relprop.composites import Composite
from relprop.errors import OptionError, UnsupportedOpError


class Rules:
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


def _names(names: str) -> frozenset[str]:
    return frozenset(names.split())


# Names of torch's functions without underscores: "mul" is also mul_ and __mul__, "imul" is __imul__.
_SLOPES = _names(
    "gelu silu relu relu6 sigmoid tanh mish softplus elu selu celu leaky_relu hardtanh hardswish hardsigmoid logsigmoid"
    " softsign tanhshrink exp log log1p erf abs square pow sqrt rsqrt reciprocal rdiv rtruediv sin cos clamp clip"
    " clamp_min clamp_max"
)
# Those whose derivative torch computes from their result: models may overwrite what they were given.
_FROM_RESULTS = _names("relu sigmoid tanh exp sqrt rsqrt reciprocal rdiv rtruediv")
_PRODUCTS = _names("mul rmul imul multiply")
_QUOTIENTS = _names("div truediv itruediv true_divide divide")
_SUMS = _names("add radd iadd sub rsub isub subtract")
_OPERATORS = _names("__imul__ __itruediv__ __iadd__ __isub__")
_MATMULS = _names("matmul rmatmul bmm mm einsum grouped_mm")
_BILINEAR = {"linear": (0, 1), "addmm": (1, 2), "addbmm": (1, 2), "baddbmm": (1, 2)}
_DROPOUTS = _names("dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout")
_SPREADS = _names("var std norm vector_norm linalg_norm linalg_vector_norm")  # of use in norms alone
_REDUCTIONS = _SPREADS | _names("mean sum amax")
_CASTS = _names("to float double half bfloat16 type type_as")
_MOVEMENTS = _CASTS | _names(
    "view view_as reshape reshape_as flatten unflatten ravel squeeze unsqueeze permute transpose t swapaxes swapdims"
    " movedim moveaxis getitem get narrow select index_select index gather take take_along_dim unbind split"
    " split_with_sizes tensor_split chunk cat concat concatenate stack hstack vstack expand expand_as broadcast_to"
    " broadcast_tensors repeat repeat_interleave tile roll flip pad pixel_shuffle pixel_unshuffle channel_shuffle"
    " unfold fold diagonal tril triu topk sort cpu cuda contiguous clone alias view_as_real view_as_complex as_strided"
    " requires_grad"
)
# Pointwise, where one value carries relevance.
_BINARY = _PRODUCTS | _QUOTIENTS | _SUMS
_POINTWISE = _BINARY | _SLOPES | _CASTS | _names("neg negative")
# Linear in what carries relevance, choices of one of several values included; their gradient is kept.
_LINEAR = (
    _MOVEMENTS
    | _REDUCTIONS
    | _BINARY
    | _names(
        "neg negative conj conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d avg_pool1d"
        " avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d max_pool1d max_pool2d"
        " max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max min amin cumsum interpolate"
        " upsample where masked_fill masked_scatter masked_select scatter scatter_add index_add index_copy index_put"
        " index_fill setitem copy fill zero nan_to_num fft_fft fft_fft2 fft_fftn"
        " cross_entropy binary_cross_entropy_with_logits mse_loss"  # scores to start from
    )
)


@dataclass(frozen=True)
class _Origin:
    """Where a value that carries relevance comes from.

    Attributes:
        above: the one value that it was computed from pointwise or by a reduction that keeps its axis, if any.
        version: of that value at the time; written in place since, it is another.
        reduced: whether it was by a reduction.
        spread: whether a variance, a deviation or a norm still waits to divide something.
        gate: whether it comes straight out of a non-linearity.
        quiet: whether it was computed without gradients, as inside an autograd function that may give it one.
    """

    above: Tensor | None = None
    version: int = 0
    reduced: bool = False
    spread: bool = False
    gate: bool = False
    quiet: bool = False


class RelevanceMode(TorchFunctionMode):
    """Calls of torch within one forward pass, with the gradients that rules ask for.

    Which tensors carry relevance is followed from the inputs on, as products with parameters keep their gradient; and
    what each was computed from, as in x * rsqrt(mean(x^2)) the mean is held constant and x * sigmoid(x) is one
    activation.
    """

    def __init__(self, rules: Rules, weights: frozenset[int], inputs: list[Any]) -> None:
        super().__init__()
        self.rules = rules
        self.weights = weights
        self.origins: Any = WeakTensorKeyDictionary()
        floating = [x for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
        self.mark([x for x in floating if x.requires_grad] or floating)

    def mark(self, result: Any, origin: _Origin = _Origin()) -> Any:
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
                self.origins[leaf] = origin
        return result

    def carries(self, value: Any) -> bool:
        if not isinstance(value, Tensor):
            return False
        origin = self.origins.get(value)
        if origin is not None:
            return not origin.quiet or value.requires_grad or not torch.is_grad_enabled()
        made_by_a_hook = value.is_leaf and value.requires_grad and id(value) not in self.weights
        if made_by_a_hook and not isinstance(value, nn.Parameter):
            self.mark(value)
            return True
        return False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "").strip("_")
        if name in ("embedding", "embedding_bag"):
            return self.mark(func(*args, **kwargs))
        if not args and "input" in kwargs:
            args = (kwargs.pop("input"),)
        if name in _DROPOUTS:
            return args[0]
        leaves = {id(leaf): leaf for leaf in pytree.tree_leaves((args, kwargs)) if self.carries(leaf)}
        carrying = list(leaves.values())
        if not carrying:
            return func(*args, **kwargs)
        if name == "detach" or _reads(func, "data") or not torch.is_grad_enabled():
            return self.mark(func(*args, **kwargs), _Origin(quiet=True))
        handler = self._handler(name)
        if handler is None:
            return self._plain(func, args, kwargs, carrying)
        self._check_norm(name, carrying)
        return handler(func, args, kwargs, carrying)

    def _check_norm(self, name: str, carrying: list[Tensor]) -> None:
        if name not in _POINTWISE and any(self.origins[leaf].spread for leaf in carrying):
            raise _without_rule(f"{name!r} of a variance, deviation or norm")

    def _handler(self, name: str) -> Callable[..., Any] | None:
        if name in _SLOPES:
            return self._slope
        if name in _BINARY:
            return self._binary
        if name in _MATMULS:
            return self._matmul
        if name in _BILINEAR:
            return functools.partial(self._bilinear, _BILINEAR[name])
        return {
            "softmax": self._softmax,
            "layer_norm": self._layer_norm,
            "rms_norm": self._rms_norm,
            "group_norm": self._group_norm,
            "batch_norm": self._batch_norm,
            "normalize": self._normalize,
            "scaled_dot_product_attention": self._attention,
            "multi_head_attention_forward": self._attention,
        }.get(name)

    def _plain(self, func: Any, args: Any, kwargs: Any, carrying: list[Tensor]) -> Any:
        """What keeps its gradient, or has none."""
        name = func.__name__.strip("_")
        target = args[0] if _in_place(func, kwargs) or name == "setitem" else None
        before = self.origins.get(target) if isinstance(target, Tensor) else None
        result = func(*args, **kwargs)
        results = [leaf for leaf in pytree.tree_leaves((result, target)) if isinstance(leaf, Tensor)]
        if any(leaf.requires_grad for leaf in carrying):
            results = [leaf for leaf in results if leaf.requires_grad]
            one_alone = name.startswith(("conv", "max", "min"))
            if results and (name not in _LINEAR or (one_alone and len(carrying) > 1)):
                raise _without_rule(repr(name))
            if results:
                self._check_norm(name, carrying)
        origin = self._origin(name, carrying, results)
        if target is not None:
            kept = before if name in _POINTWISE and len(carrying) == 1 else None
            origin = replace(kept or _Origin(), gate=False)
            self._written(target, origin)
        self.mark(results, origin)
        return result

    def _origin(self, name: str, carrying: list[Tensor], results: list[Tensor]) -> _Origin:
        x = carrying[0]
        if any(leaf is x for leaf in results):  # a cast to its own type
            return self.origins[x]  # type: ignore[no-any-return]
        gate = name in _MOVEMENTS and self.origins[x].gate
        reduction = name in _REDUCTIONS
        follows = len(carrying) == len(results) == 1 and (reduction or name in _POINTWISE)
        if follows and reduction:
            y = results[0]
            follows = y.ndim == x.ndim and (y.ndim > 2 or y.shape[-1] == 1)
        if not follows and name in _SPREADS and results:
            raise _without_rule(f"{name!r} without its axis kept")
        if not follows:
            return _Origin(gate=gate)
        return _Origin(x, x._version, reduction, name in _SPREADS or self.origins[x].spread, gate)

    def _written(self, x: Tensor, origin: _Origin) -> None:
        """Mark a tensor that was written to; what it is a view of carries what was written too."""
        if x._base is not None and not self.carries(x._base):
            self.mark(x._base)
        self.mark(x, origin)

    def _modified(self, func: Any, args: Any, kwargs: Any, result: Tensor, origin: _Origin) -> Tensor:
        """A result with a modified gradient, which an in-place function's caller finds in the tensor that it gave."""
        if not _in_place(func, kwargs):
            return self.mark(result, origin)  # type: ignore[no-any-return]
        x = args[0]
        x.copy_(result)
        self._written(x, origin)
        return x  # type: ignore[no-any-return]

    def _slope(self, func: Any, args: Any, kwargs: Any, carrying: list[Tensor]) -> Any:
        x = args[0]
        if len(carrying) > 1 or carrying[0] is not x or x.is_complex():
            raise _without_rule(f"{func.__name__.strip('_')!r} of more than one real value")
        overwritten = _in_place(func, kwargs) or func.__name__.strip("_") in _FROM_RESULTS
        f, others = _of_one_value(func, args, kwargs)
        y = slope(f, x.clone() if overwritten else x, *others)
        origin = _Origin(x, x._version, spread=self.origins[x].spread, gate=True)
        return self._modified(func, args, kwargs, y, origin)

    def _path(self, x: Tensor) -> list[tuple[Tensor, bool]]:
        """A value and those that it was computed from, each with whether a reduction lies between."""
        path, reduced = [(x, False)], False
        while (origin := self.origins.get(x)) and origin.above is not None and origin.above._version == origin.version:
            x, reduced = origin.above, reduced or origin.reduced
            path.append((x, reduced))
        return path

    def _common(self, a: Tensor, b: Tensor) -> tuple[Tensor, bool, bool] | None:
        """The nearest value that both come from, and whether each does through a reduction."""
        theirs = {id(x): reduced for x, reduced in self._path(b)}
        return next(((x, reduced, theirs[id(x)]) for x, reduced in self._path(a) if id(x) in theirs), None)

    def _binary(self, func: Any, args: Any, kwargs: Any, carrying: list[Tensor]) -> Any:
        """Sums, products and quotients; of two values that come from one, they are its norm or activation."""
        if len(args) < 2:
            args = (*args, kwargs.pop("other"))
        a, b = args[:2]
        name = func.__name__.strip("_")
        if not (self.carries(a) and self.carries(b)):
            y = self._plain(func, args, kwargs, carrying)
            return noted(y) if self.rules.softmax_detached and name not in _SUMS else y
        common = self._common(a, b)
        if common is None and (self.origins[a].spread or self.origins[b].spread):
            raise _without_rule(f"{name!r} of a variance, deviation or norm and another value")
        if common is not None and any(common[1:]) and name not in _SUMS:
            self._check_once(name, common[0], [x for x, reduced in zip((a, b), common[1:], strict=True) if not reduced])
        plain, rest = _out_of_place(func), args[2:]
        if common is not None and not any(common[1:]) and a is not b:
            source = common[0]
            if torch.broadcast_shapes(a.shape, b.shape) == source.shape:
                f = functools.partial(_of_two_values, plain, rest, kwargs)
                y = joint_slope(f, *_unwritten(func, args, kwargs, (source, a, b)))
                return self._modified(func, args, kwargs, y, _Origin(source, source._version, gate=True))
        origin = _Origin() if common is None else _Origin(common[0], common[0]._version)
        if name in _SUMS:
            return self._modified(func, args, kwargs, plain(a, b, *rest, **kwargs), origin)
        factors = self._factors(name, a, b) if common is None or a is b else [float(not c) for c in common[1:]]
        a, b = _unwritten(func, args, kwargs, (a, b))
        y = plain(scaled(a, factors[0]), scaled(b, factors[1]), *rest, **kwargs)
        if not (any(factors) or _in_place(func, kwargs)):
            return y  # of constants alone
        return self._modified(func, args, kwargs, y, origin)

    def _check_once(self, name: str, source: Tensor, operands: list[Tensor]) -> None:
        """What a norm divides comes from its source without a non-linearity, whose own gradient would be asked for."""
        for operand in operands:
            for x, _ in self._path(operand):
                if x is source:
                    break
                if self.origins[x].gate:
                    raise _without_rule(f"{name!r} of a non-linearity that is computed twice")

    def _factors(self, name: str, a: Tensor, b: Tensor) -> list[float]:
        """Of the gradients of two factors; a quotient's second one has the gradient of a product's times -1."""
        factors = [0.5, 0.5]
        if self.rules.gate_detached:
            gate = int(self.origins[b].gate and not self.origins[a].gate)
            factors = [float(i != gate) for i in range(2)]
        return [factors[0], -factors[1]] if name in _QUOTIENTS else factors

    def _matmul(self, func: Any, args: Any, kwargs: Any, carrying: list[Tensor]) -> Any:
        operands = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if self.carries(leaf)]
        factor = 1.0 / len(operands)
        args, kwargs = pytree.tree_map(lambda t: scaled(t, factor) if self.carries(t) else t, (args, kwargs))
        return self.mark(func(*args, **kwargs))

    def _bilinear(self, factors: tuple[int, int], func: Any, args: Any, kwargs: Any, carrying: list[Tensor]) -> Any:
        if all(len(args) > at and self.carries(args[at]) for at in factors):
            args = tuple(scaled(value, 0.5) if at in factors else value for at, value in enumerate(args))
        return self.mark(func(*args, **kwargs))

    def _softmax(self, func: Any, args: Any, kwargs: Any, carrying: list[Tensor]) -> Any:
        if self.rules.softmax_detached:
            f, _ = _of_one_value(func, args, kwargs)
            return held_softmax(f, args[0], _arguments(args, kwargs, ("input", "dim"))[1])
        return self.mark(noted(func(*args, **kwargs)), _Origin(gate=True))

    def _batch_norm(self, func: Any, args: Any, kwargs: Any, carrying: list[Tensor]) -> Any:
        if kwargs.get("training", len(args) > 5 and args[5]):
            raise _without_rule("'batch_norm' in training mode")
        return self.mark(func(*args, **kwargs))

    def _attention(self, func: Any, args: Any, kwargs: Any, carrying: list[Tensor]) -> Any:
        """Queries and keys pass two products, values one; projections before them are linear."""
        names = ("query", "key", "value")
        given = {**dict(zip(names, args, strict=False)), **{k: kwargs[k] for k in names if k in kwargs}}
        q, k, v = (given[name] for name in names)
        factors = (0.0, 0.0, 1.0) if self.rules.softmax_detached else (0.25, 0.25, 0.5)
        q, k, v = (scaled(t, f) if self.carries(t) else t for t, f in zip((q, k, v), factors, strict=True))
        kwargs = {k_: v_ for k_, v_ in kwargs.items() if k_ not in names}
        kwargs, args = _without_dropout(func, args, kwargs)
        return self.mark(func(q, k, v, *args[3:], **kwargs))

    def _layer_norm(self, func: Any, args: Any, kwargs: Any, carrying: list[Tensor]) -> Any:
        x, shape, weight, bias, eps = _arguments(args, kwargs, ("input", "normalized_shape", "weight", "bias", "eps"))
        y = normalised(x, _last(shape), 1e-5 if eps is None else eps, centred=True)
        return self.mark(_affine(y, weight, bias))

    def _rms_norm(self, func: Any, args: Any, kwargs: Any, carrying: list[Tensor]) -> Any:
        x, shape, weight, eps = _arguments(args, kwargs, ("input", "normalized_shape", "weight", "eps"))
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        return self.mark(_affine(normalised(x, _last(shape), eps, centred=False), weight, None))

    def _group_norm(self, func: Any, args: Any, kwargs: Any, carrying: list[Tensor]) -> Any:
        x, groups, weight, bias, eps = _arguments(args, kwargs, ("input", "num_groups", "weight", "bias", "eps"))
        apart = x.unflatten(1, (groups, -1))
        axes = tuple(range(2, apart.ndim))
        y = normalised(apart, axes, 1e-5 if eps is None else eps, centred=True).flatten(1, 2)
        lead = (-1, *[1] * (x.ndim - 2))
        weight, bias = (None if t is None else t.view(lead) for t in (weight, bias))
        return self.mark(_affine(y, weight, bias))

    def _normalize(self, func: Any, args: Any, kwargs: Any, carrying: list[Tensor]) -> Any:
        x, p, dim, eps = _arguments(args, kwargs, ("input", "p", "dim", "eps"))
        p, dim, eps = 2.0 if p is None else p, 1 if dim is None else dim, 1e-12 if eps is None else eps
        length = x.norm(p, dim, keepdim=True).clamp_min(eps)
        return self.mark(scaled(x, 1.0) / scaled(length, 0.0))


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is None and bias is None:
        return y.clone()  # the model may write to it
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _last(shape: Any) -> tuple[int, ...]:
    return tuple(range(-len(shape), 0))


def _arguments(args: Any, kwargs: Any, names: tuple[str, ...]) -> list[Any]:
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return [given.get(name) for name in names]


def _in_place(func: Any, kwargs: dict[str, Any]) -> bool:
    name = func.__name__
    return bool(kwargs.get("inplace")) or name in _OPERATORS or (name.endswith("_") and not name.startswith("__"))


def _of_one_value(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A function of its first argument and of the other tensors that it is given, out of place, and those."""
    plain, given = _out_of_place(func), {name: value for name, value in kwargs.items() if name != "inplace"}
    leaves, spec = pytree.tree_flatten((args[1:], given))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def f(x: Tensor, *others: Tensor) -> Tensor:
        filled = dict(enumerate(leaves)) | dict(zip(places, others, strict=True))
        rest, options = pytree.tree_unflatten([*filled.values()], spec)
        return plain(x, *rest, **options)  # type: ignore[no-any-return]

    return f, [leaves[place] for place in places]


def _of_two_values(plain: Any, rest: Any, kwargs: dict[str, Any], a: Tensor, b: Tensor) -> Tensor:
    return plain(a, b, *rest, **kwargs)  # type: ignore[no-any-return]


def _unwritten(func: Any, args: Any, kwargs: Any, values: Sequence[Tensor]) -> Sequence[Tensor]:
    """Values as they are before an in-place function writes to its first argument."""
    if not _in_place(func, kwargs):
        return values
    copy = args[0].clone()
    return [copy if value is args[0] else value for value in values]


def _out_of_place(func: Any) -> Any:
    if not _in_place(func, {}):
        return func
    name = func.__name__.strip("_").removeprefix("i" if func.__name__ in _OPERATORS else "")
    return getattr(torch, name, None) or getattr(nn.functional, name)


def _without_rule(what: str) -> UnsupportedOpError:
    return UnsupportedOpError(f"modified gradients: expected operations with a rule, got torch function {what}")


def _without_dropout(func: Any, args: Any, kwargs: Any) -> tuple[dict[str, Any], Any]:
    """Arguments of an attention function with its dropout off."""
    place = 4 if func.__name__ == "scaled_dot_product_attention" else 10
    if len(args) > place:
        args = (*args[:place], 0.0, *args[place + 1 :])
    if "dropout_p" in kwargs:
        kwargs = {**kwargs, "dropout_p": 0.0}
    return kwargs, args


def _reads(func: Any, attribute: str) -> bool:
    """Whether a call of torch reads an attribute of a tensor."""
    return getattr(getattr(func, "__self__", None), "__name__", "") == attribute
