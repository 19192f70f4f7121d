"""Words as colours: joining, escaping, shares, contrast, and what a browser makes of them."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from relprop.errors import NonFiniteError, OptionError, ShapeError
from relprop.pictures import Passage, colour_depth, text_html, text_terminal
from relprop.pictures.colours import DARK, LIGHT, Colour, Theme
from relprop.pictures.page import page, save_text
from relprop.pictures.text import nearest_of_256
from relprop.pictures.tokens import readable, token_strings
from tests.pictures.browser import copied, needs_browser, screenshot, share_near

WORDS = ["[CLS]", "never", "dull", ",", "un", "##kind", "[SEP]"]
VALUES = [0.0, 0.25, 2.0, 0.0, -1.0, -0.5, 0.02]


def joined(tokens: list[str]) -> str:
    return "".join(piece.before + piece.text for piece in readable(tokens))


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (WORDS, "[CLS] never dull, unkind [SEP]"),
        (["don", "'", "t", "(", "well", "-", "known", ")", "##", "."], "don't (well-known) ##."),
        (["<s>", "Never", "Ġdull", ",", "ĠcafÃ©", "ĊĊ", "Ġof", "</s>"], "<s> Never dull, café\n\n of </s>"),
        (["<s>", "▁Never", "▁du", "ll", "<0x0A>", "<0xC3>", "<0xA9>", "t"], "<s> Never dull\nét"),
        (["<|startoftext|>", "a</w>", "pho", "to</w>", ".</w>"], "<|startoftext|> a photo ."),
        (["as", " they", "\n", " are "], "as they\n are "),
    ],
)
def test_tokens_join_as_they_are_read(tokens: list[str], text: str) -> None:
    assert joined(tokens) == text
    assert len(readable(tokens)) == len(tokens)


def test_a_letter_of_several_tokens_comes_with_the_last() -> None:
    pieces = readable(["Ġ", "ð", "Ł", "Ĳ", "Ī"])  # U+1F408, F0 9F 90 88, byte by byte
    assert [piece.text for piece in pieces] == [" ", "", "", "", "🐈"]


def test_special_tokens_by_form_and_by_name() -> None:
    assert [piece.special for piece in readable(["[MASK]", "[mask]", "<0x41>", "▁a", "EOS"], {"EOS"})] == [
        *(True, False, False, False, True)
    ]


def spans(html: str) -> list[tuple[str, float, str, str]]:
    """(classes, share, title, text) of every word."""
    found = re.findall(r'<span(?: class="([^"]*)")?(?: style="--share:([^"]*)")? title="([^"]*)">(.*?)</span>', html)
    return [(classes, float(share or 0), title, text) for classes, share, title, text in found]


def test_shares_of_the_largest_magnitude() -> None:
    html = text_html([Passage(WORDS, VALUES, "class 1")])
    assert spans(html) == [
        ("special", 0, "[CLS]: +0", "[CLS]"),
        ("p", 0.125, "never: +0.25", "never"),
        ("p", 1, "dull: +2", "dull"),
        ("", 0, ",: +0", ","),
        ("n against", 0.5, "un: -1", "un"),
        ("n against", 0.25, "kind: -0.5", "kind"),
        ("special p", 0.01, "[SEP]: +0.02", "[SEP]"),
    ]
    assert "−2</span>" in html and "+2</span>" in html and "class 1" in html


def test_one_side_where_nothing_is_negative() -> None:
    html = text_html([Passage(["a", "b"], [0.0, 3.0])])
    assert 'class="bar unsigned"' in html and 'class="bar signed"' not in html and ">3<" in html
    assert [share for _, share, _, _ in spans(text_html([Passage(["a", "b"], [-4.0, 2.0])], signed=False))] == [0, 0.5]


def test_special_tokens_do_not_stretch_the_scale() -> None:
    html = text_html([Passage(["[CLS]", "a", "b", "[SEP]"], [9.0, 0.5, -1.0, -3.0])])
    assert [share for _, share, _, _ in spans(html)] == [1, 0.5, 1, 1]
    assert "[CLS]: +9" in html and "−1</span>" in html
    assert [share for _, share, _, _ in spans(text_html([Passage(["[CLS]", "a"], [2.0, 0.0])]))] == [1, 0]


def test_sides_by_passage() -> None:
    texts = [Passage(["a"], [1.0]), Passage(["a"], [-1.0])]
    assert re.findall(r'class="bar (\w+)"', text_html(texts)) == ["unsigned", "signed"]
    assert re.findall(r'class="bar (\w+)"', text_html(texts, scale="sample")) == ["signed", "signed"]


def test_scales() -> None:
    texts = [Passage(["a"], [1.0], sample=0), Passage(["a"], [2.0], sample=0), Passage(["a"], [4.0], sample=1)]

    def shares(scale: str) -> list[float]:
        return [share for _, share, _, _ in spans(text_html(texts, scale=scale))]

    assert shares("map") == [1, 1, 1]
    assert shares("sample") == [0.5, 1, 1]
    assert shares("batch") == [0.25, 0.5, 1]
    assert text_html(texts, scale="map").count('role="img"') == 3
    assert text_html(texts, scale="batch").count('role="img"') == 1
    with pytest.raises(OptionError, match="scale: expected one of map, sample, batch, got 'row'"):
        shares("row")


def test_nothing_of_a_text_is_markup() -> None:
    nasty = '</p><script>alert("1")</script>&amp;'
    html = text_html([Passage([nasty, "b"], [1.0, 0.0], title=nasty)])
    assert "<script" not in html and "&lt;/p&gt;&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;&amp;amp;" in html
    whole = page(html, nasty)
    assert "<script" not in whole and whole.count("<style>") == 2
    assert not re.search(r"https?:|src=|href=|@import|url\(", whole)


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list])
def test_zeros_and_kinds_of_numbers(kind: type) -> None:
    assert [share for _, share, _, _ in spans(text_html([Passage(["a", "b"], kind([0.0, 0.0]))]))] == [0, 0]


def test_bad_input() -> None:
    with pytest.raises(ShapeError, match="relevance of 'x': expected a number for each of 2 tokens, got 3"):
        text_html([Passage(["a", "b"], [1.0, 2.0, 3.0], "x")])
    with pytest.raises(ShapeError, match=re.escape("relevance: expected shape [N], got [1, 2]")):
        text_html([Passage(["a", "b"], torch.ones(1, 2))])
    with pytest.raises(NonFiniteError, match="relevance: expected finite numbers, got 1 NaN or infinite of 2"):
        text_html([Passage(["a", "b"], [1.0, float("nan")])])
    with pytest.raises(OptionError, match="tokens: expected strings, got 7"):
        text_html([Passage([7], [1.0])])  # type: ignore[list-item]
    with pytest.raises(OptionError, match="passages: expected at least one text, got none"):
        text_html([])
    with pytest.raises(OptionError, match="theme: expected one of auto, light, dark, got 'blue'"):
        text_html([Passage(["a"], [1.0])], theme="blue")


def test_token_strings() -> None:
    class Tokenizer:
        all_special_tokens = ("EOS",)

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return ["xyz"[i] for i in ids]

    assert token_strings(Tokenizer(), [[0, 2], [1, 1]], 2) == ([["x", "z"], ["y", "y"]], ["EOS"])
    assert token_strings(None, [[5]], 1) == ([["#5"]], [])
    assert token_strings(["a", "b"], None, 1) == ([["a", "b"]], [])
    with pytest.raises(ShapeError, match="tokens: expected strings for 2 sample"):
        token_strings(["a", "b"], None, 2)
    with pytest.raises(OptionError, match="tokens: expected a tokenizer or lists of strings, got str"):
        token_strings("ab", None, 2)
    with pytest.raises(OptionError, match="tokens: expected a list of strings for each sample"):
        token_strings(None, None, 1)


def luminance(colour: Colour) -> float:
    """WCAG 2's relative luminance."""
    linear = [part / 255 / 12.92 if part / 255 <= 0.04045 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: Colour, b: Colour) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_letters_stay_readable_at_every_share(theme: Theme) -> None:
    assert min(contrast(theme.ink, theme.ground(share)) for share in np.linspace(-1, 1, 201)) >= 4.5
    assert contrast(theme.quiet, theme.page) >= 4.5


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestTerminal:
    @pytest.mark.parametrize(
        ("stream", "environment", "depth"),
        [
            (io.StringIO(), {"TERM": "xterm-256color", "COLORTERM": "truecolor"}, "none"),
            (Terminal(), {"TERM": "xterm-256color", "COLORTERM": "truecolor"}, "truecolor"),
            (Terminal(), {"TERM": "xterm-256color"}, "256"),
            (Terminal(), {"TERM": "xterm", "NO_COLOR": ""}, "256"),
            (Terminal(), {"TERM": "xterm", "NO_COLOR": "1", "COLORTERM": "24bit"}, "none"),
            (Terminal(), {"TERM": "dumb"}, "none"),
        ],
    )
    def test_depth(
        self, stream: io.StringIO, environment: dict[str, str], depth: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("TERM", "COLORTERM", "NO_COLOR"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert colour_depth(stream) == depth

    def test_colours_of_known_values(self) -> None:
        line = text_terminal([Passage(["a", "b", "c"], [1.0, -1.0, 0.0])], colours="truecolor", theme="dark")
        ink = ";".join(map(str, DARK.ink))
        ground = [round(0.25 * p + 0.75 * c) for p, c in zip(DARK.page, DARK.positive, strict=True)]
        other = [round(0.25 * p + 0.75 * c) for p, c in zip(DARK.page, DARK.negative, strict=True)]
        text = line.splitlines()[0]
        assert text == (
            f"\x1b[48;2;{';'.join(map(str, ground))};38;2;{ink}ma\x1b[0m"
            f" \x1b[48;2;{';'.join(map(str, other))};38;2;{ink}mb\x1b[0m c"
        )

    def test_256_and_none(self) -> None:
        texts = [Passage(WORDS, VALUES, "class 1")]
        assert re.search(r"\x1b\[48;5;\d+;38;5;\d+mdull\x1b\[0m, ", text_terminal(texts, colours="256"))
        plain = text_terminal(texts, colours="none").splitlines()
        assert plain[:2] == ["class 1", "[CLS] never dull, unkind [SEP]"]
        assert plain[2] == "  strongest: dull +2, un -1, kind -0.5, never +0.25, [SEP] +0.02"

    def test_pipes_get_no_colours(self) -> None:
        assert "\x1b" not in text_terminal([Passage(WORDS, VALUES)])  # pytest captures standard output

    def test_a_text_does_not_steer_the_terminal(self) -> None:
        line = text_terminal([Passage(["\x1b[31mred", "\x9b2J", "b"], [0.0, 0.0, 1.0])], colours="none")
        assert "\x1b" not in line and "\x9b" not in line and "␛[31mred" in line

    @pytest.mark.parametrize(
        ("colour", "code"), [((0, 0, 0), 16), ((255, 0, 0), 196), ((0, 0, 95), 17), ((8, 8, 8), 232)]
    )
    def test_nearest(self, colour: Colour, code: int) -> None:
        assert nearest_of_256(colour) == code

    def test_bad_options(self) -> None:
        with pytest.raises(OptionError, match="colours: expected one of none, 256, truecolor, got '16'"):
            text_terminal([Passage(["a"], [1.0])], colours="16")
        with pytest.raises(OptionError, match="theme: expected light or dark, got 'auto'"):
            text_terminal([Passage(["a"], [1.0])], theme="auto")


@needs_browser
class TestInABrowser:
    def test_light_and_dark(self, tmp_path: Path) -> None:
        passages = [Passage(["wide-for", "wide-against", "rest"], [1.0, -1.0, 0.0], "title")]
        file = save_text(page(text_html(passages), "words"), tmp_path / "words.html")
        for dark, theme in ((False, LIGHT), (True, DARK)):
            pixels = screenshot(file, dark=dark)
            assert share_near(pixels, theme.page) > 0.9
            for share in (1.0, -1.0):  # the grounds of the two words, beside the ends of the scale
                assert share_near(pixels, theme.ground(share)) > 0.001
            assert share_near(pixels, (LIGHT if dark else DARK).page) < 0.001

    def test_a_theme_that_is_asked_for(self, tmp_path: Path) -> None:
        passages = [Passage(["word"], [1.0])]
        for theme, look in (("light", LIGHT), ("dark", DARK)):
            file = save_text(page(text_html(passages, theme=theme), "words", theme), tmp_path / f"{theme}.html")
            assert share_near(screenshot(file, dark=theme == "light"), look.page) > 0.9

    def test_copied_as_plain_text(self, tmp_path: Path) -> None:
        tokens = ["<s>", "▁Never", "▁du", "ll", ",", "▁x", "<", "y", "&", "<0x0A>", "▁ok", "</s>"]
        file = save_text(
            page(text_html([Passage(tokens, [0.5] * len(tokens), "good")]), "words"), tmp_path / "words.html"
        )
        assert copied(file).split("\n", 1)[1] == "<s> Never dull, x<y&\n ok </s>"
