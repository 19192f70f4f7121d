"""zennit's interface: `Gradient(model, composite)(input, attr_output)` gives the output and the attribution.

>>> from relprop.demo import bundled_scenes, load_model, preprocess
>>> model, images = load_model(), preprocess(bundled_scenes()["scene_1_8"].image[None])
>>> from relprop.compat.zennit import EpsilonPlusFlat, Gradient
>>> with Gradient(model=model, composite=EpsilonPlusFlat()) as attributor:
...     output, relevance = attributor(images, torch.eye(10)[[8]])
>>> relevance.shape
torch.Size([1, 3, 64, 64])

A composite is one of the classes below or its name in zennit (`COMPOSITES`), an instance of one of zennit's own, a
composite of relprop or its name, or None for the plain gradient; of two with one name ("epsilon_plus") zennit's is
meant, and relprop's is `relprop.find_composite("epsilon_plus")`. In zennit's, operations without a hook keep their
gradient, and so they do here; composites of relprop have rules for all operations of Transformers. Canonizers, zennit's
own or the one below, change a copy of the model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor, nn

from relprop.compat.engines import Engines
from relprop.compat.zennit_canonizers import Canonical, SequentialMergeBatchNorm, checked
from relprop.composites import COMPOSITES as KNOWN
from relprop.composites import Composite, Entry, find_composite
from relprop.errors import (
    OptionError,
    ShapeError,
    TargetError,
    UnknownNameError,
    UnsupportedOpError,
    unknown_name,
)
from relprop.rules import Stabiliser, make_rule

__all__ = [
    "COMPOSITES",
    "EpsilonAlpha2Beta1",
    "EpsilonAlpha2Beta1Flat",
    "EpsilonGammaBox",
    "EpsilonPlus",
    "EpsilonPlusFlat",
    "ExcitationBackprop",
    "Gradient",
    "SequentialMergeBatchNorm",
]

AttrOutput: TypeAlias = "Tensor | Callable[[Tensor], Tensor] | None"
ZeroParams: TypeAlias = "str | Sequence[str] | None"
Canonizers: TypeAlias = "Sequence[Any] | None"

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POOLS = (
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_ACTIVATIONS = (  # zennit's own list, less nn.MultiheadAttention; nn.Mish is not on it
    *(nn.ELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardtanh, nn.Hardswish, nn.LeakyReLU, nn.LogSigmoid, nn.PReLU, nn.ReLU),
    *(nn.ReLU6, nn.RReLU, nn.SELU, nn.CELU, nn.GELU, nn.Sigmoid, nn.SiLU, nn.Softplus, nn.Softshrink, nn.Softsign),
    *(nn.Tanh, nn.Tanhshrink, nn.Threshold),
)
_COMPOSED = (nn.Softsign, nn.Tanhshrink)  # of several operations each, among which no relevance is passed whole
_KINDS: tuple[tuple[tuple[type, ...], str], ...] = (
    ((nn.Linear,), "linear"),
    (_CONVOLUTIONS, "conv"),
    (_ACTIVATIONS, "activation"),
    (_POOLS, "pool"),
    (_NORMS, "norm"),
)


class Gradient:
    """`zennit.attribution.Gradient`.

    Args:
        model: in evaluation mode, with outputs [B, ...]; it is not changed. Canonizers change a copy of it, which takes
            as much memory again and is kept until weights of the model are other ones.
        composite: rules, see above.
        attr_output: relevance of the output, [B, ...] as the output is, or a function from the output to it; None is
            the output itself.
        backend, precision: as `relprop.compile` takes them.
    """

    def __init__(
        self,
        model: nn.Module,
        composite: Any = None,
        attr_output: AttrOutput = None,
        create_graph: bool = False,
        retain_graph: bool | None = None,
        *,
        backend: str = "auto",
        precision: str = "highest",
    ) -> None:
        if create_graph or retain_graph:
            raise OptionError(
                "create_graph, retain_graph: expected False, got True; relprop.compat.lxt runs relevance as autograd"
            )
        self._engines = Canonical(model, lambda changed: Engines(changed, backend=backend, precision=precision))
        self.model, self.composite, self.attr_output = model, composite, attr_output

    def __enter__(self) -> Gradient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing was registered, so nothing is to be removed."""

    def __call__(self, input: Tensor, attr_output: AttrOutput = None) -> tuple[Tensor, Tensor]:
        """The output of the model, as canonizers leave it, and the attribution, in the shape of the input.

        Raises:
            UnsupportedOpError: a rule of the composite has no counterpart. ShapeError: `attr_output`'s shape.
        """
        engines = self._engines(checked(getattr(self.composite, "canonizers", None)))
        rules = translated(self.composite, engines.model)
        given = attr_output if attr_output is not None else self.attr_output
        engine = engines((input.detach(),), method="full", composite=rules, options={"channels": "kept"})
        found = engine(input.detach(), target=_seeded_by(given))
        return found.logits, found.relevance.to(input.dtype)

    forward = __call__


@dataclass(frozen=True)
class LayerMap:
    """Rules by types of modules, as `zennit.composites.LayerMapComposite` has them; the first that fits decides.

    Args:
        layers: types of modules, and a rule's name and parameters.
        first: the same for the first module that fits one of them.
        canonizers: what changes a copy of the model before.
    """

    layers: tuple[tuple[tuple[type, ...], str, dict[str, Any]], ...]
    first: tuple[tuple[tuple[type, ...], str, dict[str, Any]], ...] = ()
    canonizers: tuple[Any, ...] = ()

    def context(self, module: nn.Module) -> NoReturn:
        """Raises OptionError: nothing is hooked to a model here."""
        raise _no_hooks("context")

    def register(self, module: nn.Module) -> NoReturn:
        """Raises OptionError, as `context`."""
        raise _no_hooks("register")

    def rules(self, model: nn.Module) -> Iterator[tuple[str, nn.Module, str, dict[str, Any], str]]:
        """Path, module, rule, parameters and the rule's name again of every module that has a rule."""
        waiting = True
        for path, module in model.named_modules():
            fits = [entry for entry in self.first if waiting and isinstance(module, entry[0])]
            waiting = waiting and not fits
            fits = fits or [entry for entry in self.layers if isinstance(module, entry[0])]
            if fits:
                yield path, module, fits[0][1], fits[0][2], fits[0][1]


def _no_hooks(name: str) -> OptionError:
    return OptionError(
        f"composite.{name}: expected Gradient(model, composite)(input, attr_output), which gives the output and the"
        f" attribution, got {name}(model); no hooks are registered here, and a backward pass is the plain gradient"
    )


def _sums() -> tuple[type, ...]:
    """zennit's module for sums, which its canonizers put into a model; where it is not loaded, there is none."""
    found = getattr(sys.modules.get("zennit.layer"), "Sum", None)
    return () if found is None else (found,)


def _pools(stabilizer: Any) -> tuple[Any, ...]:
    return ((*_POOLS, *_sums()), "epsilon", _stabilised("stabilizer", stabilizer))


def _base(stabilizer: Any) -> tuple[Any, ...]:
    return ((_ACTIVATIONS, "identity", {}), _pools(stabilizer), (_NORMS, "identity", {}))


def _epsilon_with(
    convolution: str, parameters: dict[str, Any], epsilon: Any, stabilizer: Any, zero_params: ZeroParams
) -> tuple[Any, ...]:
    bias = {"bias": not _zeroed(zero_params, "this composite")}
    shared = {**parameters, **bias, **_stabilised("stabilizer", stabilizer)}
    linear = {**bias, **_stabilised("epsilon", epsilon)}
    return (*_base(stabilizer), (_CONVOLUTIONS, convolution, shared), ((nn.Linear,), "epsilon", linear))


def _stabilised(name: str, given: Any) -> dict[str, Stabiliser]:
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        return {"stabiliser": Stabiliser(float(given))}
    if not callable(given):
        raise OptionError(f"{name}: expected a number or a zennit.core.Stabilizer, got {given!r}")
    return {"stabiliser": _stabiliser(given, name)}


def _check_own(**given: Any) -> None:
    """Refuse what zennit's composites take beside rules for their own types of modules."""
    for name, value in given.items():
        if value:
            raise OptionError(
                f"{name}: expected none, got {value!r}; give an instance of zennit's composite, whose maps are read"
                " from it"
            )


_PLUS = {"alpha": 1.0, "beta": 0.0}
_ALPHA2_BETA1 = {"alpha": 2.0, "beta": 1.0}


def _flat(stabilizer: Any) -> tuple[Any, ...]:
    return (((*_CONVOLUTIONS, nn.Linear), "flat", _stabilised("stabilizer", stabilizer)),)


def EpsilonPlus(
    epsilon: Any = 1e-6,
    stabilizer: Any = 1e-6,
    layer_map: None = None,
    zero_params: ZeroParams = None,
    canonizers: Canonizers = None,
) -> LayerMap:
    """z+ for convolutions, epsilon for linear layers.

    Args:
        epsilon: of linear layers, a number or a `zennit.core.Stabilizer` that adds its epsilon.
        stabilizer: of all other rules, likewise.
        zero_params: "bias" to leave the bias out of every rule, None to let it take its share.
        layer_map: none; for a map of one's own give an instance of zennit's composite.
        canonizers: zennit's, or `SequentialMergeBatchNorm` of this module; they change a copy of the model.
    Raises:
        OptionError: a map, canonizers that are none, or an epsilon that is no number. UnsupportedOpError: another kind
        of stabiliser; other parameters than the bias.
    """
    _check_own(layer_map=layer_map)
    layers = _epsilon_with("alpha_beta", _PLUS, epsilon, stabilizer, zero_params)
    return LayerMap(layers, canonizers=checked(canonizers))


def EpsilonAlpha2Beta1(
    epsilon: Any = 1e-6,
    stabilizer: Any = 1e-6,
    layer_map: None = None,
    zero_params: ZeroParams = None,
    canonizers: Canonizers = None,
) -> LayerMap:
    """alpha = 2, beta = 1 for convolutions, epsilon for linear layers. Arguments and errors as of `EpsilonPlus`."""
    _check_own(layer_map=layer_map)
    layers = _epsilon_with("alpha_beta", _ALPHA2_BETA1, epsilon, stabilizer, zero_params)
    return LayerMap(layers, canonizers=checked(canonizers))


def EpsilonPlusFlat(
    epsilon: Any = 1e-6,
    stabilizer: Any = 1e-6,
    layer_map: None = None,
    first_map: None = None,
    zero_params: ZeroParams = None,
    canonizers: Canonizers = None,
) -> LayerMap:
    """The same as `EpsilonPlus`, with the flat rule for the first layer."""
    _check_own(first_map=first_map)
    plain = EpsilonPlus(epsilon, stabilizer, layer_map, zero_params, canonizers)
    return replace(plain, first=_flat(stabilizer))


def EpsilonAlpha2Beta1Flat(
    epsilon: Any = 1e-6,
    stabilizer: Any = 1e-6,
    layer_map: None = None,
    first_map: None = None,
    zero_params: ZeroParams = None,
    canonizers: Canonizers = None,
) -> LayerMap:
    """The same as `EpsilonAlpha2Beta1`, with the flat rule for the first layer."""
    _check_own(first_map=first_map)
    plain = EpsilonAlpha2Beta1(epsilon, stabilizer, layer_map, zero_params, canonizers)
    return replace(plain, first=_flat(stabilizer))


def EpsilonGammaBox(
    low: Any,
    high: Any,
    epsilon: Any = 1e-6,
    gamma: float = 0.25,
    stabilizer: Any = 1e-6,
    layer_map: None = None,
    first_map: None = None,
    zero_params: ZeroParams = None,
    canonizers: Canonizers = None,
) -> LayerMap:
    """z-box for the first convolution, gamma for the others, epsilon for linear layers.

    Args:
        low, high: bounds of the input's values, each a number or one for each channel, [1, C, 1, 1].
        gamma: of convolutions.
        others: as of `EpsilonPlus`.
    """
    _check_own(layer_map=layer_map, first_map=first_map)
    box = {"low": _bound("low", low), "high": _bound("high", high), **_stabilised("stabilizer", stabilizer)}
    layers = _epsilon_with("gamma", {"gamma": gamma}, epsilon, stabilizer, zero_params)
    return LayerMap(layers, ((_CONVOLUTIONS, "z_box", box),), checked(canonizers))


def ExcitationBackprop(
    stabilizer: Any = 1e-6, layer_map: None = None, zero_params: ZeroParams = None, canonizers: Canonizers = None
) -> LayerMap:
    """z+ for convolutions and linear layers, the gradient through activations. Arguments as of `EpsilonPlus`."""
    _check_own(layer_map=layer_map)
    bias = {"bias": not _zeroed(zero_params, "this composite")}
    plus = {**_PLUS, **bias, **_stabilised("stabilizer", stabilizer)}
    layers = (_pools(stabilizer), ((*_CONVOLUTIONS, nn.Linear), "alpha_beta", plus))
    return LayerMap(layers, canonizers=checked(canonizers))


COMPOSITES: Mapping[str, Callable[..., LayerMap]] = {
    "epsilon_alpha2_beta1": EpsilonAlpha2Beta1,
    "epsilon_alpha2_beta1_flat": EpsilonAlpha2Beta1Flat,
    "epsilon_gamma_box": EpsilonGammaBox,
    "epsilon_plus": EpsilonPlus,
    "epsilon_plus_flat": EpsilonPlusFlat,
    "excitation_backprop": ExcitationBackprop,
}
_UNMAPPED = {"beta_smooth": "ReLUBetaSmooth", "deconvnet": "ReLUDeconvNet", "guided_backprop": "ReLUGuidedBackprop"}


def translated(composite: Any, model: nn.Module) -> Composite:
    """A composite of relprop with the rules that another one gives this model; relevance starts as it is given.

    Args:
        model: as the composite's canonizers leave it.
    Raises:
        UnsupportedOpError: naming a rule that has no counterpart. OptionError: a name of one that needs arguments, or
            no composite at all. UnknownNameError: a name of neither package's.
    """
    if composite is None:
        return find_composite("gradient")
    if isinstance(composite, str) and composite in COMPOSITES:
        composite = _with_defaults(composite)
    elif isinstance(composite, str):
        _check_name(composite)
    if isinstance(composite, (str, Composite)):
        return replace(find_composite(composite), seed="one")
    if isinstance(composite, LayerMap):
        found, name = composite.rules(model), "layer map"
    elif callable(getattr(composite, "module_map", None)):
        found, name = _of_zennit(composite, model), type(composite).__name__
    else:
        raise OptionError(
            f"composite: expected None, a name, a relprop.Composite or a composite of zennit, got"
            f" {type(composite).__name__}"
        )
    entries = tuple(_entry(*assigned) for assigned in found)
    return replace(find_composite("gradient").overridden(*entries, name=f"zennit {name}"), seed="one")


def _check_name(name: str) -> None:
    """Raises:
    UnsupportedOpError: a composite of zennit with a rule that has no counterpart. UnknownNameError: no composite.
    """
    if name in _UNMAPPED:
        raise UnsupportedOpError(
            f"composite: expected {', '.join(COMPOSITES)} of zennit or {', '.join(sorted(KNOWN))} of relprop, got"
            f" {name!r}, whose rule {_UNMAPPED[name]} has no counterpart"
        )
    if name not in KNOWN:
        raise unknown_name("composite", name, {*COMPOSITES, *KNOWN})


def _with_defaults(name: str) -> LayerMap:
    try:
        return COMPOSITES[name]()
    except TypeError as error:
        made = COMPOSITES[name].__name__
        raise OptionError(
            f"composite: expected {made}(low, high), whose bounds have no defaults, got {name!r}"
        ) from error


def _entry(path: str, module: nn.Module, rule: str, parameters: dict[str, Any], called: str) -> Entry:
    """The rule of one module. called: its name in the composite, for messages."""
    kind = _kind(module, path, called)
    try:
        return Entry(kind, make_rule(kind, rule, **parameters), None, path)
    except UnknownNameError:
        raise UnsupportedOpError(
            f"composite: expected a rule that {kind} operations have a counterpart of, got rule {called!r} for"
            f" {path or 'the model'} ({type(module).__name__})"
        ) from None


def _kind(module: nn.Module, path: str, rule: str) -> str:
    if isinstance(module, _COMPOSED):
        raise UnsupportedOpError(
            f"composite: expected activations that are one operation, got rule {rule!r} for {path or 'the model'}"
            f" ({type(module).__name__})"
        )
    for types, kind in (*_KINDS, (_sums(), "pool")):
        if isinstance(module, types):
            return kind
    raise UnsupportedOpError(
        f"composite: expected rules for linear layers, convolutions, activations, pools and batch norms, got rule"
        f" {rule!r} for {path or 'the model'} ({type(module).__name__})"
    )


def _of_zennit(composite: Any, model: nn.Module) -> Iterator[tuple[str, nn.Module, str, dict[str, Any], str]]:
    """What a composite of zennit would hook, module by module."""
    context: dict[Any, Any] = {}
    for path, module in model.named_modules():
        hook = composite.module_map(context, path, module)
        if hook is not None:
            yield (path, module, *_rule_of(hook, path), type(hook).__name__)


def _rule_of(hook: Any, path: str) -> tuple[str, dict[str, Any]]:
    """Name and parameters of the rule that a hook of zennit is; zennit keeps them in its functions' closures."""
    name = type(hook).__name__
    if name == "Pass":
        return "identity", {}
    if name not in ("AlphaBeta", "Epsilon", "Flat", "Gamma", "Norm", "ZBox", "ZPlus"):
        raise UnsupportedOpError(
            f"composite: expected rules AlphaBeta, Epsilon, Flat, Gamma, Norm, Pass, ZBox or ZPlus of zennit, got"
            f" {name} for {path}"
        )
    stabiliser = {"stabiliser": _stabiliser(_closure(hook.gradient_mapper)["stabilizer_fn"], path)}
    zeroed = _zeroed(getattr(hook.param_modifiers[0], "zero_params", None), path)
    if name == "Norm":
        return "epsilon", stabiliser
    if name == "Flat":
        return "flat", stabiliser
    if name == "ZBox":
        bounds = {end: _bound(end, _closure(hook.input_modifiers[i])[end]) for i, end in ((1, "low"), (2, "high"))}
        return "z_box", {**bounds, **stabiliser}
    parameters: dict[str, Any] = {**stabiliser, "bias": not zeroed}
    if name == "Gamma":
        return "gamma", {"gamma": float(_closure(hook.param_modifiers[0].modifier)["gamma"]), **parameters}
    if name == "Epsilon":
        return "epsilon", parameters
    weights = {"alpha": 1.0, "beta": 0.0} if name == "ZPlus" else _closure(hook.reducer)
    return "alpha_beta", {"alpha": float(weights["alpha"]), "beta": float(weights["beta"]), **parameters}


def _closure(function: Any) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))


def _stabiliser(found: Any, path: str) -> Stabiliser:
    epsilon = getattr(found, "epsilon", None)
    if epsilon is None or found.clip or found.norm_scale:
        raise UnsupportedOpError(
            f"composite: expected stabilizers that add epsilon with the sign of the denominator, got"
            f" {getattr(found, '__dict__', found)} for {path}"
        )
    return Stabiliser(float(epsilon))


def _zeroed(zero_params: ZeroParams, path: str) -> bool:
    """Whether a rule leaves the bias out."""
    names = [zero_params] if isinstance(zero_params, str) else list(zero_params or [])
    if set(names) - {"bias"}:
        raise UnsupportedOpError(f"composite: expected zero_params None or 'bias', got {names} for {path}")
    return bool(names)


def _bound(name: str, bound: Any) -> float | tuple[float, ...]:
    """A bound of the input's values, the same for all of them or for all of a channel.

    Args:
        bound: a number, or a tensor for images, [1, C, 1, 1]; zennit takes the first axis of any other for samples.
    """
    values = torch.as_tensor(bound, dtype=torch.float64)
    first = values.flatten()[:1]
    if len(first) and bool((values == first).all()):
        return float(first)
    channels = values[0, :, :1, :1] if values.ndim == 4 and len(values) else values.new_empty(0, 1, 1)
    if not channels.numel() or not bool((values == channels).all()):
        raise OptionError(
            f"{name}: expected one value for the input or one for each channel, [1, C, 1, 1], got several in a"
            f" tensor {list(values.shape)}"
        )
    return tuple(channels.flatten().tolist())


def _seeded_by(attr_output: AttrOutput) -> Callable[[Tensor], Tensor]:
    """A target whose gradient is the given relevance of the output."""

    def score(output: Tensor) -> Tensor:
        seed = attr_output(output.detach()) if callable(attr_output) else attr_output
        seed = output.detach() if seed is None else seed
        if not isinstance(seed, Tensor):
            raise TargetError(f"attr_output: expected a tensor, got {type(seed).__name__}")
        if seed.shape != output.shape:
            raise ShapeError(f"attr_output: expected {list(output.shape)} as the output has, got {list(seed.shape)}")
        return (output * seed.detach().to(output)).flatten(1).sum(1)

    return score
