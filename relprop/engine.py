"""compile and explain: a model becomes an engine, an engine explains batches."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from relprop import trust
from relprop.backends import choose_backend, choose_forward, choose_joint
from relprop.capture import Captured, capture, lower
from relprop.capture.export import bind_arguments
from relprop.composites import Composite, find_composite
from relprop.errors import DeviceError, DTypeError, ModelStateError, NonFiniteError, OptionError, ShapeError
from relprop.execute import Forward, Sweep, Trace, run_forward
from relprop.explanation import Explanation
from relprop.graph import Graph, Value
from relprop.ledger import Ledger
from relprop.methods import Reading, find_method
from relprop.methods.base import Reader
from relprop.methods.input_maps import over_channels
from relprop.methods.sampled import SampledMap
from relprop.methods.topology import explained_tokens, read_profile
from relprop.program import Program, build_program
from relprop.targets import Target, TargetLike, resolve_target
from relprop.weights import DeriveOnce, Weights

PRECISIONS = ("highest", "high", "medium")


@dataclass
class _Plan:
    """What compilation makes of a model; holds no tensor of it."""

    captured: Captured
    graph: Graph
    programs: dict[Any, Program]


class _Cache:
    """Captures and plans per model, dropped with the model."""

    def __init__(self) -> None:
        self.plans: weakref.WeakKeyDictionary[nn.Module, dict[Any, _Plan]] = weakref.WeakKeyDictionary()
        self.lock = threading.RLock()


_CACHE = _Cache()


def compile(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    method: str = "transformer_attribution",
    composite: str | Composite | None = None,
    method_options: Mapping[str, Any] | None = None,
    backend: str = "auto",
    precision: str = "highest",
    output: str | int | Callable[..., Any] | None = None,
    latents: Sequence[str] = (),
) -> Engine:
    """Capture a model and plan a method on it.

    Args:
        model: a module in evaluation mode, on one device. It is not modified and may be used elsewhere meanwhile.
        args, kwargs: an example call, as torch.export takes it. The batch size stays free, and the length of token
            inputs; other sizes are as in the example.
        method: a name of `relprop.methods()`.
        composite: rules for the relevance stream, a name of `relprop.composites()` or a Composite; the method's own
            by default.
        method_options: options of the method, such as {"start_layer": 1}.
        backend: "auto", "torch", "cpp" or "triton".
        precision: of matrix products in float32 streams: "highest", "high", or "medium" for bfloat16 products with
            float32 accumulation where the hardware has them.
        output: which of several outputs to explain: a key, an index, or a function of the output.
        latents: module paths ("blocks.*.mlp", "blocks.5.attn:heads") at which relevance is kept for `Explanation.at`.
    Returns:
        An engine. A second call for the same model, method and kind of input is served from a cache.
    Raises:
        ModelStateError, CaptureError, UnsupportedOpError, UnsupportedTopologyError, UnknownNameError, OptionError,
        BackendError.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if precision not in PRECISIONS:
        raise OptionError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    chosen = find_method(method)
    rules = find_composite(composite if composite is not None else chosen.composite)
    _check_mode(model)
    device, dtype = _placement(model, args, dict(kwargs or {}))
    choose = choose_backend(backend, dtype, device)
    key = (method, rules, _hashable(method_options), backend, dtype, str(device), precision, tuple(latents))

    def build(books: bool) -> Program:
        return build_program(
            plan.graph,
            chosen,
            method_options,
            rules,
            choose,
            plan.captured.batch_symbols,
            choose_joint=choose_joint(backend, dtype, device),
            choose_forward=choose_forward(backend, dtype, device, precision),
            books=books,
            latents=latents,
        )

    with _CACHE.lock:
        plan = _plan(model, args, dict(kwargs or {}), output)
        program = plan.programs.get(key)
        if program is None:
            program = build(False)
            plan.programs[key] = program

    def booked() -> Program:
        with _CACHE.lock:
            if (key, "books") not in plan.programs:
                plan.programs[key, "books"] = build(True)
            return plan.programs[key, "books"]

    return Engine(model, plan.captured, program, backend, precision, dtype, device, booked)


def _plan(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> _Plan:
    named = bind_arguments(model, args, kwargs)
    leaves, spec = pytree.tree_flatten(named)
    inputs = tuple(_signature(leaf) for leaf in leaves)
    key = (str(spec), inputs, output if not callable(output) else id(output), _structure(model))
    plans = _CACHE.plans.setdefault(model, {})
    if key not in plans:
        captured = capture(model, args, kwargs, output)
        plans[key] = _Plan(captured, lower(captured), {})
    return plans[key]


def _signature(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return repr(leaf)
    free = 2 if leaf.ndim == 2 and not leaf.is_floating_point() else 1
    return (leaf.dtype, str(leaf.device), leaf.ndim, tuple(leaf.shape[free:]))


def _structure(model: nn.Module) -> int:
    """A fingerprint of what a capture depends on: modules, plain attributes, parameter shapes and dtypes."""
    parts: list[Any] = []
    for name, module in model.named_modules():
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
    return hash(tuple(parts))


def _hashable(options: Mapping[str, Any] | None) -> Any:
    try:
        found = tuple(sorted((options or {}).items()))
        hash(found)
    except TypeError:
        raise OptionError(f"method_options: expected plain values, got {dict(options or {})!r}") from None
    return found


def _check_mode(model: nn.Module) -> None:
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise ModelStateError(
            f"{type(model).__name__}: expected a model in evaluation mode, got {len(training)} module(s) in training"
            f" mode, the first {training[0]!r}; call model.eval()"
        )


def _placement(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.device, torch.dtype]:
    tensors = [*model.parameters(), *model.buffers()]
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        raise DeviceError(f"model: expected all weights on one device, got {', '.join(sorted(map(str, devices)))}")
    given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    device = devices.pop() if devices else (given[0].device if given else torch.device("cpu"))
    for tensor in given:
        if tensor.device != device:
            raise DeviceError(f"example inputs: expected tensors on {device}, where the model is, got {tensor.device}")
    floating = {t.dtype for t in tensors if t.dtype.is_floating_point} or {torch.float32}
    return device, torch.float64 if torch.float64 in floating else torch.float32


class Engine:
    """Explains batches with one compiled program. Safe to call from several threads.

    Attributes:
        program: the plan; prints as a table.
    """

    def __init__(
        self,
        model: nn.Module,
        captured: Captured,
        program: Program,
        backend: str,
        precision: str,
        dtype: torch.dtype,
        device: torch.device,
        booked: Callable[[], Program] | None = None,
    ) -> None:
        self.program = program
        self._booked = booked
        self._model = model
        self._captured = captured
        self._weights = Weights(model, program.graph)
        self._backend = backend
        self._precision = precision
        self._dtype = dtype
        self._device = device

    def __repr__(self) -> str:
        return (
            f"Engine({type(self._model).__name__}, method={self.program.method.name!r},"
            f" composite={self.program.composite.name!r}, {self._device}, streams {self._dtype})"
        )

    def refresh(self) -> None:
        """Forget what was derived from the weights, after a write that version counters cannot show (`.data`)."""
        self._weights.derived.clear()

    def __call__(
        self, *args: Any, target: TargetLike = None, ledger: bool = False, check: bool = False, **kwargs: Any
    ) -> Explanation:
        """Explain a batch.

        Args:
            args, kwargs: as the model takes them. First axes are the batch.
            target: what to explain; see `relprop.targets.resolve_target`.
            ledger: keep the books of the relevance pass (slower).
            check: run twice more with a slightly moved input and fill `disagreement` and `trustworthy`.
        Returns:
            Each sample's explanation is what it would be alone.
        Raises:
            ShapeError, DTypeError, DeviceError, NonFiniteError: the inputs. TargetError: the target.
            ModelStateError: the model is in training mode.
        """
        with torch.no_grad():
            inputs = self._bind(args, kwargs)
            explanation, resolved, reading = self._explain(inputs, target, ledger)
            if not check:
                return explanation
            own = reading.profile if self.program.readout.starts_from_profile else None
            if own is not None:
                own = own.transpose(0, 1) if resolved.several else own[0]
            disagreement = torch.stack(
                [
                    trust.disagreement(
                        explanation.relevance,
                        self._explain(inputs, target, False, resolved, moved=seed)[0].relevance,
                        resolved.several,
                        own,
                        reading.explained_tokens,
                    )
                    for seed in trust.SEEDS
                ]
            ).amax(0)
            limit = trust.threshold(self.program.method.name, self._dtype)
            return replace(explanation, disagreement=disagreement, trustworthy=disagreement <= limit)

    def trace(self, *args: Any, target: TargetLike = None, **kwargs: Any) -> Trace:
        """Every stream at every value the sweep passes, and every attention map, for looking inside.

        Returns:
            streams by (value name, stream) and maps by (module path, map name), with a leading axis of targets.
        """
        with torch.no_grad():
            trace = Trace()
            self._explain(self._bind(args, kwargs), target, False, trace=trace)
            return trace

    def _explain(
        self,
        inputs: dict[int, Any],
        target: TargetLike,
        ledger: bool,
        resolved: Target | None = None,
        moved: int | None = None,
        trace: Trace | None = None,
    ) -> tuple[Explanation, Target, Reading]:
        program, graph = self.program, self.program.graph
        if self._booked is not None and program.gradient_form and (ledger or trace is not None):
            program = self._booked()
        bound = {**inputs, **self._weights.read(), **graph.constants}
        derive = DeriveOnce(graph, self._weights.derived)
        forward = run_forward(program, bound, derive, None if moved is None else trust.mover(graph, moved))
        output = forward.tensors[graph.output.index]
        if ledger and isinstance(program.readout, SampledMap):
            raise OptionError(f"ledger: expected a method of one pass, got {program.method.name}, a mean over several")
        if resolved is None:
            resolved = resolve_target(target, output, self._dtype)
        reading = self._reading(program, forward, output, resolved)
        reader = program.readout.reader()
        sweep = Sweep(program, forward, derive, reading, reader, self._dtype, self._precision, ledger, trace)
        if isinstance(program.readout, SampledMap):
            books, relevance = None, self._sampled(program, program.readout, bound, derive, forward, target, resolved)
        else:
            books = sweep.run(resolved.seed)
            relevance = reader.finish(reading)
        explanation = self._explanation(relevance, output, resolved, reading, forward, books)
        if program.requirements.latents:
            explanation = replace(explanation, latents=sweep.latents(resolved.several))
        return explanation, resolved, reading

    def _sampled(
        self,
        program: Program,
        readout: SampledMap,
        bound: dict[int, Any],
        derive: DeriveOnce,
        forward: Forward,
        target: TargetLike,
        resolved: Target,
    ) -> Tensor:
        """Gradients at a read-out's points, several points to a batch. [T, B, ...]"""
        ((value, stream),) = program.requirements.values
        x = forward.tensors[value.index]
        points, total = readout.points(x), None
        for start in range(0, len(points), readout.batch):
            weights, moved = zip(*points[start : start + readout.batch], strict=True)
            run = run_forward(program, self._repeated(bound, len(weights)), derive, _replacing(value, torch.cat(moved)))
            output = run.tensors[program.graph.output.index]
            if callable(target):
                resolved = resolve_target(target, output, self._dtype)
                seed = resolved.seed
            else:
                seed = resolved.seed.repeat(1, len(weights), *[1] * (resolved.seed.ndim - 2))
            reading = self._reading(program, run, output, replace(resolved, seed=seed))
            sweep = Sweep(program, run, derive, reading, Reader(), self._dtype, self._precision, False)
            sweep.run(seed)
            per_point = reading.streams[value, stream].unflatten(1, (len(weights), -1))
            scale = torch.tensor(weights, dtype=per_point.dtype, device=per_point.device)
            part = torch.einsum("tk...,k->t...", per_point, scale)
            total = part if total is None else total + part
        assert total is not None
        return over_channels(readout.combine(x.to(total.dtype), total))

    def _repeated(self, bound: dict[int, Any], times: int) -> dict[int, Any]:
        """Inputs with a batch axis, repeated; everything else as it is."""
        batched = {spec.placeholder for spec in self._captured.inputs if spec.shape and spec.shape[0] is None}
        indices = {value.index for name, value in self.program.graph.inputs.items() if name in batched}
        return {i: t.repeat(times, *[1] * (t.ndim - 1)) if i in indices else t for i, t in bound.items()}

    def _reading(self, program: Program, forward: Forward, output: Tensor, target: Target) -> Reading:
        graph = program.graph
        reading = Reading(output.shape[0], target.seed.shape[0])
        reading.backend = (
            "cpp" if any(s.backend == "cpp" for step in program.reverse for s in step.streams) else "torch"
        )
        if program.requirements.profile:
            site = program.requirements.profile_site
            reading.profile = read_profile(graph, forward.tensors, forward.shapes, target.seed, site)
            flags = explained_tokens(graph, graph.attention_sites()[0], lambda i: forward.shapes[i])
            if flags and site is None:
                reading.explained_tokens = torch.tensor(flags, device=output.device)
        if program.requirements.positions:
            reading.positions = []
        for value, _ in program.requirements.values:
            reading.inputs[value] = forward.tensors[value.index]
        return reading

    def _explanation(
        self,
        relevance: Tensor | dict[str, Tensor],
        output: Tensor,
        target: Target,
        reading: Reading,
        forward: Forward,
        books: Ledger | None,
    ) -> Explanation:
        method = self.program.method

        def shape(found: Tensor) -> Tensor:
            found = found.expand(reading.targets, *found.shape[1:])
            return (found.transpose(0, 1) if target.several else found[0]).contiguous()

        several: dict[str, Tensor] = {}
        if isinstance(relevance, dict):
            paths = {spec.placeholder: spec.path for spec in self._captured.inputs}
            several = {paths[name]: shape(found) for name, found in relevance.items()}
            shaped = several[next(path for path in paths.values() if path in several)]
            kinds, grid, size = (), None, None
        else:
            shaped = shape(relevance)
            kinds, grid, size = self._layout(reading, forward, shaped.shape[-1])
        index = target.index
        if index is not None and not target.several:
            index = index[:, 0]
        names = [spec.path for spec in self._captured.inputs if spec.placeholder in self._explained_names()]
        return Explanation(
            relevance=shaped,
            relevances=several or ({names[0]: shaped} if len(names) == 1 else {}),
            logits=output,
            target=index,
            method=method.name,
            composite=self.program.composite.name,
            token_kinds=kinds if method.output == "tokens" else (),
            grid=grid if method.output == "tokens" else None,
            image_size=size,
            ledger=books,
        )

    def _explained_names(self) -> set[str]:
        graph = self.program.graph
        explained = {v.index for v in graph.explained}
        return {name for name, value in graph.inputs.items() if value.index in explained}

    def _layout(
        self, reading: Reading, forward: Forward, tokens: int
    ) -> tuple[tuple[str, ...], tuple[int, int] | None, tuple[int, int] | None]:
        """Kinds of the tokens, the grid of patches, and the size of the input image."""
        graph = self.program.graph
        image = next((v for v in graph.explained if v.rank == 4), None)
        size = None if image is None else tuple(int(s) for s in forward.shapes[image.index][-2:])
        if not self.program.requirements.profile:
            return (), None, size  # type: ignore[return-value]
        explained = [True] * tokens if reading.explained_tokens is None else reading.explained_tokens.tolist()
        assert reading.profile is not None
        read = (reading.profile.amax((0, 1)) > 0).tolist()
        plain = "patch" if image is not None else "word"
        kinds = tuple(
            plain if is_input else ("class" if is_read else "register")
            for is_input, is_read in zip(explained, read, strict=True)
        )
        grid = None
        for node in graph.nodes:
            if image is not None and node.kind == "conv" and node.role == "input":
                shape = forward.shapes[node.outputs[0].index]
                if shape[-2] * shape[-1] == sum(explained):
                    grid = (int(shape[-2]), int(shape[-1]))
        return kinds, grid, size  # type: ignore[return-value]

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int, Any]:
        """Inputs by value index, checked against the capture."""
        if self._model.training:
            raise ModelStateError(
                f"{type(self._model).__name__}: expected a model in evaluation mode, got one in training mode"
            )
        named = bind_arguments(self._model, args, kwargs)
        given, expected = set(named), set(self._captured.signature)
        if given != expected:
            raise ShapeError(
                f"inputs: expected {', '.join(sorted(expected))}, got {', '.join(sorted(given)) or 'none'}"
            )
        ordered = {name: named[name] for name in self._captured.signature}
        leaves, spec = pytree.tree_flatten(ordered)
        if spec != self._captured.in_spec:
            raise ShapeError(f"inputs: expected the structure {self._captured.in_spec}, got {spec}")
        tensors = []
        for leaf, plain in zip(leaves, self._captured.in_leaves, strict=True):
            if plain is None and isinstance(leaf, Tensor):
                tensors.append(leaf)
            elif plain != leaf:
                raise OptionError(f"inputs: expected {plain!r} as when compiled, got {leaf!r}; compile again for it")
        bound: dict[int, Any] = {}
        batch, length = None, None
        for spec_, tensor in zip(self._captured.inputs, tensors, strict=True):
            batch, length = _check_input(spec_, tensor, batch, length)
            value = self.program.graph.inputs.get(spec_.placeholder)
            if value is not None:
                bound[value.index] = tensor
        return bound


def _replacing(value: Value, tensor: Tensor) -> Callable[[Value, Tensor], Tensor]:
    """A forward pass's hook that puts a tensor in one value's place."""
    return lambda at, found: tensor.to(found.dtype) if at is value else found


def _check_input(spec: Any, tensor: Tensor, batch: int | None, length: int | None) -> tuple[int | None, int | None]:
    if tensor.device != spec.device:
        raise DeviceError(f"input {spec.path}: expected a tensor on {spec.device}, got one on {tensor.device}")
    if tensor.dtype != spec.dtype:
        raise DTypeError(f"input {spec.path}: expected {spec.dtype}, got {tensor.dtype}")
    names = ["B" if i == 0 else "N" for i in range(len(spec.shape))]
    expected = "[" + ", ".join(names[i] if s is None else str(s) for i, s in enumerate(spec.shape)) + "]"
    fits = tensor.ndim == len(spec.shape) and all(
        want is None or want == size for want, size in zip(spec.shape, tensor.shape, strict=False)
    )
    if not fits or 0 in tensor.shape:
        raise ShapeError(f"input {spec.path}: expected shape {expected}, got {list(tensor.shape)}")
    if spec.shape and spec.shape[0] is None:
        if batch is not None and tensor.shape[0] != batch:
            raise ShapeError(
                f"input {spec.path}: expected {batch} samples as in the first input, got {tensor.shape[0]}"
            )
        batch = tensor.shape[0]
    if len(spec.shape) == 2 and spec.shape[1] is None:
        if length is not None and tensor.shape[1] != length:
            raise ShapeError(
                f"input {spec.path}: expected {length} tokens as in the first input, got {tensor.shape[1]}"
            )
        length = tensor.shape[1]
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        finite = torch.isfinite(tensor).reshape(tensor.shape[0], -1).all(-1)
        bad = torch.nonzero(~finite).flatten().tolist()
        raise NonFiniteError(f"input {spec.path}: expected finite numbers, got NaN or infinity in sample(s) {bad}")
    return batch, length


def explain(
    model: nn.Module,
    *args: Any,
    target: TargetLike = None,
    method: str = "transformer_attribution",
    composite: str | Composite | None = None,
    method_options: Mapping[str, Any] | None = None,
    backend: str = "auto",
    precision: str = "highest",
    output: str | int | Callable[..., Any] | None = None,
    latents: Sequence[str] = (),
    ledger: bool = False,
    check: bool = False,
    **kwargs: Any,
) -> Explanation:
    """Compile (from a cache after the first call) and explain in one call; see `compile` and `Engine.__call__`."""
    engine = compile(
        model,
        args,
        kwargs,
        method=method,
        composite=composite,
        method_options=method_options,
        backend=backend,
        precision=precision,
        output=output,
        latents=latents,
    )
    return engine(*args, target=target, ledger=ledger, check=check, **kwargs)
