"""The check of the very answers that were timed: their first and last sample, each against its truth in float64."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.peers.cases import Case
from benchmarks.peers.contenders import CONTENDERS, Options, products
from benchmarks.peers.proofs import usable
from benchmarks.peers.truths import TRUTHS, Truth

NOT_COMPARED = "the timed answer was not compared: "


class Refused(Exception):
    """No time for this contender; the message says why."""


class _Unaffordable(Exception):
    """A truth that is not computed; the message says why."""


def ends(answer: Tensor) -> Tensor:
    """The first and the last sample of an answer, for themselves and on the CPU. [B, ...] -> [1 or 2, ...]"""
    return answer.detach()[[0, -1] if len(answer) > 1 else [0]].cpu().clone()


def compare(name: str, case: Case, answers: Sequence[Tensor], options: Options, folder: Path | None = None) -> str:
    """What the ends of a contender's timed answers were held to, in words.

    Args:
        case: on the CPU; becomes float64. answers: of several runs. [1 or 2, ...] each
        folder: where truths of this case are kept for other contenders.
    Raises:
        Refused: an answer is wrong.
    """
    contender, dtype, samples = CONTENDERS[name], case.point.dtype, min(2, len(case.inputs))
    wrong = [why for answer in answers if (why := usable(answer.float(), samples))]
    if wrong:
        raise Refused(f"wrong answer where it is timed: {wrong[0]}")
    if not contender.truth:
        return f"{NOT_COMPARED}it is drawn at random"
    truth, kept = TRUTHS[contender.truth], None if folder is None else folder / f"truth of {contender.truth}.pt"
    if kept is None or not kept.exists():
        try:
            expected: Tensor | str = _computed(truth, case, options)
        except _Unaffordable as problem:
            expected = str(problem)
        if kept is not None:
            torch.save(expected, kept)
    else:
        expected = torch.load(kept)
    if isinstance(expected, str):
        return f"{NOT_COMPARED}{expected}"
    check = f"timed answer, {'first and last sample' if samples > 1 else 'whole'}, against float64"
    found = [truth.held(check, answer, expected, products(contender.make, dtype)) for answer in answers]
    worst = max(found, key=lambda proof: proof.error)
    if not worst.passed:
        raise Refused(f"wrong answer where it is timed: {worst}")
    return str(worst)


def _computed(truth: Truth, case: Case, options: Options) -> Tensor:
    """The truth of a case's first and last sample, each alone. [1 or 2, ...]"""
    model = case.model.double()
    chosen = [0, -1] if len(case.inputs) > 1 else [0]
    inputs = case.inputs[chosen].double().split(1)
    ids = [None] * len(chosen) if case.ids is None else case.ids[chosen].split(1)
    alone = [replace(case, model=model, inputs=x, ids=row) for x, row in zip(inputs, ids, strict=True)]
    start = time.perf_counter()
    with torch.no_grad():
        model(alone[0].inputs)
    seconds = (time.perf_counter() - start) * truth.passes * len(alone)
    if seconds > 4 * options.budget:
        raise _Unaffordable(f"about {seconds:.0f} s in float64, over the budget of {4 * options.budget:g} s")
    for way in truth.ways:
        try:
            return torch.cat([way(one).detach() for one in alone])
        except (RuntimeError, MemoryError) as problem:
            if not out_of_memory(problem):
                raise
    raise _Unaffordable(f"over the memory budget of {options.memory:g} GiB in float64")


def out_of_memory(problem: Exception) -> bool:
    """Whether an allocation failed."""
    known = ("allocate memory", "out of memory")
    return isinstance(problem, (MemoryError, torch.OutOfMemoryError)) or any(text in str(problem) for text in known)
