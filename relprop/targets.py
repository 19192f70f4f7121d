"""From what a user asks for (a class, several, an index, a function) to the seed of the reverse sweep."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from relprop.errors import TargetError


@dataclass(frozen=True)
class Target:
    """A resolved target.

    Attributes:
        seed: derivative of the explained score by the output. [T, *output shape]
        index: the classes or indices explained, None for a callable. [B, T] or [B, T, k]
        several: whether the answer keeps its axis of targets.
        apart: whether target t asks of sample t alone, as T = B.
    """

    seed: Tensor
    index: Tensor | None
    several: bool
    apart: bool = False


@dataclass(frozen=True, eq=False)
class Contrast:
    """The difference of two outputs of each sample, as a target; see `contrast`."""

    target: Any
    against: Any = None


TargetLike: TypeAlias = int | tuple[int, ...] | list[Any] | Tensor | Callable[[Any], Tensor] | Contrast | None


def contrast(target: Any, against: Any = None) -> Contrast:
    """A target that asks why one output and not another: their difference.

    Args:
        target, against: classes: an int, [B] or several for each sample [B, T]; an index tuple or [B, T, k] for an
            output with k axes per sample. `against` None is the mean over the last axis of the output, where the
            target is. Either may have one where the other has several.

    Example:
        >>> import relprop
        >>> from relprop.demo import bundled_scenes, load_model, preprocess
        >>> model, images = load_model(), preprocess(bundled_scenes()["scene_3_7"].image[None])
        >>> why = relprop.explain(model, images, target=contrast(3, against=7))
        >>> why.target is None  # no class of its own
        True
        >>> relprop.explain(model, images, target=contrast([[3, 5]], against=7)).relevance.shape  # two questions
        torch.Size([1, 2, 65])
    """
    return Contrast(target, against)


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
    if isinstance(target, Contrast):
        return max(count_targets(target.target), count_targets(target.against))
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
            with k axes per sample, a `contrast` of such, or a callable from the output to one score per sample.
        output: the model's output. [B, ...]
        pairs: the output scores every sample with every sample, [B, B]; each sample's score with itself is explained,
            or what a contrast or callable makes of the scores, for each sample apart.
    Raises:
        TargetError: out of range, of the wrong shape, or not integers.
    """
    if isinstance(target, Contrast):
        found = _from_contrast(target, output, seed_dtype)
        return _apart(found.seed, found.several) if pairs else found
    if callable(target) and pairs:
        return _each_alone(target, output, seed_dtype)
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
        "target: expected None, a contrast or a callable for an output of shape [B, B] that scores samples with each"
        f" other, got {target!r}; each sample's score with itself is explained: to explain other pairs, pass them as"
        " samples"
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


def _from_callable(
    target: Callable[[Any], Tensor], output: Tensor, seed_dtype: torch.dtype, of: int | slice = slice(None)
) -> Target:
    with torch.enable_grad():
        leaf = output.detach().to(seed_dtype).requires_grad_()
        score = target(leaf)
        if not isinstance(score, Tensor) or score.shape not in ((output.shape[0],), ()) or not score.requires_grad:
            got = f"shape {list(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
            raise TargetError(f"target: expected a callable from the output to one score per sample [B], got {got}")
        if score.ndim == 0 and output.shape[0] > 1:
            raise TargetError(f"target: expected one score per sample, shape [{output.shape[0]}], got a single score")
        (seed,) = torch.autograd.grad(score.reshape(-1)[of].sum(), leaf)
    return Target(seed.unsqueeze(0), None, False)


def _from_contrast(asked: Contrast, output: Tensor, seed_dtype: torch.dtype) -> Target:
    """Seeds of what is asked for, less those of what it is held against."""
    wanted = _side("target", asked.target, output, seed_dtype)
    if asked.against is None:
        return Target(wanted.seed - wanted.seed.mean(-1, keepdim=True), None, wanted.several)
    other = _side("against", asked.against, output, seed_dtype)
    counts = len(wanted.seed), len(other.seed)
    if counts[0] != counts[1] and 1 not in counts:
        raise TargetError(f"contrast: expected as many against as targets, or one, got {counts[0]} and {counts[1]}")
    return Target(wanted.seed - other.seed, None, wanted.several or other.several)


def _side(name: str, given: Any, output: Tensor, seed_dtype: torch.dtype) -> Target:
    """Raises:
    TargetError: no classes or indices within the output; says which side of the contrast.
    """
    if given is None or callable(given) or isinstance(given, Contrast):
        raise TargetError(f"contrast: expected classes or indices as {name}, got {given!r}")
    try:
        index, several = find_index(given, output)
    except TargetError as error:
        raise TargetError(f"contrast: {name}{str(error).removeprefix('target')}") from None
    return aimed_at(sent(index, output.device), output, seed_dtype, several)


def _apart(seed: Tensor, several: bool) -> Target:
    """A target for each sample's own row of scores with all samples.

    Args:
        seed: of all rows at once. [1, B, B]
    """
    if several:
        raise TargetError(
            f"contrast: expected one per sample for an output of shape [B, B] that scores samples with each other, got"
            f" {len(seed)}"
        )
    rows = torch.eye(seed.shape[1], dtype=seed.dtype, device=seed.device)
    return Target(rows.unsqueeze(-1) * seed, None, True, apart=True)


def _each_alone(target: Callable[[Any], Tensor], output: Tensor, seed_dtype: torch.dtype) -> Target:
    """A target for each sample's score, as a callable makes it of the scores of all."""
    seeds = [_from_callable(target, output, seed_dtype, of=sample).seed[0] for sample in range(len(output))]
    return Target(torch.stack(seeds), None, True, apart=True)
