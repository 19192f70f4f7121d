"""The lines of the ICCV 2021 notebooks, with other imports: without `.cuda()`, and up to where OpenCV draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.compat.test_chefer_multimodal import golden
from tests.engine.models import relative, vit

pytestmark = pytest.mark.filterwarnings("ignore")


def test_detr() -> None:
    """DETR.ipynb: evaluate; `outputs.logits` is `outputs['pred_logits']` there."""
    from relprop.compat.chefer_multimodal import Generator

    model, tensors = golden("detr_A_seed0")
    img, targets = tensors["inputs/pixel_values"][:1], tensors["inputs/targets"][0]
    gen = Generator(model)
    outputs = model(img)
    probas = outputs.logits.softmax(-1)[0, :, :-1]
    keep = probas.max(-1).values > probas.max(-1).values.median()  # 0.9 there; these weights are less sure
    h, w = (size // 32 for size in img.shape[-2:])
    found = {}
    for idx in keep.nonzero():
        cam = gen.generate_ours(img, idx, use_lrp=False)
        assert cam.shape == (1, 1, 1, h * w)
        cam = (cam - cam.min()) / (cam.max() - cam.min())
        found[idx.item()] = cam.view(h, w).data.cpu().numpy()
        again = gen.generate_ours(img, idx, int(probas[idx].argmax()), use_lrp=False)
        assert np.array_equal(((again - again.min()) / (again.max() - again.min())).view(h, w), found[idx.item()])
    assert len(found) == 3
    assert not np.allclose(*list(found.values())[:2])
    for t, (idx, index) in enumerate(targets[:, :, None]):
        cam = gen.generate_ours(img, idx, index, use_lrp=False)
        assert relative(cam.view(h * w), tensors["expected/detr/generate_ours"][0, t]) < 1e-6


def test_clip() -> None:
    """CLIP_explainability.ipynb, for which the text model's end of text is the token of the largest number, too."""
    from relprop.compat.chefer_multimodal import interpret

    def show_image_relevance(image_relevance: Tensor) -> np.ndarray:
        dim = int(image_relevance.numel() ** 0.5)
        image_relevance = image_relevance.reshape(1, 1, dim, dim)
        image_relevance = torch.nn.functional.interpolate(image_relevance, size=224, mode="bilinear")
        shown = image_relevance.reshape(224, 224).data.cpu().numpy()
        return (shown - shown.min()) / (shown.max() - shown.min())

    def show_heatmap_on_text(text_encoding: Tensor, R_text: Tensor) -> Tensor:
        CLS_idx = text_encoding.argmax(dim=-1)
        R_text = R_text[CLS_idx, 1:CLS_idx]
        text_scores = R_text / R_text.sum()
        return text_scores.flatten()

    model, tensors = golden("clip_A_seed0")
    img, text = tensors["inputs/pixel_values"], tensors["inputs/input_ids"]
    device = "cpu"
    R_text, R_image = interpret(model=model, image=img, texts=text, device=device)
    expected_text = tensors["expected/clip/interpret_default/text_relevance"]
    expected_image = tensors["expected/clip/interpret_default/image_relevance"]
    batch_size = text.shape[0]
    for i in range(batch_size):
        scores = show_heatmap_on_text(text[i], R_text[i])
        assert scores.shape == (int(text[i].argmax()) - 1,)
        assert float(scores.sum()) == pytest.approx(1)
        assert relative(scores, show_heatmap_on_text(text[i], expected_text[i])) < 1e-6
        shown = show_image_relevance(R_image[i])
        assert shown.shape == (224, 224)
        assert (shown.min(), shown.max()) == (0, 1)
        assert np.abs(shown - show_image_relevance(expected_image[i])).max() < 1e-5


def published_relevance(model: nn.Module, input: Tensor, index: int | None = None) -> Tensor:
    """The notebook's own function, its maps taken where timm's dropout of attention passes them on."""

    def avg_heads(cam: Tensor, grad: Tensor) -> Tensor:
        cam = cam.reshape(-1, cam.shape[-2], cam.shape[-1])
        grad = grad.reshape(-1, grad.shape[-2], grad.shape[-1])
        cam = grad * cam
        return cam.clamp(min=0).mean(dim=0)

    cams: list[Tensor] = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, args, out: cams.append(out))
    output = model(input)
    index = int(output.argmax()) if index is None else index
    grads = torch.autograd.grad(output[0, index], cams)
    R = torch.eye(cams[0].shape[-1])
    for cam, grad in zip(cams, grads, strict=True):
        R += torch.matmul(avg_heads(cam.detach(), grad), R)
    return R[0, 1:]


def test_vit() -> None:
    """Transformer_MM_explainability_ViT.ipynb: generate_visualization."""
    from relprop.compat.chefer import generate_relevance

    model = vit(img_size=224, patch_size=16, depth=2)
    original_image = torch.randn(3, 224, 224)

    def generate_visualization(original_image: Tensor, class_index: int | None = None) -> np.ndarray:
        transformer_attribution = generate_relevance(model, original_image.unsqueeze(0), index=class_index).detach()
        transformer_attribution = transformer_attribution.reshape(1, 1, 14, 14)
        transformer_attribution = torch.nn.functional.interpolate(
            transformer_attribution, scale_factor=16, mode="bilinear"
        )
        attribution = transformer_attribution.reshape(224, 224).data.cpu().numpy()
        return (attribution - attribution.min()) / (attribution.max() - attribution.min())

    cat, dog = generate_visualization(original_image), generate_visualization(original_image, class_index=7)
    assert not np.allclose(cat, dog)
    found = [generate_relevance(model, original_image.unsqueeze(0), index=index) for index in (None, 7)]
    for index, shown, relevance in ((None, cat, found[0]), (7, dog, found[1])):
        expected = published_relevance(vit(img_size=224, patch_size=16, depth=2), original_image.unsqueeze(0), index)
        assert relevance.shape == expected.shape == (196,)
        assert relative(relevance, expected) < 1e-5
        assert shown.shape == (224, 224)
        assert (shown.min(), shown.max()) == (0, 1)
