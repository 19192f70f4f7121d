"""A call in pieces: inputs and targets cut along the batch, explanations joined again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from relprop.errors import OptionError
from relprop.explanation import Explanation, TokenKinds
from relprop.targets import TargetLike, of_samples


def check_batch_size(batch_size: Any) -> None:
    """Raises:
    OptionError: neither None, "auto" nor a positive int.
    """
    if batch_size is not None and not (isinstance(batch_size, str) and batch_size == "auto"):
        check_count("batch_size", batch_size, "None, 'auto' or ")


def check_count(name: str, count: Any, otherwise: str = "") -> None:
    """Raises:
    OptionError: not a positive int.
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise OptionError(f"{name}: expected {otherwise}a positive int, got {count!r}")


def pieces(
    inputs: dict[int, Any], batched: frozenset[int], target: TargetLike, size: int
) -> Iterator[tuple[dict[int, Any], TargetLike]]:
    """Inputs by value index and targets, at most `size` samples at a time.

    Raises:
        TargetError: the target's entries are not one for each sample.
    """
    batch = next(len(inputs[i]) for i in inputs if i in batched)
    for at in range(0, batch, size):
        samples = slice(at, at + size)
        part = {i: t[samples] if i in batched else t for i, t in inputs.items()}
        yield part, of_samples(target, samples, batch)


def join(parts: list[Explanation]) -> Explanation:
    """The explanation of the whole batch."""
    if len(parts) == 1:
        return parts[0]

    def joined(field: str) -> Any:
        tensors = [getattr(part, field) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors)

    whole = {field: joined(field) for field in ("relevance", "logits", "target", "disagreement", "trustworthy")}
    for field in ("relevances", "matrices"):
        maps = [getattr(part, field) for part in parts]
        whole[field] = {name: torch.cat([found[name] for found in maps]) for name in maps[0]}
    whole["latents"] = {
        path: replace(
            latent,
            **{
                item.name: torch.cat([getattr(part.latents[path], item.name) for part in parts])
                for item in fields(latent)
                if isinstance(getattr(latent, item.name), Tensor)
            },
        )
        for path, latent in parts[0].latents.items()
    }
    if parts[0].kinds is not None:
        whole["kinds"] = _joined_kinds([part.kinds for part in parts if part.kinds is not None])
    whole["layouts"] = {
        name: replace(one, kinds=_joined_kinds([part.layouts[name].kinds for part in parts]))
        for name, one in parts[0].layouts.items()
    }
    return replace(parts[0], **whole)


def _joined_kinds(parts: list[TokenKinds]) -> TokenKinds:
    return replace(parts[0], profile=torch.cat([part.profile for part in parts], 1))


def of_own_targets(explanation: Explanation) -> Explanation:
    """Of an explanation with a target for each sample, T = B, each sample's answer to its own."""

    def own(found: Tensor | None) -> Tensor | None:
        return None if found is None else found.diagonal(dim1=0, dim2=1).movedim(-1, 0)

    whole = {field: own(getattr(explanation, field)) for field in ("relevance", "disagreement", "trustworthy")}
    maps = {f: {name: own(t) for name, t in getattr(explanation, f).items()} for f in ("relevances", "matrices")}
    latents = {
        path: replace(latent, coefficient=own(latent.coefficient), relevance=own(latent.relevance), several=False)
        for path, latent in explanation.latents.items()
    }
    return replace(explanation, latents=latents, **whole, **maps)  # type: ignore[arg-type]
