"""From what a user asks for (a class, several, an index, a function) to the seed of the reverse sweep."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from relprop.errors import TargetError

TargetLike: TypeAlias = int | tuple[int, ...] | list[Any] | Tensor | Callable[[Any], Tensor] | None


@dataclass(frozen=True)
class Target:
    """A resolved target.

    Attributes:
        seed: derivative of the explained score by the output. [T, *output shape]
        index: the classes or indices explained, None for a callable. [B, T] or [B, T, k]
        several: whether the answer keeps its axis of targets.
    """

    seed: Tensor
    index: Tensor | None
    several: bool


@dataclass(frozen=True, eq=False)
class Contrast:
    """The difference of two outputs of each sample, as a target; see `contrast`."""

    target: TargetLike
    against: TargetLike = None

    def __call__(self, output: Tensor) -> Tensor:
        """One score per sample. [B, ...] -> [B]"""
        mean = self.against is None and output.ndim == 2
        return _picked(output, self.target) - (output.mean(-1) if mean else _picked(output, self.against))


def contrast(target: TargetLike, against: TargetLike = None) -> Contrast:
    """A target that asks why one output and not another: their difference.

    Args:
        target, against: classes: an int, [B], or an index tuple for an output with several axes per sample; `against`
            None is the mean of all outputs of the target's axis.

    Example:
        >>> import relprop
        >>> from relprop.demo import bundled_scenes, load_model, preprocess
        >>> model, images = load_model(), preprocess(bundled_scenes()["scene_3_7"].image[None])
        >>> why = relprop.explain(model, images, target=contrast(3, against=7))
        >>> why.target is None  # no class of its own
        True
    """
    return Contrast(target, against)


def _picked(output: Tensor, target: TargetLike) -> Tensor:
    if target is None or callable(target):
        raise TargetError("contrast: expected a class, [B] classes or an index tuple, got " + repr(target))
    index, several = _as_index(target, output)
    if several:
        raise TargetError(f"contrast: expected one class per sample, got {index.shape[1]}")
    samples = torch.arange(output.shape[0], device=output.device)
    return output[(samples, *index[:, 0].to(output.device).unbind(-1))]


def of_samples(target: TargetLike, samples: slice, batch: int) -> TargetLike:
    """The target of a part of a batch.

    Args:
        target: as `resolve_target` takes it.
        batch: samples of the whole.
    Raises:
        TargetError: it has entries of its own for each sample, but of another number of samples.
    """
    if isinstance(target, Contrast):
        return Contrast(of_samples(target.target, samples, batch), of_samples(target.against, samples, batch))
    if not _has_entries(target):
        return target
    entries: Any = target
    if len(entries) != batch:
        raise TargetError(f"target: expected one entry for each of {batch} samples, got {len(entries)}")
    return entries[samples]


def count_targets(target: TargetLike) -> int:
    """Targets per sample: T of [B, T] or [B, T, k], 1 for every other form."""
    entries: Any = target
    several = _has_entries(target) and len(entries) > 0 and _has_entries(entries[0])
    return len(entries[0]) if several else 1


def _has_entries(target: Any) -> bool:
    """Whether it is a sequence or tensor with an entry for each sample, or for each target of one."""
    return (isinstance(target, (list, tuple, range)) and not _is_index(target)) or getattr(target, "ndim", 0) > 0


def resolve_target(target: TargetLike, output: Tensor, seed_dtype: torch.dtype, pairs: bool = False) -> Target:
    """Turn a target into a seed.

    Args:
        target: None (the largest output), an int, [B], [B, T], an index tuple of k ints or [B, T, k] for an output
            with k axes per sample, or a callable from the output to one score per sample.
        output: the model's output. [B, ...]
        pairs: the output scores every sample with every sample, [B, B]; each sample's score with itself is explained.
    Raises:
        TargetError: out of range, of the wrong shape, or not integers.
    """
    if pairs:
        target = _own_column(target, output)
    if callable(target):
        return _from_callable(target, output, seed_dtype)
    index, several = find_index(target, output)
    return aimed_at(sent(index, output.device), output, seed_dtype, several)


def find_index(target: Any, output: Tensor) -> tuple[Tensor, bool]:
    """Indices [B, T, k] within an output, and whether the caller asked for an axis of targets.

    Args:
        target: as `resolve_target` takes it, no callable.
        output: only its shape is looked at, unless the target is None. [B, ...]
    Returns:
        indices on the host, where they are checked; on the output's device for a target of None
    Raises:
        TargetError: out of range, of the wrong shape, or not integers.
    """
    sizes = tuple(output.shape[1:])
    index, several = _as_index(target, output)
    if target is None:
        return index, several
    index = index.cpu()
    limits = torch.tensor(sizes)
    bad = (index < -limits) | (index >= limits)
    if bool(bad.any()):
        wrong = index[bad][0].item()
        raise TargetError(f"target: expected indices within an output of shape [B, {_sizes(sizes)}], got {wrong}")
    return torch.where(index < 0, index + limits, index), several


def sent(index: Tensor, device: torch.device) -> Tensor:
    """Indices on a device; the host does not wait, as they are read from pinned memory that torch keeps until then."""
    if index.device == device or device.type != "cuda":
        return index.to(device)
    return index.pin_memory().to(device, non_blocking=True)


def aimed_at(index: Tensor, output: Tensor, seed_dtype: torch.dtype, several: bool) -> Target:
    """The target at indices that are known to be within the output; makes no decision on their values.

    Args:
        index: on the output's device. [B, T, k]
    """
    sizes = output.shape[1:]
    flat = index[..., 0]  # [B, T]
    for axis in range(1, len(sizes)):
        flat = flat * sizes[axis] + index[..., axis]
    seed = torch.zeros(index.shape[1], output.shape[0], math.prod(sizes), dtype=seed_dtype, device=output.device)
    seed.scatter_(2, flat.t().unsqueeze(-1), 1.0)
    kept = index.squeeze(-1) if len(sizes) == 1 else index
    return Target(seed.reshape(index.shape[1], *output.shape), kept, several)


def block_diagonal(seeds: list[Tensor]) -> Tensor:
    """Seeds of scores between samples, for several batches in one that have nothing to do with each other.

    Args:
        seeds: each [T, B, B]
    Returns:
        [T, k B, k B]
    """
    return torch.stack([torch.block_diag(*of_target) for of_target in zip(*seeds, strict=True)])


def _own_column(target: TargetLike, output: Tensor) -> Tensor:
    """Samples are explained as if alone, so that none has a score with another one."""
    own = torch.arange(output.shape[0])
    given = own if target is None else target
    if isinstance(given, Tensor) and given.shape == own.shape and bool((given.cpu() == own).all()):
        return own
    raise TargetError(
        f"target: expected None for an output of shape [B, B] that scores samples with each other, got {target!r}; each"
        " sample's score with itself is explained: to explain other pairs, pass them as samples"
    )


def _sizes(sizes: tuple[int, ...]) -> str:
    return ", ".join(str(size) for size in sizes)


def _is_index(target: Any) -> bool:
    """Whether it is a tuple of ints: one index into the axes of an output."""
    return isinstance(target, tuple) and all(isinstance(i, int) and not isinstance(i, bool) for i in target)


def _as_index(target: Any, output: Tensor) -> tuple[Tensor, bool]:
    """Indices [B, T, k], and whether the caller asked for an axis of targets."""
    batch, axes = output.shape[0], output.ndim - 1
    if axes < 1:
        raise TargetError(f"target: expected an output of shape [B, ...], got {list(output.shape)}; use a callable")
    shapes = "None, an int, [B], [B, T] or a callable" if axes == 1 else f"a tuple of {axes} ints or [B, T, {axes}]"
    if target is None:
        if axes != 1:
            raise TargetError(f"target: expected {shapes} for an output of shape {list(output.shape)}, got None")
        return output.argmax(-1).reshape(batch, 1, 1), False
    if isinstance(target, (bool, float)):
        raise TargetError(f"target: expected {shapes}, got {target!r}")
    if isinstance(target, int):
        target = (target,)
    if _is_index(target):
        if len(target) != axes:
            raise TargetError(f"target: expected {shapes} for an output of shape {list(output.shape)}, got {target}")
        return torch.tensor(target).expand(batch, 1, axes), False
    try:
        index = torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError):
        raise TargetError(f"target: expected {shapes}, got {type(target).__name__}") from None
    if index.dtype.is_floating_point or index.dtype.is_complex or index.dtype == torch.bool:
        raise TargetError(f"target: expected integers ({shapes}), got {index.dtype}")
    index = index.to(torch.int64)
    if index.ndim == 0:
        return _as_index(int(index), output)
    fits = index.shape[0] == batch and (
        (axes == 1 and index.ndim <= 2) or (index.ndim == 3 and index.shape[-1] == axes)
    )
    if not fits or 0 in index.shape[1:]:
        raise TargetError(
            f"target: expected {shapes} with B = {batch} for an output of shape {list(output.shape)}, got shape"
            f" {list(index.shape)}"
        )
    if index.ndim == 1:
        return index.reshape(batch, 1, 1), False
    return (index.unsqueeze(-1) if index.ndim == 2 else index), True


def _from_callable(target: Callable[[Any], Tensor], output: Tensor, seed_dtype: torch.dtype) -> Target:
    with torch.enable_grad():
        leaf = output.detach().to(seed_dtype).requires_grad_()
        score = target(leaf)
        if not isinstance(score, Tensor) or score.shape not in ((output.shape[0],), ()) or not score.requires_grad:
            got = f"shape {list(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
            raise TargetError(f"target: expected a callable from the output to one score per sample [B], got {got}")
        if score.ndim == 0 and output.shape[0] > 1:
            raise TargetError(f"target: expected one score per sample, shape [{output.shape[0]}], got a single score")
        (seed,) = torch.autograd.grad(score.sum(), leaf)
    return Target(seed.unsqueeze(0), None, False)
