"""Engines of one model, compiled when a call first asks for them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from relprop.composites import Composite, find_composite
from relprop.engine import Engine, compile, hashable_options
from relprop.errors import MissingDependencyError, OptionError
from relprop.methods import find_method
from relprop.plans import fingerprint


class Engines:
    """Compiles methods on one model and keeps the engines, with what they derive from the weights.

    Args:
        model: in evaluation mode when an engine is made.
        backend, precision: of every engine, as `relprop.compile` takes them.
    """

    def __init__(self, model: nn.Module, *, backend: str = "auto", precision: str = "highest") -> None:
        if not isinstance(model, nn.Module):
            raise OptionError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        self.model = model
        self._settings = {"backend": backend, "precision": precision}
        self._engines: dict[Any, Engine] = {}

    def __call__(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None = None,
        *,
        method: str,
        composite: str | Composite | None = None,
        options: Mapping[str, Any] | None = None,
        latents: tuple[str, ...] = (),
        output: str | None = None,
        held: tuple[str, ...] = (),
    ) -> Engine:
        """The engine of a method for this kind of input; arguments and errors as `relprop.compile` has them."""
        rules = None if composite is None else find_composite(composite)
        kwargs = dict(kwargs or {})
        given = (*args, *kwargs.items())
        kinds = tuple(_kind(value) for value in given)
        chosen = (find_method(method).name, rules, hashable_options(options), latents, output, held)
        key = (chosen, kinds, fingerprint(self.model))
        if key not in self._engines:
            self._engines[key] = compile(
                self.model,
                args,
                kwargs,
                method=method,
                composite=rules,
                method_options=options,
                latents=latents,
                output=output,
                held=held,
                **self._settings,  # type: ignore[arg-type]
            )
        return self._engines[key]


def _kind(value: Any) -> Any:
    """What of an argument an engine is made for: sizes but the batch and the number of tokens, or the value itself."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        return value[0], _kind(value[1])
    if not isinstance(value, Tensor):
        return repr(value)
    free = 2 if value.ndim == 2 and not value.is_floating_point() else 1
    return value.dtype, value.device, value.ndim, tuple(value.shape[free:])


def needed(module: str, by: str, install: str | None = None) -> ModuleType:
    """A module of an optional dependency.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = install or module.split(".")[0]
        raise MissingDependencyError(
            f"{by}: expected the package {package!r}, got none ({error}); install it with: pip install {package}"
        ) from error
