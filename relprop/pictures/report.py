"""One page about a model's answers: inputs, classes, every method side by side, the ledger, timings, versions."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from PIL import Image
from torch import Tensor

from relprop.errors import NonFiniteError, OptionError, ShapeError
from relprop.explanation import Explanation
from relprop.info import installation
from relprop.ledger import Ledger
from relprop.methods import METHODS
from relprop.pictures.colours import as_numbers, picture_range, shown, shown_range
from relprop.pictures.explanations import passages
from relprop.pictures.grids import is_signed
from relprop.pictures.images import enlarge, fitted, overlay, painted_scale
from relprop.pictures.ledger import ledger_picture
from relprop.pictures.page import check_theme, data_uri, page, picture, save_text
from relprop.pictures.text import Passage, text_html
from relprop.survey import Survey

__all__ = ["Report"]

_SIDE, _LARGE, _TOP = 208, 288, 5
_NOT_FINITE = "not finite"

_STYLE = """
h1,h2,h3{line-height:1.25;margin:1.4em 0 .5em}h1{margin-top:.2em}h3{font-size:1.05em}
section{border-top:1px solid rgb(var(--quiet)/.35);margin-top:2em}
.facts{color:rgb(var(--quiet))}
.first{display:flex;flex-wrap:wrap;gap:1.5em;align-items:flex-start}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(208px,1fr));gap:1em}
.grid figure{margin:0}
.grid img{display:block;width:100%;max-width:288px}
.grid figcaption{display:block;font-size:.9em;overflow-wrap:anywhere}
.grid small,.refused small{display:block;font-weight:400;color:rgb(var(--quiet));line-height:1.35}
table.plain{border-collapse:collapse;font-size:.95em}
table.plain th,table.plain td{padding:.2em .9em .2em 0;text-align:left;vertical-align:top;font-weight:400}
table.plain thead th{font-weight:600;border-bottom:1px solid rgb(var(--quiet)/.5)}
table.plain td.number,table.plain th.number{text-align:right;font-variant-numeric:tabular-nums}
.meter{width:12em}table.plain td.meter{vertical-align:middle}
.meter span{display:block;height:.7em;border-radius:.2em;background:rgb(var(--negative)/.75)}
table.plain tr.chosen td{font-weight:600}
details{margin-top:1em}summary{cursor:pointer;font-weight:600}
.ends{display:flex;justify-content:space-between;width:220px;font-size:.8em;color:rgb(var(--quiet))}
.scales{display:flex;flex-wrap:wrap;gap:.5em 2.5em;margin:.6em 0 1em}
.report .text{max-width:none}
.relprop .relprop{padding:0}
"""


@dataclass
class Report:
    """A page that grows by batches.

    Attributes:
        model: its name.
        theme: "auto", "light" or "dark".
    """

    model: str
    theme: str = "auto"
    _sections: list[str] = field(default_factory=list, repr=False)
    _surveys: list[Survey] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        check_theme(self.theme)

    @property
    def empty(self) -> bool:
        """Whether nothing was added."""
        return not self._surveys

    def add(
        self,
        survey: Survey,
        names: Sequence[str],
        scores: Tensor,
        labels: Sequence[str],
        *,
        chosen: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """A batch that was explained by every method.

        Args:
            survey: its explanations annotated with images or tokens.
            names: of the samples.
            scores: of every class, such as probabilities. [B, C]
            labels: of the classes.
            chosen: classes that were explained of each sample, where targets repeat some to be as many for each.
        Raises:
            ShapeError: names or scores of another number of samples. OptionError: nothing was explained.
        """
        if len(names) != survey.batch or len(scores) != survey.batch:
            raise ShapeError(
                f"report: expected names and scores of {survey.batch} sample(s), got {len(names)} and {len(scores)}"
            )
        self._surveys.append(survey)
        for sample, name in enumerate(names):
            first = next(iter(survey.explanations.values()))
            wanted = _wanted(first, sample, None if chosen is None else chosen[sample])
            self._sections.append(self._section(survey, sample, name, scores[sample], labels, wanted))

    def html(self) -> str:
        """The page.

        Raises:
            OptionError: nothing was added.
        """
        if self.empty:
            raise OptionError("report: expected at least one explained input, got none")
        count = len(self._sections)
        parts = [
            f"<h1>relprop: {escape(self.model)}</h1>",
            f'<p class="facts">{count} input{"s" if count > 1 else ""}, {len(self._surveys[0].explanations)} methods.'
            " Each map has its own scale: compare where it is strong, not how strong it is. In two-sided maps what is"
            " beyond the scale has its full colour.</p>",
            *self._sections,
            f"<section><h2>Methods</h2>{_timings(self._surveys)}{_refusals(self._surveys)}</section>",
            f"<section><h2>Versions</h2>{_versions()}</section>",
        ]
        return page(f'<main class="report">{"".join(parts)}</main>', f"relprop: {self.model}", self.theme, _STYLE)

    def save(self, path: str | Path) -> Path:
        """Write the page, whole or not at all.

        Raises:
            OutputError: it cannot be written. OptionError: nothing was added.
        """
        return save_text(self.html(), path)

    def _section(
        self, survey: Survey, sample: int, name: str, scores: Tensor, labels: Sequence[str], wanted: list[int]
    ) -> str:
        explanations = survey.explanations
        first = next(iter(explanations.values()))
        classes = {int(first.target[sample].reshape(-1)[t]) for t in wanted} if first.target is not None else set()
        image = None
        if first.image_size is not None:
            image = first.annotation.pictures(first.image_input(), first.batch)[sample]
        shown_input = "" if image is None else picture(enlarge(image, _LARGE), name)
        parts = [
            f"<section><h2>{escape(name)}</h2>",
            f'<div class="first">{shown_input}{_classes(scores, labels, classes)}</div>',
        ]
        if image is not None:
            parts.append(_scales(any(is_signed(e) for e in explanations.values())))
        for target in wanted:
            parts.append(f"<h3>Relevance for {escape(first.target_names(sample)[target])}</h3>")
            if image is not None:
                parts.append(_image_grid(explanations, image, sample, target))
            parts.append(_texts(explanations, sample, target, self.theme))
        parts.append(self._ledger(survey, sample))
        return "".join([*parts, "</section>"])

    def _ledger(self, survey: Survey, sample: int) -> str:
        booked = survey.booked
        if booked is None or booked.ledger is None:
            return "<h3>Ledger</h3><p>No method that answers keeps one.</p>"
        books = booked.ledger
        drawn = f"<p>{_NOT_FINITE}</p>"
        if _finite(books, sample):
            drawn = picture(
                lambda dark: ledger_picture(books, sample=sample, target=0, dark=dark, scale=2),
                f"relevance through the layers by {booked.method}",
                self.theme,
                scale=2,
            )
        name = booked.target_names(sample)[0]
        return (
            f"<h3>Ledger of {escape(booked.method)} for {escape(name)}, from the output to where it ends</h3>"
            f"{drawn}<details><summary>as numbers</summary>{_ledger_table(booked, sample)}</details>"
        )


def _finite(books: Ledger, sample: int) -> bool:
    """Whether all that is drawn of a sample's first target is."""
    layers = books.by_layer()
    amounts = [books.frontier, *(part for one in layers for part in (one.arriving, *one.absorbed.values()))]
    return all(bool(part.expand_as(books.seed)[0, sample].isfinite()) for part in amounts if part is not None)


def _wanted(explanation: Explanation, sample: int, chosen: Sequence[int] | None) -> list[int]:
    """Targets of a sample, each class once."""
    count = len(explanation.target_names(sample))
    return list(range(count if chosen is None else min(count, len(chosen))))


def _classes(scores: Tensor, labels: Sequence[str], chosen: set[int]) -> str:
    """The likeliest classes, and those that are explained, as a table with bars."""
    best = scores.topk(min(_TOP, len(scores))).indices.tolist()
    rows = []
    for index in [*best, *sorted(chosen - set(best))]:
        score = float(scores[index])
        label = labels[index] if index < len(labels) else str(index)
        width = 100 * min(max(score, 0.0), 1.0)
        kind = ' class="chosen"' if index in chosen else ""
        rows.append(
            f'<tr{kind}><td>{escape(label)}</td><td class="number">{score:.4f}</td>'
            f'<td class="meter"><span style="width:{width:.1f}%"></span></td></tr>'
        )
    head = '<thead><tr><th>class</th><th class="number">score</th><th></th></tr></thead>'
    return f'<table class="plain">{head}<tbody>{"".join(rows)}</tbody></table>'


def _scales(signed: bool) -> str:
    """The colours of one- and two-sided maps, with what their ends mean."""
    kinds = [(False, "lowest", "", "highest"), *([(True, "against", "0", "for")] if signed else [])]
    found = ""
    for kind, low, middle, high in kinds:
        bar = data_uri(painted_scale(signed=kind, size=(220, 12)))
        ends = f'<span class="ends"><span>{low}</span><span>{middle}</span><span>{high}</span></span>'
        found += f'<div><img src="{bar}" alt="colour scale from {low} to {high}" width="220">{ends}</div>'
    return f'<div class="scales">{found}</div>'


def _image_grid(explanations: dict[str, Explanation], image: Image.Image, sample: int, target: int) -> str:
    small, figures = fitted(image, _SIDE), []
    for name, explanation in explanations.items():
        try:
            maps = explanation.target_maps()
        except ShapeError:  # tokens that lie on no grid
            continue
        try:
            heat = as_numbers(maps[sample, min(target, maps.shape[1] - 1)], "map", 2)
        except NonFiniteError:
            drawn, said = "", _NOT_FINITE
        else:
            signed = is_signed(explanation)
            limits = picture_range([heat], signed=signed)
            said = shown_range(heat, limits, signed=signed) if any(limits) else "0 everywhere"
            painted = data_uri(overlay(small, heat, signed=signed, limits=limits), "JPEG")
            drawn = f'<img src="{painted}" alt="{escape(name)}">'
        figures.append(
            f"<figure>{drawn}<figcaption>{escape(name)}<small>{said}{_sameness(name)}</small></figcaption></figure>"
        )
    return f'<div class="grid">{"".join(figures)}</div>'


def _sameness(name: str) -> str:
    method = METHODS.get(name)
    return "" if method is None or method.uses_target else "; the same for every class"


def _texts(explanations: dict[str, Explanation], sample: int, target: int, theme: str) -> str:
    texts, refused = [], ""
    for name, explanation in explanations.items():
        found = passages(explanation, [sample])
        per_target = len(explanation.target_names(sample))
        for one in found[min(target, per_target - 1) :: per_target]:
            text = Passage(one.tokens, one.relevance, name + _sameness(name), sample, one.special)
            try:
                text.read()
            except NonFiniteError:
                refused += f"<figure><figcaption>{escape(text.title)}<small>{_NOT_FINITE}</small></figcaption></figure>"
            else:
                texts.append(text)
    return (text_html(texts, theme=theme) if texts else "") + refused


def _ledger_table(booked: Explanation, sample: int) -> str:
    ledger = booked.ledger
    assert ledger is not None
    causes, layers = list(ledger.absorbed), ledger.by_layer()
    branches = list(dict.fromkeys(name for layer in layers for name in layer.branches))

    def at(tensor: Tensor | None) -> str:
        return "" if tensor is None else shown(float(tensor.expand_as(ledger.seed)[0, sample]), signed=True)

    rows = [
        [
            layer.name,
            at(layer.arriving),
            *(at(layer.branches.get(name)) for name in branches),
            *(at(layer.absorbed.get(cause)) for cause in causes),
        ]
        for layer in layers
    ]
    rows.append(["frontier", at(ledger.frontier), *[""] * (len(branches) + len(causes))])
    head = [*(f"through {name}" for name in branches), *(f"absorbed: {cause}" for cause in causes)]
    return _table(["layer", "arrives", *head], rows)


def _timings(surveys: Sequence[Survey]) -> str:
    """Every method's seconds, over all batches."""
    rows = [["forward pass", "", _milliseconds(sum(s.forward_seconds for s in surveys)), "", ""]]
    for index, one in enumerate(surveys[0].findings):
        if one.explanation is None:
            continue
        found = [survey.findings[index] for survey in surveys]
        method = METHODS.get(one.method)
        rows.append(
            [
                one.method,
                _milliseconds(sum(f.compile_seconds for f in found)),
                _milliseconds(sum(f.seconds for f in found)),
                one.explanation.composite,
                "" if method is None else f"{method.summary} ({method.source})",
            ]
        )
    samples = sum(survey.batch for survey in surveys)
    return (
        f'<p class="facts">Milliseconds for {samples} input{"s" if samples > 1 else ""}, taken once: the first call of'
        " each method, and with the first method the model's capture.</p>"
    ) + _table(["method", "compile, ms", "explain, ms", "composite", "what it says"], rows, (1, 2))


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f}" if seconds >= 0.01 else f"{1000 * seconds:.1f}"


def _refusals(surveys: Sequence[Survey]) -> str:
    """Methods that the model does not support, by reason."""
    reasons: dict[str, list[str]] = {}
    for survey in surveys:
        for reason, names in survey.refusals.items():
            known = reasons.setdefault(reason, [])
            known += [name for name in names if name not in known]
    if not reasons:
        return "<p>Every method supports this model.</p>"
    listed = "".join(
        f"<li>{escape(', '.join(names))}<small>{escape(textwrap.shorten(reason, 600))}</small></li>"
        for reason, names in reasons.items()
    )
    return f'<h3>Methods that do not apply</h3><ul class="refused">{listed}</ul>'


def _versions() -> str:
    parts = [
        f"<details><summary>{escape(title)}</summary>{_table(None, [[n, t] for n, t in section.items()])}</details>"
        for title, section in installation().items()
    ]
    return "".join(parts).replace("<details>", "<details open>", 1)


def _table(head: Sequence[str] | None, rows: Sequence[Sequence[str]], numbers: Sequence[int] | None = None) -> str:
    """A table; `numbers` are the columns that are aligned to the right, by default all but the first."""
    right = set(range(1, len(rows[0])) if numbers is None and head else numbers or ())

    def row(cells: Sequence[str], tag: str) -> str:
        kinds = ("" if i not in right else ' class="number"' for i in range(len(cells)))
        written = (f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))
        return f"<tr>{''.join(written)}</tr>"

    top = "" if head is None else f"<thead>{row(head, 'th')}</thead>"
    body = "".join(row(cells, "td") for cells in rows)
    return f'<div class="scroll"><table class="plain">{top}<tbody>{body}</tbody></table></div>'
