"""What is shown of models with several inputs: each one's tokens, without its own padding, and the image's map."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import relprop
from relprop.errors import OptionError, ShapeError, UnknownNameError
from relprop.pictures import compare
from relprop.pictures.explanations import passages
from relprop.pictures.padding import kept_tokens
from relprop.pictures.report import Report
from relprop.pictures.text import Passage
from relprop.survey import survey
from tests.families.text_models import build, inputs
from tests.pictures.test_explanations import Tokenizer

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


class TestWordsAndRegions:
    @pytest.fixture(scope="class")
    def found(self) -> relprop.Explanation:
        given = {**inputs("lxmert", 2, 4), "attention_mask": SEEN}
        given["visual_attention_mask"] = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 1, 0]])
        options = {"output": "question_answering_score", "target": 1}
        return relprop.explain(build("lxmert"), method="generic_attention", **options, **given)

    def test_words_are_named_and_regions_numbered(self, found: relprop.Explanation) -> None:
        shown = by_title(found.annotated(tokens=Tokenizer(), labels=["no", "yes"]))
        entries = ("input_ids", "visual_feats", "visual_pos")
        assert list(shown) == [f"sample {i}: yes ({name})" for name in entries for i in range(2)]
        ids = found.inputs["input_ids"]
        assert shown["sample 1: yes (input_ids)"].tokens == [f"▁t{i}" for i in ids[1, :2].tolist()]
        for name in entries[1:]:
            assert shown[f"sample 0: yes ({name})"].tokens == [f"{name} {i}" for i in range(6)]
            seen = [0, 2, 3, 4]
            regions = shown[f"sample 1: yes ({name})"]
            assert regions.tokens == [f"{name} {i}" for i in seen]
            assert torch.equal(regions.relevance, found.relevances[name][1, seen])  # type: ignore[arg-type]

    def test_shown(self, found: relprop.Explanation, capsys: pytest.CaptureFixture[str]) -> None:
        for html in (found.html(), found._repr_html_(), found.html(tokens=Tokenizer())):
            assert html is not None and ">visual_pos 5</span>" in html
        found.show(tokens=Tokenizer(), samples=[1])
        assert "visual_feats 0 visual_feats 2 visual_feats 3 visual_feats 4\n" in capsys.readouterr().out
        assert "one: class 1 (visual_pos)" in compare({"one": found}, samples=[0]).html()

    def test_strings_by_input(self, found: relprop.Explanation) -> None:
        regions = [[f"{kind} {i}" for i in range(6)] for kind in ("car", "cat")]
        shown = by_title(found.annotated(tokens={"input_ids": Tokenizer(), "visual_feats": regions}))
        assert shown["sample 0: class 1 (input_ids)"].tokens[0].startswith("▁t")
        assert shown["sample 1: class 1 (visual_feats)"].tokens == ["cat 0", "cat 2", "cat 3", "cat 4"]
        assert shown["sample 1: class 1 (visual_pos)"].tokens[1] == "visual_pos 2"
        words = [["is", "it", "a", "cat"], ["why", "not"]]
        shown = by_title(found.annotated(tokens=words))  # of the one input with token ids
        assert [shown[f"sample {i}: class 1 (input_ids)"].tokens for i in range(2)] == words
        assert shown["sample 0: class 1 (visual_feats)"].tokens[0] == "visual_feats 0"

    def test_bad_input(self, found: relprop.Explanation) -> None:
        with pytest.raises(UnknownNameError, match="input with token strings: .* did you mean .visual_feats"):
            found.html(tokens={"visual_feat": [["a"] * 6] * 2})
        with pytest.raises(OptionError, match="a list of strings for each sample, as the model was given no token ids"):
            found.html(tokens={"visual_feats": Tokenizer()})
        with pytest.raises(ShapeError, match=r"tokens: expected strings for 2 sample\(s\), got 1"):
            found.html(tokens={"visual_feats": ["a"] * 6})
        two = replace(found, inputs={name: one for name, one in found.inputs.items() if name != "input_ids"})
        with pytest.raises(OptionError, match="a mapping to strings by input, as there are input_ids, visual_feats"):
            two.html(tokens=[["a"] * 4] * 2)
        with pytest.raises(OptionError, match="as the model was given no token ids"):
            two.html(tokens=Tokenizer())

    def test_one_row_of_words_and_regions(self) -> None:
        given = {**inputs("visual_bert", 2, 4), "attention_mask": SEEN}
        found = relprop.explain(build("visual_bert"), method="generic_attention", target=1, **given)
        assert found.relevance.shape == (2, 10)
        assert found.origins == ("input_ids",) * 4 + ("visual_embeds",) * 6
        shown = by_title(found.annotated(tokens=Tokenizer()))
        words, regions = (shown[f"sample 1: class 1 ({name})"] for name in ("input_ids", "visual_embeds"))
        assert words.tokens == [f"▁t{i}" for i in given["input_ids"][1, :2].tolist()]
        assert torch.equal(words.relevance, found.relevance[1, :2])  # type: ignore[arg-type]
        assert regions.tokens == [f"visual_embeds {i}" for i in range(6)]
        assert torch.equal(regions.relevance, found.relevance[1, 4:])  # type: ignore[arg-type]


def enlarged(patches: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(patches.unsqueeze(1).float(), size=size, mode="bilinear", align_corners=False)[:, 0]


class TestImages:
    @pytest.fixture(scope="class")
    def given(self) -> dict[str, Any]:
        return inputs("clip", 2, 5)

    @pytest.fixture(scope="class")
    def found(self, given: dict[str, Any]) -> relprop.Explanation:
        return relprop.explain(build("clip"), method="generic_attention", output="logits_per_text", **given)

    def test_patches_of_an_image_beside_a_text(self, found: relprop.Explanation) -> None:
        assert found.layouts["pixel_values"].kinds.names() == ("class",) + ("patch",) * 16
        assert found.token_kinds == ("word",) * 5 and found.grid is None
        patches = found.relevances["pixel_values"][:, 1:].reshape(2, 4, 4)
        assert torch.equal(found.patches, patches)
        assert torch.equal(found.image_map(), enlarged(patches, (32, 32)))

    def test_both_are_shown(self, found: relprop.Explanation, given: dict[str, Any]) -> None:
        html = found.html(tokens=Tokenizer())
        assert "data:image/png;base64," in html and f">t{int(given['input_ids'][1, 0])}</span>" in html
        assert [one.title for one in passages(found)] == ["sample 0: class 0", "sample 1: class 1"]
        assert found.picture().width > 300
        report = Report("clip")
        settings = {"output": "logits_per_text"}
        surveyed = survey(build("clip"), methods=["generic_attention", "attnlrp"], settings=settings, **given)
        report.add(surveyed, ["a", "b"], torch.rand(2, 2), ["one", "two"])
        page = report.html()
        assert page.count("data:image/jpeg;base64,") == 4 and page.count(">generic_attention</span>") == 2

    def test_where_there_is_no_map(self, found: relprop.Explanation, given: dict[str, Any]) -> None:
        lost = replace(found, relevances={"input_ids": found.relevance}, layouts={}, kinds=None)
        with pytest.raises(ShapeError, match=r"map: expected relevance over an image of \(32, 32\) pixels, got {"):
            lost.image_map()
        off_grid = {name: replace(one, grid=None) for name, one in found.layouts.items()}
        unknown = replace(found, layouts=off_grid)
        with pytest.raises(ShapeError, match="patches: expected relevance over the patches of an image"):
            unknown.image_map()
        assert by_title(unknown)["sample 1: class 1 (pixel_values)"].tokens[16] == "pixel_values 16"
        whole = relprop.explain(
            build("clip"),
            method="generic_attention",
            output="logits_per_text",
            method_options={"rows": "all"},
            **given,
        )
        with pytest.raises(ShapeError, match=r"number for each token of pixel_values, got \[2, 17, 17\].*rows='all'"):
            whole.image_map()

    def test_a_row_of_words_and_patches(self) -> None:
        """One sequence: a class token, the words and the patches."""
        torch.manual_seed(0)
        model = Together().eval()
        given = {"words": torch.tensor([[3, 1, 4], [5, 2, 6]]), "image": torch.randn(2, 3, 32, 48)}
        found = relprop.explain(model, target=1, method="attention_rollout", **given)
        assert found.token_kinds == ("class",) + ("word",) * 3 + ("patch",) * 6
        patches = found.relevance[:, 4:].reshape(2, 2, 3)
        assert torch.equal(found.image_map(), enlarged(patches, (32, 48)))
        shown = by_title(found)["sample 1: class 1"]
        assert shown.tokens == ["#5", "#2", "#6"]
        assert torch.equal(shown.relevance, found.relevance[1, 1:4])  # type: ignore[arg-type]


class Together(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.patches = nn.Embedding(9, 8), nn.Conv2d(3, 8, 16, 16)
        self.own = nn.Parameter(torch.randn(1, 1, 8))
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, words: Tensor, image: Tensor) -> Tensor:
        patches = self.patches(image).flatten(2).mT
        x = torch.cat([self.own.expand(words.shape[0], -1, -1), self.embed(words), patches], 1)
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        return self.head((x + F.scaled_dot_product_attention(q, k, v).squeeze(1))[:, 0])


@pytest.mark.full
def test_detr() -> None:
    """Its image's sides are no multiples of a patch's: the grid is that of the last convolution."""
    pixels = torch.randn(3, 3, 72, 104, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    engine = relprop.compile(build("detr"), (), {"pixel_values": pixels}, method="generic_attention")
    found = engine(pixel_values=pixels, target=(1, 2))
    assert found.relevance.shape == (3, 12) and found.grid == (3, 4) and found.token_kinds == ("patch",) * 12
    assert torch.equal(found.image_map(), enlarged(found.relevance.reshape(3, 3, 4), (72, 104)))
    cut = engine(pixel_values=pixels, target=(1, 2), batch_size=2)
    assert torch.allclose(cut.image_map(), found.image_map())
    assert "data:image/png;base64," in found.html()
