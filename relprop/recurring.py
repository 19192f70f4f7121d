"""The CPU's tape without being asked for: what comes again and again is recorded, where memory for it stays."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from relprop.lowering import Layout, Outcome, PassFunction, outcome_of
from relprop.native.tensors import empty_cache, kept_limit
from relprop.replay import Made, Noted, Replays, run_key
from relprop.tape import CpuRecorder, CpuRecording, NotTaped

_UNFIT = -1
_REMEMBERED = 1024  # shapes


class Recurring(Replays):
    """Runs of their own accord; a call that is left to the plan gets None, and the same bits there.

    A shape is recorded when it comes for the second time, and where it was dropped since, or the weights changed, only
    when it has come four, eight, ... times. The recorded run is that call's answer. It needs the plan's memory; a
    replay needs about as much and gives it back to the kernels' results, so that passes which need more than is kept of
    those (a sixteenth of the machine's memory) are left to the plan. Sizes are not padded. A call that meets another
    thread's replay does not wait for it.

    Args:
        as `Replays`.
    """

    def __init__(self, function: PassFunction, batched: Sequence[bool], *args: Any) -> None:
        super().__init__(function, batched, *args, recorder=CpuRecorder(keep=False))
        self._came: dict[Any, int] = {}
        self._turn = threading.Lock()
        self._answer: tuple[Outcome, Layout] | None = None  # of the call whose turn it is

    def __call__(self, inputs: Sequence[Tensor], index: Tensor | None) -> tuple[Outcome, Layout] | None:
        """As `Replays`, or None."""
        watched = _get_current_dispatch_mode() is not None  # by someone who wants to see the operations
        if watched or self._came.get(run_key(inputs, index)) == _UNFIT or not self._turn.acquire(blocking=False):
            return None
        try:
            with torch.inference_mode(False), torch.no_grad():
                made = self._find(inputs, index)
                return self._answer or (made.run(inputs, index), made.layout)
        except NotTaped:
            return self._answer
        finally:
            self._answer = None
            self._turn.release()

    def cuts(self, batch: int) -> Sequence[int]:
        """Any."""
        return range(1, batch + 1)

    def _runs(self, batch: int) -> list[tuple[int, int]]:
        return [(batch, batch)]

    def _make(self, inputs: Sequence[Tensor], weights: list[Tensor], index: Tensor | None) -> Made:
        key = run_key(inputs, index)
        if len(self._came) >= _REMEMBERED:
            self._came.clear()
        came = self._came[key] = self._came.get(key, 0) + 1
        if came < 2 or came & (came - 1):
            raise NotTaped(f"tape: expected a shape that comes again, got one for time {came}")
        empty_cache()  # what the plan left, whose place the recording takes
        try:
            return self._recorded(inputs, weights, index)
        except NotTaped:
            self._came[key] = _UNFIT
            raise

    def _recorded(self, inputs: Sequence[Tensor], weights: list[Tensor], index: Tensor | None) -> Made:
        noted = Noted(self.function.program.graph, self.derived)

        def run(given: Sequence[Tensor], aimed: Tensor | None) -> Outcome:
            outcome = self.function([*given, *weights], aimed, noted)
            layout = self.function.layout
            assert layout is not None
            self._answer = outcome, layout
            return outcome

        assert self.recorder is not None
        replayed, recording = self._record(run, inputs, index, self.recorder)
        assert self._answer is not None and isinstance(recording, CpuRecording)
        outcome, layout = self._answer
        self._answer = outcome_of([t.clone() for t in outcome if t is not None]), layout
        del outcome
        empty_cache()  # what torch's allocator was given back
        if recording.nbytes > kept_limit():
            raise NotTaped(f"tape: expected a pass that needs at most {kept_limit()} bytes, got {recording.nbytes}")
        return Made(replayed, layout, (weights, noted.held), recording)
