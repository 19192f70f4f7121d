"""From `--target` to the classes to explain of each image."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

from torch import Tensor

from relprop.errors import TargetError

__all__ = ["LIKELY", "Selection", "parse_target", "short_label"]

Selection = Callable[[Tensor], list[list[int]]]  # probabilities [B, C] -> classes per sample

LIKELY = 0.5  # probability from which a class of a multi-label model counts as present
_SHOWN = 6  # classes that an ambiguous label fits


def short_label(labels: Sequence[str], index: int) -> str:
    """The first synonym of a class."""
    return labels[index].split(", ")[0]


def parse_target(text: str | None, labels: Sequence[str], *, multi_label: bool = False) -> Selection:
    """What to explain, by label, number or rank.

    Args:
        text: "top:K"; a class's number; a label (any synonym, in any case) or, where none is exactly that, a part of
            just one label. None for the likeliest class, of a multi-label model for every class with p > 0.5 and the
            likeliest where there is none.
        labels: per class, synonyms separated by ", ".
    Raises:
        TargetError: unknown, with the nearest label; ambiguous, with what it fits; out of range.
    """
    if text is None:
        return _likely if multi_label else _top(1)
    wanted = text.strip().casefold()
    classes = len(labels)
    if wanted.startswith("top:"):
        digits = wanted.removeprefix("top:")
        if not digits.isdecimal() or not 1 <= int(digits) <= classes:
            raise TargetError(f"target: expected top:K with K from 1 to {classes}, got {text!r}")
        return _top(int(digits))
    index = _by_label(wanted, text, labels)
    return lambda probabilities: [[index] for _ in range(len(probabilities))]


def _by_label(wanted: str, text: str, labels: Sequence[str]) -> int:
    names = [tuple(name.casefold() for name in (label, *label.split(", "))) for label in labels]
    exact = [i for i, synonyms in enumerate(names) if wanted in synonyms]
    if len(exact) == 1:
        return exact[0]
    if wanted.removeprefix("-").isdecimal():
        if not 0 <= int(wanted) < len(labels):
            raise TargetError(f"target: expected a class from 0 to {len(labels) - 1}, got {text}")
        return int(wanted)
    fits = exact or [i for i, synonyms in enumerate(names) if wanted and wanted in synonyms[0]]
    if len(fits) == 1:
        return fits[0]
    if fits:
        shown = ", ".join(f"{labels[i]!r} ({i})" for i in fits[:_SHOWN])
        more = f" and {len(fits) - _SHOWN} more" if len(fits) > _SHOWN else ""
        raise TargetError(f"target: expected one class, got {text!r}, which fits {len(fits)}: {shown}{more}")
    by_name = {name: i for i, synonyms in reversed(list(enumerate(names))) for name in synonyms}
    near = difflib.get_close_matches(wanted, by_name, n=1, cutoff=0.4)
    hint = f"; did you mean {short_label(labels, by_name[near[0]])!r} ({by_name[near[0]]})?" if near else ""
    raise TargetError(f"target: expected a label, a number from 0 to {len(labels) - 1} or top:K, got {text!r}{hint}")


def _top(count: int) -> Selection:
    return lambda probabilities: probabilities.topk(count, dim=1).indices.tolist()


def _likely(probabilities: Tensor) -> list[list[int]]:
    """Every class with p > 0.5, likeliest first; the likeliest where there is none."""
    chosen = []
    for row in probabilities:
        order = row.argsort(descending=True).tolist()
        chosen.append([i for i in order if row[i] > LIKELY] or order[:1])
    return chosen
