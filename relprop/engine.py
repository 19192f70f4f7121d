"""compile and explain: a model becomes an engine, an engine explains batches."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from relprop import cost, memory, trust
from relprop.answers import explained_names, explanation_of
from relprop.backends import choose_kernels
from relprop.batches import check_batch_size, check_count, join, of_own_targets, pieces
from relprop.capture import Captured
from relprop.composites import Composite, find_composite
from relprop.errors import BackendError, OptionError
from relprop.execute import Forward, PassResult, Trace, run_pass, run_sampled
from relprop.explanation import Explanation
from relprop.export import example_batch, export_program, save
from relprop.graph import Value
from relprop.inputs import bind_inputs, check_mode, check_weights, placement, telling_own_errors, unwrapped
from relprop.latents import module_patterns
from relprop.lowering import PassFunction, output_shape
from relprop.methods import Reading, find_method
from relprop.methods.sampled import SampledMap
from relprop.native import available
from relprop.plans import CACHE, plan_of
from relprop.program import Program, build_program
from relprop.recurring import Recurring
from relprop.replay import CudaRecorder, Recorder, Recording, Replays
from relprop.tape import CpuRecorder
from relprop.targets import (
    Contrast,
    Target,
    TargetLike,
    block_diagonal,
    count_targets,
    find_index,
    resolve_target,
    sent,
)
from relprop.torch_flags import exact_products
from relprop.weights import DerivedWeights, DeriveOnce, Weights

PRECISIONS = ("highest", "high", "medium")
TAPED_BACKENDS = ("auto", "cpp", "torch")  # whose work the tape sees


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
    latents: str | Sequence[str] = (),
    held: tuple[str, ...] = (),
    compile: bool = False,
    cuda_graph: bool = False,
    tape: bool | None = None,
) -> Engine:
    """Capture a model and plan a method on it.

    Args:
        model: a module in evaluation mode, on one device. It is not modified and may be used elsewhere meanwhile. Of
            one that torch.compile or DataParallel wraps, what is inside.
        args, kwargs: an example call, as torch.export takes it. The batch size stays free, and the length of token
            inputs; other sizes are as in the example.
        method: a name of `relprop.methods()`.
        composite: rules for the relevance stream, a name of `relprop.composites()` or a Composite; the method's own
            by default.
        method_options: options of the method, such as {"start_layer": 1}.
        backend: "auto", "torch", "cpp", "triton" or "cuda".
        precision: of matrix products in float32 streams: "highest", "high", or "medium" for bfloat16 products with
            float32 accumulation where the hardware has them.
        output: which of several outputs to explain: a key, an index, or a function of the output.
        latents: module paths ("blocks.*.mlp", "blocks.3:input", "blocks.5.attn:heads") at which relevance is kept for
            `Explanation.at`. Of a module that is called several times every call is kept, as "path@0", "path@1". Heads
            are what each head makes of the values; where heads are mixed after the softmax, the mixed ones.
        held: arguments of the model's forward that are held as they are: nothing is propagated into them, and methods
            that move inputs leave them where they are. By default every floating-point tensor is explained.
        compile: run the pass as one graph through torch.compile, kernels as custom ops in it. Made once per padded
            batch size, which takes long.
        cuda_graph: record the pass as a CUDA graph once per padded batch size, and replay it.
        tape: the same on the CPU: replay the calls of torch's and this package's kernels, without the plan's Python,
            with the same bits. None does so by itself once a shape has come twice, in memory that it gives back after
            every call; True from the first call on, in memory that the engine keeps.
    Returns:
        An engine. A second call for the same model, method and kind of input is served from a cache.
    Raises:
        InputError, ModelStateError, CaptureError, UnsupportedOpError, UnsupportedTopologyError, UnknownNameError,
        OptionError, BackendError.

    Example:
        >>> from relprop.demo import bundled_scenes, load_model, preprocess
        >>> model, images = load_model(), preprocess(bundled_scenes()["scene_3_7"].image[None])
        >>> engine = compile(model, (images,), method="full")
        >>> engine(images.repeat(3, 1, 1, 1), target=7).relevance.shape
        torch.Size([3, 64, 64])
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    model = unwrapped(model)
    if precision not in PRECISIONS:
        raise OptionError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    chosen = find_method(method)
    rules = find_composite(composite if composite is not None else chosen.composite)
    check_mode(model)
    check_weights(model)
    device, dtype = placement(model, args, dict(kwargs or {}))
    if cuda_graph and device.type != "cuda":
        raise BackendError(f"cuda_graph: expected a model on a CUDA device, got one on {device}")
    if tape and device.type != "cpu":
        raise BackendError(f"tape: expected a model on the CPU, got one on {device}")
    if tape and backend not in TAPED_BACKENDS:
        raise BackendError(f"tape: expected a backend among {', '.join(TAPED_BACKENDS)}, got {backend}")
    if tape and compile:
        raise OptionError("tape: expected it without compile, got both")
    batch = _samples_of(args, kwargs) if backend == "auto" and device.type == "cuda" else 0
    kernels = choose_kernels(backend, dtype, device, precision, batch)
    inside = module_patterns(latents)
    key = (method, rules, hashable_options(method_options), backend, dtype, str(device), precision, inside, batch == 1)

    def build(books: bool) -> Program:
        return build_program(
            plan.graph(chosen.make_readout(method_options).all_rows),
            chosen,
            method_options,
            rules,
            kernels,
            plan.captured.batch_symbols,
            books=books,
            latents=inside,
        )

    with CACHE.lock:
        plan = plan_of(model, args, dict(kwargs or {}), output, held)
        program = plan.programs.get(key)
        if program is None:
            program = build(False)
            plan.programs[key] = program

    def booked() -> Program:
        with CACHE.lock:
            if (key, "books") not in plan.programs:
                plan.programs[key, "books"] = build(True)
            return plan.programs[key, "books"]

    engine = Engine(model, plan.captured, program, backend, precision, dtype, device, booked)
    if compile or cuda_graph or tape:
        engine._replay(compile, CudaRecorder(device) if cuda_graph else CpuRecorder() if tape else None)
    elif tape is None and device.type == "cpu" and backend in TAPED_BACKENDS and available()[0]:
        engine._replay_what_recurs()
    return engine


def _samples_of(args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> int:
    """How many samples an example has: the length of its first tensor."""
    tensors = (
        leaf for leaf in pytree.tree_leaves((args, dict(kwargs or {}))) if isinstance(leaf, Tensor) and leaf.dim()
    )
    return next((tensor.shape[0] for tensor in tensors), 1)


def hashable_options(options: Mapping[str, Any] | None) -> Any:
    """A method's options as part of a key.

    Raises:
        OptionError: values that are not plain.
    """
    try:
        found = tuple(sorted((options or {}).items()))
        hash(found)
    except TypeError:
        raise OptionError(f"method_options: expected plain values, got {dict(options or {})!r}") from None
    return found


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
        self._fixed = program.graph.constants
        found = {spec.placeholder: bool(spec.shape) and spec.shape[0] is None for spec in captured.inputs}
        self._batched = {value.index: found[name] for name, value in program.graph.inputs.items()}
        self._forecast = memory.Forecast(self._probe)
        self._replays: Replays | Recurring | None = None

    def _replay(self, compiled: bool, recorder: Recorder | None) -> None:
        """Explain by runs of fixed shapes from now on."""
        self._one_pass("compile, cuda_graph, tape")
        self._replays = Replays(*self._parts(), compiled=compiled, recorder=recorder)

    def _replay_what_recurs(self) -> None:
        """Explain by runs of fixed shapes where they pay, if this plan has any."""
        with contextlib.suppress(OptionError):
            self._one_pass("tape")
            self._replays = Recurring(*self._parts())

    def _one_pass(self, what: str) -> None:
        if len(explained_names(self.program.graph)) > 1 or self._pairs():
            raise OptionError(
                f"{what}: expected a model with one explained input and scores of its own for each sample, got"
                f" {', '.join(sorted(explained_names(self.program.graph)))} and an output of shape"
                f" {self.program.graph.output.describe()}"
            )
        matrices, latents = self.program.readout.gives_matrices, len(self.program.requirements.latents)
        if isinstance(self.program.readout, SampledMap) or latents or matrices:
            raise OptionError(
                f"{what}: expected a method of one pass, without latents and matrices of sequences, got"
                f" {self.program.method.name} with {latents} latent(s){' and matrices' if matrices else ''}"
            )

    def _parts(self) -> tuple[PassFunction, list[bool], Callable[[], list[Tensor]], DerivedWeights]:
        """What runs of fixed shapes are made from."""
        function = PassFunction(self.program, self._indices, self._dtype, self._precision)
        return function, list(self._batched.values()), self._lasting, self._weights.derived

    @property
    def _indices(self) -> list[int]:
        """Of the values that a pass starts from: inputs, then what lasts."""
        return [*self._batched, *self.program.graph.parameters, *self._fixed]

    def _lasting(self) -> list[Tensor]:
        """Parameters, buffers and constants, as they are now."""
        read = self._weights.read()
        return [*(read[index] for index in self.program.graph.parameters), *self._fixed.values()]

    def __repr__(self) -> str:
        return (
            f"Engine({type(self._model).__name__}, method={self.program.method.name!r},"
            f" composite={self.program.composite.name!r}, {self._device}, streams {self._dtype})"
        )

    def refresh(self) -> None:
        """Forget what was derived from the weights, after a write that version counters cannot show (`.data`)."""
        self._weights.derived.clear()
        if self._replays is not None:
            self._replays.clear()

    def __call__(
        self,
        *args: Any,
        target: TargetLike = None,
        ledger: bool = False,
        check: bool = False,
        batch_size: int | str | None = None,
        **kwargs: Any,
    ) -> Explanation:
        """Explain a batch.

        Args:
            args, kwargs: as the model takes them. First axes are the batch.
            target: what to explain; see `relprop.targets.resolve_target`.
            ledger: keep the books of the relevance pass (slower), of a method that propagates relevance.
            check: run twice more with a slightly moved input and fill `disagreement` and `trustworthy`.
            batch_size: samples that are explained at a time; "auto" takes as many as the free memory holds, None all.
                A callable target sees the output of these. A model that scores samples with each other takes all.
        Returns:
            Each sample's explanation is what it would be alone.
        Raises:
            ShapeError, DTypeError, DeviceError, NonFiniteError: the inputs. TargetError: the target.
            InputError: the model itself does not take them. ModelStateError: the model is in training mode.
            OptionError: the batch size; the ledger.

        Example:
            >>> from relprop.demo import bundled_scenes, load_model, preprocess
            >>> model, images = load_model(), preprocess(bundled_scenes()["scene_3_7"].image[None])
            >>> engine = compile(model, (images,))
            >>> found = engine(images, target=[[3, 7]], check=True)  # two classes of each sample
            >>> found.relevance.shape, found.trustworthy
            (torch.Size([1, 2, 65]), tensor([[True, True]]))
        """
        check_batch_size(batch_size)
        with torch.no_grad(), telling_own_errors(self._model, args, kwargs):
            inputs = self._bind(args, kwargs)
            batched = frozenset(i for i, is_batch in self._batched.items() if is_batch)
            batch = next((len(inputs[i]) for i in inputs if i in batched), 1)
            runs = self._runs(target, ledger, check)
            size = self._fitting(inputs, target, batch, runs) if batch_size == "auto" else batch_size
            if size is not None and int(size) < batch and self._pairs():
                raise OptionError(
                    "batch_size: expected a batch in one piece, as the output scores every sample with every sample"
                    f" [B, B], got batch_size {batch_size!r}, which takes {size} of {batch} samples at a time"
                )
            named = {
                spec.path: inputs[value.index]
                for spec in self._captured.inputs
                if (value := self.program.graph.inputs.get(spec.placeholder)) is not None
            }
            if size is None or int(size) >= batch:
                return replace(self._explained(inputs, target, ledger, check), inputs=named)
            if ledger:
                raise OptionError(f"ledger: expected a batch in one piece, got batch_size {size} for {batch} samples")
            parts = [self._explained(*part, ledger, check) for part in pieces(inputs, batched, target, int(size))]
            return replace(join(parts), inputs=named)

    def _explained(self, inputs: dict[int, Any], target: TargetLike, ledger: bool, check: bool) -> Explanation:
        runs = self._runs(target, ledger, check)
        if runs is not None:
            replayed = self._replayed(runs, inputs, target)
            if replayed is not None:
                return replayed
        explanation, resolved, reading = self._explain(inputs, target, ledger)
        if not check:
            return of_own_targets(explanation) if resolved.apart else explanation
        own = reading.profile if self.program.readout.starts_from_profile else None
        if own is not None:
            own = own[..., : reading.tokens]
            own = own.transpose(0, 1) if resolved.several else own[0]
        disagreement = torch.stack(
            [
                trust.disagreement(
                    trust.answer(explanation, resolved.several),
                    trust.answer(self._explain(inputs, target, False, resolved, moved=seed)[0], resolved.several),
                    resolved.several,
                    own,
                    reading.explained_tokens,
                )
                for seed in trust.SEEDS
            ]
        ).amax(0)
        limit = trust.threshold(self.program.method.name, self._dtype)
        explanation = replace(explanation, disagreement=disagreement, trustworthy=disagreement <= limit)
        return of_own_targets(explanation) if resolved.apart else explanation

    def _runs(self, target: TargetLike, ledger: bool, check: bool) -> Replays | None:
        """What explains a call by runs of fixed shapes, None where the plan does."""
        return None if ledger or check or callable(target) or isinstance(target, Contrast) else self._replays

    def _replayed(self, replays: Replays, inputs: dict[int, Any], target: TargetLike) -> Explanation | None:
        """A run of fixed shapes, where there is one; the target is checked before, as nothing within reads values."""
        shape = output_shape(self.program.graph, inputs)
        index, several = None, False
        if target is not None or len(shape) != 2:
            index, several = find_index(target, torch.empty(shape, device="meta"))
            index = sent(index, self._device)
        with exact_products():
            found = replays([inputs[i] for i in self._batched], index)
        if found is None:
            return None
        outcome, layout = found
        targets, batch = outcome.relevance.shape[:2]
        reading = Reading(batch, targets, outcome.profile, explained_tokens=layout.explained_tokens)
        aim = Target(outcome.relevance, outcome.index, several)
        result = PassResult(outcome.relevance, outcome.logits, aim, reading, layout.shapes)
        return explanation_of(result, self.program, self._captured.inputs)

    @property
    def recordings(self) -> list[Recording]:
        """What there is to replay, the one used last at the end."""
        return [] if self._replays is None else self._replays.recordings

    def memory(self, batch: int, *, targets: int = 1) -> int:
        """Peak bytes of explaining a batch, beside the model's own weights: the inputs, what is derived from weights,
        and what lives during the pass.

        Of an engine that records passes (`tape`, `cuda_graph` of `compile`) it is what the first call of a batch takes:
        the padded size, at most 64 samples at a time, with the copies that recordings have of inputs and answers.
        Later calls take no more. Of several runs with large answers it is a bound. What torch.compile makes of a pass
        (`compile=True`) is forecast as the plan's.

        Measured once per engine and number of targets, on two small batches of inputs shaped like the example, and
        continued from there allocation by allocation.

        Args:
            batch: samples.
            targets: per sample.
        Raises:
            OptionError: a number that is not a positive int.
        """
        check_count("batch", batch)
        check_count("targets", targets)
        return self._peak(self._sizes(), targets, [batch], self._replays) + self.derived_memory

    def _peak(
        self, sizes: Mapping[int, tuple[int, ...]], targets: int, batches: Sequence[int], runs: Replays | None
    ) -> int:
        """Of batches one after the other, beside what is derived from weights."""
        passes = self._forecast(sizes, targets)
        if runs is None:
            return passes.peak(max(batches))
        return runs.peak(batches, passes, lambda count: self._input_bytes(sizes, count))

    def _input_bytes(self, sizes: Mapping[int, tuple[int, ...]], batch: int) -> int:
        shapes = {i: (batch if is_batch else sizes[i][0], *sizes[i][1:]) for i, is_batch in self._batched.items()}
        return sum(math.prod(shape) * self.program.graph.values[i].dtype.itemsize for i, shape in shapes.items())

    @property
    def derived_memory(self) -> int:
        """Bytes of what has been derived from the model's weights: casts of half precision, packed weights."""
        return self._weights.derived.nbytes

    def _sizes(self) -> dict[int, tuple[int, ...]]:
        """Of every input at a batch of one, as in the example."""
        values, symbols = self.program.graph.values, self.program.batch_symbols
        return {i: tuple(cost.sizes(values[i], symbols)) for i in self._batched}

    def _example(self, sizes: Mapping[int, tuple[int, ...]], batch: int) -> dict[int, Tensor]:
        """Ones of these sizes, at another batch."""
        values = self.program.graph.values
        return {
            i: torch.ones((batch if is_batch else sizes[i][0], *sizes[i][1:]), dtype=values[i].dtype).to(self._device)
            for i, is_batch in self._batched.items()
        }

    def _probe(self, sizes: Mapping[int, tuple[int, ...]], targets: int, batch: int) -> Explanation:
        axes = self.program.graph.output.rank - 1
        index = None if self._pairs() else torch.zeros(batch, targets, *([axes] if axes > 1 else []), dtype=torch.int64)
        with torch.no_grad():
            return self._explain(self._example(sizes, batch), index, False)[0]

    def _fitting(self, inputs: dict[int, Any], target: TargetLike, batch: int, runs: Replays | None) -> int:
        """As many samples as the free memory holds."""
        sizes = {i: (1 if is_batch else len(inputs[i]), *inputs[i].shape[1:]) for i, is_batch in self._batched.items()}
        targets = count_targets(target)

        def forecast(count: int) -> int:
            return self._peak(sizes, targets, [count, *([batch % count] if batch % count else [])], runs)

        forecast(1)  # the first one derives from the weights what every pass needs: that memory is not free after it
        if runs is not None:
            runs.release()
        budget = int(memory.SHARE * memory.available(self._device))
        return memory.largest_batch(forecast, budget, range(1, batch + 1) if runs is None else runs.cuts(batch))

    def export(self, path: str | Path, *, targets: int | None = None, compiled: bool = False) -> Path:
        """Write the forward and relevance pass as one `.pt2` file that runs without relprop.

        It takes the model's tensors in order, with any batch size and other sizes as in the example, and answers
        (relevance, logits, target) as an explanation has them. Its rules are in plain PyTorch, in float32 or float64;
        weights are part of it. Without compilation `torch.export.load(path).module()` runs it, compiled
        `torch._inductor.aoti_load_package(path)`.

        Args:
            targets: None explains the largest output; a number T adds indices [B, T] (or [B, T, k] for an output with
                k axes per sample) to the inputs.
            compiled: make a library for this machine's device with AOTInductor.
        Raises:
            OptionError: targets.
        """
        self._one_pass("export")
        if targets is not None and (isinstance(targets, bool) or not isinstance(targets, int) or targets < 1):
            raise OptionError(f"targets: expected None or a positive int, got {targets!r}")
        if targets is None and self.program.graph.output.rank != 2:
            raise OptionError(
                f"targets: expected a number for an output of shape {self.program.graph.output.describe()}, got None"
            )
        lasting, sizes = self._lasting(), self._sizes()
        batch = example_batch(*lasting, *self._example(sizes, 1).values(), targets=targets)
        with torch.no_grad():
            made = export_program(
                self.program,
                self._indices,
                list(self._example(sizes, batch).values()),
                list(self._batched.values()),
                lasting,
                self._dtype,
                self._precision,
                targets,
            )
        return save(made, path, compiled=compiled)

    def trace(self, *args: Any, target: TargetLike = None, **kwargs: Any) -> Trace:
        """Every stream at every value the sweep passes, and every attention map, for looking inside.

        Returns:
            streams by (value name, stream), each [T, *shape], and the maps that the method reads ("attention",
            "gradient", "relevance") by (module path, map name), each [T or 1, B, H, Nq, Nk]. A module that is called
            several times has "path@0", "path@1".
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
        # Books are kept of the plain rules, which want |w| of every layer: all of them would be the model once more.
        derive = DeriveOnce(graph, self._weights.derived, keep=not ledger)
        readout = program.readout
        if ledger and isinstance(readout, SampledMap):
            raise OptionError(f"ledger: expected a method of one pass, got {program.method.name}, a mean over several")
        if ledger and "relevance" not in program.seeds:
            raise OptionError(f"ledger: expected a method that propagates relevance, got {program.method.name}")

        def aim(output: Tensor) -> Target:
            return resolve_target(target, output, self._dtype, self._pairs()) if resolved is None else resolved

        def sampled(forward: Forward, aimed: Target) -> dict[Value, Tensor]:
            assert isinstance(readout, SampledMap)
            pairs = self._pairs()

            def aim_again(output: Tensor, points: int) -> Tensor:
                seeds = [aimed.seed] * points
                if callable(target):  # it knows the batch of one point, and its seed depends on the output
                    parts = output.chunk(points)
                    if pairs:
                        parts = tuple(part.chunk(points, 1)[i] for i, part in enumerate(parts))
                    seeds = [resolve_target(target, part, self._dtype, pairs).seed for part in parts]
                return block_diagonal(seeds) if pairs else torch.cat(seeds, 1)

            repeated = self._repeated(bound)
            return run_sampled(
                program, readout, repeated, derive, forward, aimed, aim_again, self._dtype, self._precision
            )

        with exact_products():
            result = run_pass(
                program,
                bound,
                aim,
                derive,
                self._dtype,
                self._precision,
                move=None if moved is None else trust.mover(graph, moved),
                ledger=ledger,
                trace=trace,
                instead=sampled if isinstance(readout, SampledMap) else None,
            )
        return explanation_of(result, self.program, self._captured.inputs), result.target, result.reading

    def _pairs(self) -> bool:
        """Whether the output scores every sample with every sample."""
        symbols = self.program.batch_symbols
        sizes = [size.node.expr for size in self.program.graph.output.shape if isinstance(size, torch.SymInt)]
        return len(sizes) == 2 and all(expr.free_symbols & symbols for expr in sizes)

    def _repeated(self, bound: dict[int, Any]) -> Callable[[int], dict[int, Any]]:
        """Inputs with a batch axis, repeated; everything else as it is."""
        indices = {index for index, is_batch in self._batched.items() if is_batch}

        def repeated(times: int) -> dict[int, Any]:
            return {i: t.repeat(times, *[1] * (t.ndim - 1)) if i in indices else t for i, t in bound.items()}

        return repeated

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int, Any]:
        return bind_inputs(self._model, self._captured, self.program.graph, args, kwargs)


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
    latents: str | Sequence[str] = (),
    held: tuple[str, ...] = (),
    ledger: bool = False,
    check: bool = False,
    **kwargs: Any,
) -> Explanation:
    """Compile (from a cache after the first call) and explain in one call; see `compile` and `Engine.__call__`.

    Example:
        >>> from relprop.demo import bundled_scenes, load_model, preprocess
        >>> model, images = load_model(), preprocess(bundled_scenes()["scene_3_7"].image[None])
        >>> explanation = explain(model, images, target=7)
        >>> explanation.relevance.shape, explanation.image_map().shape
        (torch.Size([1, 65]), torch.Size([1, 64, 64]))
        >>> explain(model, images, target=7, method="attnlrp").relevance.shape
        torch.Size([1, 64, 64])
    """
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
        held=held,
    )
    return engine(*args, target=target, ledger=ledger, check=check, **kwargs)
