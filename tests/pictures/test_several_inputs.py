"""What is shown of models with several inputs: each one's tokens, without its own padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import relprop
from relprop.pictures.explanations import passages
from relprop.pictures.padding import kept_tokens
from relprop.pictures.text import Passage
from tests.families.text_models import build, inputs

pytestmark = [pytest.mark.filterwarnings("ignore")]

SEEN = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def by_title(found: relprop.Explanation) -> dict[str, Passage]:
    return {one.title: one for one in passages(found)}


class TestPadding:
    @pytest.fixture(scope="class")
    def given(self) -> dict[str, Any]:
        given = inputs("bart", 2, 4)
        return {**given, "attention_mask": SEEN, "decoder_input_ids": given["decoder_input_ids"][:, :4]}

    @pytest.mark.parametrize("own", [None, torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])])
    def test_each_side_of_an_encoder_decoder_has_its_own(self, given: dict[str, Any], own: Tensor | None) -> None:
        given = given if own is None else {**given, "decoder_attention_mask": own}
        found = relprop.explain(build("bart"), method="gradient_x_input", target=(2, 7), **given)
        shown = by_title(found)
        for name, mask in (("input_ids", SEEN), ("decoder_input_ids", torch.ones(2, 4) if own is None else own)):
            for sample in range(2):
                text, kept = shown[f"sample {sample}: output 7 at 2 ({name})"], mask[sample].bool()
                assert text.tokens == [f"#{i}" for i in given[name][sample][kept].tolist()]
                assert torch.equal(text.relevance, found.relevances[name][sample][kept])  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("names", "explained", "name", "mask"),
        [
            (["input_ids", "attention_mask"], [], "input_ids", "attention_mask"),
            (["input_ids", "attention_mask", "decoder_input_ids"], [], "decoder_input_ids", None),
            (["decoder_attention_mask", "decoder_input_ids", "input_ids"], [], "input_ids", None),
            (["attention_mask", "words", "others"], ["others", "words"], "words", "attention_mask"),
            (["attention_mask", "words", "others"], ["others", "words"], "others", None),
            (["attention_mask", "source", "target"], ["target"], "target", None),
            (["attention_mask", "visual_attention_mask", "visual_pos"], ["visual_pos"], "visual_pos", "visual_"),
            (["attention_mask", "visual_attention_mask", "visual_x", "words"], ["words"], "words", "attention_mask"),
            (["words", "words_attention_mask"], [], "words", "words_"),
            (["input_ids", "attention_mask", "global_attention_mask"], [], "input_ids", "attention_mask"),
            (["input_ids", "global_attention_mask"], [], "input_ids", None),
            (["batch['input_ids']", "batch['attention_mask']"], [], "batch['input_ids']", "batch['attention_mask']"),
        ],
    )
    def test_masks_by_name(self, names: list[str], explained: list[str], name: str, mask: str | None) -> None:
        given = {key: torch.full((2, 3), place) for place, key in enumerate(names)}
        given = {key: value if "mask" not in key else torch.rand(2, 3) > 0.5 for key, value in given.items()}
        wanted = next((key for key in names if mask is not None and key.startswith(mask) and "mask" in key), None)
        found = kept_tokens(given, explained, name, 3)
        assert (found is None) == (wanted is None)
        assert found is None or torch.equal(found, given[str(wanted)])
        assert kept_tokens(given, explained, name, 4) is None
