"""What people call the things that an explanation is about: images, token strings, class names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from relprop.errors import NonFiniteError, OptionError, ShapeError
from relprop.images import load_image

Normalisation = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class Annotation:
    """Names and pictures that `show` and `save` put beside relevance.

    Attributes:
        images: as the model sees them (cropped alike): PIL images, files, or one tensor [B, 3, H, W], of uint8 or of
            floats from 0 to 1. One alone for a batch of one.
        tokens: a tokenizer of transformers, or strings for each sample; a mapping to these by input where there are
            several.
        labels: class names by index, as a sequence or a mapping such as a model's `config.id2label`.
        normalisation: (mean, std) by channel that the model's input was normalised with, to undo it where `images` are
            not given.
    """

    images: Any = None
    tokens: Any = None
    labels: Sequence[str] | Mapping[int, str] | None = None
    normalisation: Normalisation | None = None

    def with_(self, **given: Any) -> Annotation:
        """The same with everything that is given and not None.

        Raises:
            OptionError: there is no such thing to say.
        """
        known = [item.name for item in fields(self)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise OptionError(f"annotation: expected {', '.join(known)}, got {', '.join(unknown)}")
        return replace(self, **{name: value for name, value in given.items() if value is not None})

    def label(self, index: Sequence[int]) -> str:
        """The name of an output, by its index within a sample."""
        last = int(index[-1])
        named = f"class {last}" if len(index) == 1 else f"output {last}"
        if isinstance(self.labels, Mapping):
            named = str(self.labels.get(last, named))
        elif self.labels is not None and 0 <= last < len(self.labels):
            named = str(self.labels[last])
        return named if len(index) == 1 else f"{named} at {', '.join(str(int(i)) for i in index[:-1])}"

    def pictures(self, inputs: Tensor | None, samples: int) -> list[Image.Image]:
        """The images of a batch.

        Args:
            inputs: what the model was given. [B, 1 or 3, H, W]
        Raises:
            OptionError: neither images nor inputs, or images of another kind. ShapeError: another number of them.
        """
        given = self.images
        if given is None:
            if inputs is None:
                raise OptionError("images: expected the images that were explained, got none; pass images=...")
            return [Image.fromarray(_undone(one, self.normalisation)) for one in inputs]
        if isinstance(given, (Image.Image, str, Path)):
            given = [given]
        if isinstance(given, Tensor):
            given = given[None] if given.ndim == 3 else given
            found = [Image.fromarray(_pixels(one)) for one in given]
        else:
            found = [_image(one) for one in given]
        if len(found) != samples:
            raise ShapeError(f"images: expected {samples} for as many samples, got {len(found)}")
        return found


def _image(given: Any) -> Image.Image:
    if isinstance(given, Image.Image):
        return given.convert("RGB")
    if isinstance(given, (str, Path)):
        return load_image(given)
    if isinstance(given, Tensor):
        return Image.fromarray(_pixels(given))
    raise OptionError(f"images: expected PIL images, files or a tensor, got {type(given).__name__}")


def _pixels(image: Tensor) -> Any:
    """[3, H, W] of uint8, or of floats from 0 to 1, as [H, W, 3] of uint8."""
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ShapeError(f"images: expected shape [B, 3, H, W], got [B, {', '.join(map(str, image.shape))}]")
    array = image.detach().cpu()
    if array.is_floating_point():
        values = array.double()
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise OptionError(
                f"images: expected floats from 0 to 1, got {float(values.min()):.3g} to {float(values.max()):.3g};"
                " leave images out to have the model's own input shown"
            )
        array = (values * 255).round()
    return np.ascontiguousarray(array.byte().expand(3, -1, -1).permute(1, 2, 0).numpy())


def _undone(image: Tensor, normalisation: Normalisation | None) -> Any:
    """A model's input as a picture: normalisation undone, stretched to all brightness where it is unknown."""
    values = image.detach().cpu().double()
    if values.ndim != 3 or values.shape[0] not in (1, 3):
        raise ShapeError(f"images: expected an input [B, 3, H, W], got [B, {', '.join(map(str, values.shape))}]")
    if not bool(values.isfinite().all()):
        raise NonFiniteError("images: expected finite numbers, got NaN or infinity in the model's input")
    if normalisation is None:
        low, high = values.min(), values.max()
        return _pixels(((values - low) / (high - low if high > low else 1.0)).float())
    mean, std = (values.new_tensor(list(part))[:, None, None] for part in normalisation)
    if mean.numel() not in (1, len(values)) or std.shape != mean.shape:
        raise ShapeError(
            f"normalisation: expected (mean, std) of {len(values)} channels, got {mean.numel()} and {std.numel()}"
        )
    return _pixels((values * std + mean).clamp(0, 1))
