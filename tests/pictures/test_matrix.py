"""Matrices of tokens, as picture and as table, and what a generation shows of itself."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import relprop
from relprop.errors import NonFiniteError, OptionError, ShapeError
from relprop.pictures import matrix_html, token_matrix
from relprop.pictures.colours import DARK, LIGHT
from relprop.pictures.page import page, save_text
from tests.pictures.browser import needs_browser, screenshot, share_near

VALUES = np.array([[0.5, 0.0, 0.0], [-1.0, 0.25, 0.0]])
ROWS, COLUMNS = ["one", "<b>"], ["one", "<b>", "Ġ"]


def cells(html: str) -> list[tuple[str, float, str]]:
    found = re.findall(r'<td class="([pn])" style="--share:([^"]*)" title="([^"]*)"></td>|<td class="(none)">', html)
    return [(kind or empty, float(share or 0), title) for kind, share, title, empty in found]


def test_table() -> None:
    html = matrix_html(VALUES, ROWS, COLUMNS, title="a & b")
    assert cells(html) == [
        ("p", 0.5, "one for one: +0.5"),
        ("none", 0, ""),
        ("none", 0, ""),
        ("n", 1, "one for &lt;b&gt;: -1"),
        ("p", 0.25, "&lt;b&gt; for &lt;b&gt;: +0.25"),
        ("none", 0, ""),
    ]
    assert "a &amp; b" in html and "<b>" not in html and "+1</span>" in html
    assert html.count("<tr>") == 3


def test_picture_has_the_values_colours() -> None:
    pixels = np.asarray(token_matrix(VALUES, ROWS, COLUMNS)).astype(int)
    for colour in ((255, 127, 127), (0, 0, 255), (255, 191, 191)):
        assert share_near(pixels, colour) > 0.01, colour
    dark = np.asarray(token_matrix(VALUES, ROWS, COLUMNS, dark=True, scale=2)).astype(int)
    assert share_near(dark, DARK.page) > 0.3 and share_near(dark, DARK.negative) > 0.01
    assert dark.shape[0] == pytest.approx(2 * pixels.shape[0], abs=1)
    token_matrix(np.zeros((1, 1)), ["$a_"], ["\n"])


@pytest.mark.parametrize("rows", [5, 9, 20])
def test_scale_stands_beside_the_matrix(rows: int) -> None:
    """From its top, and no lower than its end. The matrix is all red, so blue is the scale's."""
    pixels = np.asarray(token_matrix(np.ones((rows, 8)), ["a"] * rows, ["bcd"] * 8)).astype(int)
    matrix, scale = ((pixels[..., lacking] < 10) & (pixels[..., full] > 240) for lacking, full in ((2, 0), (0, 2)))
    lines, columns = np.flatnonzero(matrix.sum(1) > 20), np.flatnonzero(matrix.sum(0) > 20)
    assert np.flatnonzero(scale.any(1)).max() <= lines.max() + 2
    assert np.flatnonzero(scale.any(0)).min() > columns.max()
    assert matrix[:, columns.max() + 5 :].any(1).argmax() == pytest.approx(lines.min(), abs=2)


@pytest.mark.parametrize(("text", "upright"), [("WW", True), ("WWWW", False)])
def test_short_tokens_stand_upright(text: str, upright: bool) -> None:
    """Above a matrix; longer ones are turned. The label's ink is wider than high, or the other way round."""
    pixels = np.asarray(token_matrix(np.ones((6, 1)), ["a"] * 6, [text])).astype(int)
    red = (pixels[..., 0] > 240) & (pixels[..., 2] < 10)
    top, right = np.flatnonzero(red.sum(1) > 15).min(), np.flatnonzero(red.sum(0) > 100)
    ink = pixels[: top - 2, : right[np.flatnonzero(np.diff(right, append=10**6) > 1)[0]] + 1].max(-1) < 120
    high, wide = (np.flatnonzero(ink.any(axis)) for axis in (1, 0))
    assert (np.ptp(wide) > np.ptp(high)) == upright


def test_bad_input() -> None:
    for make in (token_matrix, matrix_html):
        with pytest.raises(
            ShapeError, match=r"token_matrix: expected relevance \[2, 2\] for as many texts, got \[2, 3\]"
        ):
            make(VALUES, ROWS, ROWS)
        with pytest.raises(NonFiniteError, match="token_matrix: expected finite numbers, got 1 NaN or infinite of 6"):
            make(np.where(VALUES == 0.5, np.nan, VALUES), ROWS, COLUMNS)


@needs_browser
def test_in_a_browser(tmp_path: Path) -> None:
    file = save_text(page(matrix_html(VALUES, ROWS, COLUMNS), "m"), tmp_path / "m.html")
    for dark, theme in ((False, LIGHT), (True, DARK)):
        pixels = screenshot(file, dark=dark, size=(500, 300))
        assert share_near(pixels, theme.negative) > 0.001  # the strongest cell, at full strength
        half = tuple(round((p + c) / 2) for p, c in zip(theme.page, theme.positive, strict=True))
        assert share_near(pixels, half) > 0.001


class Tokenizer:
    all_special_tokens = ("<pad>",)
    pad_token = "<pad>"

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"Ġt{i}" if i else "<pad>" for i in ids]


def generation() -> relprop.Generation:
    """Two samples of two prompt tokens and three generated; the first prompt is padded, the second ends early."""
    ids = torch.tensor([[0, 4, 5, 6, 7], [1, 2, 3, 9, 0]])
    relevance = torch.zeros(2, 3, 5)
    relevance[0, :, 1], relevance[0, 2, 3], relevance[1, 0, 0], relevance[1, 1, 2] = 1.0, -2.0, 3.0, 4.0
    written = torch.tensor([[True, True, True], [True, True, False]])
    return relprop.Generation(relevance, None, ids, torch.zeros(2, 3), written, 1)


class TestGeneration:
    def test_matrix_leaves_padding_out(self) -> None:
        html = generation().html(Tokenizer())
        assert re.findall(r'<th scope="col"><span>(.*?)</span>', html) == ["t4", "t5", "t6", "t7"]
        assert re.findall(r'<th scope="row">(.*?)</th>', html) == ["t5", "t6", "t7"]
        assert [cell for cell in cells(html) if cell[0] != "none"] == [
            ("p", 0.5, "t4 for t5: +1"),
            ("p", 0.5, "t4 for t6: +1"),
            ("p", 0.5, "t4 for t7: +1"),
            ("n", 1, "t6 for t7: -2"),
        ]
        second = generation().html(Tokenizer(), sample=1)
        assert re.findall(r'<th scope="row">(.*?)</th>', second) == ["t3", "t9"]
        assert re.findall(r'<th scope="row">(.*?)</th>', generation().html()) == ["#5", "#6", "#7"]

    def test_text(self) -> None:
        html = generation().html(Tokenizer(), form="text", sample=1)
        assert re.findall(r"<figcaption><span>(.*?)</span>", html) == ["→ t3", "→ t9"]
        assert re.findall(r'title="[^"]*">(.*?)</span>', html) == ["t1", "t2", "t1", "t2", "t3"]

    def test_source(self) -> None:
        source = replace(generation(), source=torch.ones(2, 3, 2), source_ids=torch.tensor([[1, 2], [3, 4]]))
        assert re.findall(r'<th scope="col"><span>(.*?)</span>', source.html(Tokenizer(), sample=1)) == ["t3", "t4"]
        own = source.html(Tokenizer(), sample=1, source=False)
        assert len(re.findall(r'<th scope="col">', own)) == 5
        given = source.html([["a"] * 5] * 2, source_tokens=[["x", "y"]] * 2)
        assert re.findall(r'<th scope="col"><span>(.*?)</span>', given) == ["x", "y"]

    def test_files_and_notebooks(self, tmp_path: Path) -> None:
        found = generation()
        with Image.open(found.save(tmp_path / "a.png", Tokenizer())) as stored:
            assert np.array_equal(np.asarray(stored), np.asarray(found.picture(Tokenizer())))
        assert "data:image" not in found.save(tmp_path / "a.html").read_text()
        assert found._repr_html_() == found.html()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"sample": 2}, "sample: expected 0 to 1, got 2"),
            ({"form": "sankey"}, "form: expected one of matrix, text, got 'sankey'"),
            ({"source": True}, "source: expected an encoder's tokens, got the generation of a decoder alone"),
        ],
    )
    def test_bad_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(OptionError, match=message):
            generation().html(**options)
