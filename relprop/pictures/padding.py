"""Which tokens are shown: those that the attention mask of their own input does not hide."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

_MASK = "attention_mask"
_USUAL = ("input_ids", "inputs_embeds")


def kept_tokens(inputs: Mapping[str, Tensor], explained: Iterable[str], name: str, tokens: int) -> Tensor | None:
    """Which tokens of an input its mask does not hide; None where it has no mask of this length. [B, N], bool

    Masks go with inputs by name: `decoder_attention_mask` with `decoder_input_ids`, `visual_attention_mask` with every
    `visual_...`; one without such a beginning goes with `input_ids`, else with the first tokens.

    Args:
        inputs: everything that the model was called with, by name.
        explained: names of the inputs that have relevance.
        name: of one of them.
        tokens: how many it became.
    """
    masks = {_key(one).partition(_MASK)[0]: mask for one, mask in inputs.items() if _MASK in _key(one)}
    others = [one for one in inputs if _MASK not in _key(one)]
    own = [beginning for beginning in masks if any(_begins(one, beginning) for one in others)]
    fitting = [beginning for beginning in own if _begins(name, beginning)]
    if not fitting and "" in masks and name == _first_tokens(inputs, [*explained], others, own):
        fitting = [""]
    found = masks[max(fitting, key=len)] if fitting else None
    return None if found is None or found.ndim != 2 or found.shape[-1] != tokens else found.bool().cpu()


def _key(name: str) -> str:
    """The last name of an input's path: "batch['input_ids']" is `input_ids`."""
    return (re.findall(r"\w+", name) or [""])[-1]


def _begins(name: str, beginning: str) -> bool:
    return bool(beginning) and f"{_key(name)}_".startswith(beginning)


def _first_tokens(inputs: Mapping[str, Tensor], explained: list[str], others: list[str], own: list[str]) -> str | None:
    """The input that a mask without a beginning belongs to; it need not be explained."""
    free = [name for name in others if not any(_begins(name, beginning) for beginning in own)]
    usual = [name for key in _USUAL for name in free if _key(name) == key]
    ids = [name for name in free if inputs[name].ndim == 2 and not inputs[name].is_floating_point()]
    return next(iter([*usual, *ids, *(name for name in free if name in explained)]), None)
