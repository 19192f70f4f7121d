"""What compilation makes of a model, kept per model: captures, canonical graphs and programs."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from relprop.capture import Captured, capture, held_apart, lower
from relprop.capture.export import bind_arguments
from relprop.graph import Graph
from relprop.program import Program


@dataclass
class Plan:
    """What compilation makes of a model; holds no tensor of it."""

    captured: Captured
    graphs: dict[bool, Graph] = field(default_factory=dict)  # by whether all rows are computed
    programs: dict[Any, Program] = field(default_factory=dict)

    def graph(self, all_rows: bool) -> Graph:
        """The canonical graph; without `all_rows` rows that the output does not read are left out."""
        if all_rows not in self.graphs:
            self.graphs[all_rows] = lower(self.captured, hoist=not all_rows)
        return self.graphs[all_rows]


class _Cache:
    """Captures and plans per model, dropped with the model."""

    def __init__(self) -> None:
        self.plans: weakref.WeakKeyDictionary[nn.Module, dict[Any, Plan]] = weakref.WeakKeyDictionary()
        self.lock = threading.RLock()


CACHE = _Cache()


def plan_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, held: tuple[str, ...] = ()
) -> Plan:
    """The model's plan for calls like this one, some arguments held; the caller holds the cache's lock."""
    named = bind_arguments(model, args, kwargs)
    leaves, spec = pytree.tree_flatten(named)
    inputs = tuple(_signature(leaf) for leaf in leaves)
    key = (str(spec), inputs, output if not callable(output) else id(output), held, fingerprint(model))
    plans = CACHE.plans.setdefault(model, {})
    if key not in plans:
        plans[key] = Plan(held_apart(capture(model, args, kwargs, output), held))
    return plans[key]


def _signature(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return repr(leaf)
    free = 2 if leaf.ndim == 2 and not leaf.is_floating_point() else 1
    return (leaf.dtype, str(leaf.device), leaf.ndim, tuple(leaf.shape[free:]))


def fingerprint(model: nn.Module) -> int:
    """A fingerprint of what a capture depends on: modules, plain attributes, also of a `config`, parameter shapes and
    dtypes.
    """
    parts: list[Any] = []
    configs: dict[int, Any] = {}
    for name, module in model.named_modules():
        config = vars(module).get("config")
        configs[id(config)] = getattr(config, "__dict__", None)
        plain = tuple(
            (k, v)
            for k, v in vars(module).items()
            if isinstance(v, (int, float, str, bool, type(None))) and not k.startswith("_")
        )
        tensors = tuple(
            (k, tuple(t.shape), t.dtype, str(t.device))
            for store in (module._parameters, module._buffers)
            for k, t in store.items()
            if t is not None
        )
        parts.append((name, type(module), plain, tensors))
    return hash((*parts, str(list(configs.values()))))
