"""Passes of fixed shapes, made once each and run again: compiled, recorded (a CUDA graph, a tape), or both."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from relprop.graph import Graph, Value
from relprop.lowering import DerivedKey, Layout, Outcome, PassFunction, lower, outcome_of
from relprop.memory import Memory
from relprop.tape import unrecorded
from relprop.weights import DerivedWeights, DeriveOnce

LARGEST = 64  # samples of one run; a larger batch takes several
KEPT = 8  # shapes that stay; the one not used for longest goes first

Run = Callable[[Sequence[Tensor], "Tensor | None"], Outcome]


def padded_size(batch: int, largest: int = LARGEST) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, ... that is not below a batch: a third at most is padding."""
    power = 1 << max(0, batch - 1).bit_length()
    between = 3 * power // 4
    return min(between if between >= batch and power >= 4 else power, largest)


def padded(tensor: Tensor, size: int) -> Tensor:
    """The last sample repeated up to a size. [B, ...] -> [size, ...]"""
    if len(tensor) == size:
        return tensor
    return torch.cat([tensor, tensor[-1:].expand(size - len(tensor), *tensor.shape[1:])])


class Recording(Protocol):
    """A run that was recorded, and what it writes to."""

    outputs: Sequence[Tensor]

    def turn(self) -> AbstractContextManager[None]:
        """What is done within comes after every earlier turn of any recording of the same pool, also on the device."""

    def replay(self) -> None:
        """The run once more, on what its inputs hold now."""


class Recorder(Protocol):
    """Makes recordings, which share their memory.

    Attributes:
        holds: whether that memory stays theirs while another run is made.
    """

    holds: bool

    def __call__(self, run: Callable[[], Sequence[Tensor]]) -> Recording:
        """Make a run, perhaps several times, and record it."""

    def release(self) -> None:
        """Give back what is not held, until the next turn; nobody is within one."""


_RECORDING = threading.Lock()  # torch records one CUDA graph at a time in a process


class CudaRecorder:
    """Records runs as CUDA graphs that share one pool of memory, so that all of them need what the largest needs.

    They are recorded on a stream that no other recorder has: libraries keep their workspaces by stream, and recordings
    of two engines may be replayed at once.
    """

    holds = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.pool = torch.cuda.graph_pool_handle()
            self.done = torch.cuda.Event()
            self.stream = torch.cuda.Stream(self.device)

    def __call__(self, run: Callable[[], Sequence[Tensor]]) -> Recording:
        """Warm up, as kernels compile and libraries allocate at first, then record."""
        with _RECORDING, torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                for _ in range(2):
                    run()
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            # What other threads do meanwhile, such as allocating, is no part of the recording and does not break it.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                outputs = run()
        return _CudaRecording(self, graph, outputs)

    def release(self) -> None:
        """Nothing: the pool lives as long as its graphs."""


@dataclass
class _CudaRecording:
    recorder: CudaRecorder
    graph: Any
    outputs: Sequence[Tensor]

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        torch.cuda.current_stream(self.recorder.device).wait_event(self.recorder.done)
        yield
        self.recorder.done.record(torch.cuda.current_stream(self.recorder.device))

    def replay(self) -> None:
        with torch.cuda.device(self.recorder.device):
            self.graph.replay()


class Noted(DeriveOnce):
    """Notes what is derived in plain PyTorch, which lasts and is no part of a recording; kernels keep their own."""

    def __init__(self, graph: Graph, weights: DerivedWeights) -> None:
        super().__init__(graph, weights)
        self.asked: dict[DerivedKey, Tensor] = {}
        self.packings: dict[tuple[int, bool, torch.dtype], Tensor] = {}

    def __call__(self, value: Value, tensor: Tensor, transform: str, dtype: torch.dtype) -> Tensor:
        name = self._name(value)
        with contextlib.nullcontext() if name is None else unrecorded():
            found = super().__call__(value, tensor, transform, dtype)
        if name is not None and found is not tensor:
            self.asked[name, transform, dtype] = found
        return found

    def packed(self, value: Value, tensor: Tensor, transpose: bool, dtype: torch.dtype) -> Tensor | None:
        with unrecorded():
            found = super().packed(value, tensor, transpose, dtype)
        if found is not None:
            self.packings[value.index, transpose, dtype] = found
        return found

    @property
    def held(self) -> list[Tensor]:
        """All of it."""
        return [*self.asked.values(), *self.packings.values()]


@dataclass
class Made:
    """A run of fixed shapes."""

    run: Run
    layout: Layout
    held: Any  # what the run reads without owning it
    recording: Recording | None = None


class Replays:
    """Explains batches with runs of fixed shapes.

    A batch is padded to the next size by repeating its last sample; samples do not see each other, so what is cut off
    again changes nothing. Memory is bounded: `kept` shapes stay. When a weight changed, every run is made again. Safe
    to call from several threads; recordings take turns, as they share their memory.

    Args:
        function: the pass; takes inputs, then `weights`.
        batched: per input, whether its first axis is the batch.
        weights: parameters, buffers and constants as they are now.
        derived: the model's cache.
        compiled: whether the run goes through torch.compile.
        recorder: makes recordings; None for none.
    """

    def __init__(
        self,
        function: PassFunction,
        batched: Sequence[bool],
        weights: Callable[[], Sequence[Tensor]],
        derived: DerivedWeights,
        *,
        compiled: bool = False,
        recorder: Recorder | None = None,
        largest: int = LARGEST,
        kept: int = KEPT,
    ) -> None:
        self.function, self.batched, self.weights, self.derived = function, tuple(batched), weights, derived
        self.compiled, self.recorder, self.largest, self.kept = compiled, recorder, largest, kept
        self._made: OrderedDict[Any, Made] = OrderedDict()
        self._lock, self._replaying = threading.Lock(), threading.Lock()
        self._fingerprint: Any = None

    def __call__(self, inputs: Sequence[Tensor], index: Tensor | None) -> tuple[Outcome, Layout] | None:
        """Args:
            inputs: in the function's order.
            index: on the inputs' device, None for the largest output. [B, T, k]
        Returns:
            None where there is no run for these sizes, which only some pools leave open.
        """
        batch = next(len(t) for t, is_batch in zip(inputs, self.batched, strict=True) if is_batch)
        with torch.inference_mode(False), torch.no_grad():  # what is kept may be written to outside of it
            found = [
                self._piece(
                    [t[at : at + self.largest] if b else t for t, b in zip(inputs, self.batched, strict=True)], part
                )
                for at in range(0, batch, self.largest)
                for part in (None if index is None else index[at : at + self.largest],)
            ]
        return _joined([outcome for outcome, _ in found]), found[0][1]

    def cuts(self, batch: int) -> Sequence[int]:
        """Sizes that pieces of a batch may have, ascending: those that take no padding, and the whole."""
        below = range(1, min(batch, self.largest + 1))
        return [*(size for size in below if padded_size(size, self.largest) == size), batch]

    def peak(self, pieces: Sequence[int], passes: Memory, inputs: Callable[[int], int]) -> int:
        """Bytes of explaining batches that no run is there for, one after the other, beside weights.

        Beside the given inputs every recording has a copy of its own, and what fills a batch up is another; a pass
        that is made while the recordings before it hold their memory adds to that; answers are copied out of where
        recordings have them, and joined where they are several.

        Args:
            pieces: samples of each batch.
            passes: the plan's, with its inputs.
            inputs: bytes of the inputs of a batch.
        """
        runs = [run for piece in pieces for run in self._runs(piece)]
        work: dict[int, int] = {}
        for count, size in runs:
            taken = passes.peak(size) - (inputs(size) if count == size else 0)
            work[size] = max(taken, work.get(size, 0))
        samples, holds = sum(pieces), self.recorder is not None and self.recorder.holds
        own, copied, spare = 0, runs[:-1], 0
        if self.recorder is not None:
            own, copied = sum(inputs(size) for size in work), runs
            # The plan has its seed, as large as the logits, to the end; a tape until its last use.
            spare = 0 if holds else passes.answer.at(max(work))
        answers = sum(passes.answer.at(size) for _, size in copied)
        answers += passes.answer.at(samples) if len(runs) > 1 else 0
        made = sum(work.values()) if holds else max(work.values())
        return inputs(samples) + own + made + max(0, answers - spare)

    def _runs(self, batch: int) -> list[tuple[int, int]]:
        """Of each run that a batch takes the samples, without and with padding."""
        counts = [min(self.largest, batch - at) for at in range(0, batch, self.largest)]
        return [(count, padded_size(count, self.largest)) for count in counts]

    def release(self) -> None:
        """Give back the memory that recordings keep between their turns, where they can."""
        if self.recorder is not None:
            with self._replaying:
                self.recorder.release()

    def clear(self) -> None:
        """Forget every run."""
        with self._lock:
            self._made.clear()

    @property
    def shapes(self) -> list[Any]:
        """The shapes that runs are there for, the one used last at the end."""
        return list(self._made)

    @property
    def recordings(self) -> list[Recording]:
        """Of the same shapes, where there are any."""
        return [made.recording for made in self._made.values() if made.recording is not None]

    def _piece(self, inputs: Sequence[Tensor], index: Tensor | None) -> tuple[Outcome, Layout]:
        batch = next(len(t) for t, is_batch in zip(inputs, self.batched, strict=True) if is_batch)
        size = padded_size(batch, self.largest)
        filled = [padded(t, size) if is_batch else t for t, is_batch in zip(inputs, self.batched, strict=True)]
        aimed = None if index is None else padded(index, size)
        made = self._find(filled, aimed)
        return _cut(made.run(filled, aimed), batch), made.layout

    def _find(self, inputs: Sequence[Tensor], index: Tensor | None) -> Made:
        key = run_key(inputs, index)
        with self._lock:
            weights = list(self.weights())
            fingerprint = [(t.data_ptr(), -1 if t.is_inference() else t._version) for t in weights]
            if fingerprint != self._fingerprint:
                self._made.clear()
                self._fingerprint = fingerprint
            made = self._made.get(key)
            if made is None:
                made = self._made[key] = self._make(inputs, weights, index)
                while len(self._made) > self.kept:
                    self._made.popitem(last=False)
            self._made.move_to_end(key)
        return made

    def _make(self, inputs: Sequence[Tensor], weights: list[Tensor], index: Tensor | None) -> Made:
        self.release()
        noted = Noted(self.function.program.graph, self.derived)
        self.function([*inputs, *weights], index, noted)
        layout = self.function.layout
        assert layout is not None
        held: Any = (weights, noted.held, layout.explained_tokens)
        run: Run
        if self.compiled:
            run, graph = self._compile(inputs, weights, index, noted.asked, layout)
            held = (*held, graph)
        else:

            def run(given: Sequence[Tensor], aimed: Tensor | None) -> Outcome:
                return self.function([*given, *weights], aimed, noted, layout.explained_tokens)

        if self.recorder is None:
            return Made(run, layout, held)
        run, recording = self._record(run, inputs, index, self.recorder)
        return Made(run, layout, held, recording)

    def _compile(
        self,
        inputs: Sequence[Tensor],
        weights: list[Tensor],
        index: Tensor | None,
        derived: Mapping[DerivedKey, Tensor],
        layout: Layout,
    ) -> tuple[Run, Any]:
        graph, _ = lower(self.function, [*inputs, *weights], index, derived, layout.explained_tokens, self.derived)
        function = torch.compile(graph, dynamic=False)
        explained = layout.explained_tokens

        def run(given: Sequence[Tensor], aimed: Tensor | None) -> Outcome:
            rest = [t for t in (aimed, explained) if t is not None]
            found = function(*given, *weights, *derived.values(), *rest)
            return outcome_of(found)

        return run, graph

    def _record(
        self, run: Run, inputs: Sequence[Tensor], index: Tensor | None, recorder: Recorder
    ) -> tuple[Run, Recording]:
        """The same run on tensors of its own, recorded."""
        mine, aim = [t.clone() for t in inputs], None if index is None else index.clone()
        outcome: list[Outcome] = []

        def fixed() -> list[Tensor]:
            outcome[:] = [run(mine, aim)]
            return [t for t in outcome[0] if t is not None]

        with self._replaying:
            recording = recorder(fixed)

        def replayed(given: Sequence[Tensor], aimed: Tensor | None) -> Outcome:
            with self._replaying, recording.turn():
                for own, tensor in zip(mine, given, strict=True):
                    own.copy_(tensor)
                if aim is not None and aimed is not None:
                    aim.copy_(aimed)
                recording.replay()
                found = [t.clone() for t in recording.outputs]
            return outcome_of(found)

        return replayed, recording


def run_key(inputs: Sequence[Tensor], index: Tensor | None) -> Any:
    """What a run is fixed to."""
    aimed = None if index is None else tuple(index.shape)
    return (*(tuple(t.shape) for t in inputs), aimed, torch.get_num_threads())


def _cut(outcome: Outcome, batch: int) -> Outcome:
    profile = outcome.profile
    return Outcome(
        outcome.relevance[:, :batch],
        outcome.logits[:batch],
        outcome.index[:batch],
        None if profile is None else profile[:, :batch],
    )


def _joined(parts: list[Outcome]) -> Outcome:
    if len(parts) == 1:
        return parts[0]
    profiles = [p.profile for p in parts if p.profile is not None]
    return Outcome(
        torch.cat([p.relevance for p in parts], 1),
        torch.cat([p.logits for p in parts]),
        torch.cat([p.index for p in parts]),
        torch.cat(profiles, 1) if profiles else None,
    )
