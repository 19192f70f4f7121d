"""Runs on the CPU written down call by call, and made again without the plan: the CPU's counterpart of a CUDA graph.

While a run is recorded its operations are noted: torch's as the dispatcher sees them, the kernels' by the compiled
module (csrc/tape.h). Views, allocations and everything in Python then disappear: what is left is called in order, on
one block of memory in which every intermediate has a place for as long as it is needed.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from relprop.errors import OptionError
from relprop.native.module import _C
from relprop.native.tensors import fresh_results

_aten = torch.ops.aten
_ALIGNMENT = 64
_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_COPIES = (_aten.clone.default, _aten._to_copy.default)
_ZEROS = (_aten.zeros.default, _aten.new_zeros.default, _aten.zeros_like.default)
_EMPTY = (_aten.empty.memory_format, _aten.empty_strided.default, _aten.new_empty.default, _aten.empty_like.default)


class NotTaped(OptionError):
    """A run that cannot be written down, or takes more memory than it may."""


_Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


@dataclass
class _Noted:
    """One operation of torch's: what came, what it made, and how many kernel calls came before it."""

    op: Any
    args: Any
    kwargs: dict[str, Any]
    made: list[Tensor]
    kernels: int

    def tensors(self) -> list[Tensor]:
        return [t for t in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]


class _Notes(TorchDispatchMode):
    """Notes every operation; all tensors live on, so that an address means one tensor."""

    def __init__(self, tape: Any, most: int | None) -> None:
        super().__init__()
        self.tape, self.most, self.ops = tape, most, list[_Noted]()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(tag in func.tags for tag in _VALUES) or _is_random(func, args, kwargs or {}):
            raise NotTaped(f"tape: expected a pass that depends on no value and no chance, got {func}")
        kernels = len(self.tape)
        result = func(*args, **(kwargs or {}))
        made = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        if any(t.layout is not torch.strided or t.is_neg() or t.is_conj() for t in made):
            raise NotTaped(f"tape: expected tensors with memory of their own, got another kind from {func}")
        noted = _Noted(func, args, kwargs or {}, made, kernels)
        self.ops.append(noted)
        self.nbytes += 0 if func._schema.is_mutable or _is_view(noted) else sum(t.nbytes for t in made)
        if self.most is not None and self.nbytes > self.most:
            raise NotTaped(f"tape: expected a pass that makes at most {self.most} bytes, got more at {func}")
        return result


def _is_random(op: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether it draws numbers; attention does not without dropout."""
    if torch.Tag.nondeterministic_seeded not in op.tags:
        return False
    given = {**dict(zip((a.name for a in op._schema.arguments), args, strict=False)), **kwargs}
    return "dropout_p" not in {a.name for a in op._schema.arguments} or given.get("dropout_p", 0.0) != 0.0


def _record(run: Callable[[], Sequence[Tensor]], most: int | None) -> tuple[Sequence[Tensor], list[_Noted], Any]:
    tape = _C.Tape()
    notes = _Notes(tape, most)
    with fresh_results(), notes:
        tape.start()
        try:
            outputs = run()
        finally:
            tape.stop()
    return outputs, notes.ops, tape


@dataclass
class _Storage:
    """Memory that the run made: where it was, and between which calls it is needed."""

    start: int
    nbytes: int
    first: int = -1
    last: int = -1
    offset: int = 0


class _Memory:
    """The storages that a run made, by address."""

    def __init__(self, ops: Sequence[_Noted]) -> None:
        found: dict[int, _Storage] = {}
        for op in ops:
            given = {t.untyped_storage().data_ptr() for t in op.tensors()}
            for tensor in op.made:
                storage = tensor.untyped_storage()
                start = storage.data_ptr()
                if start and start not in given and start not in found:
                    found[start] = _Storage(start, storage.nbytes())
        self.storages = found
        self._starts = sorted(found)

    def of(self, tensor: Tensor) -> _Storage | None:
        return self.storages.get(tensor.untyped_storage().data_ptr())

    def at(self, address: int) -> _Storage | None:
        """The storage that an address lies in."""
        i = bisect.bisect_right(self._starts, address) - 1
        if i < 0:
            return None
        storage = self.storages[self._starts[i]]
        return storage if address < storage.start + max(1, storage.nbytes) else None

    def place(self) -> int:
        """Give every storage a place among those that are needed with it; returns the bytes of all."""
        placed: list[_Storage] = []
        total = 0
        for storage in sorted((s for s in self.storages.values() if s.first >= 0), key=lambda s: -s.nbytes):
            at = 0
            for other in sorted((p for p in placed if _overlap(p, storage)), key=lambda p: p.offset):
                if at + storage.nbytes <= other.offset:
                    break
                at = max(at, _aligned(other.offset + other.nbytes))
            storage.offset = at
            placed.append(storage)
            total = max(total, _aligned(at + storage.nbytes))
        return total


def _overlap(a: _Storage, b: _Storage) -> bool:
    return a.first <= b.last and b.first <= a.last


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _is_view(op: _Noted) -> bool:
    """Whether it only makes new tensors of old memory."""
    given = {t.untyped_storage().data_ptr() for t in op.tensors()}
    return not op.op._schema.is_mutable and all(t.untyped_storage().data_ptr() in given for t in op.made)


def _into(op: Any) -> tuple[Any, list[str]] | None:
    """The overload that writes to given tensors, and what it calls them."""
    signature = [(a.name, str(a.type)) for a in op._schema.arguments]
    for name in op._overloadpacket.overloads():
        found = getattr(op._overloadpacket, name)
        arguments = found._schema.arguments
        outs = [a.name for a in arguments if a.is_out]
        if outs and [(a.name, str(a.type)) for a in arguments if not a.is_out] == signature:
            return found, outs
    return None


class CpuRecorder:
    """Records runs on the CPU; all recordings share one block of memory, as large as the largest needs.

    Args:
        most: bytes that a run may make in all, which are alive together while it is recorded; None for no limit.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        self._block = torch.empty(0, dtype=torch.uint8)

    def __call__(self, run: Callable[[], Sequence[Tensor]]) -> _CpuRecording:
        """Raises:
        NotTaped: the run depends on values, or makes too much.
        """
        return _CpuRecording(self, *_record(run, self.most))

    def block(self, nbytes: int) -> Tensor:
        """Memory of at least this size, aligned for the kernels."""
        if self._block.nbytes < nbytes:
            whole = torch.empty(nbytes + _ALIGNMENT, dtype=torch.uint8)
            start = -whole.data_ptr() % _ALIGNMENT
            self._block = whole[start : start + nbytes]
        return self._block


class _CpuRecording:
    """Calls in order: of torch, and between them runs of kernels on the tape."""

    def __init__(self, recorder: CpuRecorder, outputs: Sequence[Tensor], ops: list[_Noted], tape: Any) -> None:
        self._tape = tape
        memory = _Memory(ops)
        calls = [op for op in ops if not _is_view(op) and op.op not in _EMPTY]
        _find_uses(memory, calls, outputs, tape)
        self._memory, self._block = memory, recorder.block(memory.place())
        base = self._block.data_ptr()
        moved = sorted((s.start, s.start + max(1, s.nbytes), base + s.offset) for s in memory.storages.values())
        tape.move(moved)
        self._moved: dict[int, Tensor] = {}
        self.outputs: Sequence[Tensor] = [self._place(t) for t in outputs]
        self._calls: list[_Call] = []
        for item in _in_order(calls, len(tape)):
            if isinstance(item, range):
                self._calls.append((tape.run, (item.start, item.stop), {}))
            else:
                self._calls.append(self._again(item))
        self._held = [t for op in ops for t in (*op.tensors(), *op.made) if memory.of(t) is None]

    def _place(self, tensor: Any) -> Any:
        """The same tensor in the recording's own memory."""
        if not isinstance(tensor, Tensor):
            return tensor
        storage = self._memory.of(tensor)
        if storage is None:
            return tensor
        found = self._moved.get(id(tensor))
        if found is None:
            start = self._block.storage_offset() + storage.offset
            offset = start // tensor.element_size() + tensor.storage_offset()
            found = torch.empty(0, dtype=tensor.dtype)
            found.set_(self._block.untyped_storage(), offset, tensor.shape, tensor.stride())
            self._moved[id(tensor)] = found
        return found

    def _again(self, op: _Noted) -> _Call:
        """A call that does once more what an operation did, into the places of its results."""
        args, kwargs = pytree.tree_map(self._place, (op.args, op.kwargs))
        if op.op._schema.is_mutable:
            return op.op._op, args, kwargs
        made = [self._place(t) for t in op.made]
        if op.op in _ZEROS:
            return made[0].zero_, (), {}
        if op.op in _COPIES:
            return made[0].copy_, (args[0],), {}
        into = _into(op.op)
        if into is not None and len(into[1]) == len(made):
            return into[0]._op, args, {**kwargs, **dict(zip(into[1], made, strict=True))}
        return _filled, (op.op._op, args, kwargs, made), {}

    def turn(self) -> AbstractContextManager[None]:
        """Nothing to wait for: whoever replays holds the lock."""
        return contextlib.nullcontext()

    def replay(self) -> None:
        """All calls in order."""
        for call, args, kwargs in self._calls:
            call(*args, **kwargs)


def _in_order(calls: Sequence[_Noted], kernels: int) -> Iterator[_Noted | range]:
    """Operations, and between them the kernel calls made there."""
    done = 0
    for op in calls:
        if op.kernels > done:
            yield range(done, op.kernels)
        done = op.kernels
        yield op
    if kernels > done:
        yield range(done, kernels)


def _find_uses(memory: _Memory, calls: Sequence[_Noted], outputs: Sequence[Tensor], tape: Any) -> None:
    """Note for every storage the calls, of torch and of kernels, in which it is read or written."""
    at = 0
    for item in _in_order(calls, len(tape)):
        if isinstance(item, range):
            for call in item:
                found = [memory.at(address) for address in tape.pointers(call)]
                at = _use(found, at)
        else:
            at = _use([memory.of(t) for t in (*item.tensors(), *item.made)], at)
    _use([memory.of(t) for t in outputs], at)


def _use(storages: Sequence[_Storage | None], at: int) -> int:
    for storage in storages:
        if storage is not None:
            storage.first = at if storage.first < 0 else storage.first
            storage.last = at
    return at + 1


def _filled(op: Any, args: Any, kwargs: Any, places: Sequence[Tensor]) -> None:
    """For an operation that cannot write to given memory."""
    made = [t for t in pytree.tree_leaves(op(*args, **kwargs)) if isinstance(t, Tensor)]
    for place, tensor in zip(places, made, strict=True):
        place.copy_(tensor)
