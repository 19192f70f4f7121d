"""The CPU's tape without being asked for: what comes again and again is recorded, where that pays."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from relprop.lowering import Layout, Outcome, PassFunction, known_sizes, shape_within
from relprop.replay import Made, Replays, run_key
from relprop.tape import CpuRecorder, NotTaped

MOST = 1 << 28  # bytes that a recorded run makes in all: with more work than that, Python's share is small
_UNFIT = -1
_REMEMBERED = 1024  # shapes


class Recurring(Replays):
    """Runs of their own accord; a call that is left to the plan gets None, and the same bits there.

    A shape is recorded when it comes for the second time, and where it was dropped since, or the weights changed, only
    when it has come four, eight, ... times: recording takes a few times as long as the plan. Larger runs are not.
    Sizes are not padded. A call that meets another thread's replay does not wait for it.

    Args:
        as `Replays`; most: bytes that a recorded run may make in all.
    """

    def __init__(self, function: PassFunction, batched: Sequence[bool], *args: Any, most: int = MOST) -> None:
        super().__init__(function, batched, *args, recorder=CpuRecorder(most))
        self.most = most
        self._came: dict[Any, int] = {}
        self._turn = threading.Lock()

    def __call__(self, inputs: Sequence[Tensor], index: Tensor | None) -> tuple[Outcome, Layout] | None:
        """As `Replays`, or None."""
        watched = _get_current_dispatch_mode() is not None  # by someone who wants to see the operations
        if watched or self._came.get(run_key(inputs, index)) == _UNFIT or not self._turn.acquire(blocking=False):
            return None
        try:
            with torch.inference_mode(False), torch.no_grad():
                made = self._find(inputs, index)
                return made.run(inputs, index), made.layout
        except NotTaped:
            return None
        finally:
            self._turn.release()

    def _make(self, inputs: Sequence[Tensor], weights: list[Tensor], index: Tensor | None) -> Made:
        key = run_key(inputs, index)
        if len(self._came) >= _REMEMBERED:
            self._came.clear()
        came = self._came[key] = self._came.get(key, 0) + 1
        if came < 2 or came & (came - 1):
            raise NotTaped(f"tape: expected a shape that comes again, got one for time {came}")
        try:
            if self._estimate(inputs, index) > self.most:
                raise NotTaped(f"tape: expected a pass that makes at most {self.most} bytes, got more")
            return super()._make(inputs, weights, index)
        except NotTaped:
            self._came[key] = _UNFIT
            raise

    def _estimate(self, inputs: Sequence[Tensor], index: Tensor | None) -> float:
        """Bytes that a run makes at least, about: every result once, and once per stream on the way back."""
        graph, program = self.function.program.graph, self.function.program
        known = known_sizes(graph, dict(zip(self.function.indices, inputs, strict=False)))
        made = [v for node in graph.nodes if node.kind not in ("movement", "fanout", "constant") for v in node.outputs]
        try:
            elements = sum(prod(shape_within(value, known)) for value in made)
        except TypeError:  # sizes that depend on values
            return float("inf")
        targets = 1 if index is None else index.shape[1]
        streams = len({stream.stream for step in program.reverse for stream in step.streams})
        return elements * (1 + targets * streams) * self.function.dtype.itemsize
