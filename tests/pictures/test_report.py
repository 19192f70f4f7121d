"""A batch by every method, and the page about it."""

from __future__ import annotations

import html as escaping
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import relprop
import relprop.survey as survey_module
from relprop.errors import OptionError, RelpropError, ShapeError, UnknownNameError
from relprop.info import installation
from relprop.methods import METHODS
from relprop.pictures.colours import DARK, LIGHT
from relprop.pictures.report import Report
from relprop.survey import Finding, Survey, survey
from tests.engine.models import vit
from tests.pictures.browser import needs_browser, screenshot, share_near

QUICK = ("transformer_attribution", "attnlrp", "attention_rollout")
LABELS = [f"<label {i}>" for i in range(10)]


@pytest.fixture(scope="module")
def found() -> tuple[nn.Module, torch.Tensor, Survey]:
    model, x = vit(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return model, x, survey(model, x, target=[[3, 7], [1, 1]], methods=QUICK, ledger="attnlrp")


class TestSurvey:
    def test_answers_are_those_of_explain(self, found: tuple[nn.Module, torch.Tensor, Survey]) -> None:
        model, x, surveyed = found
        assert list(surveyed.explanations) == list(QUICK) and surveyed.batch == 2 and not surveyed.refusals
        for name, explanation in surveyed.explanations.items():
            direct = relprop.explain(model, x, target=[[3, 7], [1, 1]], method=name)
            assert torch.equal(explanation.relevance, direct.relevance)
        assert surveyed.booked is not None and surveyed.booked.method == "attnlrp"
        assert surveyed.forward_seconds > 0 and all(one.seconds > 0 for one in surveyed.findings)

    def test_forward_time_starts_when_the_first_pass_is_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A GPU is still at work when a call returns."""
        told: list[str] = []
        monkeypatch.setattr("relprop.survey._synchronise", lambda args, kwargs: told.append("waited"))
        monkeypatch.setattr("relprop.survey.time.perf_counter", lambda: told.append("clock") or 0.0)
        survey_module._forward(lambda x: told.append("model"), (torch.zeros(1),), {})
        assert told == ["model", "waited", "clock", "model", "waited", "clock"]

    def test_refusals_by_reason(self) -> None:
        said: list[str] = []
        model, x = nn.Linear(4, 3).eval(), torch.randn(2, 4)
        surveyed = survey(model, x, target=1, methods=[*QUICK, "full"], said=said.append)
        assert said == [*QUICK, "full"]
        assert [*surveyed.explanations] == ["attnlrp", "full"]
        assert sorted(name for names in surveyed.refusals.values() for name in names) == [
            "attention_rollout",
            "transformer_attribution",
        ]
        assert surveyed.booked is not None and surveyed.booked.method == "full"

    def test_bad_input(self) -> None:
        model, x = nn.Linear(4, 3).eval(), torch.randn(2, 4)
        with pytest.raises(UnknownNameError, match="did you mean 'attnlrp'"):
            survey(model, x, methods=["attnlpr"])
        with pytest.raises(OptionError, match="methods: expected at least one method, got none"):
            survey(model, x, methods=[])
        with pytest.raises(RelpropError, match="^raw_attention: .*attention"):
            survey(model, x, methods=["raw_attention"])
        with pytest.raises(RelpropError, match="^raw_attention, full: Linear: expected a model in evaluation mode"):
            survey(nn.Linear(4, 3), x, methods=["raw_attention", "full"])


@pytest.fixture(scope="module")
def page(found: tuple[nn.Module, torch.Tensor, Survey]) -> str:
    report, surveyed = Report("a <model>"), found[2].annotated(labels=LABELS)
    refused = Finding("full", refusal="two sequences & <more>")
    surveyed = replace(surveyed, findings=[*surveyed.findings, refused])
    assert surveyed.booked is not None
    report.add(surveyed, ["<one>.png", "two.png"], surveyed.booked.logits.softmax(-1), LABELS, chosen=[[3, 7], [1]])
    return report.html()


class TestPage:
    def test_stands_alone_and_escapes(self, page: str) -> None:
        assert "<script" not in page and not re.search(r'(src|href)="(?!data:)|https?://[^ ]*\.(js|css)|@import', page)
        for raw in ("<model>", "<one>", "<label", "<more>"):
            assert raw not in page and escaping.escape(raw) in page

    def test_every_method_for_every_class(self, page: str) -> None:
        assert re.findall(r"<h3>Relevance for (.*?)</h3>", page) == [escaping.escape(LABELS[i]) for i in (3, 7, 1)]
        assert page.count('<div class="grid">') == 3
        for name in QUICK:
            assert page.count(f"<figcaption>{name}<small>") == 3
        assert page.count("; the same for every class") == 3
        assert page.count("data:image/jpeg;base64,") == 9

    def test_what_is_not_finite_is_said_in_its_place(self, found: tuple[nn.Module, torch.Tensor, Survey]) -> None:
        """One broken map, and one broken ledger, do not lose the page."""
        surveyed = found[2]
        broken = []
        for one in surveyed.findings:
            assert one.explanation is not None
            relevance = one.explanation.relevance.clone()
            if one.method == "attnlrp":
                relevance[1, 0, 3, 3] = torch.nan
            broken.append(replace(one, explanation=replace(one.explanation, relevance=relevance, relevances={})))
        booked = surveyed.booked
        assert booked is not None and booked.ledger is not None
        frontier = booked.ledger.frontier.clone()
        frontier[0, 1] = torch.inf
        books = replace(booked, ledger=replace(booked.ledger, frontier=frontier))
        report = Report("m")
        scores = booked.logits.softmax(-1)
        report.add(replace(surveyed, findings=broken, booked=books), ["a", "b"], scores, LABELS, chosen=[[3, 7], [1]])
        page = report.html()
        assert page.count("<figure><figcaption>attnlrp<small>not finite</small>") == 1
        assert page.count("data:image/jpeg;base64,") == 8
        assert page.count("<p>not finite</p>") == 1 and page.count("<td>frontier</td>") == 2

    def test_classes_and_scores(self, page: str, found: tuple[nn.Module, torch.Tensor, Survey]) -> None:
        booked = found[2].booked
        assert booked is not None
        scores = booked.logits.softmax(-1)[0]
        rows = re.findall(r'<tr( class="chosen")?><td>&lt;label (\d)&gt;</td><td class="number">([\d.]+)</td>', page)
        first = rows[: len(rows) - len(rows) // 2]
        best = scores.topk(5).indices.tolist()
        assert [int(index) for _, index, _ in rows[:5]] == best
        for chosen, index, score in first[:5]:
            assert float(score) == pytest.approx(float(scores[int(index)]), abs=1e-4)
            assert bool(chosen) == (int(index) in (3, 7))

    def test_ledger_timings_refusals_versions(self, page: str) -> None:
        assert page.count("<h3>Ledger of attnlrp for &lt;label") == 2
        assert page.count('media="(prefers-color-scheme: dark)"') == 2
        assert "<td>blocks.2</td>" in page and "absorbed: bias" in page
        assert "forward pass" in page and METHODS["attnlrp"].source in page
        assert "<li>full<small>two sequences &amp; &lt;more&gt;</small></li>" in page
        assert f">{relprop.__version__}</td>" in page and installation()["versions"]["torch"] in page

    @needs_browser
    def test_in_a_browser(self, page: str, tmp_path: Path) -> None:
        file = tmp_path / "report.html"
        file.write_text(page, encoding="utf-8")
        for dark, theme in ((False, LIGHT), (True, DARK)):
            pixels = screenshot(file, dark=dark, size=(1100, 3400))
            assert share_near(pixels, theme.page) > 0.5
            assert share_near(pixels, (86, 180, 233)) > 0.005  # the ledger's bars
            assert share_near(pixels, (LIGHT if dark else DARK).page) < 0.01

    def test_bad_input(self, found: tuple[nn.Module, torch.Tensor, Survey]) -> None:
        with pytest.raises(OptionError, match="report: expected at least one explained input, got none"):
            Report("x").html()
        with pytest.raises(OptionError, match="theme: expected one of auto, light, dark, got 'blue'"):
            Report("x", theme="blue")
        with pytest.raises(ShapeError, match=re.escape("expected names and scores of 2 sample(s), got 1 and 2")):
            Report("x").add(found[2], ["one"], torch.zeros(2, 10), LABELS)


def test_a_text(tmp_path: Path) -> None:
    """Words of every method, without padding; what is not finite is said below."""
    from tests.pictures.test_explanations import Tokenizer, Words

    torch.manual_seed(0)
    ids = torch.tensor([[3, 1, 4], [5, 2, 0]])
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    surveyed = survey(Words().eval(), target=[[0], [1]], methods=["gradient_x_input", "attnlrp"], **given)
    report = Report("words")
    named = surveyed.annotated(tokens=Tokenizer())
    report.add(named, ["first", "second"], torch.rand(2, 3), ["a", "b", "c"])
    text = report.save(tmp_path / "a.html").read_text()
    assert re.findall(r"<figcaption><span>(.*?)</span>", text) == ["gradient_x_input", "attnlrp"] * 2
    assert text.count(">t5</span>") == 2 and "&lt;pad&gt;" not in text
    explanation = named.explanations["attnlrp"]
    gone = torch.full_like(explanation.relevance, torch.nan)
    bad = replace(explanation, relevance=gone, relevances=dict.fromkeys(explanation.relevances, gone))
    report = Report("words")
    findings = [named.findings[0], replace(named.findings[1], explanation=bad)]
    report.add(replace(named, findings=findings), ["first", "second"], torch.rand(2, 3), ["a", "b", "c"])
    text = report.html()
    assert re.findall(r"<figcaption><span>(.*?)</span>", text) == ["gradient_x_input"] * 2
    assert text.count("<figcaption>attnlrp<small>not finite</small></figcaption>") == 2


def test_words_beside_an_image(found: tuple[nn.Module, torch.Tensor, Survey]) -> None:
    """As of a model that reads both: the maps, and below them the words."""
    words = torch.tensor([[3, 1, 4], [5, 2, 6]])
    findings = []
    for one in found[2].findings:
        assert one.explanation is not None
        relevances = {"x": one.explanation.relevance, "words": torch.rand(2, 2, 3)}
        both = replace(one.explanation, relevances=relevances, inputs={**one.explanation.inputs, "words": words})
        findings.append(replace(one, explanation=both))
    report = Report("both")
    report.add(replace(found[2], findings=findings), ["one", "two"], torch.rand(2, 10), LABELS, chosen=[[3], [1]])
    page = report.html()
    assert page.count("data:image/jpeg;base64,") == 6
    assert page.count(">#4</span>") == page.count(">#6</span>") == len(QUICK)
