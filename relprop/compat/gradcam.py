"""pytorch-grad-cam's interface: an image's map as float32 [B, H, W] in [0, 1].

>>> from relprop.demo import bundled_scenes, load_model, preprocess
>>> model, images = load_model(), preprocess(bundled_scenes()["scene_2_6"].image[None])
>>> from relprop.compat.gradcam import RelevanceCAM
>>> with RelevanceCAM(model=model) as cam:
...     grayscale_cam = cam(input_tensor=images, targets=[lambda output: output[6]])[0, :]
>>> grayscale_cam.shape
(64, 64)

Targets are that package's, or any function from one sample's output to its score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from relprop.compat.engines import Engines
from relprop.composites import Composite
from relprop.errors import OptionError, ShapeError, TargetError

__all__ = ["GradCAM", "RelevanceCAM"]

SampleScore: TypeAlias = Callable[[Tensor], Tensor]
_FACTORS = (0.9, 1.0, 1.1)  # of the inputs that `aug_smooth` averages over, each also mirrored


class RelevanceCAM:
    """Any method of relprop as a CAM.

    Args:
        model: put into evaluation mode, and not changed otherwise.
        target_layers, reshape_transform: as the original takes them; not looked at, since the model's graph shows
            where its attention layers and patches are.
        method, composite, method_options, backend, precision: as `relprop.compile` takes them.

    Attributes:
        outputs: the model's output for the latest call. [B, classes]
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module] | None = None,
        reshape_transform: Callable[..., Any] | None = None,
        method: str = "transformer_attribution",
        composite: str | Composite | None = None,
        method_options: Mapping[str, Any] | None = None,
        *,
        backend: str = "auto",
        precision: str = "highest",
    ) -> None:
        self._engines = Engines(model, backend=backend, precision=precision)
        self.model, self.target_layers, self.reshape_transform = model.eval(), target_layers, reshape_transform
        self.method, self.composite, self.options = method, composite, method_options
        self.outputs: Tensor | None = None

    def __enter__(self) -> RelevanceCAM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to undo; unlike the original's, errors pass."""

    def __call__(
        self,
        input_tensor: Tensor,
        targets: Sequence[SampleScore] | None = None,
        aug_smooth: bool = False,
        eigen_smooth: bool = False,
    ) -> np.ndarray:
        """Positive relevance, each sample's stretched to [0, 1]. [B, H, W], float32

        Args:
            input_tensor: images. [B, C, H, W]
            targets: one per sample, from its output [classes] to a score; None for the largest output.
            aug_smooth: the mean over six changed inputs: mirrored or not, times 0.9, 1 and 1.1.
            eigen_smooth: not there: no activations are weighted.
        Raises:
            TargetError: another number of targets than samples, where the original left samples out in silence.
            ShapeError: not images. OptionError: `eigen_smooth`.
        """
        if eigen_smooth:
            raise OptionError("eigen_smooth: expected False, got True; relevance has no activations to project")
        if input_tensor.ndim != 4:
            raise ShapeError(f"input_tensor: expected images [B, C, H, W], got {list(input_tensor.shape)}")
        device = next(self.model.parameters()).device
        images = input_tensor.detach().to(device)
        if not aug_smooth:
            return self._map(images, targets)
        found = []
        for mirrored in (False, True):
            for factor in _FACTORS:
                changed = self._map((images.flip(-1) if mirrored else images) * factor, targets)
                found.append(changed[..., ::-1] if mirrored else changed)
        return np.mean(found, axis=0)

    def _map(self, images: Tensor, targets: Sequence[SampleScore] | None) -> np.ndarray:
        engine = self._engines((images,), method=self.method, composite=self.composite, options=self.options)
        found = engine(images, target=None if targets is None else _scores(targets))
        self.outputs = found.logits
        positive = found.image_map().clamp(min=0).double().cpu().numpy()
        low, high = positive.min((1, 2), keepdims=True), positive.max((1, 2), keepdims=True)
        return ((positive - low) / np.where(high > low, high - low, 1.0)).astype(np.float32)


class GradCAM(RelevanceCAM):
    """Grad-CAM on the last attention map, with the heads as its channels."""

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module] | None = None,
        reshape_transform: Callable[..., Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, target_layers, reshape_transform, "attention_gradcam", **options)


def _scores(targets: Sequence[SampleScore]) -> Callable[[Tensor], Tensor]:
    """A target: each sample's own function of its output."""

    def score(output: Tensor) -> Tensor:
        given = list(targets)
        if len(given) != len(output):
            raise TargetError(f"targets: expected one for each of {len(output)} samples, got {len(given)}")
        for target in given:
            if not callable(target):
                raise TargetError(
                    f"targets: expected functions of a sample's output, such as ClassifierOutputTarget(281), got"
                    f" {target!r}"
                )
        found = [target(row) for target, row in zip(given, output, strict=True)]
        wrong = [part for part in found if not isinstance(part, Tensor) or part.numel() != 1]
        if wrong:
            shape = list(wrong[0].shape) if isinstance(wrong[0], Tensor) else type(wrong[0]).__name__
            raise TargetError(f"targets: expected one score per sample, got {shape}")
        return torch.stack([part.reshape(()) for part in found])

    return score
