"""pytorch-grad-cam's interface: an image's map as float32 [B, H, W] in [0, 1].

>>> from relprop.demo import bundled_scenes, load_model, preprocess
>>> model, images = load_model(), preprocess(bundled_scenes()["scene_2_6"].image[None])
>>> from relprop.compat.gradcam import GradCAM, RelevanceCAM
>>> with RelevanceCAM(model=model) as cam:
...     grayscale_cam = cam(input_tensor=images, targets=[lambda output: output[6]])[0, :]
>>> grayscale_cam.shape
(64, 64)
>>> with GradCAM(model=model, target_layers=[model.blocks[-1].norm1]) as cam:
...     grayscale_cam = cam(input_tensor=images, targets=[lambda output: output[6]])[0, :]

`GradCAM` is the original's method at the layers that it is given; `RelevanceCAM` makes any method of relprop a CAM.
Targets are that package's, or any function from one sample's output to its score.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relprop.compat.engines import Engines
from relprop.composites import Composite
from relprop.errors import DTypeError, OptionError, RelpropError, ShapeError, TargetError, UnsupportedTopologyError

__all__ = ["GradCAM", "RelevanceCAM"]

SampleScore: TypeAlias = Callable[[Tensor], Tensor]
_FACTORS = (0.9, 1.0, 1.1)  # of the inputs that `aug_smooth` averages over, each also mirrored
_SMALLEST = 1e-7  # what the original adds to a layer's maximum before it divides by it


class _CAM:
    """What a CAM does with images and targets, and with the maps that a subclass makes of them."""

    def __init__(self, model: nn.Module, *, backend: str = "auto", precision: str = "highest") -> None:
        self._engines = Engines(model, backend=backend, precision=precision)
        self.model = model.eval()
        self.outputs: Tensor | None = None

    def __enter__(self) -> Any:
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
        """What speaks for the target, each sample's stretched to [0, 1]. [B, H, W], float32

        Args:
            input_tensor: images. [B, C, H, W]
            targets: one per sample, from its output [classes] to a score; None for the largest output.
            aug_smooth: the mean over six changed inputs: mirrored or not, times 0.9, 1 and 1.1.
            eigen_smooth: the first principal component of a layer's weighted channels in place of their sum; of
                `GradCAM` alone.
        Raises:
            TargetError: no functions, or another number of them than samples, where the original left samples out in
            silence. ShapeError, DTypeError: not images. OptionError: `eigen_smooth`.
        """
        images = self._images(input_tensor)
        if not aug_smooth:
            return self._map(images, targets, eigen_smooth)
        found = []
        for mirrored in (False, True):
            for factor in _FACTORS:
                changed = self._map((images.flip(-1) if mirrored else images) * factor, targets, eigen_smooth)
                found.append(changed[..., ::-1] if mirrored else changed)
        return np.mean(found, axis=0)

    def _images(self, given: Any) -> Tensor:
        if not isinstance(given, Tensor):
            raise ShapeError(f"input_tensor: expected a tensor of images [B, C, H, W], got {type(given).__name__}")
        if given.ndim != 4:
            raise ShapeError(f"input_tensor: expected images [B, C, H, W], got {list(given.shape)}")
        if not given.is_floating_point():
            raise DTypeError(f"input_tensor: expected images as the model takes them, floating, got {given.dtype}")
        return given.detach().to(next(self.model.parameters()).device)

    def _map(self, images: Tensor, targets: Sequence[SampleScore] | None, eigen_smooth: bool) -> np.ndarray:
        """Maps of images, in [0, 1]. [B, H, W]"""
        raise NotImplementedError


class RelevanceCAM(_CAM):
    """Any method of relprop as a CAM: positive relevance at the size of the image.

    Args:
        model: put into evaluation mode, and not changed otherwise.
        target_layers, reshape_transform: nothing: relevance reaches the patches, whose place the model's graph shows.
            `GradCAM` looks at layers.
        method, composite, method_options, backend, precision: as `relprop.compile` takes them.

    Attributes:
        outputs: the model's output for the latest call. [B, classes]

    Raises:
        OptionError: a target layer or a `reshape_transform`, which would change nothing.
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
        super().__init__(model, backend=backend, precision=precision)
        for name, given in (("target_layers", target_layers), ("reshape_transform", reshape_transform)):
            if given is not None:
                raise OptionError(
                    f"{name} of RelevanceCAM: expected None, got {type(given).__name__}: relevance is of the input's"
                    " patches, not of a layer; use GradCAM for a layer's activations, or relprop.explain(latents=) for"
                    " its relevance"
                )
        self.method, self.composite, self.options = method, composite, method_options

    def _map(self, images: Tensor, targets: Sequence[SampleScore] | None, eigen_smooth: bool) -> np.ndarray:
        if eigen_smooth:
            raise OptionError("eigen_smooth: expected False, got True; relevance has no activations to project")
        engine = self._engines((images,), method=self.method, composite=self.composite, options=self.options)
        found = engine(images, target=None if targets is None else _scores(targets))
        self.outputs = found.logits
        return _stretched(found.image_map().clamp(min=0).double().cpu().numpy()).astype(np.float32)


class GradCAM(_CAM):
    """Grad-CAM at layers: channels of what comes out of a layer, weighted by their mean gradient, cut at zero.

    Args:
        model: put into evaluation mode, and not changed otherwise: parameters get no gradients, hooks are gone after a
            call.
        target_layers: modules of the model; the maps of several are averaged.
        reshape_transform: from a layer's output to channels over the image [B, C, h, w]. None for outputs of that
            shape, and for a Vision Transformer's tokens [B, N, C], of which the patches are taken.

    Attributes:
        outputs: the model's output for the latest call. [B, classes]

    Raises:
        OptionError: no layers, or one that is none of the model's. Calls also raise UnsupportedTopologyError for a
        layer that is not called once or gives no tensor, and ShapeError where its output is no image.

    Source: Selvaraju et al., ICCV 2017; scaling as in pytorch-grad-cam.
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module],
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(model)
        self.target_layers = _paths(model, target_layers)
        if reshape_transform is not None and not callable(reshape_transform):
            raise OptionError(f"reshape_transform: expected a function, got {type(reshape_transform).__name__}")
        self.reshape_transform = reshape_transform

    def _map(self, images: Tensor, targets: Sequence[SampleScore] | None, eigen_smooth: bool) -> np.ndarray:
        with torch.enable_grad(), _kept(self.target_layers) as outputs:
            logits = _logits(self.model(images))
            scores = logits.amax(-1) if targets is None else _scores(targets)(logits)
        if not scores.requires_grad:
            raise TargetError("targets: expected scores that depend on the model's output, got constants")
        layers = {path: _once(path, found) for path, found in outputs.items()}
        gradients = torch.autograd.grad(scores.sum(), list(layers.values()), allow_unused=True)
        self.outputs = logits.detach()
        maps = []
        for (path, output), gradient in zip(layers.items(), gradients, strict=True):
            if gradient is None:
                raise UnsupportedTopologyError(f"target_layers: expected layers that the score depends on, got {path}")
            activations, slopes = (self._channels(path, part, images) for part in (output.detach(), gradient))
            weighted = (slopes.mean((2, 3), keepdim=True) * activations).cpu().numpy()
            cam = np.maximum(_first_components(weighted) if eigen_smooth else weighted.sum(1), 0)
            small = torch.from_numpy(_stretched(cam, _SMALLEST)).unsqueeze(1)
            maps.append(F.interpolate(small, size=images.shape[2:], mode="bilinear", align_corners=False)[:, 0])
        return _stretched(torch.stack(maps).mean(0).numpy()).astype(np.float32)

    def _channels(self, path: str, found: Tensor, images: Tensor) -> Tensor:
        """A layer's output or its gradient as channels over the image. [B, C, h, w], float64"""
        if self.reshape_transform is not None:
            shaped = self.reshape_transform(found)
            if not isinstance(shaped, Tensor) or shaped.ndim != 4:
                got = list(shaped.shape) if isinstance(shaped, Tensor) else type(shaped).__name__
                raise ShapeError(f"reshape_transform: expected [B, C, h, w] of {path}, got {got}")
            return shaped.double()
        if found.ndim == 3:
            return self._patches(path, found, images).double()
        if found.ndim != 4:
            raise ShapeError(f"{path}: expected an output [B, C, h, w] or [B, N, C], got {list(found.shape)}")
        return found.double()

    def _patches(self, path: str, tokens: Tensor, images: Tensor) -> Tensor:
        """The image's patches among a layer's tokens, as the model's graph tells them. [B, N, C] -> [B, C, h, w]"""
        hint = "; give reshape_transform="
        try:
            found = self._engines((images,), method="raw_attention")(images[:1])
        except RelpropError as error:
            raise UnsupportedTopologyError(
                f"{path}: cannot tell the patches among its tokens{hint}: {error}"
            ) from error
        patches = torch.tensor([kind == "patch" for kind in found.token_kinds])
        number = int(patches.sum())
        if found.grid is None or tokens.shape[1] not in (number, len(patches)):
            raise ShapeError(
                f"{path}: expected {len(patches)} tokens or {number} patches of a grid {found.grid}, got"
                f" {list(tokens.shape)}{hint}"
            )
        kept = tokens if tokens.shape[1] == number else tokens[:, patches.to(tokens.device)]
        return kept.unflatten(1, found.grid).movedim(-1, 1)


def _paths(model: nn.Module, layers: Any) -> dict[str, nn.Module]:
    """Layers by their paths in the model."""
    if not isinstance(layers, (list, tuple, nn.ModuleList, nn.Sequential)) or not len(layers):
        raise OptionError(f"target_layers: expected a list of the model's modules, got {_described(layers)}")
    paths = {module: path for path, module in model.named_modules() if path}
    for layer in layers:
        if layer not in paths:
            raise OptionError(f"target_layers: expected modules inside {type(model).__name__}, got {_described(layer)}")
    return {paths[layer]: layer for layer in layers}


def _described(given: Any) -> str:
    return type(given).__name__ if isinstance(given, nn.Module) else repr(given)[:60]


@contextlib.contextmanager
def _kept(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Any]]]:
    """What comes out of layers while the model runs, as part of its graph."""
    found: dict[str, list[Any]] = {path: [] for path in layers}

    def keep(path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            kept = output
            if isinstance(output, Tensor):
                kept = output if output.requires_grad else output.detach().requires_grad_()
            found[path].append(kept)
            return kept.clone() if isinstance(kept, Tensor) else output  # what changes it in place changes the copy

        return hook

    handles = [layer.register_forward_hook(keep(path)) for path, layer in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _logits(output: Any) -> Tensor:
    """What a model gives for its samples, alone or as Hugging Face's models give it. [B, classes]"""
    found = getattr(output, "logits", output)
    if not isinstance(found, Tensor) or found.ndim != 2:
        got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ShapeError(f"model: expected logits [B, classes], got {got}")
    return found


def _once(path: str, outputs: list[Any]) -> Tensor:
    """The output of a layer's only call."""
    if len(outputs) != 1:
        raise UnsupportedTopologyError(
            f"target_layers: expected layers that are called once, got {path}, called {len(outputs)} times"
        )
    if not isinstance(outputs[0], Tensor):
        raise UnsupportedTopologyError(
            f"target_layers: expected layers that give a tensor, got {path}, which gives {type(outputs[0]).__name__}"
        )
    return outputs[0]


def _first_components(weighted: np.ndarray) -> np.ndarray:
    """Each sample's channels projected on their first principal component, as the original does. [B, h, w]"""
    found = []
    for channels in weighted:
        rows = channels.reshape(len(channels), -1).T
        rows = rows - rows.mean(0)
        found.append((rows @ np.linalg.svd(rows)[2][0]).reshape(channels.shape[1:]))
    return np.stack(found)


def _stretched(maps: np.ndarray, smallest: float = 0.0) -> np.ndarray:
    """Each sample's values from their least to their largest to [0, 1]; a constant map is zero. [B, H, W]"""
    above = maps - maps.min((1, 2), keepdims=True)
    largest = above.max((1, 2), keepdims=True) + smallest
    return above / np.where(largest > 0, largest, 1.0)


def _scores(targets: Any) -> Callable[[Tensor], Tensor]:
    """A target: each sample's own function of its output."""
    if isinstance(targets, (str, Mapping, Tensor)) or not isinstance(targets, Sequence):
        raise TargetError(
            f"targets: expected a list with one function per sample, or None, got {type(targets).__name__}"
        )
    given = list(targets)

    def score(output: Tensor) -> Tensor:
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
