"""torch.export of the user's module, with the batch size (and the length of token inputs) left free."""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from relprop.capture.reasons import check_own_call, export_failure, first_fixed
from relprop.errors import CaptureError, OptionError, ShapeError

_EXPORT_LOCK = threading.RLock()


@dataclass(frozen=True)
class InputSpec:
    """One tensor that the model is called with."""

    path: str
    placeholder: str
    shape: tuple[int | None, ...]  # None where the size is free
    dtype: torch.dtype
    device: torch.device
    sizes: tuple[str, ...] = ()  # the same as the capture names them: sizes of one name are equal

    @property
    def argument(self) -> str:
        """Of the model's forward, which this tensor is, or is part of."""
        return self.path.partition("[")[0]

    @property
    def is_token_ids(self) -> bool:
        return not self.dtype.is_floating_point and self.dtype != torch.bool and len(self.shape) == 2


@dataclass
class Captured:
    """The exported graph and what ties it to the model: no tensor of the model is held, only names."""

    graph: fx.Graph
    inputs: tuple[InputSpec, ...]
    in_spec: pytree.TreeSpec
    in_leaves: tuple[Any, ...]  # the non-tensor leaves, None where a tensor stands
    parameters: dict[str, str]  # placeholder -> qualified name of a parameter or buffer
    constants: dict[str, Tensor]  # placeholder -> tensor baked into the graph
    output: fx.Node
    batch_symbols: frozenset[Any]
    signature: tuple[str, ...] = field(default=())  # argument names in call order
    held: tuple[str, ...] = ()  # arguments that no relevance is asked for

    def copy(self) -> Captured:
        """The same with a graph of its own, to be rewritten."""
        nodes: dict[fx.Node, fx.Node] = {}
        graph = fx.Graph()
        graph.output(fx.map_arg(graph.graph_copy(self.graph, nodes), lambda node: node))
        return replace(self, graph=graph, output=nodes[self.output])


def bind_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Name every argument as the model's forward does, so that positional and keyword calls are one.

    Raises:
        ShapeError: the arguments do not fit the forward signature.
    """
    forward = inspect.signature(model.forward)
    try:
        bound = forward.bind(*args, **kwargs)
    except TypeError as error:
        raise ShapeError(f"{type(model).__name__}.forward: expected {forward}, got {error}") from None
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = forward.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            raise CaptureError(
                f"{type(model).__name__}.forward: expected named arguments, got the variable argument list *{name}"
            )
        else:
            named[name] = value
    return named


def _dynamic_shapes(leaves: list[Any]) -> tuple[list[Any], int]:
    """Free sizes per leaf, and the example's batch size: axis 0 of the first tensor; axis 1 of integer ids."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim]
    if not tensors:
        raise CaptureError("expected at least one tensor with a batch axis among the example inputs, got none")
    batch = tensors[0].shape[0]
    lengths = {t.shape[1] for t in tensors if t.ndim == 2 and not t.is_floating_point()}
    specs: list[Any] = []
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            specs.append(None)
            continue
        free: dict[int, Any] = {}
        if leaf.ndim and leaf.shape[0] == batch:
            free[0] = Dim.AUTO
        if leaf.ndim == 2 and leaf.shape[1] in lengths and not leaf.is_floating_point():
            free[1] = Dim.AUTO
        specs.append(free)
    return specs, batch


def _doubled(leaves: list[Any], batch: int) -> list[Any]:
    """The capture needs a batch of at least two, and one that no free length equals."""
    sizes = {s for leaf in leaves if isinstance(leaf, Tensor) for s in leaf.shape[1:]}
    wanted = max(batch, 2)
    while wanted in sizes and wanted < 64:
        wanted += 1
    if wanted == batch:
        return leaves
    index = [i % batch for i in range(wanted)]
    return [
        leaf[torch.tensor(index, device=leaf.device)]
        if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == batch
        else leaf
        for leaf in leaves
    ]


@contextlib.contextmanager
def _stock_attention() -> Iterator[None]:
    """Keep nn.MultiheadAttention on its composed path: the fused inference path hides the attention."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _broadcast_masks() -> Iterator[None]:
    """Let transformers build masks by broadcasting positions, not by nested vmaps, which an export cannot hold."""
    masking: Any = sys.modules.get("transformers.masking_utils")
    own = {name: getattr(masking, name, None) for name in ("_vmap_for_bhqkv", "TransformGetItemToIndex")}
    if None in own.values():
        yield
        return

    def broadcast(mask: Callable[..., Tensor], bh_indices: bool = True) -> Callable[..., Tensor]:
        def of_positions(b: Any, h: Any, q: Tensor, k: Tensor) -> Tensor:
            if not bh_indices:
                return mask(b, h, q[:, None], k).expand(q.shape[0], k.shape[0])
            found = mask(b[:, None, None, None], h[:, None, None], q[:, None], k)
            return found.expand(b.shape[0], h.shape[0], q.shape[0], k.shape[0])

        return of_positions

    masking._vmap_for_bhqkv, masking.TransformGetItemToIndex = broadcast, contextlib.nullcontext
    try:
        yield
    finally:
        for name, value in own.items():
            setattr(masking, name, value)


class _Wrapped(nn.Module):
    """Calls the model with its arguments by name, so that torch.export sees one flat keyword call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Any]) -> Any:
        return self.model(**inputs)


def capture(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: str | int | Callable[..., Any] | None
) -> Captured:
    """Export a module in evaluation mode.

    Args:
        model: any module that torch.export can trace; it is not modified.
        args, kwargs: an example call. A batch of one is repeated for the capture.
        output: which output to explain, by key, index or attribute; None where there is one or it is `logits`.
    Raises:
        CaptureError: the model cannot be exported, fixes its batch size, or writes to a buffer.
        InputError: the model itself does not take the example call.
        OptionError: `output` does not name an output.
    """
    named = bind_arguments(model, args, kwargs)
    leaves, in_spec = pytree.tree_flatten(named)
    free, batch = _dynamic_shapes(leaves)
    example = pytree.tree_unflatten(_doubled(leaves, batch), in_spec)
    dynamic = pytree.tree_unflatten(free, in_spec)
    # One lock for all captures: the tracer's global state is not meant for threads.
    with _EXPORT_LOCK, _stock_attention(), _broadcast_masks(), torch.enable_grad():
        try:
            exported = torch.export.export(_Wrapped(model), (example,), dynamic_shapes=(dynamic,), strict=False)
        except Exception as error:
            check_own_call(model, args, kwargs)
            raise CaptureError(export_failure(model, error)) from error
    signature = exported.graph_signature
    for item in signature.output_specs:
        if item.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION):
            raise CaptureError(
                f"{type(model).__name__} writes to {item.target!r} in its forward: expected a forward without"
                " side effects; turn caches and running statistics off"
            )
    graph = _inlined(exported.graph_module)
    nodes = {node.name: node for node in graph.nodes}
    parameters: dict[str, str] = {}
    constants: dict[str, Tensor] = {}
    user: list[str | None] = []
    for spec in signature.input_specs:
        name = getattr(spec.arg, "name", None)
        if spec.kind is InputKind.USER_INPUT:
            user.append(name if name in nodes and isinstance(nodes[name].meta.get("val"), Tensor) else None)
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            assert spec.target is not None and name is not None
            parameters[name] = spec.target.removeprefix("model.")
        else:
            assert spec.target is not None and name is not None
            constants[name] = exported.constants[spec.target]
    inputs = _input_specs(named, leaves, user, nodes)
    symbols = frozenset(
        symbol
        for spec in inputs
        if spec.shape and spec.shape[0] is None
        for symbol in _symbols(nodes[spec.placeholder].meta["val"].shape[0])
    )
    size = next(t.shape[0] for t in pytree.tree_leaves(example) if isinstance(t, Tensor) and t.ndim)
    stuck = [spec.path for spec in inputs if spec.dtype.is_floating_point and spec.shape[1:] and spec.shape[0] == size]
    if stuck or not symbols:
        fixed = first_fixed(graph, size)
        place = f", first in {fixed.target} at {module_path(fixed)} {source_line(fixed)}" if fixed is not None else ""
        which = f"the batch size of {', '.join(stuck)}" if stuck and symbols else "its batch size"
        raise CaptureError(
            f"{type(model).__name__} fixes {which}: expected a forward that accepts any batch, got one that is"
            f" specialised to that of the example{place}; take it from x.shape[0], not from len(x), a loop over samples"
            " or a number"
        )
    picked = _pick_output(graph, exported, output, type(model).__name__)
    plain = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    return Captured(graph, inputs, in_spec, plain, parameters, constants, picked, symbols, tuple(named))


def _symbols(size: Any) -> set[Any]:
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()


def _input_specs(
    named: dict[str, Any], leaves: list[Any], user: list[str | None], nodes: dict[str, fx.Node]
) -> tuple[InputSpec, ...]:
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(named)[0]]
    specs = []
    for path, leaf, placeholder in zip(paths, leaves, user, strict=True):
        if not isinstance(leaf, Tensor):
            continue
        if placeholder is None:
            raise CaptureError(f"input {path} is a tensor that the exported graph does not take as one")
        shape = nodes[placeholder].meta["val"].shape
        free = tuple(None if _symbols(size) else int(size) for size in shape)
        pretty = path.removeprefix("['").replace("']", "", 1)
        specs.append(InputSpec(pretty, placeholder, free, leaf.dtype, leaf.device, tuple(map(str, shape))))
    return tuple(specs)


def _inlined(module: fx.GraphModule) -> fx.Graph:
    """A copy of the graph in which grad-mode and autocast regions are spelled out and guards are gone."""
    graph = fx.Graph()
    environment: dict[fx.Node, Any] = {}

    def copy(source: fx.GraphModule, bound: list[Any] | None, environment: dict[fx.Node, Any]) -> Any:
        arguments = iter(bound or [])
        for node in source.graph.nodes:
            if node.op == "placeholder" and bound is not None:
                environment[node] = next(arguments)
            elif node.op == "get_attr" and isinstance(getattr(source, str(node.target), None), fx.GraphModule):
                environment[node] = getattr(source, str(node.target))
            elif node.op == "call_module":
                continue  # guards on the example's sizes
            elif node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
                resolved = fx.map_arg(node.args, lambda n: environment[n])
                at = next((i for i, a in enumerate(resolved) if isinstance(a, fx.GraphModule)), None)
                if at is None or not str(node.target).startswith("wrap_with"):
                    raise CaptureError(
                        f"control flow {node.target} cannot be captured, at {module_path(node)}: {source_line(node)}"
                    )
                environment[node] = copy(resolved[at], list(resolved[at + 1 :]), {})
            elif node.op == "call_function" and isinstance(environment.get(_first(node)), tuple):
                environment[node] = environment[_first(node)][node.args[1]]  # getitem on an inlined region
            elif node.op == "output":
                result = fx.map_arg(node.args[0], lambda n: environment[n])
                if bound is None:
                    graph.output(result)
                return result
            else:
                environment[node] = graph.node_copy(node, lambda n: environment[n])
        return None

    copy(module, None, environment)
    return graph


def _first(node: fx.Node) -> Any:
    return node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None


def _pick_output(graph: fx.Graph, exported: Any, wanted: str | int | Callable[..., Any] | None, model: str) -> fx.Node:
    flat = next(n for n in graph.nodes if n.op == "output").args[0]
    structure = pytree.tree_unflatten(list(flat), exported.call_spec.out_spec)
    if callable(wanted):
        picked = wanted(structure)
    elif wanted is None:
        floating = [n for n in flat if isinstance(n, fx.Node) and n.meta["val"].dtype.is_floating_point]
        picked = _member(structure, "logits")
        if picked is None and len(floating) == 1:
            picked = floating[0]
    else:
        picked = _member(structure, wanted)
    if not isinstance(picked, fx.Node):
        names = list(structure) if isinstance(structure, dict) else type(structure).__name__
        raise OptionError(
            f"output of {model}: expected output= to name one floating-point tensor of {names}, got {wanted!r}"
        )
    return picked


def _member(structure: Any, key: str | int) -> Any:
    if isinstance(structure, fx.Node):
        return structure if key in (0, "logits") else None
    try:
        return structure[key]
    except (KeyError, IndexError, TypeError):
        return getattr(structure, key, None) if isinstance(key, str) else None


def module_path(node: fx.Node) -> str:
    """Qualified name of the module that a node came from, as in `model.named_modules()`."""
    stack = node.meta.get("nn_module_stack") or {}
    return _in_model(list(stack.values())[-1][0]) if stack else ""


def later_calls(node: fx.Node) -> dict[str, int]:
    """The modules around a node that had been called before, and how often; the stack's keys count: `name@1`."""
    stack = node.meta.get("nn_module_stack") or {}
    return {_in_model(path): int(key.rpartition("@")[2]) for key, (path, _) in stack.items() if "@" in key}


def calls(node: fx.Node) -> frozenset[str]:
    """The modules whose call a node is part of."""
    return frozenset(_in_model(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values())


def _in_model(path: str) -> str:
    """A path without the wrapper that calls the model by name and holds it as `model`."""
    return str(path).removeprefix("model.") if str(path).startswith("model.") else ""


def source_line(node: fx.Node) -> str:
    """`file:line` of the model's code that made a node, or an empty string."""
    trace = (node.meta.get("stack_trace") or "").strip().split("\n")
    places = [line.strip() for line in trace if line.strip().startswith("File ")]
    if not places:
        return ""
    file, line = places[-1].split(", ")[:2]
    return f"{file.removeprefix('File ').strip(chr(34))}:{line.removeprefix('line ').strip()}"
