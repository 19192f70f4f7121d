"""Whole explanations on the device against the rules in float64: methods, backends, with and without a CUDA graph.

A row per method, backend and dtype: the largest error over two inputs and two targets of each. Where the pass is
recorded, both inputs are replayed after one another and the first again, and each answer is held to float64 and to the
same engine's without a recording. What `end_to_end` times must have a row here that is right.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.contenders import backends, engine_of, images, key_of, llama, token_ids, vit
from benchmarks.gpu.machine import Machine, told

DTYPES = (torch.bfloat16, torch.float32)
LARGEST_ERROR = 1e-3  # in float32
# Times what plain rules in the same dtype lose. The published rules amplify any rounding: two that round alike differ.
FACTOR = {"chefer": 4.0}
USUAL_FACTOR = 2.0
# Of how far the answers to two inputs are apart: a replay that answers to another input is as far off.
LARGEST_DIFFERENCE = 0.1


@dataclass
class Family:
    """A model in float64, two inputs, and how its engines are made.

    Attributes:
        methods: and composites.
        answer: of an engine, for an input.
    """

    name: str
    exact: Any
    inputs: tuple[Any, Any]
    methods: tuple[tuple[str, str], ...]
    example: Callable[[Any], Any]
    options: dict[str, Any]
    answer: Callable[[Any, Any], Tensor]


def vit_family(machine: Machine) -> Family:
    target = torch.tensor([[5, 7]] * 2, device=machine.device)
    return Family(
        "vit",
        vit(machine).double(),
        (images(machine, 2, seed=1).double(), images(machine, 2, seed=2).double()),
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
        (token_ids(machine, length, seed=1), token_ids(machine, length, seed=2)),
        (("attnlrp", "attnlrp"),),
        lambda given: ((given,), kwargs),
        {"output": "logits"},
        lambda engine, given: engine(given, target=(0, 7), **kwargs).relevance.double(),
    )


def _error(found: Tensor, truth: Tensor) -> float:
    error = float((found - truth).norm() / truth.norm())
    return error if error == error else float("inf")


def _replayed(found: list[Tensor], plain: list[Tensor] | None) -> dict[str, float]:
    """How far replays are from the answers of the same engine without a recording, and those from one another."""
    if plain is None:
        return {"replay_difference": float("inf"), "inputs_apart": 0.0}
    first, second = plain
    pairs = zip(found, (first, second, first), strict=True)
    return {
        "replay_difference": max(_error(one, other) for one, other in pairs),
        "inputs_apart": _error(second, first),
    }


class _Model:
    """One family's model in one dtype."""

    def __init__(self, machine: Machine, family: Family, dtype: torch.dtype) -> None:
        self.machine, self.family, self.dtype = machine, family, dtype
        self.model = family.exact if dtype == torch.float64 else copy.deepcopy(family.exact).to(dtype)
        self.inputs = [x.to(dtype) if x.is_floating_point() else x for x in family.inputs]

    def answers(
        self, method: str, composite: str, backend: str, graph: bool = False, streams: torch.dtype | None = None
    ) -> list[Tensor]:
        """Of both inputs; where the pass is recorded the first one's again."""
        options = {"backend": backend, "method": method, "composite": composite, **self.family.options}
        engine = engine_of(self.machine, self.model, self.family.example(self.inputs[0]), graph, **options)
        engine._dtype = streams or engine._dtype
        return [self.family.answer(engine, given) for given in (*self.inputs, *self.inputs[: int(graph)])]


def rows_of(machine: Machine, family: Family) -> Iterator[bool]:
    """A row per method, dtype, backend and way to run; whether it is right."""
    exact = _Model(machine, family, torch.float64)
    truths = {pair: exact.answers(*pair, "torch") for pair in family.methods}
    for dtype in DTYPES:
        model = _Model(machine, family, dtype)
        for method, composite in family.methods:
            truth = truths[method, composite]
            own = model.answers(method, composite, "torch", streams=dtype)
            lost = max(_error(found, want) for found, want in zip(own, truth, strict=True))
            bound = FACTOR.get(composite, USUAL_FACTOR) * lost
            if dtype == torch.float32:
                bound = max(LARGEST_ERROR, bound if composite in FACTOR else 0.0)
            plain: dict[str, list[Tensor]] = {}
            ways = [(backend, graph) for backend in backends(machine) for graph in (False, True)]
            for backend, graph in (*ways, ("torch", False)):
                key = key_of(family.name, method, composite, backend, graph, dtype)
                row: dict[str, Any] = dict(zip(Machine.KEY, key, strict=True))
                row |= {"run": "error", "error_torch_own_streams": lost, "bound": bound}
                try:
                    found = model.answers(method, composite, backend, graph)
                except Exception as problem:
                    machine.add(**row, right=False, failed=told(problem))
                    yield False
                    continue
                wanted = [*truth, truth[0]]
                row["error"] = max(_error(one, other) for one, other in zip(found, wanted, strict=False))
                right = row["error"] <= bound
                if graph:
                    row |= _replayed(found, plain.get(backend))
                    right &= row["replay_difference"] <= LARGEST_DIFFERENCE * row["inputs_apart"]
                else:
                    plain[backend] = found
                machine.add(**row, right=right, failed="" if right else "its error")
                yield right


def parity(machine: Machine) -> bool:
    """Rows of end_to_end_parity.csv; whether all are right."""
    return all([right for family in (vit_family, llama_family) for right in rows_of(machine, family(machine))])
