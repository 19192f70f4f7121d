"""What `show` and `save` of an explanation show, and several explanations side by side."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from relprop.errors import OptionError, ShapeError
from relprop.explanation import Explanation
from relprop.pictures.colours import as_numbers
from relprop.pictures.grids import (
    Block,
    HeatMap,
    chosen_samples,
    compared_blocks,
    draw_blocks,
    explanation_blocks,
    is_signed,
)
from relprop.pictures.padding import kept_tokens
from relprop.pictures.text import Passage, text_html, text_terminal
from relprop.pictures.tokens import strings_by_input
from relprop.pictures.view import View

if TYPE_CHECKING:
    from relprop.pipelines import Explained

__all__ = ["compare", "explained_view", "explanation_view", "passages"]


def explanation_view(
    explanation: Explanation,
    *,
    over: str = "targets",
    scale: str = "map",
    signed: bool | None = None,
    samples: Sequence[int] | None = None,
    columns: int | None = None,
    side: int = 180,
    heading: str = "",
    **annotation: Any,
) -> View:
    """See `Explanation.view`."""
    noted = explanation.annotated(**annotation) if annotation else explanation
    title = heading or f"relevance by {explanation.method}"
    views = []
    if explanation.has_image_map:
        blocks = explanation_blocks(noted, over, samples)

        def picture() -> Any:
            return draw_blocks(blocks, signed=signed, scale=scale, columns=columns, side=side, heading=heading)

        views.append(View(title, picture))
    elif over != "targets":
        raise OptionError(f"over: expected 'targets' for a text, got {over!r}")
    texts = passages(noted, samples)
    if texts:
        views.append(text_view(texts, title, scale, signed))
    if not views:
        raise ShapeError(
            f"view: expected an image or one number for each token, got relevance {list(explanation.relevance.shape)}"
        )
    return views[0] if len(views) == 1 else View(title, views[0].picture, views[1].text, views[1].terminal)


def text_view(texts: Sequence[Passage], title: str, scale: str = "map", signed: bool | None = None) -> View:
    """Texts as something to look at."""
    return View(
        title,
        text=lambda theme: text_html(texts, scale=scale, signed=signed, theme=theme),
        terminal=lambda: text_terminal(texts, scale=scale, signed=signed),
    )


def passages(explanation: Explanation, samples: Sequence[int] | None = None) -> list[Passage]:
    """Every text of an explanation, for every sample and target, padding left out.

    Raises:
        OptionError, ShapeError, UnknownNameError: the token strings that it was annotated with.
    """
    chosen = chosen_samples(explanation, samples)
    texts = _texts(explanation)
    rows = {name: (ids if ids is None else ids.tolist(), found.shape[-1]) for name, (found, ids) in texts.items()}
    named = strings_by_input(explanation.annotation.tokens, rows, explanation.batch) if texts else {}
    found = []
    for name, (relevance, _) in texts.items():
        tokens, special = named[name]
        mask = kept_tokens(explanation.inputs, texts, name, relevance.shape[-1])
        whole = torch.ones(relevance.shape[-1], dtype=torch.bool) if mask is None else mask
        masks = whole.expand(explanation.batch, -1)
        for sample in chosen:
            kept, strings = masks[sample], tokens[sample]
            if len(strings) == len(kept):
                strings = [token for token, keep in zip(strings, kept.tolist(), strict=True) if keep]
            for target, label in enumerate(explanation.target_names(sample)):
                title = f"{label} ({name})" if len(texts) > 1 else label
                title = f"sample {sample}: {title}" if len(chosen) > 1 else title
                values = relevance[sample, target] if explanation.several else relevance[sample]
                found.append(Passage(strings, values.cpu()[kept], title, sample, tuple(special)))
    return found


def _texts(explanation: Explanation) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Relevance [B, (T), N] and token ids [B, N] of every sequence that no heat map shows, by input."""
    axes, pictured = 2 + explanation.several, explanation.pictured
    found = {}
    for name, relevance in _sequences(explanation).items():
        ids = explanation.inputs.get(name)
        if ids is not None and (ids.is_floating_point() or ids.shape != (explanation.batch, relevance.shape[-1])):
            ids = None
        if relevance.ndim == axes and name != pictured:
            found[name] = relevance, ids
    return found


def _sequences(explanation: Explanation) -> dict[str, Tensor]:
    """Relevance by input, also where the tokens of several stand in one row: without those of the model itself."""
    if not explanation.origins:
        return dict(explanation.relevances) or {"": explanation.relevance}
    origins = list(enumerate(explanation.origins))
    return {
        name: explanation.relevance[..., [i for i, origin in origins if origin == name]]
        for name in dict.fromkeys(filter(None, explanation.origins))
    }


def explained_view(
    explained: Explained, *, scale: str = "map", signed: bool | None = None, side: int = 180, heading: str = ""
) -> View:
    """See `Explained.view`."""
    named = f"{explained.label}, score {explained.score:.3f}"
    title = heading or named
    explanation = explained.explanation
    found = {"": explained.relevance, **explained.relevances}
    heat = next(
        (m for m in found.values() if explanation is not None and tuple(m.shape) == explanation.image_size), None
    )
    view = View(title)
    if heat is not None:
        assert explanation is not None
        image = explanation.annotation.pictures(explanation.image_input(), explanation.batch)[explained.sample]
        kind = is_signed(explanation) if signed is None else signed
        blocks = [Block("", image, [HeatMap(named, as_numbers(heat, "map", 2), kind)])]
        view = View(title, lambda: draw_blocks(blocks, scale=scale, side=side, heading=heading))
    words = next((m for m in found.values() if m.ndim == 1 and len(m) == len(explained.tokens)), None)
    if words is not None:
        text = text_view([Passage(explained.tokens, words, named)], title, scale, signed)
        view = replace(text, picture=view.picture)
    return view


def compare(
    explanations: Mapping[str, Explanation],
    *,
    scale: str = "map",
    signed: bool | None = None,
    samples: Sequence[int] | None = None,
    columns: int | None = None,
    side: int = 180,
    heading: str = "",
    **annotation: Any,
) -> View:
    """Several explanations of the same inputs side by side, such as one for each method; texts beside images below.

    Args:
        explanations: by title.
        others: as `Explanation.view` takes them. Units differ from method to method: compare where, not how much.
    Raises:
        OptionError: none, or images and texts mixed. ShapeError: explanations of other inputs.
    """
    if not explanations:
        raise OptionError("compare: expected at least one explanation, got none")
    noted = {name: found.annotated(**annotation) for name, found in explanations.items()}
    title = heading or f"{len(noted)} explanations"
    pictured = [found.has_image_map for found in noted.values()]
    if any(pictured) and not all(pictured):
        raise OptionError("compare: expected explanations of images or of texts, got both")
    texts = []
    for name, found in noted.items():
        for one in passages(found, samples):
            texts.append(Passage(one.tokens, one.relevance, f"{name}: {one.title}", one.sample, one.special))
    if not all(pictured):
        return text_view(texts, title, scale, signed)
    blocks = compared_blocks(noted, samples)
    view = text_view(texts, title, scale, signed) if texts else View(title)
    drawn = functools.partial(
        draw_blocks, blocks, signed=signed, scale=scale, columns=columns, side=side, heading=heading
    )
    return replace(view, picture=drawn)
