"""The picture of every method on one of the demo's images, made when the site is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sphinx.application import Sphinx

import relprop
from relprop.composites import COMPOSITES
from relprop.demo import CLASS_NAMES, MEAN, STD, bundled_scenes, load_model, preprocess
from relprop.methods import METHODS
from relprop.pictures import compare, conditioning_picture, enlarge, overlay, panel, save_png

SCENE, DIGITS, SIDE = "scene_3_7", (3, 7), 176
OVERVIEW = ("transformer_attribution", "generic_attention", "attention_rollout", "full")


def draw(folder: Path) -> None:
    """`<method>.png` for every method: the image, and relevance for either of its digits."""
    model, scene = load_model(), bundled_scenes()[SCENE]
    image = enlarge(Image.fromarray(scene.image.permute(1, 2, 0).contiguous().numpy()), SIDE)
    inputs = preprocess(scene.image[None])
    for method in METHODS.values():
        path = folder / f"{method.name}.png"
        if path.exists():
            continue
        found = relprop.explain(model, inputs, target=torch.tensor([DIGITS]), method=method.name)
        maps, signed = found.image_map()[0], method.output == "input"
        tiles = [(f"for {digit}", overlay(image, maps[i], signed=signed)) for i, digit in enumerate(DIGITS)]
        save_png(panel([("image", image), *tiles]), path)


def draw_composites(path: Path) -> None:
    """`full` by the rules of every composite, asked for the first digit."""
    model, scene = load_model(), bundled_scenes()[SCENE]
    image = enlarge(Image.fromarray(scene.image.permute(1, 2, 0).contiguous().numpy()), 150)
    inputs, tiles = preprocess(scene.image[None]), [("image", image)]
    for name in COMPOSITES:
        found = relprop.explain(model, inputs, target=DIGITS[0], method="full", composite=name)
        tiles.append((name, overlay(image, found.image_map()[0], signed=True)))
    save_png(panel(tiles, columns=5), path)


def draw_conditioning(path: Path) -> None:
    """Cancellation and amplification in the demo's model, with the published residual adds and the bounded ones."""
    model, scenes = load_model(), bundled_scenes()
    images = preprocess(torch.stack([scene.image for scene in scenes.values()]))
    composites = ("chefer", "chefer_stable", "attnlrp", "reslrp")
    books = {
        name: relprop.explain(model, images, method="full", composite=name, ledger=True).ledger for name in composites
    }
    save_png(conditioning_picture(books), path)


def draw_overview(folder: Path) -> None:
    """Some methods side by side, and relevance inside the model layer by layer."""
    model, scene = load_model(), bundled_scenes()["scene_5_9"]
    images, notes = preprocess(scene.image[None]), {"labels": CLASS_NAMES, "normalisation": (MEAN, STD)}
    found = {name: relprop.explain(model, images, target=[[5, 9]], method=name) for name in OVERVIEW}
    save_png(compare(found, **notes).image(), folder / "overview.png")
    inside = relprop.explain(model, images, target=5, method="attnlrp", latents=["blocks.*.mlp"])
    save_png(inside.picture(over="layers", columns=6, side=128, **notes), folder / "layers.png")


def prepare(app: Sphinx) -> None:
    """Before anything is read."""
    folder = Path(app.srcdir) / "_generated" / "methods"
    folder.mkdir(parents=True, exist_ok=True)
    draw(folder)
    if not (folder.parent / "layers.png").exists():
        draw_overview(folder.parent)
    if not (folder.parent / "composites.png").exists():
        draw_composites(folder.parent / "composites.png")
    if not (folder.parent / "conditioning.png").exists():
        draw_conditioning(folder.parent / "conditioning.png")


def setup(app: Sphinx) -> dict[str, Any]:
    """Sphinx's entry."""
    app.connect("builder-inited", prepare)
    return {"parallel_read_safe": True}
