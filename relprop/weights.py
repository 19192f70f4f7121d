"""The model's weights, read live at every call; what is derived from them is cached and checked for staleness."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from relprop import native
from relprop.errors import ModelStateError, ShapeError
from relprop.graph import Graph, Value

_TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda t: t,
    "abs": torch.abs,
    "positive": lambda t: t.clamp(min=0),
    "negative": lambda t: t.clamp(max=0),
    "packed": lambda t: native.pack_weight(t, transpose=False, operands=t.dtype),
    "packed_transpose": lambda t: native.pack_weight(t, transpose=True, operands=t.dtype),
}


def made(tensor: Tensor, transform: str, dtype: torch.dtype) -> Tensor:
    """tensor, cast to dtype and transformed."""
    return _TRANSFORMS[transform](tensor.to(dtype))


class _Ready:
    """A tensor of a GPU that one stream makes, for other streams to read."""

    def __init__(self, tensor: Tensor) -> None:
        self.stream = torch.cuda.current_stream(tensor.device)
        self.event = self.stream.record_event()

    def awaited(self, tensor: Tensor) -> None:
        """What the current stream does from now on comes after, and the memory stays until it is done.

        Not within a recording, whose warm-up has waited and which keeps what it reads.
        """
        here = torch.cuda.current_stream(tensor.device)
        if here != self.stream and not torch.cuda.is_current_stream_capturing():
            here.wait_event(self.event)
            tensor.record_stream(here)


@dataclass
class _Entry:
    source: weakref.ref[Tensor]
    pointer: int
    version: int
    tensor: Tensor
    ready: _Ready | None = None


class DerivedWeights:
    """Casts and magnitudes of one model's parameters, made once and made again when a parameter changed.

    A change shows in the parameter's identity, storage or version counter. A write through `.data` shows in none of
    them: `clear` is for that.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str, torch.dtype], _Entry] = {}
        self._lock = threading.Lock()

    def get(self, name: str, tensor: Tensor, transform: str, dtype: torch.dtype, keep: bool = True) -> Tensor:
        """tensor, cast to dtype and transformed; "packed" and "packed_transpose" are for the CPU kernels' products.

        Without `keep` what is there is used, and what is made is not kept.
        """
        key = (name, transform, dtype)
        found = self._entries.get(key)
        version, pointer = -1 if tensor.is_inference() else tensor._version, tensor.data_ptr()
        if found is not None and found.version == version and found.pointer == pointer and found.source() is tensor:
            if found.ready is not None:
                found.ready.awaited(found.tensor)
            return found.tensor
        derived = made(tensor.detach(), transform, dtype)
        if keep:
            ready = _Ready(derived) if derived.is_cuda and not is_fake(derived) else None
            with self._lock:
                self._entries[key] = _Entry(weakref.ref(tensor), pointer, version, derived, ready)
        return derived

    def clear(self) -> None:
        """Forget everything derived."""
        with self._lock:
            self._entries.clear()

    @property
    def nbytes(self) -> int:
        """Bytes held beside the model's own weights."""
        return sum(e.tensor.numel() * e.tensor.element_size() for e in list(self._entries.values()))


class Derive:
    """What a run asks of its tensors: casts and transforms. Nothing is kept."""

    def __call__(self, value: Value, tensor: Tensor, transform: str, dtype: torch.dtype) -> Tensor:
        """tensor, cast to dtype and transformed ("abs", "positive", "negative" or "" for neither)."""
        return made(tensor, transform, dtype)

    def packed(self, value: Value, tensor: Tensor, transpose: bool, dtype: torch.dtype) -> Tensor | None:
        """A weight as the CPU kernels' products of this dtype read it; None where it would not last."""
        return None


class DeriveOnce(Derive):
    """What is derived from a model's parameters is made once per model, unless autograd is to see it.

    Args:
        keep: False to take what is there and to keep no more.
    """

    def __init__(self, graph: Graph, weights: DerivedWeights, keep: bool = True) -> None:
        self._names = graph.parameters
        self._weights, self._keep = weights, keep

    def __call__(self, value: Value, tensor: Tensor, transform: str, dtype: torch.dtype) -> Tensor:
        name = self._name(value) if transform or tensor.dtype != dtype else None
        if name is None:
            return made(tensor, transform, dtype)
        return self._weights.get(name, tensor, transform, dtype, self._keep)

    def packed(self, value: Value, tensor: Tensor, transpose: bool, dtype: torch.dtype) -> Tensor | None:
        name = self._name(value)
        if name is None:
            return None
        return self._weights.get(name, tensor, "packed_transpose" if transpose else "packed", dtype, self._keep)

    def _name(self, value: Value) -> str | None:
        return None if torch.is_grad_enabled() else self._names.get(value.index)


_DERIVED: weakref.WeakKeyDictionary[nn.Module, DerivedWeights] = weakref.WeakKeyDictionary()
_DERIVED_LOCK = threading.Lock()


def derived_weights(model: nn.Module) -> DerivedWeights:
    """The cache that all engines of a model share."""
    with _DERIVED_LOCK:
        return _DERIVED.setdefault(model, DerivedWeights())


class Weights:
    """Where a graph's parameters and buffers live in a model."""

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self._model = model
        self._names = graph.parameters
        self._shapes = {index: tuple(int(s) for s in graph.values[index].shape) for index in graph.parameters}
        self._find()
        self.derived = derived_weights(model)

    def _find(self) -> None:
        """Resolve every name to its module, and note the way there."""
        self._places: list[tuple[int, nn.Module, str, str]] = []
        way: dict[str, tuple[nn.Module, str, nn.Module]] = {}
        for index, name in self._names.items():
            *path, attribute = name.split(".")
            module = self._model
            for depth, part in enumerate(path):
                child = module._modules.get(part)
                if child is None:
                    raise ModelStateError(f"parameter {name}: expected a module {'.'.join(path)} as captured, got none")
                way[".".join(path[: depth + 1])] = (module, part, child)
                module = child
            self._places.append((index, module, attribute, name))
        self._way = list(way.values())

    def read(self) -> dict[int, Tensor]:
        """Every parameter and buffer as it is now, also where a submodule was replaced.

        Raises:
            ModelStateError: one is gone. ShapeError: one has another shape than when the model was captured.
        """
        if any(parent._modules.get(part) is not child for parent, part, child in self._way):
            self._find()
        found: dict[int, Tensor] = {}
        for index, module, attribute, name in self._places:
            tensor = module._parameters.get(attribute)
            if tensor is None:
                tensor = module._buffers.get(attribute)
            if tensor is None:
                tensor = getattr(module, attribute, None)
            if not isinstance(tensor, Tensor):
                raise ModelStateError(f"parameter {name}: expected a tensor as captured, got {type(tensor).__name__}")
            if tensor.shape != self._shapes[index]:
                expected = list(self._shapes[index])
                raise ShapeError(f"parameter {name}: expected shape {expected} as captured, got {list(tensor.shape)}")
            found[index] = tensor
        return found
