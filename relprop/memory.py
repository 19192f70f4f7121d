"""How much memory a pass takes: measured on two small batches, allocation by allocation, and continued from there."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from relprop.native.tensors import fresh_results

PROBES = (2, 4)
SHARE = 0.8  # of the free memory that an automatic batch may take


class Allocations(TorchDispatchMode):
    """Bytes that are alive, after every allocation within, of what was not there before.

    Attributes:
        history: one number per new storage.
    """

    def __init__(self) -> None:
        super().__init__()
        self.history: list[int] = []
        self._alive = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        for tensor in _tensors((args, kwargs)):
            self._known.add(tensor.untyped_storage())
        found = func(*args, **(kwargs or {}))
        for tensor in _tensors(found):
            storage = tensor.untyped_storage()
            if storage not in self._known:
                self._known.add(storage)
                self._allocated(storage)
        return found

    def _allocated(self, storage: Any) -> None:
        size = storage.nbytes()
        self._alive += size
        self.history.append(self._alive)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self._alive -= size


def _tensors(structure: Any) -> list[Tensor]:
    """All with memory of their own; those of a capture, fake ones, have none."""
    return [leaf for leaf in pytree.tree_leaves(structure) if isinstance(leaf, Tensor) and not is_fake(leaf)]


@dataclass(frozen=True)
class Memory:
    """Bytes alive at every allocation of a pass, as functions of the batch: `constant + batch * per_sample`."""

    constant: list[float] = field(default_factory=list)
    per_sample: list[float] = field(default_factory=list)

    def peak(self, batch: int) -> int:
        """The largest, at a batch size."""
        found = zip(self.constant, self.per_sample, strict=True)
        return max((int(a + batch * b) for a, b in found), default=0)


def measure(run: Callable[[int], None]) -> Memory:
    """Probe a pass.

    Args:
        run: explains a batch of a given size; called once before anything is counted.
    """
    run(PROBES[0])
    histories = []
    for batch in PROBES:
        with fresh_results(), Allocations() as counted:
            run(batch)
        histories.append(counted.history)
    if len(histories[0]) != len(histories[1]):  # the batch decided which way was taken: only the peaks compare
        histories = [[max(history, default=0)] for history in histories]
    few, many = PROBES
    slopes = [(b - a) / (many - few) for a, b in zip(*histories, strict=True)]
    return Memory([a - few * slope for a, slope in zip(histories[0], slopes, strict=True)], slopes)


class Forecast:
    """Peak bytes of passes, probed once for inputs of given sizes and a number of targets.

    Args:
        probe: explains a batch: the inputs' sizes, the number of targets, the number of samples.
    """

    def __init__(self, probe: Callable[[Mapping[int, tuple[int, ...]], int, int], None]) -> None:
        self._probe = probe
        self._known: dict[Any, Memory] = {}

    def __call__(self, sizes: Mapping[int, tuple[int, ...]], targets: int, batch: int) -> int:
        """Bytes at a batch size, beside weights and what is derived from them."""
        key = (tuple(sizes.items()), targets)
        if key not in self._known:
            self._known[key] = measure(lambda count: self._probe(sizes, targets, count))
        return self._known[key].peak(batch)


def largest_batch(memory: Callable[[int], int], budget: int, batch: int) -> int:
    """The largest batch up to `batch` whose memory is within a budget; 1 where none is."""
    low, high = 1, batch
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if memory(middle) <= budget else (low, middle - 1)
    return low


def available(device: torch.device) -> int:
    """Bytes that can be allocated on a device: of the machine, or of the container that the process is in."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        free = free if limit == "max" else min(free, int(limit) - int(used))
    except (OSError, StopIteration):
        pass
    return free
