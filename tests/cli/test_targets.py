from __future__ import annotations

import re

import pytest
import torch
from timm.data import ImageNetInfo

from relprop.cli.targets import parse_target, short_label
from relprop.errors import TargetError

_INFO = ImageNetInfo()
IMAGENET = tuple(_INFO.index_to_description(i) for i in range(1000))
DIGITS = tuple(str(i) for i in range(10))
PROBABILITIES = torch.tensor([[0.1, 0.9, 0.6], [0.4, 0.2, 0.3]])


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("golden retriever", 207),
        ("Golden Retriever", 207),
        ("tabby cat", 281),  # a synonym
        ("tabby, tabby cat", 281),
        ("tench", 0),
        ("german short", 210),  # part of one label only
        ("207", 207),
        ("0", 0),
        ("134", 134),
    ],
)
def test_label_or_number(text: str, index: int) -> None:
    assert parse_target(text, IMAGENET)(torch.zeros(2, 1000)) == [[index], [index]]


def test_top() -> None:
    assert parse_target("top:2", ("a", "b", "c"))(PROBABILITIES) == [[1, 2], [0, 2]]
    assert parse_target("TOP:3", ("a", "b", "c"))(PROBABILITIES) == [[1, 2, 0], [0, 2, 1]]


def test_default_is_the_likeliest() -> None:
    assert parse_target(None, ("a", "b", "c"))(PROBABILITIES) == [[1], [0]]


def test_default_of_several_labels_is_all_that_are_present_or_the_likeliest() -> None:
    assert parse_target(None, ("a", "b", "c"), multi_label=True)(PROBABILITIES) == [[1, 2], [0]]


@pytest.mark.parametrize(
    ("text", "labels", "message"),
    [
        (
            "golden retreiver",
            IMAGENET,
            "target: expected a label, a number from 0 to 999 or top:K, got 'golden retreiver'; did you mean"
            " 'golden retriever' (207)?",
        ),
        ("crane", IMAGENET, "target: expected one class, got 'crane', which fits 2: 'crane' (134), 'crane' (517)"),
        ("terrier", IMAGENET, "target: expected one class, got 'terrier', which fits "),
        ("1000", IMAGENET, "target: expected a class from 0 to 999, got 1000"),
        ("-1", IMAGENET, "target: expected a class from 0 to 999, got -1"),
        ("12", DIGITS, "target: expected a class from 0 to 9, got 12"),
        ("top:0", DIGITS, "target: expected top:K with K from 1 to 10, got 'top:0'"),
        ("top:11", DIGITS, "target: expected top:K with K from 1 to 10, got 'top:11'"),
        ("top:many", DIGITS, "target: expected top:K with K from 1 to 10, got 'top:many'"),
        ("", DIGITS, "target: expected a label, a number from 0 to 9 or top:K, got ''"),
    ],
)
def test_refused(text: str, labels: tuple[str, ...], message: str) -> None:
    with pytest.raises(TargetError, match=re.escape(message)):
        parse_target(text, labels)


def test_short_label() -> None:
    assert short_label(IMAGENET, 281) == "tabby"
