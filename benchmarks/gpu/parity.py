"""Whole explanations on the device against the rules in float64: methods, backends, with and without a CUDA graph.

A row per method, backend and dtype: the median error over five inputs, one input's being that of all its targets.
Published rules amplify any rounding, by factors that differ from input to input: two computations that round alike
differ more on one input than two medians do. Where the pass is recorded, the inputs are replayed after one another and
the first again, and each answer is held to float64 and to the same engine's without a recording. What `end_to_end`
times must have a row here that is right.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.contenders import backends, engine_of, images, key_of, llama, token_ids, vit
from benchmarks.gpu.machine import Machine, told

DTYPES = (torch.bfloat16, torch.float32)
INPUTS = 5
LARGEST_ERROR = 1e-3  # in float32
FACTOR = 2.0  # times what plain rules lose that compute in the same dtype throughout
AMPLIFYING = ("chefer",)  # composites whose plain rules lose more than LARGEST_ERROR in float32 on some inputs
# Of how far the answers to two inputs are apart: a replay that answers to another input is as far off.
LARGEST_DIFFERENCE = 0.1


@dataclass
class Family:
    """A model in float64, inputs, and how its engines are made.

    Attributes:
        methods: and composites.
        answer: of an engine, for an input.
    """

    name: str
    exact: Any
    inputs: tuple[Any, ...]
    methods: tuple[tuple[str, str], ...]
    example: Callable[[Any], Any]
    options: dict[str, Any]
    answer: Callable[[Any, Any], Tensor]


def vit_family(machine: Machine) -> Family:
    target = torch.tensor([[5, 7]] * 2, device=machine.device)
    return Family(
        "vit",
        vit(machine).double(),
        tuple(images(machine, 2, seed=seed).double() for seed in range(1, INPUTS + 1)),
        (("transformer_attribution", "chefer"), ("transformer_attribution", "chefer_stable"), ("attnlrp", "attnlrp")),
        lambda given: given,
        {},
        lambda engine, given: engine(given, target=target).relevance[..., 1:].double(),
    )


def llama_family(machine: Machine) -> Family:
    model = llama(machine, layers=2, dtype=torch.float64)
    kwargs = {"use_cache": False, "logits_to_keep": 1}
    length = machine.size(256, 6)
    return Family(
        "llama",
        model,
        tuple(token_ids(machine, length, seed=seed) for seed in range(1, INPUTS + 1)),
        (("attnlrp", "attnlrp"),),
        lambda given: ((given,), kwargs),
        {"output": "logits"},
        lambda engine, given: engine(given, target=(0, 7), **kwargs).relevance.double(),
    )


def _error(found: Tensor, truth: Tensor) -> float:
    error = float((found - truth).norm() / truth.norm())
    return error if error == error else float("inf")


def bound_of(dtype: torch.dtype, composite: str, lost: list[float]) -> float:
    """What the median error may be.

    Args:
        lost: by plain rules that compute in this dtype, per input.
    """
    relative = FACTOR * statistics.median(lost)
    if dtype != torch.float32:
        return relative
    return max(LARGEST_ERROR, relative) if composite in AMPLIFYING else LARGEST_ERROR


def is_right(errors: list[float], bound: float) -> bool:
    """Whether the median is within the bound, and no answer holds anything but numbers."""
    return statistics.median(errors) <= bound and all(error < float("inf") for error in errors)


def _replayed(found: list[Tensor], plain: list[Tensor] | None) -> dict[str, float]:
    """How far replays are from the answers of the same engine without a recording, and those from one another."""
    if plain is None:
        return {"replay_difference": float("inf"), "inputs_apart": 0.0}
    pairs = zip(found, (*plain, plain[0]), strict=True)
    return {
        "replay_difference": max(_error(one, other) for one, other in pairs),
        "inputs_apart": min(_error(other, plain[0]) for other in plain[1:]),
    }


class _Model:
    """One family's model in one dtype."""

    def __init__(self, machine: Machine, family: Family, dtype: torch.dtype) -> None:
        self.machine, self.family, self.dtype = machine, family, dtype
        self.model = family.exact if dtype == torch.float64 else copy.deepcopy(family.exact).to(dtype)
        self.inputs = [x.to(dtype) if x.is_floating_point() else x for x in family.inputs]

    def answers(
        self,
        method: str,
        composite: str,
        backend: str,
        graph: bool = False,
        compiled: bool = False,
        streams: torch.dtype | None = None,
    ) -> list[Tensor]:
        """Of all inputs; where the pass is recorded the first one's again."""
        options = {"backend": backend, "method": method, "composite": composite, "compile": compiled}
        options |= self.family.options
        engine = engine_of(self.machine, self.model, self.family.example(self.inputs[0]), graph, **options)
        engine._dtype = streams or engine._dtype
        return [self.family.answer(engine, given) for given in (*self.inputs, *self.inputs[: int(graph)])]


def rows_of(machine: Machine, family: Family) -> Iterator[bool]:
    """A row per method, dtype, backend and way to run; whether it is right."""
    exact = _Model(machine, family, torch.float64)
    truths = {pair: exact.answers(*pair, "torch") for pair in family.methods}
    for dtype in DTYPES:
        model = _Model(machine, family, dtype)
        for pair in family.methods:
            ways = [(backend, graph, False) for backend in backends(machine) for graph in (False, True)]
            yield from _rows(machine, model, pair, truths[pair], [*ways, ("torch", False, False)])


def compiled_rows_of(machine: Machine, family: Family) -> Iterator[bool]:
    """A row of the first method's pass through torch.compile, recorded, in bfloat16."""
    # Generated code rounds elsewhere than plain rules do, which the published composite amplifies on some inputs.
    pair = next(pair for pair in family.methods if pair[1] != "chefer")
    truth = _Model(machine, family, torch.float64).answers(*pair, "torch")
    model = _Model(machine, family, torch.bfloat16)
    yield from _rows(machine, model, pair, truth, [("triton", False, False), ("triton", True, True)])


def _rows(
    machine: Machine, model: _Model, pair: tuple[str, str], truth: list[Tensor], ways: list[tuple[str, bool, bool]]
) -> Iterator[bool]:
    """A row per backend, whether recorded and whether through torch.compile."""
    method, composite = pair
    own = model.answers(*pair, "torch", streams=model.dtype)
    lost = [_error(found, want) for found, want in zip(own, truth, strict=True)]
    bound = bound_of(model.dtype, composite, lost)
    plain: dict[str, list[Tensor]] = {}
    for backend, graph, compiled in ways:
        key = key_of(model.family.name, method, composite, backend, graph, model.dtype, compiled)
        row: dict[str, Any] = dict(zip(Machine.KEY, key, strict=True))
        row |= {"run": "error", "error_torch_own_streams": statistics.median(lost), "bound": bound}
        try:
            found = model.answers(method, composite, backend, graph, compiled)
        except Exception as problem:
            machine.add(**row, right=False, failed=told(problem))
            yield False
            continue
        errors = [_error(one, other) for one, other in zip(found, truth, strict=False)]  # a second replay is compared
        row |= {"error": statistics.median(errors), "error_largest": max(errors)}
        right = is_right(errors, bound)
        if graph:
            row |= _replayed(found, plain.get(backend))
            # Generated code rounds otherwise than what it is compared with; an answer to another input is its error.
            right &= compiled or row["replay_difference"] <= LARGEST_DIFFERENCE * row["inputs_apart"]
        else:
            plain[backend] = found
        machine.add(**row, right=right, failed="" if right else "its error")
        yield right


def parity(machine: Machine) -> bool:
    """Rows of end_to_end_parity.csv; whether all are right."""
    return all([right for family in (vit_family, llama_family) for right in rows_of(machine, family(machine))])


def compiled_parity(machine: Machine) -> bool:
    """Likewise of passes through torch.compile: what generated code around the kernels changes."""
    return all([right for family in (vit_family, llama_family) for right in compiled_rows_of(machine, family(machine))])
