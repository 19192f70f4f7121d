"""The ICCV 2021 interfaces for two modalities: their numbers from the golden data, their callers' lines, bad input."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import relprop
from relprop.compat.chefer import (
    ClassIndexError,
    DetrGenerator,
    Generator,
    GeneratorBaselines,
    GeneratorOurs,
    LayerIndexError,
    interpret,
)
from relprop.errors import DTypeError, OptionError, ShapeError, TargetError, UnsupportedTopologyError
from tests.engine.models import GOLDEN, relative

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

CASES = {c["case"]: c for c in json.loads((GOLDEN / "manifest_multimodal.json").read_text())["cases"]}


@cache
def golden(case: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A golden case's model in float64, and its tensors."""
    tensors, sizes = load_file(GOLDEN / f"{case}.safetensors"), dict(CASES[case]["model_args"])
    kind = CASES[case]["model_class"].removeprefix("transformers.")
    if "backbone_args" in CASES[case]:
        sizes["backbone_config"] = transformers.ResNetConfig(**CASES[case]["backbone_args"])
    model = getattr(transformers, kind)(getattr(transformers, kind).config_class(**sizes))
    model.load_state_dict({k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")})
    tensors = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
    return model.double().eval(), tensors


SEEDS = pytest.mark.parametrize("seed", [0, 1])


@SEEDS
@pytest.mark.parametrize(("name", "start"), [("default", -1), ("start0", 0), ("start1", 1)])
def test_clip(name: str, start: int, seed: int) -> None:
    """As the notebook calls it."""
    model, tensors = golden(f"clip_A_seed{seed}")
    img, text = tensors["inputs/pixel_values"], tensors["inputs/input_ids"]
    R_text, R_image = interpret(
        model=model, image=img, texts=text, device="cpu", start_layer=start, start_layer_text=start
    )
    assert relative(R_text, tensors[f"expected/clip/interpret_{name}/text_relevance"]) < 1e-6
    assert relative(R_image, tensors[f"expected/clip/interpret_{name}/image_relevance"]) < 1e-6
    alone = interpret(img, text[1:2], model, "cpu", start, start)
    assert relative(alone[0][0], R_text[1]) < 1e-9
    assert relative(alone[1][0], R_image[1]) < 1e-9


def test_clip_with_an_image_for_each_text() -> None:
    model, tensors = golden("clip_A_seed0")
    text, number = tensors["inputs/input_ids"], np.int64(1)
    torch.manual_seed(0)
    images = torch.randn(len(text), *tensors["inputs/pixel_values"].shape[1:], dtype=torch.float64)
    for start in (-1, number):
        together = interpret(images, text, model, start_layer=start, start_layer_text=start)
        for i in range(len(text)):
            alone = interpret(images[i : i + 1], text[i : i + 1], model, "cpu", int(start), int(start))
            for found, expected in zip(together, alone, strict=True):
                assert relative(found[i], expected[0]) < 1e-9
        assert relative(together[1][0], together[1][1]) > 1e-3


LXMERT: dict[str, dict[str, Any]] = {
    "generate_ours": {"use_lrp": False},
    "generate_ours_no_normalization": {"use_lrp": False, "normalize_self_attention": False},
    "generate_ours_no_self_in_rule_10": {"use_lrp": False, "apply_self_in_rule_10": False},
    "generate_ours_use_lrp": {},
}


def lxmert(seed: int = 0) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    model, tensors = golden(f"lxmert_A_seed{seed}")
    names = ("input_ids", "attention_mask", "visual_feats", "visual_pos")
    return model, {name: tensors[f"inputs/{name}"] for name in names}, tensors


@SEEDS
@pytest.mark.parametrize("name", sorted(LXMERT))
def test_lxmert(name: str, seed: int) -> None:
    model, given, tensors = lxmert(seed)
    generator = GeneratorOurs(model)
    for t in range(2):
        targets = tensors["inputs/targets"][:, t]
        together = generator.generate_ours(given, targets, **LXMERT[name])
        for i in range(3):
            one = {key: value[i : i + 1] for key, value in given.items()}
            alone = generator.generate_ours(one, int(targets[i]), **LXMERT[name])
            for found, both, part in zip(alone, together, ("R_t_t", "R_t_i"), strict=True):
                expected = tensors[f"expected/lxmert/{name}/{part}"][i, t]
                assert found.shape == expected.shape
                assert torch.isfinite(found).all()
                if torch.isfinite(expected).all():  # padding makes the original divide zero by zero
                    assert relative(found, expected) < 1e-6
                    assert relative(both[i], expected) < 1e-6


@SEEDS
@pytest.mark.parametrize(
    ("name", "targeted"),
    [
        ("transformer_attr", True),
        ("partial_lrp", True),
        ("attn_gradcam", True),
        ("raw_attn", False),
        ("rollout", False),
    ],
)
def test_lxmert_baselines(name: str, targeted: bool, seed: int) -> None:
    model, given, tensors = lxmert(seed)
    generate = getattr(GeneratorBaselines(model, count_padding=True), f"generate_{name}")
    for t in range(2):
        targets = tensors["inputs/targets"][:, t]
        together = generate(given, targets) if targeted else generate(given)
        for i in range(3):
            one = {key: value[i : i + 1] for key, value in given.items()}
            alone = generate(one, int(targets[i])) if targeted else generate(one)
            for found, both, part in zip(alone, together, ("R_t_t", "R_t_i"), strict=True):
                expected = tensors[f"expected/lxmert/generate_{name}/{part}"][i, t]
                assert found.shape == expected.shape
                for answer in (found, both[i]):
                    assert (answer - expected).norm() <= 1e-6 * expected.norm()  # some of Grad-CAM's are all zero


QUESTIONS = ["ours", "transformer_attr", "partial_lrp", "raw_attn", "attn_gradcam", "rollout"]


@pytest.mark.parametrize("name", QUESTIONS)
def test_padded_questions_are_their_samples(name: str) -> None:
    """Words and regions that are padding, in one batch, and each question alone without them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "visual_feat_dim": 16}
    config = transformers.LxmertConfig(vocab_size=50, num_qa_labels=5, l_layers=2, x_layers=2, r_layers=2, **sizes)
    model = transformers.LxmertForQuestionAnswering(config).double()
    generate = getattr((GeneratorOurs if name == "ours" else GeneratorBaselines)(model), f"generate_{name}")
    counts = ((7, 6), (4, 5), (5, 3))
    given = {
        "input_ids": torch.randint(1, 50, (3, 7)),
        "attention_mask": (torch.arange(7) < torch.tensor([[words] for words, _ in counts])).long(),
        "visual_feats": torch.randn(3, 6, 16, dtype=torch.float64),
        "visual_pos": torch.rand(3, 6, 4, dtype=torch.float64),
        "visual_attention_mask": (torch.arange(6) < torch.tensor([[regions] for _, regions in counts])).long(),
    }
    together = generate(given)
    for i, (words, regions) in enumerate(counts):
        one = {key: value[i : i + 1, : regions if "visual" in key else words] for key, value in given.items()}
        for found, expected, number in zip(together, generate(one), (words, regions), strict=True):
            assert (found[i, :words, :number] - expected).norm() <= 1e-9 * expected.norm()
            assert not found[i, :words, number:].any()


STATES: dict[str, dict[str, Any]] = {
    "generate_ours": {},
    "generate_ours_use_lrp": {},
    "generate_ours_no_normalization": {"normalise_between": False},
    "generate_ours_no_self_in_rule_10": {"self_between": False},
}


@SEEDS
@pytest.mark.parametrize("name", sorted(STATES))
def test_lxmert_matrices(name: str, seed: int) -> None:
    """All four, as the engine answers and as the generator keeps them."""
    model, given, tensors = lxmert(seed)
    words, regions = "input_ids", "visual_feats"
    pairs = {
        "R_t_t": (words, words),
        "R_t_i": (words, regions),
        "R_i_i": (regions, regions),
        "R_i_t": (regions, words),
    }
    options = {"edge": "gradient_x_relevance"} if name == "generate_ours_use_lrp" else STATES[name]
    engine = relprop.compile(
        model,
        (),
        given,
        method="generic_attention",
        output="question_answering_score",
        method_options={**options, "rows": "all"},
    )
    generator, targets = GeneratorOurs(model), tensors["inputs/targets"]
    together = engine(**given, target=targets)
    for i in range(3):
        for t in range(2):
            generator.generate_ours({k: v[i : i + 1] for k, v in given.items()}, int(targets[i, t]), **LXMERT[name])
            for part, pair in pairs.items():
                expected = tensors[f"expected/lxmert/{name}/{part}"][i, t]
                if not torch.isfinite(expected).all():  # padding makes the original divide zero by zero
                    continue
                found = together.matrices[pair][i, t].clone()
                if part == "R_t_t":
                    found[0, 0] = 0
                assert relative(found, expected) < 1e-6
                assert relative(getattr(generator, part), expected) < 1e-6


def test_lxmert_index_of_the_largest_answer() -> None:
    model, given, _ = lxmert()
    generator = GeneratorBaselines(model)
    best = model(**given).question_answering_score.argmax(-1)
    for left, right in zip(
        generator.generate_attn_gradcam(given), generator.generate_attn_gradcam(given, best), strict=True
    ):
        assert torch.equal(left, right)


def test_lxmert_through_a_wrapper_as_in_the_original() -> None:
    """An object with `model` and `forward(input)`, as the notebook's own."""
    model, given, _ = lxmert()

    class ModelUsage:
        def __init__(self) -> None:
            self.model = model

        def forward(self, input: tuple[int, str]) -> Any:
            row, self.question = input
            self.output = self.model(**{key: value[row : row + 1] for key, value in given.items()}, return_dict=True)
            return self.output

    lrp = GeneratorOurs(ModelUsage())
    R_t_t, R_t_i = lrp.generate_ours((1, "what is this?"), use_lrp=False, normalize_self_attention=True)
    one = {key: value[1:2] for key, value in given.items()}
    expected = GeneratorOurs(model).generate_ours(one, use_lrp=False)
    assert torch.equal(R_t_t, expected[0])
    assert torch.equal(R_t_i, expected[1])
    assert not model._forward_pre_hooks
    row = relprop.explain(model, method="generic_attention", output="question_answering_score", **one)
    assert relative(R_t_i[0], row.relevances["visual_feats"][0]) < 1e-9


DETR: dict[str, dict[str, Any]] = {
    "generate_ours": {},
    "generate_ours_no_normalization": {"normalize_self_attention": False},
    "generate_ours_no_self_in_rule_10": {"apply_self_in_rule_10": False},
}


@SEEDS
@pytest.mark.parametrize("name", sorted(DETR))
def test_detr(name: str, seed: int) -> None:
    model, tensors = golden(f"detr_A_seed{seed}")
    x, generator = tensors["inputs/pixel_values"], DetrGenerator(model)
    for i in range(2):
        for t, (query, index) in enumerate(tensors["inputs/targets"][i].tolist()):
            expected = tensors[f"expected/detr/{name}"][i, t]
            found = generator.generate_ours(x[i : i + 1], query, index, use_lrp=False, **DETR[name])
            assert found.shape == (1, 1, 12)
            assert relative(found[0, 0], expected) < 1e-6
            both = generator.generate_ours(x, torch.tensor([query]), index, use_lrp=False, **DETR[name])
            assert both.shape == (1, 2, 1, 12)
            assert relative(both[0, i, 0], expected) < 1e-6
            if name == "generate_ours":
                for part in ("R_i_i", "R_q_q", "R_q_i"):
                    assert relative(getattr(generator, part)[i], tensors[f"expected/detr/{name}/{part}"][i, t]) < 1e-6
    best = int(model(x[:1]).logits[0, 2, :-1].argmax())
    assert torch.equal(
        generator.generate_ours(x[:1], 2, use_lrp=False), generator.generate_ours(x[:1], 2, best, use_lrp=False)
    )
    assert all(parameter.grad is None for parameter in model.parameters())


DETR_BASELINES = ("transformer_att", "partial_lrp", "attn_gradcam", "raw_attn", "rollout")


@SEEDS
@pytest.mark.parametrize("name", DETR_BASELINES)
def test_detr_baselines(name: str, seed: int) -> None:
    model, tensors = golden(f"detr_A_seed{seed}")
    x, generate = tensors["inputs/pixel_values"], getattr(DetrGenerator(model), f"generate_{name}")
    for i in range(2):
        for t, (query, index) in enumerate(tensors["inputs/targets"][i].tolist()):
            classes = () if name in ("raw_attn", "rollout") else (index,)
            expected = tensors[f"expected/detr/generate_{name}"][i, t]
            found, both = generate(x[i : i + 1], query, *classes), generate(x, torch.tensor([query]), *classes)
            assert found.shape == (1, 1, 12)
            assert both.shape == (1, 2, 1, 12)
            for answer in (found[0, 0], both[0, i, 0]):
                assert (answer - expected).norm() <= 1e-6 * expected.norm()  # some of Grad-CAM's are all zero
    assert all(parameter.grad is None for parameter in model.parameters())


DETR_ALL = {f"generate_{name}": f"generate_{name}" for name in DETR_BASELINES}
DETR_ALL |= {"generate_ours": "generate_ours", "generate_ours_use_lrp": "generate_ours"}


@SEEDS
@pytest.mark.parametrize("name", sorted(DETR_ALL))
def test_detr_with_a_query_for_each_image(name: str, seed: int) -> None:
    """Numbers of the original, which takes one image."""
    model, tensors = golden(f"detr_A_seed{seed}")
    x, generate = tensors["inputs/pixel_values"], getattr(DetrGenerator(model), DETR_ALL[name])
    options = {"use_lrp": False} if name == "generate_ours" else {}
    for t in range(3):
        queries, classes = tensors["inputs/targets"][:, t].unbind(1)
        chosen = () if name in ("generate_raw_attn", "generate_rollout") else (classes,)
        both = generate(x, queries, *chosen, **options)
        assert both.shape == (1, 2, 1, 12)
        for i in range(2):
            expected = tensors[f"expected/detr/{name}"][i, t]
            assert (both[0, i, 0] - expected).norm() <= 1e-6 * expected.norm()


def test_detr_with_a_query_for_each_image_and_its_largest_class() -> None:
    model, tensors = golden("detr_A_seed0")
    x, generator = tensors["inputs/pixel_values"], DetrGenerator(model)
    x, queries = torch.cat([x, x[:1].flip(-1)]), torch.tensor([5, 0, 2])
    for options in ({}, {"use_lrp": False}):
        together = generator.generate_ours(x, queries, **options)
        kept = generator.R_i_i, generator.R_q_q, generator.R_q_i
        for i in range(3):
            alone = generator.generate_ours(x[i : i + 1], queries[i : i + 1], **options)
            assert alone.shape == (1, 1, 1, 12)
            assert relative(together[:, i : i + 1], alone) < 1e-9
            for found, expected in zip(kept, (generator.R_i_i, generator.R_q_q, generator.R_q_i), strict=True):
                assert relative(found[i], expected) < 1e-9
    expected = generator.generate_raw_attn(x, queries)
    for asked in (queries.tolist(), tuple(queries), queries.numpy(), queries - 7):
        assert torch.equal(generator.generate_raw_attn(x, asked), expected)
    assert relative(generator.generate_raw_attn(x[:1], [5]), expected[:, :1]) < 1e-9


@SEEDS
def test_detr_with_relevance(seed: int) -> None:
    model, tensors = golden(f"detr_A_seed{seed}")
    x, generator = tensors["inputs/pixel_values"], DetrGenerator(model)
    for i in range(2):
        for t, (query, index) in enumerate(tensors["inputs/targets"][i].tolist()):
            expected = tensors["expected/detr/generate_ours_use_lrp"][i, t]
            assert relative(generator.generate_ours(x[i : i + 1], query, index)[0, 0], expected) < 2e-7
            assert relative(generator.generate_ours(x, query, index)[0, i], expected) < 2e-7


def test_detr_whose_queries_cannot_be_given() -> None:
    """As in older versions of transformers: relevance of their first attention is not there."""
    stock, tensors = golden("detr_A_seed0")

    class Older(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config = stock, stock.config
            self.model = stock.model

        def forward(self, pixel_values: Tensor, decoder_inputs_embeds: Tensor | None = None) -> Any:
            return self.inner(pixel_values)

    generator = DetrGenerator(Older())
    with pytest.raises(UnsupportedTopologyError, match="pairs of the queries, got 8 .one less where"):
        generator.generate_ours(tensors["inputs/pixel_values"], 0)
    expected = DetrGenerator(stock).generate_partial_lrp(tensors["inputs/pixel_values"], 0, 1)
    assert relative(generator.generate_partial_lrp(tensors["inputs/pixel_values"], 0, 1), expected) < 1e-6


def test_lxmert_with_embeddings_for_words() -> None:
    model, given, _ = lxmert()
    embedded = {name: value for name, value in given.items() if name != "input_ids"}
    embedded["inputs_embeds"] = model.get_submodule("lxmert.embeddings.word_embeddings")(given["input_ids"]).detach()
    for options in LXMERT.values():
        generator = GeneratorOurs(model)
        expected = generator.generate_ours(given, 3, **options)
        kept = generator.R_i_i, generator.R_i_t
        found = generator.generate_ours(embedded, 3, **options)
        for left, right in zip((*found, generator.R_i_i, generator.R_i_t), (*expected, *kept), strict=True):
            assert relative(left, right) < 1e-9


def test_lxmert_under_other_names() -> None:
    model, given, _ = lxmert()

    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, words: Tensor, regions: Tensor, boxes: Tensor) -> Any:
            return self.inner(words, regions, boxes)

    names = {"words": "input_ids", "regions": "visual_feats", "boxes": "visual_pos"}
    with pytest.raises(UnsupportedTopologyError, match="for input_ids or inputs_embeds, got it of .*words"):
        GeneratorOurs(Renamed()).generate_ours({name: given[old] for name, old in names.items()})


def test_a_generator_of_another_kind() -> None:
    from relprop.compat import chefer_multimodal

    model, _ = golden("detr_A_seed0")
    with pytest.raises(OptionError, match="input_ids, got DetrForObj.*, which takes pixel_values; .*_multimodal"):
        Generator(model)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=9, **sizes))
    with pytest.raises(OptionError, match="pixel_values, got BertForSeq.*, which takes input_ids; .*compat.chefer.Gen"):
        chefer_multimodal.Generator(bert)
    assert chefer_multimodal.Generator is DetrGenerator


def test_bad_input() -> None:
    model, tensors = golden("clip_A_seed0")
    img, text = tensors["inputs/pixel_values"], tensors["inputs/input_ids"]
    with pytest.raises(LayerIndexError, match="start_layer_text: expected -1 or one of 3 attention layers, got 3"):
        interpret(img, text, model, start_layer_text=3)
    with pytest.raises(LayerIndexError, match="start_layer: expected an int, got 0.5"):
        interpret(img, text, model, start_layer=0.5)
    three = text[:1].repeat(3, 1)
    for images, texts, error, wrong in (
        (img[:1].repeat(2, 1, 1, 1), three, ShapeError, "image: expected one image, or one for each of 3 texts, got 2"),
        (text, img, ShapeError, r"image: expected a tensor of images \[B, 3, H, W\], got \["),
        (img, "a cat", ShapeError, r"texts: expected a tensor of token ids \[B, N\], got str"),
        (img, text.float(), DTypeError, "texts: expected token ids, integers, got torch.float32"),
        (img.long(), text, DTypeError, "image: expected images as the model takes them, floating, got torch.int64"),
    ):
        with pytest.raises(error, match=wrong):
            interpret(images, texts, model)
    model, tensors = golden("detr_A_seed0")
    x, generator = tensors["inputs/pixel_values"], DetrGenerator(model)
    wanted = r"target_index: expected one query or one for each image, integers of shape \[2\], got "
    sum_of_several = "; several queries of one image would be explained as one sum"
    for query, got in (
        ("a", "str"),
        (None, "NoneType"),
        (1.5, "torch.float32"),
        (torch.tensor([1.5]), "torch.float32"),
        (True, "torch.bool"),
        ([0, 1, 2], r"shape \[3\]" + sum_of_several),
        (torch.tensor([[0], [1]]), r"shape \[2, 1\]" + sum_of_several),
    ):
        for generate in (generator.generate_ours, generator.generate_rollout, generator.generate_partial_lrp):
            with pytest.raises(TargetError, match=wanted + got):
                generate(x, query)
    with pytest.raises(TargetError, match=r"shape \[1\], got shape \[2\]" + sum_of_several):
        generator.generate_raw_attn(x[:1], torch.tensor([0, 1]))
    with pytest.raises(TargetError, match="target_index: expected one of 7 queries, got -8, 7"):
        generator.generate_raw_attn(x, [7, -8])
    for given, got in (({"pixel_values": x}, "dict"), (x[0], "\\[3, ")):
        for generate in (generator.generate_ours, generator.generate_rollout):
            with pytest.raises(ShapeError, match=f"img: expected a tensor of images .B, 3, H, W., got {got}"):
                generate(given, 1)
    for generate in (generator.generate_ours, generator.generate_rollout, generator.generate_transformer_att):
        with pytest.raises(TargetError, match="target_index: expected one of 7 queries, got 7"):
            generate(x, 7)
    with pytest.raises(ClassIndexError, match="expected classes of an output with 6"):
        generator.generate_attn_gradcam(x, 0, 6)
    with pytest.raises(TargetError, match="target_index: expected one of 7 queries, got 7"):
        generator.generate_ours(x, 7, use_lrp=False)
    with pytest.raises(ClassIndexError, match="expected classes of an output with 6"):
        generator.generate_ours(x, 0, 6, use_lrp=False)
    model, given, _ = lxmert()
    with pytest.raises(OptionError, match="input: expected the model's keyword arguments, got list"):
        GeneratorOurs(model).generate_ours([1, 2])
    with pytest.raises(TargetError, match="one class for each sample"):
        GeneratorOurs(model).generate_ours(given, torch.tensor([1, 2]))
    with pytest.raises(TargetError, match="several classes of one sample would be explained as one sum"):
        GeneratorBaselines(model).generate_partial_lrp(given, torch.zeros(3, 8, dtype=torch.long))
    with pytest.raises(ClassIndexError, match="expected classes of an output with 8"):
        GeneratorBaselines(model).generate_transformer_attr(given, 8)
    with pytest.raises(OptionError, match="edge: expected one of"):
        relprop.explain(model, method="generic_attention", method_options={"edge": "relevant"}, **given)


def test_towers() -> None:
    with pytest.raises(UnsupportedTopologyError, match="expected a model with attention in vision_model"):
        from relprop.compat.chefer_multimodal import _towers

        _towers(["encoder.layers.0"])
