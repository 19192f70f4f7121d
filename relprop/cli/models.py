"""From `--model` to something that can be explained: a module, its preprocessing and its class labels."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from relprop.errors import DeviceError, OptionError, UnknownNameError, WeightsError
from relprop.images import load_weights

__all__ = [
    "Subject",
    "fit_weights",
    "load_digits",
    "load_subject",
    "load_timm",
    "names_a_file",
    "names_a_place",
    "place_of",
]

_WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pkl", ".npz", ".h5")
_SEPARATORS = tuple(s for s in (os.sep, os.altsep) if s)
_SHOWN = 5  # keys of a misfit


@dataclass(frozen=True)
class Subject:
    """A classifier to explain.

    Attributes:
        name: for people.
        model: in evaluation mode, from [B, 3, H, W] to logits [B, C].
        prepare: from a PIL image to one input. [3, H, W]
        mean, std: that `prepare` normalises with, per channel.
        labels: per class; synonyms separated by ", ". Empty where only the model knows how many classes there are.
        multi_label: logits are independent (sigmoid) rather than exclusive (softmax).
    """

    name: str
    model: nn.Module
    prepare: Callable[[Image.Image], Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    labels: tuple[str, ...]
    multi_label: bool = False

    def picture(self, prepared: Tensor) -> Image.Image:
        """An input as the picture that the model sees: normalisation undone. prepared: [3, H, W]"""
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.mean, self.std))
        pixels = ((prepared.cpu() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
        return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))

    def probabilities(self, inputs: Tensor) -> Tensor:
        """Probability of every class. inputs: [B, 3, H, W]; returns [B, C], float64 on the CPU

        Raises:
            OptionError: the model's output is not [B, C].
        """
        with torch.no_grad():
            logits = self.model(inputs)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise OptionError(f"model {self.name}: expected a classifier with an output [B, C], got {got}")
        return probabilities_of(logits, self.multi_label)


def probabilities_of(logits: Tensor, multi_label: bool) -> Tensor:
    """Of independent logits, or of one alone, the sigmoid; else the softmax. [B, C], float64 on the CPU"""
    logits = logits.double().cpu()
    return logits.sigmoid() if multi_label or logits.shape[-1] == 1 else logits.softmax(-1)


def names_a_file(model: str) -> bool:
    """Whether a --model is a file rather than a timm name."""
    return model.lower().endswith(_WEIGHT_SUFFIXES) or (":" not in model and any(s in model for s in _SEPARATORS))


def names_a_place(model: str) -> bool:
    """Whether a --model is a file or folder rather than a name on the hub, which may be owner/name."""
    outside = model.startswith((".", "~")) or Path(model).is_absolute()
    separators = sum(model.count(s) for s in _SEPARATORS)
    return outside or separators > 1 or model.lower().endswith(_WEIGHT_SUFFIXES)


def load_subject(
    model: str | None,
    *,
    arch: str | None = None,
    weights: Path | None = None,
    image_size: int | None = None,
    device: str = "cpu",
) -> Subject:
    """The model that the options name, in evaluation mode on the device.

    Raises:
        UnknownNameError, WeightsError, OptionError, DeviceError
    """
    place = place_of(device)
    if model is None:
        subject = load_digits(weights)
    elif names_a_file(model):
        if arch is None:
            raise OptionError(f"model {model}: expected the timm name of its architecture as arch, got none")
        subject = load_timm(arch, Path(model), image_size)
    else:
        subject = load_timm(model, weights, image_size)
    subject.model.to(place)
    return subject


def place_of(device: str) -> torch.device:
    """Raises:
    DeviceError: torch cannot use it here.
    """
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise DeviceError(f"device: expected one that torch can use here, got {device!r}: {reason}") from error
    return place


def load_digits(weights: Path | None = None) -> Subject:
    """The bundled digits model, or its architecture with other weights.

    Raises:
        WeightsError: missing or misfit weights.
    """
    from relprop.demo import model as digits

    if weights is None:
        model: nn.Module = digits.load_model()
    else:
        model = digits.build_model()
        fit_weights(model, load_weights(weights), f"{weights}: the digits model")
    return Subject(
        "digits", model.eval(), digits.preprocess, digits.MEAN, digits.STD, digits.CLASS_NAMES, multi_label=True
    )


def load_timm(name: str, weights: Path | None = None, image_size: int | None = None) -> Subject:
    """A timm model with its pretrained weights, or with those of a safetensors file.

    Args:
        name: as `timm.create_model` takes it.
        weights: file; the number of classes is read off its classifier.
        image_size: timm's img_size, for architectures that take it.
    Raises:
        UnknownNameError: timm has no such model, or no such pretrained tag. WeightsError: no pretrained weights to be
            had, or a file that is missing or does not fit. OptionError: no image_size, or not a classifier.
    """
    from timm.data import create_transform, resolve_model_data_config

    _check_name(name)
    size: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    if weights is None:
        model = _pretrained(name, size)
    else:
        state = load_weights(weights)
        classes = _classes_in(name, state)
        model = _create(name, size if classes is None else {**size, "num_classes": classes})
        fit_weights(model, state, f"{weights}: {name}")
    if getattr(model, "num_classes", None) == 0:
        raise OptionError(f"model {name}: expected a classifier, got a model without a head (num_classes is 0)")
    config = resolve_model_data_config(model, args=size)
    return Subject(
        name,
        model.eval(),
        create_transform(**config, is_training=False),
        tuple(config["mean"]),
        tuple(config["std"]),
        _labels(model),
    )


def _check_name(name: str) -> None:
    import timm

    if ":" in name:  # hf_hub:..., local-dir:...: timm looks there
        return
    arch, _, tag = name.partition(".")
    if not timm.is_model(arch):
        near = _nearest(arch, timm.list_models())
        raise UnknownNameError(f"unknown model: expected a timm name (timm.list_models()), got {name!r}{near}")
    tagged = timm.list_models(f"{arch}.*", pretrained=True)
    if tag and name not in tagged:
        known = ", ".join(tagged) or "none, it has no pretrained weights"
        raise UnknownNameError(f"unknown pretrained tag: expected one of {known}, got {name!r}{_nearest(name, tagged)}")


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else ""


def _create(name: str, options: Mapping[str, Any], pretrained: bool = False) -> nn.Module:
    import timm

    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        raise OptionError(f"image size: expected a model that can change it, got {name}") from error


def _pretrained(name: str, options: Mapping[str, Any]) -> nn.Module:
    try:
        return _create(name, options, pretrained=True)
    except (OptionError, TypeError):
        raise
    except Exception as error:  # whatever the hub's client, the network or timm have to say
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(
            f"model {name}: expected pretrained weights from the hub or its local cache, got {type(error).__name__}:"
            f" {first} Without a network give a safetensors file with --weights"
        ) from error


def _classes_in(name: str, state: Mapping[str, Tensor]) -> int | None:
    """Number of classes of the classifier in a state dict, None where it cannot be told."""
    import timm

    config = None if ":" in name else timm.get_pretrained_cfg(name)
    heads = getattr(config, "classifier", None)
    head = heads[0] if isinstance(heads, (tuple, list)) and heads else heads
    weight = state.get(f"{head}.weight")
    return None if weight is None or weight.ndim < 1 else int(weight.shape[0])


def fit_weights(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load a state dict that fits exactly.

    Args:
        what: the file and the architecture, for the error.
    Raises:
        WeightsError: missing, unexpected and mismatched keys, the first few of each.
    """
    own = model.state_dict()
    mismatched = [
        f"{key} (expected {list(own[key].shape)}, got {list(value.shape)})"
        for key, value in state.items()
        if key in own and own[key].shape != value.shape
    ]
    faults = (
        ("missing", [key for key in own if key not in state]),
        ("unexpected", [key for key in state if key not in own]),
        ("mismatched", mismatched),
    )
    found = [f"{len(keys)} {kind}: {_few(keys)}" for kind, keys in faults if keys]
    if found:
        raise WeightsError(
            f"{what}: expected the {len(own)} tensors of this architecture, got others; {'; '.join(found)}"
        )
    model.load_state_dict(state)


def _few(keys: list[str]) -> str:
    more = f", and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more


def _labels(model: nn.Module) -> tuple[str, ...]:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    classes = int(getattr(model, "num_classes", 0))
    subset = infer_imagenet_subset(model)
    if subset is None:
        return tuple(str(i) for i in range(classes))
    names = ImageNetInfo(subset)
    return tuple(names.index_to_description(i) for i in range(classes))
