"""The gallery: its models know their tasks, and what is committed is small and whole."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from PIL import Image

import relprop
from relprop.demo import gallery

FOLDER = Path(relprop.__file__).parents[1] / "docs" / "pictures"
KINDS = (
    *("batch", "classes", "heads", "layers", "ledger", "ledger_dark", "matrix", "methods"),
    *("report_dark", "report_light", "words_dark", "words_light"),
)


def test_committed_pictures() -> None:
    # Those of measured rows are drawn by benchmarks.peers.pictures and benchmarks.numerics.conditioning.
    drawn = [path for path in FOLDER.iterdir() if not path.name.startswith(("race_", "conditioning"))]
    assert sorted(path.stem for path in drawn if path.suffix == ".png") == list(KINDS)
    for path in drawn:
        assert path.stat().st_size < 150_000, path
        if path.suffix == ".png":
            with Image.open(path) as picture:
                picture.load()
                assert picture.width <= 1200


def test_opinions() -> None:
    draw = random.Random(3)
    for _ in range(50):
        words, good = gallery.opinion(draw)
        first, second = " ".join(words).split(" and ")
        signs = [
            (("not" in part) != any(word in part for word in ("superb", "moving", "funny"))) for part in (first, second)
        ]
        assert good == sum(signs) and set(words) <= set(gallery.WORDS)
    given = gallery.word_ids([["[CLS]", "the"], ["[CLS]"]])
    assert given["input_ids"].tolist() == [[1, 3], [1, 0]] and given["attention_mask"].tolist() == [[1, 1], [1, 0]]


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_models_know_their_tasks() -> None:
    pytest.importorskip("transformers")
    draw = random.Random(4)
    sentences, classes = zip(*(gallery.opinion(draw) for _ in range(200)), strict=True)
    judge = gallery.train_opinions()
    with torch.no_grad():
        found = judge(**gallery.word_ids(sentences)).logits.argmax(-1)
    assert float((found == torch.tensor(classes)).float().mean()) > 0.98
    model = gallery.train_reversal()
    letters = torch.randint(2, len(gallery.LETTERS), (100, 6))
    given = torch.cat([letters, torch.ones(100, 1, dtype=torch.int64)], 1)
    with torch.no_grad():
        written = model.generate(given, max_new_tokens=6, do_sample=False, pad_token_id=0)  # type: ignore[operator]
    assert float((written[:, 7:] == letters.flip(1)).all(1).float().mean()) > 0.95
    explained = relprop.explain_generation(model, given[:8], written[:8])
    # What is written backwards comes from its own letter.
    assert float((explained.relevance.argmax(-1) == torch.arange(5, -1, -1)).float().mean()) > 0.9
