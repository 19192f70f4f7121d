"""How much memory a pass takes: measured on two small batches, allocation by allocation, and continued from there."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
        alive: bytes of those that are there now.
    """

    def __init__(self) -> None:
        super().__init__()
        self.history: list[int] = []
        self.alive = 0
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
        self.alive += size
        self.history.append(self.alive)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.alive -= size


def _tensors(structure: Any) -> list[Tensor]:
    """All with memory of their own; those of a capture, fake ones, have none."""
    return [leaf for leaf in pytree.tree_leaves(structure) if isinstance(leaf, Tensor) and not is_fake(leaf)]


class Line(NamedTuple):
    """Bytes as a function of the batch."""

    constant: float
    per_sample: float

    def at(self, batch: int) -> int:
        """At a batch size."""
        return int(self.constant + batch * self.per_sample)


@dataclass(frozen=True)
class Memory:
    """Bytes of a pass at any batch size.

    Attributes:
        alive: at every allocation.
        answer: of what the pass gives.
    """

    alive: list[Line]
    answer: Line

    def peak(self, batch: int) -> int:
        """The most that is alive."""
        return max((line.at(batch) for line in self.alive), default=0)


def measure(run: Callable[[int], object]) -> Memory:
    """Probe a pass.

    Args:
        run: explains a batch of a given size and gives the answer; called once before anything is counted.
    """
    run(PROBES[0])
    histories, answers = [], []
    for batch in PROBES:
        with fresh_results(), Allocations() as counted:
            answer = run(batch)
        histories.append(counted.history)
        answers.append(counted.alive)
        del answer
    if len(histories[0]) != len(histories[1]):  # the batch decided which way was taken: only the peaks compare
        histories = [[max(history, default=0)] for history in histories]
    return Memory([_line(*found) for found in zip(*histories, strict=True)], _line(*answers))


def _line(*probed: int) -> Line:
    few, many = PROBES
    slope = (probed[1] - probed[0]) / (many - few)
    return Line(probed[0] - few * slope, slope)


class Forecast:
    """Memory of passes, probed once for inputs of given sizes and a number of targets.

    Args:
        probe: explains a batch: the inputs' sizes, the number of targets, the number of samples.
    """

    def __init__(self, probe: Callable[[Mapping[int, tuple[int, ...]], int, int], object]) -> None:
        self._probe = probe
        self._known: dict[Any, Memory] = {}

    def __call__(self, sizes: Mapping[int, tuple[int, ...]], targets: int) -> Memory:
        """Of a pass, beside weights and what is derived from them."""
        key = (tuple(sizes.items()), targets)
        if key not in self._known:
            self._known[key] = measure(lambda count: self._probe(sizes, targets, count))
        return self._known[key]


def largest_batch(memory: Callable[[int], int], budget: int, sizes: Sequence[int]) -> int:
    """The largest of ascending batch sizes whose memory is within a budget; the first where none is."""
    low, high = 0, len(sizes) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if memory(sizes[middle]) <= budget else (low, middle - 1)
    return sizes[low]


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
