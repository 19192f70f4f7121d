"""One example of every kind of picture: `python -m relprop.demo.gallery --out docs/pictures`.

Images are the demo's. For texts two small Transformers are trained on the spot, on tasks whose truth is known: words
that are for or against, turned around by "not", and letters to be written backwards. Pages become pictures where
chromium is on the PATH.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

import relprop
from relprop.compat.engines import needed
from relprop.demo.bundled import bundled_scenes
from relprop.demo.command import draw_into_folder
from relprop.demo.model import CLASS_NAMES, load_model, preprocess
from relprop.images import prepare_output
from relprop.pictures import compare, ledger_picture, save_png
from relprop.pictures.report import Report
from relprop.survey import survey

__all__ = ["draw_gallery", "main", "train_opinions", "train_reversal"]

_METHODS = ("transformer_attribution", "full", "generic_attention", "attention_rollout", "attnlrp")
_GOOD, _BAD = ("superb", "moving", "funny"), ("dull", "poor", "silly")
_THINGS = ("film", "plot", "cast", "music")
WORDS = ("[PAD]", "[CLS]", "[SEP]", "the", "is", "not", "and", *_THINGS, *_GOOD, *_BAD)
OPINIONS = ("negative", "mixed", "positive")
LETTERS = ("<end>", "|", *"abcdefghijklmnopqrstuvwxyz")
_LENGTH = 6  # letters to be written backwards


def opinion(draw: random.Random) -> tuple[list[str], int]:
    """A sentence of two clauses and its class: how many of them are good."""
    words, good = ["[CLS]"], 0
    for i in range(2):
        kind, turned = draw.random() < 0.5, draw.random() < 0.4
        adjective = draw.choice(_GOOD if kind else _BAD)
        words += [*(["and"] if i else []), "the", draw.choice(_THINGS), "is", *(["not"] if turned else []), adjective]
        good += kind != turned
    return [*words, "[SEP]"], good


def word_ids(sentences: Sequence[Sequence[str]]) -> dict[str, Tensor]:
    """Padded ids and their mask. [B, N]"""
    longest = max(map(len, sentences))
    ids = torch.tensor([[WORDS.index(word) for word in s] + [0] * (longest - len(s)) for s in sentences])
    mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sentences])
    return {"input_ids": ids, "attention_mask": mask}


def train_opinions(steps: int = 800, seed: int = 0) -> nn.Module:
    """A BERT of two layers that tells good from bad."""
    transformers = needed("transformers", by="relprop.demo.gallery")
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        num_labels=len(OPINIONS),
    )
    model, draw = transformers.BertForSequenceClassification(config), random.Random(seed)
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(steps):
        sentences, classes = zip(*(opinion(draw) for _ in range(96)), strict=True)
        model(**word_ids(sentences), labels=torch.tensor(classes)).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


def train_reversal(steps: int = 500, seed: int = 0) -> nn.Module:
    """A GPT-2 of two layers that writes letters backwards."""
    transformers = needed("transformers", by="relprop.demo.gallery")
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=len(LETTERS),
        n_positions=2 * _LENGTH + 2,
        n_embd=64,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config)
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(steps):
        letters = torch.randint(2, len(LETTERS), (96, _LENGTH))
        sequence = torch.cat([letters, torch.ones(96, 1, dtype=torch.int64), letters.flip(1)], 1)
        labels = sequence.clone()
        labels[:, : _LENGTH + 1] = -100  # what is given is not to be guessed
        model(sequence, labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


def draw_gallery(out: str | Path) -> list[Path]:
    """Write every kind of picture.

    Returns:
        the files.
    Raises:
        OutputError, MissingDependencyError
    """
    folder = prepare_output(out)
    return [*_draw_images(folder), *_draw_texts(folder), *_draw_matrix(folder), *_draw_report(folder)]


def _scenes() -> tuple[nn.Module, Tensor, list[Image.Image], list[list[int]], list[str]]:
    scenes = bundled_scenes()
    images = [Image.fromarray(s.image.permute(1, 2, 0).contiguous().numpy()) for s in scenes.values()]
    inputs = preprocess(torch.stack([scene.image for scene in scenes.values()]))
    return load_model(), inputs, images, [s.labels.nonzero().flatten().tolist() for s in scenes.values()], list(scenes)


def _draw_images(folder: Path) -> list[Path]:
    model, inputs, images, digits, _ = _scenes()
    noted: dict[str, Any] = {"images": images[:2], "labels": [f"digit {name}" for name in CLASS_NAMES]}
    first, targets = inputs[:2], digits[:2]
    found = relprop.explain(model, first, target=targets).annotated(**noted)
    latents = ["blocks.?", "blocks.1.attn:heads", "blocks.3.attn:heads"]
    one, of_one = inputs[1:2], {"images": images[1:2], "labels": noted["labels"]}
    digit = digits[1][0]
    inside = relprop.explain(model, one, target=digit, method="attnlrp", latents=latents, ledger=True)
    inside = inside.annotated(**of_one)
    assert inside.ledger is not None
    by_method = {name: relprop.explain(model, one, target=digit, method=name) for name in _METHODS}
    drawn = {
        "classes": found.picture(),
        "batch": found.picture(scale="batch"),
        "layers": inside.picture(over="layers", scale="sample", side=150),
        "heads": inside.picture(over="heads", side=130),
        "methods": compare(by_method, side=172, columns=3, **of_one).image(),
        "ledger": ledger_picture(inside.ledger),
        "ledger_dark": ledger_picture(inside.ledger, dark=True),
    }
    return [save_png(image, folder / f"{name}.png") for name, image in drawn.items()]


def _draw_texts(folder: Path) -> list[Path]:
    model = train_opinions()
    sentences = ["the film is superb and the plot is not dull", "the music is moving and the cast is not funny"]
    words = [["[CLS]", *sentence.split(), "[SEP]"] for sentence in sentences]
    found = relprop.explain(model, **word_ids(words), method="attnlrp", target=[[2, 0]] * len(words))
    page = found.save(folder / "words.html", tokens=words, labels=OPINIONS)
    return [page, *_photographed(page, folder, (760, 380))]


def _draw_matrix(folder: Path) -> list[Path]:
    given = torch.tensor([[*(LETTERS.index(letter) for letter in "planet"), 1]])
    model = train_reversal()
    with torch.no_grad():
        options = {"max_new_tokens": _LENGTH, "do_sample": False, "pad_token_id": 0}
        written = model.generate(given, attention_mask=torch.ones_like(given), **options)  # type: ignore[operator]
    found = relprop.explain_generation(model, given, written)
    tokens = [[LETTERS[i] for i in row] for row in written.tolist()]
    page = found.save(folder / "matrix.html", tokens)
    return [save_png(found.picture(tokens), folder / "matrix.png"), page]


def _draw_report(folder: Path) -> list[Path]:
    model, inputs, images, digits, names = _scenes()
    made = survey(model, inputs[:1], target=digits[:1], ledger="attnlrp")
    labels = [f"digit {name}" for name in CLASS_NAMES]
    assert made.booked is not None
    report = Report("the demo's digits")
    report.add(made.annotated(images=images[:1], labels=labels), names[:1], made.booked.logits.sigmoid(), labels)
    with tempfile.TemporaryDirectory() as place:
        return _photographed(report.save(Path(place) / "report.html"), folder, (860, 700))


def _photographed(page: Path, folder: Path, size: tuple[int, int]) -> list[Path]:
    """A page as a reader sees it who prefers light, or dark; nothing without chromium."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print(f"relprop: note: no picture of {page.name}: chromium is not on the PATH", file=sys.stderr)
        return []
    found = []
    for name, scheme in (("light", 1), ("dark", 0)):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            taken = Path(profile) / "page.png"
            flags = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars")
            quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync")
            subprocess.run(
                [
                    *(browser, *flags, *quiet, f"--user-data-dir={profile}"),
                    *(f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={taken}"),
                    *(f"--window-size={size[0]},{size[1]}", page.resolve().as_uri()),
                ],
                check=True,
                capture_output=True,
                timeout=300,
            )
            with Image.open(taken) as image:
                found.append(save_png(image.convert("RGB"), folder / f"{page.stem}_{name}.png"))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see `--help`."""
    says = "One picture of every kind."
    return draw_into_folder(
        draw_gallery, arguments, prog="python -m relprop.demo.gallery", says=says, out="demo-output/gallery"
    )


if __name__ == "__main__":
    sys.exit(main())
