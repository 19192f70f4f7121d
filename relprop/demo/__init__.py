"""A task with known truth: handwritten digits over photographs, and a small Vision Transformer trained on it."""

from __future__ import annotations

from relprop.demo.bundled import bundled_scenes
from relprop.demo.digits import DigitScenes, Scene, SceneBatch
from relprop.demo.model import CLASS_NAMES, MEAN, STD, build_model, load_model, preprocess

__all__ = [
    "CLASS_NAMES",
    "MEAN",
    "STD",
    "DigitScenes",
    "Scene",
    "SceneBatch",
    "build_model",
    "bundled_scenes",
    "load_model",
    "preprocess",
]
