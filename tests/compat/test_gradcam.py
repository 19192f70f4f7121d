"""pytorch-grad-cam's interface: its example's lines, its scaling, its targets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import relprop
from relprop.compat.gradcam import GradCAM, RelevanceCAM
from relprop.errors import DTypeError, OptionError, ShapeError, TargetError, UnsupportedTopologyError
from tests.engine.models import vit

pytestmark = pytest.mark.filterwarnings("ignore")


class Category:
    """A target as pytorch-grad-cam's ClassifierOutputTarget is."""

    def __init__(self, category: int) -> None:
        self.category = category

    def __call__(self, model_output: Tensor) -> Tensor:
        return model_output[self.category]


def patches(tokens: Tensor) -> Tensor:
    """`reshape_transform` of the README, for 4 x 4 patches after a class token."""
    return tokens[:, 1:, :].reshape(tokens.size(0), 4, 4, tokens.size(2)).transpose(2, 3).transpose(1, 2)


def test_example_of_the_readme() -> None:
    """With only the import changed."""
    model = vit()
    target_layers = [model.get_submodule("blocks.2.norm1")]
    input_tensor = torch.randn(1, 3, 32, 32)
    targets = [Category(3)]
    with GradCAM(model=model, target_layers=target_layers, reshape_transform=patches) as cam:
        grayscale_cam = cam(input_tensor=input_tensor, targets=targets)
        grayscale_cam = grayscale_cam[0, :]
        model_outputs = cam.outputs
    assert grayscale_cam.shape == (32, 32)
    assert grayscale_cam.dtype == np.float32
    assert torch.allclose(model_outputs, model(input_tensor), atol=1e-5)


def test_relevance_at_the_size_of_the_image() -> None:
    model, images = vit(), torch.randn(1, 3, 32, 32)
    with RelevanceCAM(model=model) as cam:
        found = cam(input_tensor=images, targets=[Category(3)])
        assert torch.allclose(cam.outputs, model(images), atol=1e-5)
    assert (found.shape, found.dtype) == ((1, 32, 32), np.float32)
    assert (found.min(), found.max()) == (0.0, 1.0)


def grad_cam(model: nn.Module, path: str, images: Tensor, classes: list[int]) -> np.ndarray:
    """Grad-CAM at one layer of tokens after a class token, spelled out with numpy. [B, 4, 4]"""
    inside: dict[str, Tensor] = {}
    handle = model.get_submodule(path).register_forward_hook(lambda *call: inside.update(found=call[2]))
    logits = model(images)
    handle.remove()
    gradient = torch.autograd.grad(sum(logits[i, c] for i, c in enumerate(classes)), inside["found"])[0]  # type: ignore[call-overload]
    found = []
    for activation, slope in zip(inside["found"].detach().numpy(), gradient.numpy(), strict=True):
        weights = slope[1:].sum(0) / 16
        cam = np.array([max(float(weights @ token), 0.0) for token in activation[1:]])
        found.append((cam - cam.min()) / (1e-7 + (cam - cam.min()).max()))
    return np.array(found).reshape(-1, 4, 4)


@pytest.mark.parametrize("reshape_transform", [patches, None])
def test_grad_cam_by_its_formula(reshape_transform: Any) -> None:
    """One layer, and the mean over two, with the tokens' own places as the default; nothing is left behind."""
    model, images = vit().double(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    classes, paths = [1, 5, 3], ["blocks.0", "blocks.2.norm1"]
    targets = [Category(c) for c in classes]
    small = [grad_cam(model, path, images, classes) for path in paths]
    for chosen in ([0], [1], [0, 1]):
        large = torch.nn.functional.interpolate(
            torch.from_numpy(np.mean([small[i] for i in chosen], axis=0))[:, None], size=(32, 32), mode="bilinear"
        )[:, 0].numpy()
        above = large - large.min((1, 2), keepdims=True)
        layers = [model.get_submodule(paths[i]) for i in chosen]
        found = GradCAM(model, layers, reshape_transform)(images, targets)
        assert np.abs(found - above / above.max((1, 2), keepdims=True)).max() < 1e-6
        assert not any(module._forward_hooks for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())
    predicted = GradCAM(model, layers, patches)(images)
    assert np.array_equal(
        predicted, GradCAM(model, layers)(images, [Category(int(c)) for c in model(images).argmax(-1)])
    )
    assert not np.allclose(found, predicted)


class Convolved(nn.Module):
    """A layer whose output the next one changes in place, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.relu, self.out = nn.Conv2d(3, 5, 3, stride=2), nn.ReLU(inplace=True), nn.Linear(5, 4)
        self.twice, self.never = nn.Identity(), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(self.out(self.twice(self.relu(self.conv(x)).mean((2, 3)))))


def test_grad_cam_of_channels_that_are_overwritten() -> None:
    """The layer's own output counts, also where no parameter asks for a gradient."""
    model, images = Convolved().double().eval().requires_grad_(False), torch.randn(2, 3, 21, 31, dtype=torch.float64)
    before = model.conv(images)
    slope = (before > 0).double() / before[0, 0].numel() * model.out.weight[2][:, None, None]
    cam = (slope.mean((2, 3), keepdim=True) * before).sum(1, keepdim=True).clamp(min=0)
    large = torch.nn.functional.interpolate(cam, size=(21, 31), mode="bilinear")[:, 0].numpy()
    above = large - large.min((1, 2), keepdims=True)
    found = GradCAM(model, [model.conv])(images, [Category(2)] * 2)
    assert np.abs(found - above / above.max((1, 2), keepdims=True)).max() < 1e-4  # 1e-7 of a small map's maximum


def test_grad_cam_of_a_hugging_face_model() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=32, patch_size=8, num_labels=4, **sizes)
    )
    layer, images = (
        next(m for p, m in model.named_modules() if p.endswith("1.layernorm_before")),
        torch.randn(2, 3, 32, 32),
    )
    targets = [Category(1), Category(2)]
    found = GradCAM(model, [layer])(images, targets)
    assert np.array_equal(found, GradCAM(model, [layer], patches)(images, targets))
    assert found.max() == 1.0


@pytest.mark.parametrize("options", [{}, {"aug_smooth": True}, {"eigen_smooth": True}])
def test_grad_cam_as_the_original(options: dict[str, bool]) -> None:
    """The numbers of pytorch-grad-cam's own class, on tokens and on channels, for one layer and two."""
    original = pytest.importorskip("pytorch_grad_cam").GradCAM
    model, images = vit(), torch.randn(2, 3, 32, 32)
    targets = [Category(1), Category(4)]
    for paths in (["blocks.2.norm1"], ["blocks.0", "blocks.1.mlp"]):
        layers = [model.get_submodule(path) for path in paths]
        expected = original(model, layers, patches)(images.clone(), targets, **options)
        assert np.abs(GradCAM(model, layers, patches)(images, targets, **options) - expected).max() < 1e-5
    net, images = timm.create_model("resnet10t", num_classes=6).eval(), torch.randn(2, 3, 70, 50)
    layers = [net.get_submodule("layer4")[-1]]  # type: ignore[index]
    expected = original(net, layers)(images.clone(), targets, **options)
    assert np.abs(GradCAM(net, layers)(images, targets, **options) - expected).max() < 1e-5


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
    with pytest.raises(ShapeError, match="expected a tensor of images \\[B, C, H, W\\], got ndarray"):
        cam(images.numpy())  # type: ignore[arg-type]
    with pytest.raises(DTypeError, match="expected images as the model takes them, floating, got torch.uint8"):
        cam(images.to(torch.uint8))
    for targets, got in ((1, "int"), (torch.tensor([1, 2]), "Tensor"), ("cat", "str")):
        with pytest.raises(TargetError, match=f"expected a list with one function per sample, or None, got {got}"):
            cam(images, targets)  # type: ignore[arg-type]
    for options, name in (({"target_layers": [cam.model]}, "target_layers"), ({"reshape_transform": len}, "reshape")):
        with pytest.raises(OptionError, match=f"{name}.* of RelevanceCAM: expected None.* use GradCAM"):
            RelevanceCAM(vit(), **options)  # type: ignore[arg-type]


def test_bad_layers() -> None:
    net, images = Convolved().eval(), torch.randn(2, 3, 21, 31)
    for layers, got in ((None, "None"), ([], "\\[\\]"), (net.conv, "Conv2d"), ("conv", "'conv'")):
        with pytest.raises(OptionError, match=f"target_layers: expected a list of the model's modules, got {got}"):
            GradCAM(net, layers)  # type: ignore[arg-type]
    for layer, got in ((nn.ReLU(), "ReLU"), ("conv", "'conv'"), (net, "Convolved")):
        with pytest.raises(OptionError, match=f"expected modules inside Convolved, got {got}"):
            GradCAM(net, [layer])  # type: ignore[list-item]
    with pytest.raises(OptionError, match="reshape_transform: expected a function, got int"):
        GradCAM(net, [net.conv], 4)  # type: ignore[arg-type]
    for layer, times in ((net.twice, 2), (net.never, 0)):
        with pytest.raises(UnsupportedTopologyError, match=f"called once, got .*, called {times} times"):
            GradCAM(net, [layer])(images)
    with pytest.raises(ShapeError, match="out: expected an output \\[B, C, h, w\\] or \\[B, N, C\\], got \\[2, 4\\]"):
        GradCAM(net, [net.out])(images)
    with pytest.raises(ShapeError, match="reshape_transform: expected \\[B, C, h, w\\] of conv, got \\[2, 5, 150\\]"):
        GradCAM(net, [net.conv], lambda found: found.flatten(2))(images)
    with pytest.raises(TargetError, match="expected scores that depend on the model's output, got constants"):
        GradCAM(net, [net.conv])(images, [lambda output: torch.tensor(1.0)] * 2)
    with pytest.raises(ShapeError, match="model: expected logits \\[B, classes\\], got \\[2, 5, 10, 15\\]"):
        GradCAM(nn.Sequential(net.conv), [net.conv])(images)


class Tokens(nn.Module):
    """Tokens whose places nothing tells: no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x.flatten(2).mT).mean(1))


def test_tokens_without_a_known_place() -> None:
    net, images = Tokens().eval(), torch.randn(2, 3, 6, 6)
    with pytest.raises(UnsupportedTopologyError, match="layer: cannot tell the patches .*; give reshape_transform=: "):
        GradCAM(net, [net.layer])(images)
    assert GradCAM(net, [net.layer], lambda x: x.mT.unflatten(2, (6, 6)))(images).shape == (2, 6, 6)
    model, images = vit(), torch.randn(1, 3, 32, 32)
    embedded = model.get_submodule("patch_embed")  # before the class token
    rows = GradCAM(model, [embedded], lambda x: x.mT.unflatten(2, (4, 4)))
    assert np.array_equal(GradCAM(model, [embedded])(images), rows(images))
