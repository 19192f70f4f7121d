from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from relprop.cli.models import Subject, fit_weights, load_subject, load_timm, names_a_file, names_a_place
from relprop.demo.model import build_model
from relprop.errors import DeviceError, OptionError, RelpropError, UnknownNameError, WeightsError

ARCH = "test_vit"  # timm's own for tests: 64 channels, 6 blocks, patches of 16 pixels


def fails(error: type[Exception], text: str) -> pytest.RaisesExc:
    return pytest.raises(error, match=re.escape(text))


def tiny(**options: int) -> nn.Module:
    return timm.create_model(ARCH, img_size=32, **options)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A timm model's weights with a head of five classes, for inputs of 32 x 32."""
    path = tmp_path / "five.safetensors"
    save_file(tiny(num_classes=5).state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("model", "file"),
    [
        ("vit_base_patch16_224", False),
        ("vit_base_patch16_224.augreg_in21k", False),
        ("hf_hub:timm/vit_tiny_patch16_224.augreg_in21k", False),
        ("mine.safetensors", True),
        ("mine.PTH", True),
        ("folder/mine", True),
    ],
)
def test_names_a_file(model: str, file: bool) -> None:
    assert names_a_file(model) is file


@pytest.mark.parametrize(
    ("model", "place"),
    [
        ("bert-base-uncased", False),
        ("textattack/bert-base-uncased-SST-2", False),
        ("models/bert/sst", True),
        ("./bert", True),
        ("../bert", True),
        ("~/bert", True),
        ("/models", True),
        ("owner/bert.safetensors", True),
    ],
)
def test_names_a_place(model: str, place: bool) -> None:
    assert names_a_place(model) is place


def test_local_file_gives_classes_and_preprocessing(file: Path) -> None:
    subject = load_subject(str(file), arch=ARCH, image_size=32)
    assert subject.labels == ("0", "1", "2", "3", "4") and not subject.model.training and not subject.multi_label
    prepared = subject.prepare(Image.new("RGB", (50, 40), (255, 0, 128)))
    assert prepared.shape == (3, 32, 32)
    assert np.asarray(subject.picture(prepared))[16, 16].tolist() == [255, 0, 128]
    probabilities = subject.probabilities(prepared[None])
    assert probabilities.shape == (1, 5) and float(probabilities.sum()) == pytest.approx(1)
    stored = load_timm(ARCH, file, 32).model.state_dict()
    assert all(torch.equal(stored[key], value) for key, value in subject.model.state_dict().items())


def test_misfit_names_the_keys(tmp_path: Path) -> None:
    state = tiny(num_classes=5).state_dict()
    state["module.head"] = state.pop("head.bias")
    del state["norm.weight"], state["norm.bias"]
    state["cls_token"] = torch.zeros(1, 1, 7)
    path = tmp_path / "w.safetensors"
    save_file(state, path)
    text = (
        f"{path}: {ARCH}: expected the 80 tensors of this architecture, got others; 3 missing: norm.weight, norm.bias,"
        " head.bias; 1 unexpected: module.head; 1 mismatched: cls_token (expected [1, 1, 64], got [1, 1, 7])"
    )
    with fails(WeightsError, text):
        load_timm(ARCH, path, 32)


def test_misfit_shows_the_first_few_keys() -> None:
    with pytest.raises(WeightsError) as caught:
        fit_weights(tiny(), {}, "w")
    first = "cls_token, pos_embed, patch_embed.proj.weight, patch_embed.proj.bias, blocks.0.norm1.weight"
    assert str(caught.value).endswith(f"80 missing: {first}, and 75 more")


def test_digits_with_other_weights(tmp_path: Path) -> None:
    model = build_model()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    subject = load_subject(None, weights=tmp_path / "w.safetensors")
    assert subject.multi_label and subject.labels[3] == "3"
    assert torch.equal(subject.model.head.weight, model.head.weight)


def test_digits_misfit(file: Path) -> None:
    with fails(WeightsError, f"{file}: the digits model: expected the 80 tensors of this architecture, got others"):
        load_subject(None, weights=file)


def test_digits_weights_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relprop.demo.model.WEIGHTS", tmp_path / "no.safetensors")
    with fails(WeightsError, f"expected the demo weights at {tmp_path / 'no.safetensors'}, got no such file"):
        load_subject(None)


def test_unknown_model_names_the_nearest() -> None:
    text = "expected a timm name (timm.list_models()), got 'vit_tiny_patch16_22'; did you mean 'vit_tiny_patch16_224'?"
    with fails(UnknownNameError, text):
        load_subject("vit_tiny_patch16_22")


def test_unknown_tag_names_those_there_are() -> None:
    with fails(
        UnknownNameError, "expected one of test_vit.r160_in1k, got 'test_vit.r160'; did you mean 'test_vit.r160_in1k'?"
    ):
        load_subject("test_vit.r160")


def test_pretrained_weights_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **options: object) -> nn.Module:
        assert options == {"pretrained": True}
        raise OSError("no route to the hub\nand a long tail")

    monkeypatch.setattr(timm, "create_model", offline)
    text = (
        f"model {ARCH}: expected pretrained weights from the hub or its local cache, got OSError: no route to the hub"
        " Without a network give a safetensors file with --weights"
    )
    with fails(WeightsError, text):
        load_subject(ARCH)


def test_pretrained_model_has_imagenet_names(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **options: model)
    subject = load_subject(ARCH, image_size=32)
    assert len(subject.labels) == 1000 and subject.labels[281] == "tabby, tabby cat"


def test_without_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(num_classes=0)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **options: model)
    with fails(OptionError, f"model {ARCH}: expected a classifier, got a model without a head (num_classes is 0)"):
        load_subject(ARCH)


def test_output_that_is_no_classification() -> None:
    subject = Subject("flat", nn.Identity(), lambda image: torch.zeros(3, 2, 2), (0.0,), (1.0,), ())
    with fails(OptionError, "model flat: expected a classifier with an output [B, C], got [1, 3, 2, 2]"):
        subject.probabilities(torch.zeros(1, 3, 2, 2))


def test_fixed_image_size(file: Path) -> None:
    with fails(OptionError, "image size: expected a model that can change it, got resnet18"):
        load_timm("resnet18", file, 32)


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_unusable_device(device: str) -> None:
    with fails(DeviceError, f"device: expected one that torch can use here, got '{device}': "):
        load_subject(None, device=device)


def test_file_without_architecture(file: Path) -> None:
    with fails(OptionError, "expected the timm name of its architecture as arch, got none"):
        load_subject(str(file))
    assert issubclass(OptionError, RelpropError)
