"""Scenes with known truth: real handwritten digits drawn over real photographs.

Every scene comes with the labels of its digits and, per digit, the exact set of pixels its ink covers, so that an
explanation of "why a 3?" can be scored against where the 3 actually is. Digits (scikit-learn's 8x8 handwritten ones)
and photographs (those shipped inside the scikit-learn and scikit-image wheels) are split once, by a fixed seed, into
disjoint train and test parts. Nothing is downloaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from relprop.errors import MissingDependencyError

__all__ = ["IMAGE_SIZE", "NUM_CLASSES", "DigitScenes", "Scene", "SceneBatch", "Split", "photo_names", "split_indices"]

Split = Literal["train", "test"]

IMAGE_SIZE = 64
NUM_CLASSES = 10
SPLIT_SEED = 20240229
TEST_FRACTION = 0.25

# Photographs only: nothing with print or dials, which would put unlabelled characters into the background.
_PHOTOS: dict[Split, tuple[tuple[str, str], ...]] = {
    "train": (
        ("sklearn.datasets.images", "china.jpg"),
        ("skimage.data", "astronaut.png"),
        ("skimage.data", "camera.png"),
        ("skimage.data", "coffee.png"),
        ("skimage.data", "grass.png"),
        ("skimage.data", "rocket.jpg"),
    ),
    "test": (
        ("sklearn.datasets.images", "flower.jpg"),
        ("skimage.data", "chelsea.png"),
        ("skimage.data", "gravel.png"),
        ("skimage.data", "brick.png"),
    ),
}

_SIZE = (22.0, 31.0)  # pixels per digit height
_ROTATION = math.radians(10)
_STRETCH = 0.12
_CROP = (64, 224)  # side of the photograph's crop, pixels, before it is resized to the scene
_DIM = (0.35, 0.65)  # photographs are dimmed so that a bright digit stands out from any of them
_CONTRAST = 90.0  # least distance in luma (0..255) between ink and the photograph under it
_INK = 0.25  # least alpha that counts as ink; anything fainter is not drawn at all
_GAP = 1  # pixels kept free between the bounding boxes of two digits
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Scene:
    """One image and its truth.

    image: uint8 [3, 64, 64] RGB. labels: float32 [10], 1 for each digit present. masks: bool [10, 64, 64], the pixels
    that the ink of each digit covers (all False for absent digits; no two overlap). background: uint8 [3, 64, 64], the
    same image without digits; it equals `image` at every pixel outside the masks.
    """

    image: torch.Tensor
    labels: torch.Tensor
    masks: torch.Tensor
    background: torch.Tensor


class SceneBatch(NamedTuple):
    """Scenes stacked along a first axis: images uint8 [B,3,64,64], labels float32 [B,10], masks bool [B,10,64,64]."""

    images: torch.Tensor
    labels: torch.Tensor
    masks: torch.Tensor


class DigitScenes:
    """Endless, random-access scenes: scene `index` depends on (split, seed, digits_per_image, index) alone.

    Each scene has `digits_per_image` = (lo, hi) digits, the count drawn uniformly, all of different classes.

    Raises ValueError for an unknown split, a negative seed or an impossible range of digits (1 <= lo <= hi <= 3), and
    MissingDependencyError where scikit-learn or scikit-image is not installed.
    """

    def __init__(self, split: Split = "train", seed: int = 0, digits_per_image: tuple[int, int] = (1, 3)) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"expected split 'train' or 'test', got {split!r}")
        if seed < 0:
            raise ValueError(f"expected a seed >= 0, got {seed}")
        lo, hi = digits_per_image
        if not 1 <= lo <= hi <= 3:
            raise ValueError(f"expected digits_per_image (lo, hi) with 1 <= lo <= hi <= 3, got {digits_per_image}")
        self.split: Split = split
        self.seed = seed
        self.digits_per_image = (lo, hi)
        self._glyphs = _glyphs(split)
        self._photos = _photos(split)

    def sample(self, index: int) -> Scene:
        """The scene with this index (>= 0; ValueError otherwise)."""
        image, labels, masks, background = self._draw(index)
        return Scene(*(torch.from_numpy(part) for part in (image, labels, masks, background)))

    def batch(self, indices: Iterable[int]) -> SceneBatch:
        """The scenes with these indices, in their order; the same pixels as `sample` gives one by one."""
        drawn = [self._draw(int(index))[:3] for index in indices]
        if not drawn:
            raise ValueError("expected at least one index, got none")
        return SceneBatch(*(torch.from_numpy(np.stack(parts)) for parts in zip(*drawn, strict=True)))

    def _draw(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.bool_], NDArray[np.uint8]]:
        if index < 0:
            raise ValueError(f"expected an index >= 0, got {index}")
        rng = np.random.default_rng((self.seed, 0 if self.split == "train" else 1, *self.digits_per_image, index))
        background = _background(self._photos[int(rng.integers(len(self._photos)))], rng)
        lo, hi = self.digits_per_image
        classes = rng.choice(NUM_CLASSES, size=int(rng.integers(lo, hi + 1)), replace=False)
        glyphs = [self._glyphs[c][int(rng.integers(len(self._glyphs[c])))] for c in classes]
        canvas = background.astype(np.float32)
        labels = np.zeros(NUM_CLASSES, dtype=np.float32)
        masks = np.zeros((NUM_CLASSES, IMAGE_SIZE, IMAGE_SIZE), dtype=np.bool_)
        for digit, alpha, (top, left) in zip(classes, *_layout(glyphs, rng), strict=True):
            place = (slice(top, top + alpha.shape[0]), slice(left, left + alpha.shape[1]))
            under = canvas[place]
            ink = _ink_colour(under[alpha > 0].mean(axis=0), rng)
            canvas[place] = under + alpha[..., None] * (ink - under)
            masks[(digit, *place)] = alpha > 0
            labels[digit] = 1
        image = np.rint(canvas).astype(np.uint8)
        return (
            np.ascontiguousarray(image.transpose(2, 0, 1)),
            labels,
            masks,
            np.ascontiguousarray(background.transpose(2, 0, 1)),
        )


def split_indices(split: Split) -> NDArray[np.int64]:
    """Positions in `sklearn.datasets.load_digits()` that belong to a split, sorted; every class is split alike."""
    _, target = _load_digits()
    rng = np.random.default_rng(SPLIT_SEED)
    chosen = []
    for digit in range(NUM_CLASSES):
        order = rng.permutation(np.flatnonzero(target == digit))
        cut = round(len(order) * TEST_FRACTION)
        chosen.append(order[:cut] if split == "test" else order[cut:])
    return np.sort(np.concatenate(chosen))


def photo_names(split: Split) -> tuple[str, ...]:
    """File names of the photographs that a split crops its backgrounds from."""
    return tuple(name for _, name in _PHOTOS[split])


@lru_cache(maxsize=1)
def _load_digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError(_missing("scikit-learn")) from error
    data = load_digits()
    return data.images, data.target


@lru_cache(maxsize=2)
def _glyphs(split: Split) -> tuple[tuple[Image.Image, ...], ...]:
    """Per class, the digits of a split as float images [12, 12] in 0..1 with a blank rim of 2."""
    images, target = _load_digits()
    members = split_indices(split)
    padded = np.pad(images[members] / 16.0, ((0, 0), (2, 2), (2, 2))).astype(np.float32)
    labels = target[members]
    return tuple(tuple(Image.fromarray(g) for g in padded[labels == c]) for c in range(NUM_CLASSES))


@lru_cache(maxsize=2)
def _photos(split: Split) -> tuple[Image.Image, ...]:
    photos = []
    for package, name in _PHOTOS[split]:
        try:
            path = files(package).joinpath(name)
        except ImportError as error:
            raise MissingDependencyError(_missing(f"scikit-{package[2:].split('.')[0]}")) from error
        if not path.is_file():
            raise MissingDependencyError(
                f"expected {name} inside the installed {package}, got none; "
                "install it anew with: pip install 'relprop[demo]'"
            )
        with path.open("rb") as stream:
            photos.append(Image.open(stream).convert("RGB"))
    return tuple(photos)


def _missing(package: str) -> str:
    return f"the demo scenes need {package}, which is not installed; install it with: pip install 'relprop[demo]'"


def _background(photo: Image.Image, rng: np.random.Generator) -> NDArray[np.uint8]:
    side = rng.uniform(_CROP[0], min(_CROP[1], *photo.size))
    left, top = rng.uniform(0, photo.width - side), rng.uniform(0, photo.height - side)
    box = (left, top, left + side, top + side)
    pixels = np.asarray(photo.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR, box=box))
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return np.rint(pixels * np.float32(rng.uniform(*_DIM))).astype(np.uint8)


def _ink_colour(under: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """A random colour brighter than the mean colour `under` it, the brightest of the draws if none is bright enough."""
    draws = rng.integers(40, 256, size=(16, 3)).astype(np.float32)
    luma = draws @ _LUMA
    enough = np.flatnonzero(luma >= float(under @ _LUMA) + _CONTRAST)
    return draws[enough[0] if len(enough) else int(luma.argmax())]


def _render(glyph: Image.Image, rng: np.random.Generator, shrink: float) -> NDArray[np.float32]:
    """Alpha [h, w] of one digit, cropped to its ink; zero or at least `_INK` everywhere."""
    size = rng.uniform(*_SIZE) * shrink
    angle = rng.uniform(-_ROTATION, _ROTATION)
    per_y = 8.0 / size
    per_x = per_y * (1.0 + rng.uniform(-_STRETCH, _STRETCH))
    out = math.ceil(size * 1.3)
    cos, sin = math.cos(angle), math.sin(angle)
    a, b, d, e = per_x * cos, per_x * sin, -per_y * sin, per_y * cos
    shift_x, shift_y = 6.0 - (a + b) * out / 2, 6.0 - (d + e) * out / 2
    grey = glyph.transform((out, out), Image.Transform.AFFINE, (a, b, shift_x, d, e, shift_y), Image.Resampling.BICUBIC)
    threshold = rng.uniform(0.3, 0.5)  # thicker or thinner strokes
    alpha = np.clip((np.asarray(grey) - threshold) / 0.3, 0.0, 1.0)
    alpha[alpha < _INK] = 0.0
    rows, cols = np.flatnonzero(alpha.any(axis=1)), np.flatnonzero(alpha.any(axis=0))
    return alpha[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1].astype(np.float32)


def _layout(
    glyphs: list[Image.Image], rng: np.random.Generator
) -> tuple[list[NDArray[np.float32]], list[tuple[int, int]]]:
    """Alphas of the digits and their (top, left), with bounding boxes that keep `_GAP` apart."""
    shrink = 1.0
    while True:
        alphas = [_render(glyph, rng, shrink) for glyph in glyphs]
        for _ in range(12):
            boxes = [
                (int(rng.integers(IMAGE_SIZE - h + 1)), int(rng.integers(IMAGE_SIZE - w + 1)), h, w)
                for h, w in (alpha.shape for alpha in alphas)
            ]
            if not any(_touch(p, q) for i, p in enumerate(boxes) for q in boxes[:i]):
                return alphas, [(top, left) for top, left, _, _ in boxes]
        shrink *= 0.95


def _touch(p: tuple[int, int, int, int], q: tuple[int, int, int, int]) -> bool:
    return (
        p[0] < q[0] + q[2] + _GAP
        and q[0] < p[0] + p[2] + _GAP
        and p[1] < q[1] + q[3] + _GAP
        and q[1] < p[1] + p[3] + _GAP
    )
