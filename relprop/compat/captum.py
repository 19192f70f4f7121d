"""Captum's conventions: attributions in the shape of the inputs, tuples in and out, every form of a target.

>>> from relprop.demo import bundled_scenes, load_model, preprocess
>>> model, images = load_model(), preprocess(bundled_scenes()["scene_5_9"].image[None])
>>> from relprop.compat.captum import LRP
>>> attributions, delta = LRP(model).attribute(images, target=5, return_convergence_delta=True)
>>> attributions.shape
torch.Size([1, 3, 64, 64])

`LRP` and `LayerLRP` stand in for Captum's classes, on Transformers too; `Relevance` and `LayerRelevance` take any
method of relprop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from relprop.capture.export import bind_arguments
from relprop.compat.engines import Engines, needed
from relprop.composites import Composite, find_composite
from relprop.errors import OptionError, TargetError
from relprop.explanation import Explanation
from relprop.latents import INPUT, check_calls
from relprop.methods import find_method

needed("captum.attr", by="relprop.compat.captum")

from captum._utils.common import _select_targets  # noqa: E402
from captum.attr import Attribution, LayerAttribution  # noqa: E402
from captum.attr._utils.lrp_rules import EpsilonRule, PropagationRule  # noqa: E402
from captum.log import log_usage  # noqa: E402

__all__ = ["LRP", "LayerLRP", "LayerRelevance", "Relevance"]

Inputs: TypeAlias = "Tensor | tuple[Tensor, ...]"


class Relevance(Attribution):  # type: ignore[misc]
    """Any method of relprop as a Captum attribution.

    Args:
        forward_func: the model, a module in evaluation mode, or its `forward`.
        method: a name of `relprop.methods()`. Methods that answer per token give an image's map at the image's size,
            spread evenly over its channels, and embeddings' relevance spread evenly over theirs.
        composite, method_options, backend, precision: as `relprop.compile` takes them.
    """

    def __init__(
        self,
        forward_func: nn.Module | Callable[..., Any],
        method: str = "attnlrp",
        composite: str | Composite | None = None,
        method_options: Mapping[str, Any] | None = None,
        *,
        backend: str = "auto",
        precision: str = "highest",
    ) -> None:
        super().__init__(forward_func)
        self.method, self.composite = find_method(method), composite
        self.options = dict(method_options or {})
        self.model = _module(forward_func)
        self._engines = Engines(self.model, backend=backend, precision=precision)

    @property
    def multiplies_by_inputs(self) -> bool:
        """Relevance is of the input itself, not of a change of it; SmoothGrad's plain gradient is not."""
        return self.method.name != "smoothgrad" or bool(self.options.get("times_input", False))

    def has_convergence_delta(self) -> bool:
        """Whether attributions are meant to add up to the score, or to its change from a baseline."""
        composite = find_composite(self.composite or self.method.composite)
        return self._of_change or (self.method.output == "input" and self._conserves(composite))

    @property
    def _of_change(self) -> bool:
        return self.method.name == "integrated_gradients"

    def _conserves(self, composite: Composite) -> bool:
        return composite.seed == "score" and self.method.name not in ("gradient_x_input", "smoothgrad")

    def compute_convergence_delta(self, attributions: Inputs, output: Tensor) -> Tensor:
        """The score less the sum of the attributions, as Captum's LRP has it. [B]

        For `integrated_gradients` `output` is the score's change from the baseline, and the delta the sum less that, as
        Captum's IntegratedGradients has it.
        """
        given = attributions if isinstance(attributions, tuple) else (attributions,)
        total = sum(part.reshape(len(part), -1).sum(1) for part in given)
        return total - output.flatten() if self._of_change else output.flatten() - total

    @log_usage(part_of_slo=True)  # NoiseTunnel calls what it wraps
    def attribute(
        self,
        inputs: Inputs,
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        verbose: bool = False,
    ) -> Any:
        """Attributions of the inputs' shape and dtype; for token ids one value per token.

        Args:
            inputs: tensors that the model is called with, in order.
            target: None for one score per sample, an int, a tuple of ints, a list of either or a tensor, as in Captum.
            additional_forward_args: the arguments after the inputs. They are held as they are and have no
                attributions.
            return_convergence_delta: also return `compute_convergence_delta`, of sums before they are rounded to the
                inputs' dtype. [B]
            verbose: print the program.
        Raises:
            AssertionError, IndexError: targets as Captum raises them. OptionError: inputs that are no tensors, a rule
            that was set on a layer for Captum, a convergence delta of a method whose relevance does not add up to the
            score.
        """
        found, args = self._explain(inputs, target, additional_forward_args, (), verbose)
        given = _given(inputs)
        names = list(bind_arguments(self.model, args, {}))
        parts = tuple(self._of_input(found, name, tensor) for name, tensor in zip(names, given, strict=False))
        rounded = tuple(_as_given(part, tensor) for part, tensor in zip(parts, given, strict=True))
        attributions = rounded if isinstance(inputs, tuple) else rounded[0]
        return self._with_delta(attributions, parts, found, args, target, return_convergence_delta)

    def attribute_future(self, *args: Any, **kwargs: Any) -> None:
        """Not there, as for most of Captum's classes."""
        raise NotImplementedError(f"attribute_future is not implemented for {type(self).__name__}")

    def _explain(
        self, inputs: Inputs, target: Any, additional: Any, latents: tuple[str, ...], verbose: bool
    ) -> tuple[Explanation, tuple[Any, ...]]:
        given = _given(inputs)
        more = () if additional is None else additional if isinstance(additional, tuple) else (additional,)
        options = dict(self.options)
        if "channels" in self.method.options:
            options["channels"] = "kept"
        if latents and "rows" in self.method.options:
            options["rows"] = "all"
        args = (*given, *more)
        fixed = list(bind_arguments(self.model, args, {}).items())[len(given) :]
        held = [name for name, value in fixed if any(isinstance(t, Tensor) for t in pytree.tree_leaves(value))]
        engine = self._engines(
            args,
            method=self.method.name,
            composite=self.composite,
            options=options,
            latents=latents,
            held=tuple(held),
        )
        _check_rules(self.model)
        for path in latents:
            check_calls(engine.program.graph, path.removesuffix(INPUT))
        if verbose:
            print(engine.program)
        return engine(*args, target=_score(target)), args

    def _of_input(self, found: Explanation, name: str, tensor: Tensor) -> Tensor:
        if name not in found.relevances:
            known = ", ".join(sorted(found.relevances))
            raise OptionError(f"inputs: expected those that carry relevance ({known}), got {name}")
        part = found.relevances[name]
        if self.method.output == "tokens":
            if tensor.ndim == 4:
                return (found.image_map() / tensor.shape[1]).unsqueeze(1).expand(tensor.shape)
            if tensor.ndim == 3 and part.shape == tensor.shape[:2]:
                return (part / tensor.shape[2]).unsqueeze(2).expand(tensor.shape)
            if part.shape != tensor.shape:
                raise OptionError(
                    f"{name}: expected an image, token ids or embeddings for {self.method.name}, which answers per"
                    f" token {list(part.shape)}, got {list(tensor.shape)}"
                )
        return part.sum(-1) if part.ndim > tensor.ndim else part  # a token's embedding adds up to its id

    def _with_delta(
        self,
        attributions: Any,
        parts: tuple[Tensor, ...],
        found: Explanation,
        args: tuple[Any, ...],
        target: Any,
        wanted: bool,
    ) -> Any:
        if not wanted:
            return attributions
        if not self.has_convergence_delta():
            raise OptionError(
                f"return_convergence_delta: expected a method whose relevance adds up to the score, got"
                f" {self.method.name} with composite {find_composite(self.composite or self.method.composite).name}"
            )
        score = _score(target)(found.logits)
        if self._of_change:
            score = score - _score(target)(self._at_baseline(args, len(parts)))
        return attributions, self.compute_convergence_delta(parts, score)

    def _at_baseline(self, args: tuple[Any, ...], inputs: int) -> Tensor:
        """The model's output where its inputs, the first of its arguments, are `integrated_gradients`' baseline."""
        for tensor in args[:inputs]:
            if not tensor.is_floating_point():
                raise OptionError(
                    f"return_convergence_delta: expected an input that can be a baseline, got {tensor.dtype}"
                )
        baseline = {**self.method.options, **self.options}["baseline"]
        with torch.no_grad():
            output = self.model(*(torch.full_like(tensor, baseline) for tensor in args[:inputs]), *args[inputs:])
        return getattr(output, "logits", output)


class LayerRelevance(LayerAttribution, Relevance):  # type: ignore[misc]
    """Relevance at the output or input of one layer, or of each of several.

    Args:
        forward_func, method, composite, method_options, backend, precision: as for `Relevance`.
        layer: a module of the model, or a list of modules.
    """

    def __init__(self, forward_func: nn.Module, layer: nn.Module | Sequence[nn.Module], *args: Any, **kw: Any) -> None:
        LayerAttribution.__init__(self, forward_func, layer)
        Relevance.__init__(self, forward_func, *args, **kw)
        self.layer = layer

    @log_usage(part_of_slo=True)
    def attribute(  # type: ignore[override]
        self,
        inputs: Inputs,
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        attribute_to_layer_input: bool = False,
        verbose: bool = False,
    ) -> Any:
        """Relevance in the shape of the layer's output or input; a list of them for a list of layers.

        Args:
            inputs, target, additional_forward_args, return_convergence_delta, verbose: as for `Relevance`; the delta is
                of each layer.
            attribute_to_layer_input: at what goes into the layer, instead of what comes out of it.
        Raises:
            OptionError: the layer is none of the model's. UnsupportedTopologyError: it is called several times, or it
                has several outputs that are used, or several inputs where its input was asked for.
        """
        several = isinstance(self.layer, (list, tuple))
        layers = list(self.layer) if several else [self.layer]
        end = INPUT if attribute_to_layer_input else ""
        paths = tuple(_path(self.model, layer) + end for layer in layers)
        found, args = self._explain(inputs, target, additional_forward_args, paths, verbose)
        exact = [found.at(path).relevance for path in paths]
        parts = [_as_given(part, args[0]) for part in exact]
        deltas = [
            self._with_delta(part, (whole,), found, args, target, return_convergence_delta)
            for part, whole in zip(parts, exact, strict=True)
        ]
        if not return_convergence_delta:
            return parts if several else parts[0]
        return (parts, [delta for _, delta in deltas]) if several else deltas[0]


class LRP(Relevance):
    """Captum's `LRP`: its default rules (epsilon, without an epsilon to speak of), and AttnLRP's for attention."""

    def __init__(self, model: nn.Module | Callable[..., Any], **options: Any) -> None:
        super().__init__(model, "attnlrp", **options)


class LayerLRP(LayerRelevance):
    """Captum's `LayerLRP`, as `LRP` above."""

    def __init__(self, model: nn.Module, layer: nn.Module | Sequence[nn.Module], **options: Any) -> None:
        super().__init__(model, layer, "attnlrp", **options)


def _module(forward_func: Any) -> nn.Module:
    """The model that a forward function is; what Captum is given beyond that has weights that cannot be found."""
    owner = getattr(forward_func, "__self__", None)
    found = owner if getattr(forward_func, "__name__", "") in ("forward", "__call__", "_wrapped_call_impl") else None
    model = found if isinstance(found, nn.Module) else forward_func
    if not isinstance(model, nn.Module):
        got = getattr(forward_func, "__qualname__", type(forward_func).__name__)
        raise OptionError(
            f"forward_func: expected a torch.nn.Module or its forward, got {got}; write other functions as a module"
            " whose forward is the function"
        )
    return model


def _as_given(part: Tensor, tensor: Tensor) -> Tensor:
    """In the dtype of an input that has one of numbers."""
    return part.to(tensor.dtype) if tensor.is_floating_point() else part


def _given(inputs: Inputs) -> tuple[Tensor, ...]:
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    if not given or not all(isinstance(tensor, Tensor) for tensor in given):
        kinds = [type(part).__name__ for part in given]
        raise OptionError(f"inputs: expected a tensor or a tuple of tensors, got {', '.join(kinds) or 'none'}")
    return given


def _score(target: Any) -> Callable[[Tensor], Tensor]:
    """From the model's output to one score per sample, chosen and checked by Captum's own code. [B]"""

    def score(output: Tensor) -> Tensor:
        if isinstance(target, Tensor) and target.is_floating_point():
            raise TargetError(f"target: expected integers, got {target.dtype}")
        found = _select_targets(output, target)
        if found.ndim and found[0].numel() != 1:
            raise AssertionError(
                "Target not provided when necessary, cannot take gradient with respect to multiple outputs."
            )
        return found.reshape(output.shape[0])

    return score


def _check_rules(model: nn.Module) -> None:
    """Raises OptionError for rules that were set as Captum wants them, but have no counterpart here."""
    for path, module in model.named_modules():
        rule = getattr(module, "rule", None)
        if not isinstance(rule, PropagationRule):
            continue
        if type(rule) is not EpsilonRule or rule.STABILITY_FACTOR != PropagationRule.STABILITY_FACTOR:
            raise OptionError(
                f"{path}.rule: expected none, or EpsilonRule as Captum makes it, got {type(rule).__name__}; give rules"
                " for layers as composite=, such as relprop.find_composite('attnlrp').overridden(...)"
            )


def _path(model: nn.Module, layer: Any) -> str:
    for path, module in model.named_modules():
        if module is layer and path:
            return path
    raise OptionError(f"layer: expected a module inside {type(model).__name__}, got {type(layer).__name__}")
