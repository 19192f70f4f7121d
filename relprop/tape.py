"""Runs on the CPU written down call by call, and made again without the plan: the CPU's counterpart of a CUDA graph.

While a run is recorded its operations are noted: torch's as the dispatcher sees them, the kernels' by the compiled
module (csrc/tape.h). Of the tensors that it makes only descriptions are noted, so that they die when they do in the
plan. Views, allocations and everything in Python then disappear: what is left is called in order, on one block of
memory in which every intermediate has a place for as long as it is needed.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from relprop.errors import OptionError
from relprop.native.module import _C
from relprop.native.tensors import SMALLEST_KEPT, empty, fresh_results

_aten = torch.ops.aten
_ALIGNMENT = 64
_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_COPIES = (_aten.clone.default, _aten._to_copy.default)
_ZEROS = (_aten.zeros.default, _aten.new_zeros.default, _aten.zeros_like.default)
_EMPTY = (_aten.empty.memory_format, _aten.empty_strided.default, _aten.new_empty.default, _aten.empty_like.default)
_here = threading.local()  # notes: of the run that this thread records


class NotTaped(OptionError):
    """A run that cannot be written down, or takes more memory than it may."""


_Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


@dataclass(eq=False)
class _Storage:
    """Memory that the run made: where it was and how many kernel calls came before its birth and its death, since an
    address may be another's later; between which calls of any kind it is needed, and its place in the block.
    """

    start: int
    nbytes: int
    born: int
    died: int = sys.maxsize
    first: int = -1
    last: int = -1
    offset: int = 0


@dataclass(frozen=True)
class _Made:
    """What a tensor was that the run made."""

    storage: _Storage
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    start: int  # in elements


@dataclass
class _Noted:
    """One operation of torch's: what came, what it made, and how many kernel calls came before it."""

    op: Any
    args: Any
    kwargs: dict[str, Any]
    made: list[_Made | Tensor]
    kernels: int

    def storages(self) -> list[_Storage]:
        found = pytree.tree_leaves((self.args, self.kwargs, self.made))
        return [t.storage for t in found if isinstance(t, _Made)]


class _Notes(TorchDispatchMode):
    """Notes every operation that computes something, every storage that the run makes, and when that dies."""

    def __init__(self, tape: Any) -> None:
        super().__init__()
        self.tape, self.paused = tape, False
        self.ops: list[_Noted] = []
        self.storages: list[_Storage] = []
        self.outside: dict[int, Tensor] = {}  # what the run was given, which must live as long as the recording
        self._alive: dict[int, tuple[_Storage, weakref.ref[Any]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if any(tag in func.tags for tag in _VALUES) or _is_random(func, args, kwargs):
            raise NotTaped(f"tape: expected a pass that depends on no value and no chance, got {func}")
        kernels = len(self.tape)
        came, named = pytree.tree_map_only(Tensor, self.described, (args, kwargs))
        result = func(*args, **kwargs)
        tensors = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        if any(t.layout is not torch.strided or t.is_neg() or t.is_conj() for t in tensors):
            raise NotTaped(f"tape: expected tensors with memory of their own, got another kind from {func}")
        changes = func._schema.is_mutable
        if changes and any(self._resized(t) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)):
            raise NotTaped(f"tape: expected tensors that keep their memory, got a resized one from {func}")
        born = [self._bear(t) for t in tensors]
        writes = changes and torch.Tag.inplace_view not in func.tags
        if func not in _EMPTY and (writes or any(born)):  # else tensors of old memory with new shapes
            self.ops.append(_Noted(func, came, named, [self.described(t) for t in tensors], kernels))
        return result

    def described(self, tensor: Tensor) -> _Made | Tensor:
        """What is noted of a tensor: itself where the run did not make it."""
        storage = tensor.untyped_storage()
        found = self._alive.get(storage._cdata)
        if found is None:
            self.outside.setdefault(storage._cdata, tensor)
            return tensor
        return _Made(found[0], tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())

    def forget(self) -> None:
        """Whatever dies from now on is no part of the run."""
        self._alive.clear()

    def _bear(self, tensor: Tensor) -> bool:
        """Whether a result's memory is new, which is noted then."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or key in self.outside:
            return False
        made = _Storage(storage.data_ptr(), storage.nbytes(), len(self.tape))
        self._alive[key] = made, weakref.ref(storage, lambda _: self._bury(key))
        self.storages.append(made)
        return True

    def _bury(self, key: int) -> None:
        made, _ = self._alive.pop(key)
        made.died = len(self.tape)

    def _resized(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        found = self._alive.get(storage._cdata)
        return found is not None and (storage.data_ptr(), storage.nbytes()) != (found[0].start, found[0].nbytes)


def _is_random(op: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether it draws numbers; attention does not without dropout."""
    if torch.Tag.nondeterministic_seeded not in op.tags:
        return False
    given = {**dict(zip((a.name for a in op._schema.arguments), args, strict=False)), **kwargs}
    return "dropout_p" not in {a.name for a in op._schema.arguments} or given.get("dropout_p", 0.0) != 0.0


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """What is made within lasts: for a run that this thread records it was there before."""
    notes: _Notes | None = getattr(_here, "notes", None)
    if notes is None:
        yield
        return
    notes.paused = True
    notes.tape.stop()
    try:
        yield
    finally:
        notes.paused = False
        notes.tape.start()


def _record(run: Callable[[], Sequence[Tensor]]) -> tuple[_Notes, list[_Made | Tensor]]:
    """The notes of a run, and its results."""
    notes = _Notes(_C.Tape())
    with fresh_results(), notes:
        _here.notes = notes
        notes.tape.start()
        try:
            outputs = [notes.described(t) for t in run()]
        finally:
            notes.tape.stop()
            _here.notes = None
            notes.forget()
    return notes, outputs


def _pointed(notes: _Notes) -> list[list[tuple[_Storage, int] | None]]:
    """For every kernel call where its tensors are: the storage and the byte in it, None for what the run did not make.

    An address means the storage that was alive there when the call was made.
    """
    found: list[list[tuple[_Storage, int] | None]] = []
    waiting, alive = 0, list[_Storage]()
    for call in range(len(notes.tape)):
        while waiting < len(notes.storages) and notes.storages[waiting].born <= call:
            alive.append(notes.storages[waiting])
            waiting += 1
        alive = sorted((s for s in alive if s.died > call and s.nbytes), key=lambda s: s.start)
        starts = [s.start for s in alive]
        found.append([])
        for address in notes.tape.pointers(call):
            i = bisect.bisect_right(starts, address) - 1
            within = i >= 0 and address < starts[i] + alive[i].nbytes
            found[-1].append((alive[i], address - starts[i]) if within else None)
    return found


def _place(storages: Sequence[_Storage]) -> int:
    """Give every storage a place among those that are needed with it; returns the bytes of all."""
    placed: list[_Storage] = []
    total = 0
    for storage in sorted((s for s in storages if s.first >= 0), key=lambda s: -s.nbytes):
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
    """Records runs on the CPU; they take turns on one block of memory, as large as the largest needs.

    Args:
        keep: whether the block stays between turns. Else one of 256 kB or more goes back after each to where the
            kernels' results come from, which keeps a bounded amount of memory for whoever asks next.
    """

    holds = False

    def __init__(self, keep: bool = True) -> None:
        self.keep = keep
        self._block: Tensor | None = None

    def __call__(self, run: Callable[[], Sequence[Tensor]]) -> CpuRecording:
        """Raises:
        NotTaped: the run depends on values.
        """
        return CpuRecording(self, *_record(run))

    def release(self) -> None:
        """Give the block back."""
        self._block = None

    @contextlib.contextmanager
    def block(self, nbytes: int) -> Iterator[Tensor]:
        """Memory of at least this size, aligned for the kernels."""
        if self._block is None or self._block.nbytes < nbytes:
            self._block = None
            self._block = empty((_aligned(nbytes) // 4,), torch.float32)
        try:
            yield self._block
        finally:
            if not self.keep and self._block.nbytes >= SMALLEST_KEPT:
                self._block = None


class CpuRecording:
    """Calls in order: of torch, and between them runs of kernels on the tape.

    Attributes:
        nbytes: of the block that a replay works on.
        outputs: what the run gave, within a turn.
    """

    def __init__(self, recorder: CpuRecorder, notes: _Notes, outputs: Sequence[_Made | Tensor]) -> None:
        self._recorder, self._tape, self._outside = recorder, notes.tape, list(notes.outside.values())
        pointed = _pointed(notes)
        _find_uses(notes.ops, pointed, outputs)
        self._storages = [s for s in notes.storages if s.first >= 0]
        self.nbytes = max(_ALIGNMENT, _place(self._storages))
        for call, found in enumerate(pointed):
            self._tape.place(call, [-1 if at is None else at[0].offset + at[1] for at in found])
        self._block: Tensor | None = None
        self._base = 0
        self._tensors: dict[_Made, Tensor] = {}
        self.outputs: Sequence[Tensor] = [self._tensor(t) for t in outputs]
        self._calls: list[_Call] = []
        for item in _in_order(notes.ops, len(pointed)):
            if isinstance(item, range):
                self._calls.append((self._tape.run, (item.start, item.stop), {}))
            else:
                self._calls.append(self._again(item))

    def _tensor(self, noted: Any) -> Any:
        """What stands for a tensor in the calls; it has memory within a turn."""
        if not isinstance(noted, _Made):
            return noted
        return self._tensors.setdefault(noted, torch.empty(0, dtype=noted.dtype))

    def _again(self, op: _Noted) -> _Call:
        """A call that does once more what an operation did, into the places of its results."""
        args, kwargs = pytree.tree_map(self._tensor, (op.args, op.kwargs))
        if op.op._schema.is_mutable:
            return op.op._op, args, kwargs
        made = [self._tensor(t) for t in op.made]
        if op.op in _ZEROS:
            return made[0].zero_, (), {}
        if op.op in _COPIES:
            return made[0].copy_, (args[0],), {}
        into = _into(op.op)
        if into is not None and len(into[1]) == len(made):
            return into[0]._op, args, {**kwargs, **dict(zip(into[1], made, strict=True))}
        return _filled, (op.op._op, args, kwargs, made), {}

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Within it there is memory to replay in; whoever asks for a turn sees to it that no other is under way."""
        with self._recorder.block(self.nbytes) as self._block:
            try:
                if self._block.data_ptr() != self._base:
                    self._move(self._block.data_ptr())
                yield
            finally:
                self._block = None

    def _move(self, base: int) -> None:
        """Have all calls work on a block that starts here; nothing of the recording's owns it."""
        whole = torch.frombuffer((ctypes.c_char * self.nbytes).from_address(base), dtype=torch.uint8)
        for made, tensor in self._tensors.items():
            start = made.storage.offset // made.dtype.itemsize + made.start
            tensor.set_(whole.untyped_storage(), start, made.shape, made.stride)
        self._tape.move(base)
        self._base = base

    def replay(self) -> None:
        """All calls in order.

        Raises:
            OptionError: outside of a turn.
        """
        if self._block is None:
            raise OptionError("tape: expected a replay within a turn, which has the memory for it, got one outside")
        for call, args, kwargs in self._calls:
            call(*args, **kwargs)


def _in_order(ops: Sequence[_Noted], kernels: int) -> Iterator[_Noted | range]:
    """Operations, and between them the kernel calls made there."""
    done = 0
    for op in ops:
        if op.kernels > done:
            yield range(done, op.kernels)
        done = op.kernels
        yield op
    if kernels > done:
        yield range(done, kernels)


def _find_uses(
    ops: Sequence[_Noted],
    pointed: Sequence[Sequence[tuple[_Storage, int] | None]],
    outputs: Sequence[_Made | Tensor],
) -> None:
    """Note for every storage the calls, of torch and of kernels, in which it is read or written."""
    at = 0
    for item in _in_order(ops, len(pointed)):
        if isinstance(item, range):
            for call in item:
                at = _use([place[0] for place in pointed[call] if place is not None], at)
        else:
            at = _use(item.storages(), at)
    _use([t.storage for t in outputs if isinstance(t, _Made)], at)


def _use(storages: Sequence[_Storage], at: int) -> int:
    for storage in storages:
        storage.first = at if storage.first < 0 else storage.first
        storage.last = at
    return at + 1


def _filled(op: Any, args: Any, kwargs: Any, places: Sequence[Tensor]) -> None:
    """For an operation that cannot write to given memory."""
    made = [t for t in pytree.tree_leaves(op(*args, **kwargs)) if isinstance(t, Tensor)]
    for place, tensor in zip(places, made, strict=True):
        place.copy_(tensor)
