"""Pipelines of transformers with small models: the same labels and scores, and relevance beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import relprop
from relprop.errors import OptionError, UnknownNameError
from tests.engine.models import relative

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

WORDS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "film", "that", "is", "never", "dull", "but", "not"),
    *("photo", "of", "this", "cat", "dog", "two", "remote", "controls", "."),
]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    return transformers.BertTokenizer(str(tmp_path / "vocab.txt"))


def classifier(labels: int = 3) -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    config.num_labels = labels
    return transformers.BertForSequenceClassification(config)


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 50, 3), dtype=np.uint8))


def test_text(tokenizer: Any) -> None:
    model = classifier()
    why = relprop.pipeline("text-classification", model=model, tokenizer=tokenizer)
    theirs = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)
    text = "a film that is never dull"
    (result,) = why(text)
    expected = theirs(text)
    assert result["label"] == expected[0]["label"]
    assert result["score"] == pytest.approx(expected[0]["score"], abs=1e-6)
    assert result.tokens == ("[CLS]", *text.split(), "[SEP]")
    direct = relprop.explain(model, **tokenizer(text, return_tensors="pt"))
    assert torch.equal(result.relevance, direct.relevance[0])
    assert dict(result)["label"] == result.label


def test_texts_of_different_lengths(tokenizer: Any) -> None:
    """Each as if alone, padding left out."""
    why = relprop.pipeline("sentiment-analysis", model=classifier().double(), tokenizer=tokenizer, method="attnlrp")
    texts = ["a film that is never dull", "not dull"]
    together = why(texts)
    for text, result in zip(texts, together, strict=True):
        (alone,) = why(text)
        assert alone.tokens == result.tokens
        assert len(result.relevance) == len(text.split()) + 2
        assert relative(result.relevance, alone.relevance) < 1e-6
    best = why(texts, top_k=2)
    everything = why(texts[0], top_k=None)
    assert [len(labels) for labels in best] == [2, 2]
    assert [result.label for result in everything[:2]] == [result.label for result in best[0]]
    assert relative(everything[1].relevance, best[0][1].relevance) < 1e-6
    assert not torch.equal(everything[0].relevance, everything[1].relevance)
    assert everything[0].score > everything[1].score


def plain(results: Any) -> Any:
    """Labels and scores, nested as they are."""
    if isinstance(results, list):
        return [plain(one) for one in results]
    return {"label": results["label"], "score": pytest.approx(results["score"], abs=1e-6)}


PAIR = {"text": "a film", "text_pair": "that is never dull"}


@pytest.mark.parametrize(
    "inputs",
    [
        "a film",
        ["a film", "not dull but never"],
        ("a film", "dull"),
        PAIR,
        [PAIR, {"text": "dull", "text_pair": "dull"}, PAIR],
    ],
    ids=["text", "texts", "tuple", "pair", "pairs"],
)
@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"top_k": 2}, {"top_k": None}, {"function_to_apply": "sigmoid"}])
def test_answers_are_nested_as_theirs(tokenizer: Any, inputs: Any, options: dict[str, Any]) -> None:
    model = classifier()
    torch.nn.init.normal_(model.classifier.weight)
    given = {"model": model, "tokenizer": tokenizer}
    why = relprop.pipeline("text-classification", **given, method="attnlrp")
    theirs = transformers.pipeline("text-classification", **given)
    expected = theirs(list(inputs) if isinstance(inputs, tuple) else inputs, **options)
    assert plain(expected) == plain(why(inputs, **options))


def test_pairs(tokenizer: Any) -> None:
    """Both texts are read, with their segments, and one pair's answer is the same in any batch."""
    model = classifier().double()
    torch.nn.init.normal_(model.bert.embeddings.token_type_embeddings.weight)
    why = relprop.pipeline("text-classification", model=model, tokenizer=tokenizer, method="attnlrp")
    alone = why(PAIR)
    assert alone.tokens == ("[CLS]", "a", "film", "[SEP]", "that", "is", "never", "dull", "[SEP]")
    read = tokenizer(PAIR["text"], PAIR["text_pair"], return_tensors="pt")
    assert relative(alone.relevance, relprop.explain(model, **read, method="attnlrp").relevance[0]) < 1e-9
    for size in (None, 1, 2):
        together = why([{"text": "dull", "text_pair": "not dull"}, PAIR, PAIR], batch_size=size)
        assert [len(one.tokens) for one in together] == [6, 9, 9]
        assert relative(together[1].relevance, alone.relevance) < 1e-9
    generated = why(one for one in ["a film", "dull"])
    assert [one.tokens for one in generated] == [("[CLS]", "a", "film", "[SEP]"), ("[CLS]", "dull", "[SEP]")]


def test_options_of_the_pipeline(tokenizer: Any) -> None:
    """Given once, they hold for every call, unless a call says otherwise."""
    model = classifier()
    given = {"model": model, "tokenizer": tokenizer, "top_k": 2, "truncation": True, "max_length": 4}
    why = relprop.pipeline("text-classification", **given, method="attnlrp")
    theirs = transformers.pipeline("text-classification", **given)
    texts = ["a film that is never dull", "dull"]
    assert plain(theirs(texts)) == plain(why(texts))
    assert [len(labels) for labels in why(texts, top_k=3)] == [3, 3]
    assert why(texts)[0][0].tokens == ("[CLS]", "a", "film", "[SEP]")
    assert len(why(texts, max_length=5, padding=True)[0][0].tokens) == 5
    sigmoid = why(texts[0], function_to_apply="sigmoid")[0][0].score
    assert sigmoid == pytest.approx(theirs(texts[0], function_to_apply="sigmoid")[0][0]["score"], abs=1e-6)
    assert abs(sigmoid - why(texts[0])[0][0].score) > 0.01


def test_results_are_mappings(tokenizer: Any) -> None:
    (word,) = relprop.pipeline("text-classification", model=classifier(), tokenizer=tokenizer)("a film")
    assert list(word) == ["label", "score", "relevance", "tokens", "relevances"] and len(word) == 5
    assert dict(word.items())["tokens"] == word.tokens and word.get("entity") is None and "score" in word
    assert word == word and len({word, word}) == 1


def test_images() -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=32, patch_size=8
    )
    config.num_labels = 4
    model = transformers.ViTForImageClassification(config)
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    why = relprop.pipeline("image-classification", model=model, image_processor=processor)
    theirs = transformers.pipeline("image-classification", model=model, image_processor=processor)
    found, expected = why(image(0)), theirs(image(0))
    assert [result.label for result in found] == [one["label"] for one in expected]
    assert [result.score for result in found] == pytest.approx([one["score"] for one in expected], abs=1e-6)
    assert found[0].relevance.shape == (32, 32)
    pixels = processor(images=image(0), return_tensors="pt")["pixel_values"]
    third = model.config.label2id[found[2].label]
    assert relative(found[2].relevance, relprop.explain(model, pixels, target=third).image_map()[0]) < 1e-3
    several = why([image(0), image(1)], top_k=1)
    assert [len(labels) for labels in several] == [1, 1]
    assert several[0][0].label == found[0].label
    one_by_one = why([image(0), image(1), image(2)], top_k=1, batch_size=2)
    assert len(one_by_one) == 3
    assert relative(one_by_one[1][0].relevance, several[1][0].relevance) < 1e-5
    sigmoid = why(image(0), top_k=2, function_to_apply="sigmoid")
    assert plain(theirs(image(0), top_k=2, function_to_apply="sigmoid")) == plain(sigmoid)
    usual = relprop.pipeline("image-classification", model=model, image_processor=processor, top_k=2)
    assert len(usual(image(0))) == 2 and len(usual(image(0), top_k=3)) == 3


def clip() -> Any:
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.CLIPConfig(
        text_config={**tower, "vocab_size": len(WORDS), "eos_token_id": 3, "max_position_embeddings": 20},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    model = transformers.CLIPModel(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_zero_shot(tokenizer: Any) -> None:
    model = clip()
    given = {"tokenizer": tokenizer, "image_processor": transformers.CLIPImageProcessor(size=32, crop_size=32)}
    why = relprop.pipeline("zero-shot-image-classification", model=model, **given)
    theirs = transformers.pipeline("zero-shot-image-classification", model=model, **given)
    labels = ["a cat", "two remote controls", "dog"]
    found, expected = why(image(0), candidate_labels=labels), theirs(image(0), candidate_labels=labels)
    assert [result.label for result in found] == [one["label"] for one in expected]
    assert [result.score for result in found] == pytest.approx([one["score"] for one in expected], abs=1e-5)
    assert found[0].relevance.shape == (32, 32)
    for result in found:
        assert len(result.relevances["input_ids"]) == len(result.tokens)
        assert result.tokens[1:-1] == (*["this", "is", "a", "photo", "of"], *result.label.split(), ".")
    assert not torch.equal(found[0].relevance, found[1].relevance)
    asked = {
        "hypothesis_template": "this {}",
        "timeout": 1.0,
        "tokenizer_kwargs": {"max_length": 4, "truncation": True},
    }
    assert {one.tokens[1:-1] for one in why(image(0), labels, **asked)} == {
        ("this", first) for first in ("a", "two", "dog")
    }
    with pytest.raises(OptionError, match="expected hypothesis_template, timeout, tokenizer_kwargs, got top_k, foo"):
        why(image(0), labels, top_k=2, foo=1)
    for bad in ("a cat", [], None, 3):
        with pytest.raises(OptionError, match="candidate_labels: expected a list of labels"):
            why(image(0), candidate_labels=bad)
    assert len(why([image(0), image(1)], candidate_labels=labels)) == 2
    both = found[1].html()
    assert "data:image/png;base64," in both and "photo</span>" in both


def test_zero_shot_of_patches(tokenizer: Any) -> None:
    """A method that answers for patches: pixels all the same."""
    given = {"tokenizer": tokenizer, "image_processor": transformers.CLIPImageProcessor(size=32, crop_size=32)}
    why = relprop.pipeline("zero-shot-image-classification", model=clip(), method="generic_attention", **given)
    for result in why(image(0), candidate_labels=["a cat", "dog"]):
        assert result.explanation is not None
        patches = result.explanation.relevances["pixel_values"][result.sample, 1:].reshape(1, 1, 4, 4)
        large = torch.nn.functional.interpolate(patches, size=(32, 32), mode="bilinear", align_corners=False)
        assert torch.equal(result.relevance, large[0, 0])
        assert torch.equal(result.relevances["pixel_values"], result.relevance)
        html = result.html()
        assert "data:image/png;base64," in html and "photo</span>" in html


def test_results_show_themselves(tokenizer: Any, tmp_path: Path) -> None:
    why = relprop.pipeline("text-classification", model=classifier(), tokenizer=tokenizer, method="attnlrp")
    (word,) = why("a film that is <b>")
    html = word.html()
    assert html == word._repr_html_() and f"{word.label}, score {word.score:.3f}" in html
    assert "that</span>" in html and "data:image" not in html and "<b>" not in html
    assert "never" in why(["not", "never dull"])[1].save(tmp_path / "a.html").read_text()
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=32, patch_size=8
    )
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.2] * 3)
    why = relprop.pipeline(
        "image-classification", model=transformers.ViTForImageClassification(config), image_processor=processor
    )
    first, second = why([image(0), image(1)], top_k=1)
    assert "data:image/png;base64," in first[0].html()
    seen = image(1).resize((32, 32), Image.Resampling.BILINEAR)
    found = second[0].explanation
    assert found is not None
    shown = found.annotation.pictures(found.image_input(), 2)[1]
    assert np.abs(np.asarray(shown).astype(int) - np.asarray(seen)).max() <= 1
    with Image.open(second[0].save(tmp_path / "a.png", side=100)) as stored:
        assert stored.width == 8 + 2 * 108


def test_bad_input(tokenizer: Any) -> None:
    with pytest.raises(UnknownNameError, match="unknown task.*got 'image-clasification'; did you mean 'image-class"):
        relprop.pipeline("image-clasification")
    for task, options, wrong in (
        (["text-classification"], {}, "unknown task"),
        ("text-classification", {"method": "foo"}, "unknown method: expected one of .*, got 'foo'"),
        ("text-classification", {"composite": "chefr"}, "unknown composite: .*; did you mean 'chefer'"),
    ):
        with pytest.raises(UnknownNameError, match=wrong):
            relprop.pipeline(task, model="/not/there", **options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="method_options of attnlrp: expected .*, got start_layer"):
        relprop.pipeline("text-classification", "/not/there", method="attnlrp", method_options={"start_layer": 1})
    why = relprop.pipeline("text-classification", model=classifier(), tokenizer=tokenizer)
    for bad in ([], 3, None, ["a", 3], [PAIR, "a film"], {"text": "a", "pair": "b"}, [["a", "film"], ["b", "c"]]):
        with pytest.raises(OptionError, match="inputs: expected a text or several, or pairs"):
            why(bad)
    for size in (-2, 0, False, 1.5):
        with pytest.raises(OptionError, match=f"batch_size: expected None or a positive int, got {size}"):
            why("a film", batch_size=size)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="top_k: expected None or a positive int, got 0"):
        why("a film", top_k=0)
    with pytest.raises(UnknownNameError, match="unknown entry"):
        why("a film")[0]["lable"]
