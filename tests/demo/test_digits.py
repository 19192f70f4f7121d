from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from relprop.demo import (
    CLASS_NAMES,
    DigitScenes,
    Scene,
    build_model,
    bundled_scenes,
    load_model,
    preprocess,
)
from relprop.demo import digits as digits_module
from relprop.demo.digits import photo_names, split_indices
from relprop.demo.model import WEIGHTS
from relprop.errors import MissingDependencyError, WeightsError


@pytest.fixture
def data() -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")


def assert_consistent(scene: Scene) -> None:
    assert scene.image.shape == scene.background.shape == (3, 64, 64)
    assert scene.image.dtype == scene.background.dtype == torch.uint8
    assert scene.masks.shape == (10, 64, 64) and scene.masks.dtype == torch.bool
    assert scene.labels.shape == (10,) and scene.labels.dtype == torch.float32
    assert torch.equal(scene.masks.flatten(1).any(1).float(), scene.labels)
    assert int(scene.masks.sum(0).max()) == 1  # digits do not overlap
    changed = (scene.image != scene.background).any(0)
    assert torch.equal(changed, scene.masks.any(0))


@pytest.mark.usefixtures("data")
class TestScenes:
    def test_same_scene_for_same_seed_and_index(self) -> None:
        first, again = DigitScenes("train", 5).sample(17), DigitScenes("train", 5).sample(17)
        assert torch.equal(first.image, again.image) and torch.equal(first.masks, again.masks)

    @pytest.mark.parametrize("other", [("train", 6, 17), ("train", 5, 18), ("test", 5, 17)])
    def test_other_scene_for_other_seed_index_or_split(self, other: tuple[str, int, int]) -> None:
        split, seed, index = other
        scene = DigitScenes("train", 5).sample(17)
        assert not torch.equal(scene.image, DigitScenes(split, seed).sample(index).image)

    def test_batch_equals_single(self) -> None:
        scenes = DigitScenes("test", 1, (2, 2))
        indices = [9, 2, 2, 40]
        batch = scenes.batch(indices)
        assert batch.images.shape == (4, 3, 64, 64) and batch.masks.shape == (4, 10, 64, 64)
        for row, index in enumerate(indices):
            scene = scenes.sample(index)
            assert torch.equal(batch.images[row], scene.image)
            assert torch.equal(batch.labels[row], scene.labels)
            assert torch.equal(batch.masks[row], scene.masks)

    @pytest.mark.parametrize("split", ["train", "test"])
    def test_masks_are_the_pixels_that_differ_from_the_photograph(self, split: str) -> None:
        scenes = DigitScenes(split, 2)
        for index in range(60):
            assert_consistent(scenes.sample(index))

    @pytest.mark.parametrize("counts", [(1, 1), (2, 2), (1, 3), (3, 3)])
    def test_number_of_digits(self, counts: tuple[int, int]) -> None:
        seen = set(DigitScenes("train", 0, counts).batch(range(60)).labels.sum(1).int().tolist())
        assert seen == set(range(counts[0], counts[1] + 1))

    def test_digits_cover_and_stand_out(self) -> None:
        scenes = DigitScenes("test", 3, (2, 2))
        for index in range(60):
            scene = scenes.sample(index)
            areas = scene.masks.flatten(1).sum(1)[scene.labels.bool()]
            assert bool((areas >= 40).all()), areas
            luma = lambda x: (x.float() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)  # noqa: E731
            ink = scene.masks.any(0)
            assert (luma(scene.image) - luma(scene.background))[ink].mean() > 30

    def test_every_class_appears(self) -> None:
        assert bool((DigitScenes("test", 4).batch(range(100)).labels.sum(0) > 0).all())

    def test_splits_are_disjoint_and_complete(self) -> None:
        train, test = set(split_indices("train").tolist()), set(split_indices("test").tolist())
        assert not train & test
        assert train | test == set(range(1797))
        assert not set(photo_names("train")) & set(photo_names("test"))

    def test_bad_arguments(self) -> None:
        with pytest.raises(ValueError, match="expected split 'train' or 'test', got 'val'"):
            DigitScenes("val")
        with pytest.raises(ValueError, match=r"expected digits_per_image .* got \(2, 5\)"):
            DigitScenes("train", 0, (2, 5))
        with pytest.raises(ValueError, match="expected a seed >= 0, got -1"):
            DigitScenes("train", -1)
        with pytest.raises(ValueError, match="expected an index >= 0, got -3"):
            DigitScenes("train").sample(-3)
        with pytest.raises(ValueError, match="at least one index"):
            DigitScenes("train").batch([])

    def test_shipped_weights_find_unseen_digits(self) -> None:
        from relprop.demo.train import average_precision

        precision = average_precision(load_model(), DigitScenes("test", 77, (2, 2)), 300)
        assert precision.shape == (10,)
        assert precision.mean() >= 0.93


@pytest.mark.parametrize("package", ["sklearn", "skimage"])
def test_missing_extra_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if package == "skimage":
        pytest.importorskip("sklearn")
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    for cached in (digits_module._load_digits, digits_module._glyphs, digits_module._photos):
        cached.cache_clear()
    with pytest.raises(MissingDependencyError, match=r"pip install 'relprop\[demo\]'"):
        DigitScenes("train")
    assert issubclass(MissingDependencyError, ImportError)


def test_model_loads_and_answers() -> None:
    model = load_model()
    assert not model.training
    assert len(CLASS_NAMES) == 10
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.inference_mode():
        logits = model(torch.randn(3, 3, 64, 64))
    assert logits.shape == (3, 10)
    assert bool(torch.isfinite(logits).all())


def test_missing_weights_are_named(tmp_path: Path) -> None:
    path = tmp_path / "absent.safetensors"
    with pytest.raises(WeightsError, match=r"expected the demo weights at .*absent\.safetensors, got no such file"):
        load_model(path)


def test_unreadable_and_foreign_weights(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not weights at all")
    with pytest.raises(WeightsError, match="expected a safetensors file"):
        load_model(broken)
    foreign = tmp_path / "foreign.safetensors"
    state = build_model().state_dict()
    state.pop("head.bias")
    save_file(state, foreign)
    with pytest.raises(WeightsError, match=r"(?s)expected the weights of .*head\.bias"):
        load_model(foreign)


def test_preprocess() -> None:
    grey = Image.new("L", (100, 80), 255)
    assert torch.equal(preprocess(grey), torch.ones(3, 64, 64))
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    image = Image.fromarray(pixels[1].permute(1, 2, 0).numpy())
    assert torch.equal(preprocess(pixels)[1], preprocess(image))
    with pytest.raises(TypeError, match=r"expected a PIL image or a uint8 tensor, got torch\.float32"):
        preprocess(pixels.float())
    with pytest.raises(TypeError, match="got str"):
        preprocess("scene.png")
    with pytest.raises(ValueError, match=r"expected a tensor \[\.\.\., 3, 64, 64\], got \[3, 32, 32\]"):
        preprocess(torch.zeros(3, 32, 32, dtype=torch.uint8))


def test_bundled_scenes_are_recognised() -> None:
    scenes = bundled_scenes()
    assert len(scenes) == 6 and "scene_3_7" in scenes
    model = load_model()
    for name, scene in scenes.items():
        assert_consistent(scene)
        assert scene.labels.nonzero().flatten().tolist() == sorted(int(digit) for digit in name.split("_")[1:])
        with torch.inference_mode():
            found = model(preprocess(scene.image[None]))[0].sigmoid() > 0.5
        assert torch.equal(found.float(), scene.labels), name


def test_bundle_without_images(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"expected scene_\*\.png and truth\.npz"):
        bundled_scenes(tmp_path)


def test_report_matches_the_claim() -> None:
    report = json.loads(WEIGHTS.with_suffix(".json").read_text(encoding="utf-8"))
    assert report["mAP"] >= 0.95
    assert report["scenes"] >= 2000
    assert len(report["average_precision"]) == 10


def test_training_writes_weights_and_log(data: None, tmp_path: Path) -> None:
    from relprop.demo.train import evaluate, train

    weights = train(tmp_path, minutes=0.03, seed=1)
    assert load_model(weights)
    assert (tmp_path / "digits_vit_log.csv").read_text().startswith("stage,minutes,step")
    score = evaluate(weights, tmp_path / "report.json", num_scenes=100)
    assert 0 < score < 1
    with pytest.raises(ValueError, match="expected minutes > 0, got 0"):
        train(tmp_path, minutes=0)
