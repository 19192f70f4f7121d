"""One batch through every method: what each says, how long it took, and why some refuse."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from relprop.engine import compile
from relprop.errors import OptionError, RelpropError
from relprop.explanation import Explanation
from relprop.methods import METHODS, find_method
from relprop.targets import TargetLike

__all__ = ["Finding", "Survey", "survey"]


@dataclass(frozen=True)
class Finding:
    """One method's answer.

    Attributes:
        method: its name.
        explanation: None where it refused.
        refusal: why it did.
        compile_seconds: capturing the model, which later methods share, and planning.
        seconds: explaining the batch, the first time: what is cached for later calls is made in it.
    """

    method: str
    explanation: Explanation | None = None
    refusal: str = ""
    compile_seconds: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Survey:
    """What every method says about a batch.

    Attributes:
        findings: in the order of `relprop methods`.
        booked: an explanation with its ledger, None where no method keeps one.
        forward_seconds: of one forward pass without gradients.
        batch: samples.
    """

    findings: list[Finding]
    booked: Explanation | None
    forward_seconds: float
    batch: int

    @property
    def explanations(self) -> dict[str, Explanation]:
        """By method, of those that answered."""
        return {one.method: one.explanation for one in self.findings if one.explanation is not None}

    def annotated(self, **notes: Any) -> Survey:
        """The same with names and pictures, as `Explanation.annotated` takes them."""
        findings = [
            one if one.explanation is None else replace(one, explanation=one.explanation.annotated(**notes))
            for one in self.findings
        ]
        booked = None if self.booked is None else self.booked.annotated(**notes)
        return replace(self, findings=findings, booked=booked)

    @property
    def refusals(self) -> dict[str, list[str]]:
        """Methods that refused, by reason."""
        found: dict[str, list[str]] = {}
        for one in self.findings:
            if one.explanation is None:
                found.setdefault(one.refusal, []).append(one.method)
        return found


def survey(
    model: nn.Module,
    *args: Any,
    target: TargetLike = None,
    methods: Sequence[str] | None = None,
    ledger: str = "transformer_attribution",
    settings: Mapping[str, Any] | None = None,
    said: Callable[[str], None] = lambda method: None,
    **kwargs: Any,
) -> Survey:
    """Explain a batch by every method; those that the model does not support say so.

    Args:
        model, args, kwargs, target: as `relprop.explain` takes them.
        methods: names; all by default.
        ledger: the method whose books are kept; "full" where it has none.
        settings: backend, precision, composite and others of `relprop.compile`, for every method.
        said: is told each method's name when it is done.
    Raises:
        UnknownNameError: a method. OptionError: no method. RelpropError: every method's refusal, where none answers.
    """
    names = list(METHODS) if methods is None else [find_method(name).name for name in methods]
    if not names:
        raise OptionError("methods: expected at least one method, got none")
    options = dict(settings or {})
    seconds, batch = _forward(model, args, kwargs)
    findings = []
    for name in names:
        findings.append(_finding(model, args, kwargs, target, name, options))
        said(name)
    found = Survey(findings, None, seconds, batch)
    if not found.explanations:
        raise RelpropError("; ".join(f"{', '.join(names)}: {reason}" for reason, names in found.refusals.items()))
    return replace(found, booked=_booked(model, args, kwargs, target, (ledger, "full"), options))


def _forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, int]:
    """Seconds of the second of two forward passes, and the batch."""
    with torch.no_grad():
        model(*args, **kwargs)
        _synchronise(args, kwargs)
        start = time.perf_counter()
        model(*args, **kwargs)
        _synchronise(args, kwargs)
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    return time.perf_counter() - start, len(given[0])


def _synchronise(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if any(isinstance(value, Tensor) and value.is_cuda for value in (*args, *kwargs.values())):
        torch.cuda.synchronize()


def _finding(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], target: TargetLike, name: str, options: Any
) -> Finding:
    start = time.perf_counter()
    try:
        engine = compile(model, args, kwargs, method=name, **options)
        compiled = time.perf_counter()
        explanation = engine(*args, target=target, **kwargs)
        _synchronise(args, kwargs)
    except RelpropError as error:
        return Finding(name, refusal=str(error).removeprefix(f"{name}: "))
    return Finding(name, explanation, "", compiled - start, time.perf_counter() - compiled)


def _booked(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    target: TargetLike,
    names: Sequence[str],
    options: Mapping[str, Any],
) -> Explanation | None:
    for name in names:
        try:
            engine = compile(model, args, kwargs, method=name, **options)
            found = engine(*args, target=target, ledger=True, **kwargs)
        except RelpropError:
            continue
        if found.ledger is not None and found.ledger.entries:
            return found
    return None
