"""The authors' interfaces: their examples' lines, their numbers from the golden data, and their bad input."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import relprop
from relprop.compat.chefer import LRP, Baselines, ClassIndexError, Generator, LayerIndexError, generate_relevance
from relprop.errors import OptionError, TargetError, UnknownNameError
from tests.engine.models import golden, manifest, relative, vit

CASES = sorted(manifest())

# golden name -> how the original is called
CALLS: dict[str, Any] = {
    "vit_lrp/transformer_attribution": lambda m, x, t: LRP(m).generate_LRP(x, t),
    "vit_lrp/transformer_attribution_start1": lambda m, x, t: LRP(m).generate_LRP(x, t, "grad", start_layer=1),
    "vit_lrp/rollout": lambda m, x, t: LRP(m).generate_LRP(x, index=t, method="rollout"),
    "vit_lrp/rollout_start1": lambda m, x, t: LRP(m).generate_LRP(x, index=t, method="rollout", start_layer=1),
    "vit_lrp/full": lambda m, x, t: LRP(m).generate_LRP(x, method="full", index=t),
    "vit_lrp/last_layer": lambda m, x, t: LRP(m).generate_LRP(x, method="last_layer", index=t),
    "vit_lrp/last_layer_ablation": lambda m, x, t: LRP(m).generate_LRP(x, t, method="last_layer", is_ablation=True),
    "vit_lrp/last_layer_attn": lambda m, x, t: LRP(m).generate_LRP(x, t, method="last_layer_attn"),
    "vit_lrp/second_layer": lambda m, x, t: LRP(m).generate_LRP(x, t, method="second_layer"),
    "vit_lrp/second_layer_ablation": lambda m, x, t: LRP(m).generate_LRP(x, t, method="second_layer", is_ablation=True),
    "vit_orig_lrp/full": lambda m, x, t: LRP(m, "chefer_original").generate_LRP(x, t, method="full"),
    "vit_baseline/rollout": lambda m, x, t: Baselines(m).generate_rollout(x),
    "vit_baseline/rollout_start1": lambda m, x, t: Baselines(m).generate_rollout(x, start_layer=1),
    "vit_baseline/cam_attn": lambda m, x, t: Baselines(m).generate_cam_attn(x, index=t),
    "mm_vit/generate_relevance": lambda m, x, t: generate_relevance(m, x, index=t),
}
WITHOUT_BATCH = {
    "vit_lrp/last_layer",
    "vit_lrp/last_layer_ablation",
    "vit_lrp/last_layer_attn",
    "vit_lrp/second_layer",
    "vit_lrp/second_layer_ablation",
    "vit_baseline/cam_attn",
    "mm_vit/generate_relevance",
}


def close(found: Tensor, expected: Tensor) -> None:
    if torch.isfinite(expected).all():
        assert relative(found.reshape(expected.shape), expected) < 1e-6
    else:  # zero over zero in the original, where its map is constant
        assert torch.equal(found, torch.zeros_like(found))


@cache
def hugging_face(case: str) -> nn.Module:
    """A golden case's weights in a stock `ViTForImageClassification`."""
    transformers = pytest.importorskip("transformers")
    args, model = manifest()[case]["model_args"], golden(case)[0]
    config = transformers.ViTConfig(
        image_size=args["img_size"],
        patch_size=args["patch_size"],
        num_labels=args["num_classes"],
        hidden_size=args["embed_dim"],
        num_hidden_layers=args["depth"],
        num_attention_heads=args["num_heads"],
        intermediate_size=int(args["mlp_ratio"] * args["embed_dim"]),
        qkv_bias=args["qkv_bias"],
        layer_norm_eps=model.get_submodule("blocks.0.norm1").eps,
    )
    renamed = {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "blocks": "vit.encoder.layer",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "head": "classifier",
    }
    state = {}
    for name, value in model.state_dict().items():
        for old, new in {**renamed, **({"norm": "vit.layernorm"} if name.startswith("norm.") else {})}.items():
            name = name.replace(old, new)
        if ".attn.qkv." not in name:
            state[name] = value
            continue
        for part, chunk in zip(("query", "key", "value"), value.chunk(3), strict=True):
            state[name.replace("attn.qkv", f"attention.attention.{part}")] = chunk
    found = transformers.ViTForImageClassification.from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float64
    )
    found.vit.layernorm.eps = model.get_submodule("norm").eps
    return found.eval()


@pytest.mark.parametrize("name", sorted(CALLS))
@pytest.mark.parametrize(
    ("case", "package"),
    [*((case, "timm") for case in CASES), ("vit_A_seed0", "transformers"), ("vit_C_seed0", "transformers")],
)
def test_vit_as_published(case: str, package: str, name: str) -> None:
    model, tensors = golden(case)
    model = model if package == "timm" else hugging_face(case)
    x, targets, expected = tensors["inputs/x"].double(), tensors["inputs/targets"], tensors[f"expected/{name}"]
    for t in range(expected.shape[1]):
        together = CALLS[name](model, x, targets[:, t])
        assert together.shape[0] == len(x)
        for i in range(len(x)):
            alone = CALLS[name](model, x[i : i + 1], int(targets[i, t]))
            assert alone.shape == together[i : i + 1].shape[int(name in WITHOUT_BATCH) :]
            close(alone, expected[i, t])
            close(together[i], expected[i, t])


def test_example_of_the_notebook() -> None:
    """Transformer_explainability.ipynb, without `.cuda()`."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=20)
    original_image = torch.randn(3, 224, 224)
    attribution_generator = LRP(model)

    def generate_visualization(original_image: Tensor, class_index: int | None = None) -> np.ndarray:
        transformer_attribution = attribution_generator.generate_LRP(
            original_image.unsqueeze(0), method="transformer_attribution", index=class_index
        ).detach()
        transformer_attribution = transformer_attribution.reshape(1, 1, 14, 14)
        transformer_attribution = torch.nn.functional.interpolate(
            transformer_attribution, scale_factor=16, mode="bilinear"
        )
        attribution = transformer_attribution.reshape(224, 224).data.cpu().numpy()
        return (attribution - attribution.min()) / (attribution.max() - attribution.min())

    cat, dog = generate_visualization(original_image), generate_visualization(original_image, class_index=7)
    assert cat.shape == dog.shape == (224, 224)
    assert not model.training
    assert not np.allclose(cat, dog)
    predicted = int(model(original_image[None]).argmax())
    assert np.array_equal(cat, generate_visualization(original_image, class_index=predicted))


def test_weights_changed_in_place_are_noticed() -> None:
    model, x = vit(), torch.randn(2, 3, 32, 32)
    generator = LRP(model)
    before = generator.generate_LRP(x, 3)
    with torch.no_grad():
        model.get_parameter("head.weight").mul_(-1)
    expected = relprop.explain(model, x, target=3).relevance[:, 1:]
    assert torch.equal(generator.generate_LRP(x, 3), expected)
    assert not torch.equal(before, expected)


@pytest.mark.parametrize(
    ("index", "error", "text"),
    [
        (torch.tensor([1, 2]), TargetError, "one class for each sample, shape \\[1\\], got shape \\[2\\]"),
        ([[1]], TargetError, "got shape \\[1, 1\\]; several classes of one sample"),
        (10, ClassIndexError, "expected classes of an output with 10, got \\[10\\]"),
        (-11, IndexError, "expected classes"),
        ("cat", TargetError, "got str"),
        (1.0, TargetError, "got torch.float"),
        (True, TargetError, "got torch.bool"),
    ],
)
def test_bad_index(index: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        LRP(vit()).generate_LRP(torch.randn(1, 3, 32, 32), index)


@pytest.mark.parametrize("index", [3, np.int64(3), [3], np.array([3]), torch.tensor(3), torch.tensor([3]), -7])
def test_forms_of_the_index(index: Any) -> None:
    model, x = vit(), torch.randn(1, 3, 32, 32)
    assert torch.equal(LRP(model).generate_LRP(x, index), LRP(model).generate_LRP(x, 3))


def test_other_bad_input() -> None:
    x = torch.randn(1, 3, 32, 32)
    with pytest.raises(UnknownNameError, match="got 'transformer_attributon'; did you mean 'transformer_attribution'"):
        LRP(vit()).generate_LRP(x, method="transformer_attributon")
    for method in (["full"], None):
        with pytest.raises(UnknownNameError, match="unknown method: expected one of full, grad"):
            LRP(vit()).generate_LRP(x, method=method)  # type: ignore[arg-type]
    for options in ({"method": ["full"]}, {"composite": ["chefer"]}):
        with pytest.raises(UnknownNameError, match=r"unknown (method|composite): expected one of .*, got \['"):
            relprop.compile(vit(), (x,), **options)  # type: ignore[arg-type]
    with pytest.raises(LayerIndexError, match="start_layer: expected one of 3 attention layers, got 3"):
        LRP(vit()).generate_LRP(x, start_layer=3)
    with pytest.raises(IndexError):
        Baselines(vit()).generate_rollout(x, start_layer=3)
    for start_layer in ([0], np.zeros(1), 1.5, "last", True, None):
        with pytest.raises(LayerIndexError, match="start_layer: expected an int, got "):
            LRP(vit()).generate_LRP(x, start_layer=start_layer)  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match=r"unknown composite: expected one of .*, got \['chefer'\]"):
        LRP(vit(), ["chefer"]).generate_LRP(x)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="precision: expected one of") as wrong:
        LRP(vit(), precision="fastest").generate_LRP(x)
    assert not isinstance(wrong.value, IndexError)
    with pytest.raises(OptionError, match="model: expected a torch.nn.Module, got str"):
        LRP("vit_base_patch16_224")  # type: ignore[arg-type]


def test_start_layers_from_the_end() -> None:
    """-1 is the last layer alone."""
    model, x = vit(), torch.randn(1, 3, 32, 32)
    for method in ("transformer_attribution", "rollout"):
        for start_layer in (-1, -3):
            found = LRP(model).generate_LRP(x, 3, method, start_layer=start_layer)
            assert torch.equal(found, LRP(model).generate_LRP(x, 3, method, start_layer=3 + start_layer))


@pytest.mark.parametrize("kind", [np.int64, np.uint8])
def test_forms_of_the_start_layer(kind: type) -> None:
    model, x = vit(), torch.randn(1, 3, 32, 32)  # an engine for the equal int would serve both: theirs come first
    found = LRP(model).generate_LRP(x, 3, start_layer=kind(1))
    by_option = relprop.explain(model, x, target=3, method_options={"start_layer": kind(2)}).relevance[:, 1:]
    assert torch.equal(found, LRP(model).generate_LRP(x, 3, start_layer=1))
    assert torch.equal(by_option, LRP(model).generate_LRP(x, 3, start_layer=2))


class TestBert:
    """The BERT generator, on stock Hugging Face classes."""

    pytestmark = pytest.mark.filterwarnings("ignore")
    calls: dict[str, Any] = {
        "generate_LRP_start0": lambda g, w, t: g.generate_LRP(**w, index=t, start_layer=0),
        "generate_LRP_start1": lambda g, w, t: g.generate_LRP(**w, index=t, start_layer=1),
        "generate_LRP_startlast": lambda g, w, t: g.generate_LRP(**w, index=t, start_layer=-1),
        "generate_LRP_last_layer": lambda g, w, t: g.generate_LRP_last_layer(**w, index=t),
        "generate_full_lrp": lambda g, w, t: g.generate_full_lrp(**w, index=t),
        "generate_attn_last_layer": lambda g, w, t: g.generate_attn_last_layer(**w, index=t),
        "generate_rollout": lambda g, w, t: g.generate_rollout(**w, index=t),
        "generate_rollout_start1": lambda g, w, t: g.generate_rollout(**w, start_layer=1),
        "generate_attn_gradcam": lambda g, w, t: g.generate_attn_gradcam(**w, index=t),
    }

    @pytest.mark.parametrize("name", sorted(calls))
    @pytest.mark.parametrize("case", ["bert_A_seed0", "bert_B_seed1"])
    def test_as_published(self, case: str, name: str) -> None:
        pytest.importorskip("transformers")
        from tests.engine.test_golden_bert import golden, words

        model, tensors = golden(case)
        given, targets, expected = words(tensors), tensors["inputs/targets"], tensors[f"expected/bert_lrp/{name}"]
        generator = Generator(model, count_padding=True)
        for t in range(expected.shape[1]):
            together = self.calls[name](generator, given, targets[:, t])
            for i in range(len(targets)):
                alone = self.calls[name](generator, {k: v[i : i + 1] for k, v in given.items()}, int(targets[i, t]))
                assert alone.shape == (1, given["input_ids"].shape[1])
                for found in (alone[0], together[i]):
                    if float(expected[i, t].norm()) == 0.0:
                        assert torch.equal(found, expected[i, t])
                    else:
                        close(found, expected[i, t])

    @pytest.mark.parametrize("name", sorted(calls))
    def test_padded_batch_is_its_samples(self, name: str) -> None:
        """Texts of 9, 6 and 4 tokens in one batch, and each alone without padding."""
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=40, hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
        )
        generator = Generator(transformers.BertForSequenceClassification(config).double())
        lengths, ids = (9, 6, 4), torch.randint(0, 40, (3, 9))
        mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
        targets = torch.tensor([1, 0, 1])
        together = self.calls[name](generator, {"input_ids": ids, "attention_mask": mask}, targets)
        for i, length in enumerate(lengths):
            words = {"input_ids": ids[i : i + 1, :length], "attention_mask": mask[i : i + 1, :length]}
            alone = self.calls[name](generator, words, targets[i : i + 1])[0]
            assert float(alone.norm()) > 0
            assert relative(together[i, :length], alone) < 1e-9
            assert torch.equal(together[i, length:], torch.zeros(9 - length, dtype=torch.float64))

    def test_example_of_the_notebook(self) -> None:
        """BERT_explainability.ipynb, without a tokenizer and `.to("cuda")`."""
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=40, hidden_size=24, num_hidden_layers=12, num_attention_heads=2, intermediate_size=32
        )
        model = transformers.BertForSequenceClassification(config)
        model.eval()
        explanations = Generator(model)
        input_ids, attention_mask = torch.randint(0, 40, (1, 9)), torch.ones(1, 9, dtype=torch.long)
        expl = explanations.generate_LRP(input_ids=input_ids, attention_mask=attention_mask, start_layer=0)[0]
        expl = (expl - expl.min()) / (expl.max() - expl.min())
        assert expl.shape == (9,)
        assert float(expl[0]) == 0.0
        last = explanations.generate_LRP(input_ids=input_ids, attention_mask=attention_mask, index=1)
        assert torch.equal(
            last, explanations.generate_LRP(input_ids=input_ids, attention_mask=attention_mask, index=1, start_layer=11)
        )

    def test_start_layer_of_a_longer_model(self) -> None:
        pytest.importorskip("transformers")
        from tests.engine.test_golden_bert import golden, words

        model, tensors = golden("bert_A_seed0")
        with pytest.raises(LayerIndexError, match="expected one of 3 attention layers, got 11"):
            Generator(model).generate_LRP(**words(tensors))
