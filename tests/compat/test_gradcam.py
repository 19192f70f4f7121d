"""pytorch-grad-cam's interface: its example's lines, its scaling, its targets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import relprop
from relprop.compat.gradcam import GradCAM, RelevanceCAM
from relprop.errors import OptionError, ShapeError, TargetError
from tests.engine.models import vit

pytestmark = pytest.mark.filterwarnings("ignore")


class Category:
    """A target as pytorch-grad-cam's ClassifierOutputTarget is."""

    def __init__(self, category: int) -> None:
        self.category = category

    def __call__(self, model_output: Tensor) -> Tensor:
        return model_output[self.category]


@pytest.mark.parametrize("kind", [GradCAM, RelevanceCAM])
def test_example_of_the_readme(kind: Any) -> None:
    """With only the import changed."""
    model = vit()
    target_layers = [model.get_submodule("blocks.2.norm1")]
    input_tensor = torch.randn(1, 3, 32, 32)
    targets = [Category(3)]
    with kind(model=model, target_layers=target_layers, reshape_transform=None) as cam:
        grayscale_cam = cam(input_tensor=input_tensor, targets=targets)
        grayscale_cam = grayscale_cam[0, :]
        model_outputs = cam.outputs
    assert grayscale_cam.shape == (32, 32)
    assert grayscale_cam.dtype == np.float32
    assert torch.allclose(model_outputs, model(input_tensor), atol=1e-5)
    if kind is RelevanceCAM:
        assert grayscale_cam.min() == 0.0
        assert grayscale_cam.max() == 1.0


def test_a_batch_is_its_samples() -> None:
    model, images = vit().double(), torch.randn(3, 3, 32, 32, dtype=torch.float64)  # some are ill-conditioned
    targets = [Category(1), Category(5), lambda output: output[2] - output[4]]
    cam = RelevanceCAM(model)
    together = cam(images, targets)
    for i in range(3):
        assert np.allclose(together[i], cam(images[i : i + 1], targets[i : i + 1])[0], atol=1e-5)
    assert np.array_equal(cam(images), cam(images, [Category(int(c)) for c in model(images).argmax(-1)]))
    pixels = RelevanceCAM(model, method="attnlrp")(images, targets)
    assert pixels.shape == (3, 32, 32)


def test_as_the_original_scales() -> None:
    """The same map through the original's own code for targets, sizes and scaling."""
    pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.base_cam import BaseCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget, ClassifierOutputTarget

    model, images = vit(), torch.randn(2, 3, 32, 32)

    class Theirs(BaseCAM):
        def get_cam_image(self, input_tensor: Tensor, *args: Any, **kwargs: Any) -> np.ndarray:
            target = torch.tensor([t.category for t in args[1]])
            return relprop.explain(model, input_tensor.detach(), target=target).patches.numpy()

    layers = [model.get_submodule("blocks.2.norm1")]
    targets = [ClassifierOutputTarget(1), ClassifierOutputTarget(4)]
    original = Theirs(model, layers)
    found = RelevanceCAM(model)(images, targets)
    assert np.abs(found - original(images, targets)).max() < 1e-3  # cv2's own interpolation, at float32
    smooth = RelevanceCAM(model)(images, targets, aug_smooth=True)
    assert np.abs(smooth - original(images, targets, aug_smooth=True)).max() < 1e-3
    softmax = RelevanceCAM(model)(images, [ClassifierOutputSoftmaxTarget(1), ClassifierOutputSoftmaxTarget(4)])
    assert softmax.shape == (2, 32, 32)


def test_bad_input() -> None:
    cam, images = RelevanceCAM(vit()), torch.randn(2, 3, 32, 32)
    with pytest.raises(TargetError, match="expected one for each of 2 samples, got 1"):
        cam(images, [Category(1)])
    with pytest.raises(TargetError, match="expected functions of a sample's output.*got 281"):
        cam(images, [281, 282])  # type: ignore[list-item]
    with pytest.raises(TargetError, match="expected one score per sample, got \\[10\\]"):
        cam(images, [lambda output: output, lambda output: output])
    with pytest.raises(IndexError):
        cam(images, [Category(10), Category(1)])
    with pytest.raises(ShapeError, match="expected images \\[B, C, H, W\\], got \\[3, 32, 32\\]"):
        cam(images[0])
    with pytest.raises(OptionError, match="eigen_smooth: expected False"):
        cam(images, eigen_smooth=True)
