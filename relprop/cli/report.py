"""`relprop explain --report`: images or texts in, one page out; and texts in the terminal's colours."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from relprop.cli.explain import batches, collect, image_subject, parse_options, stack_targets
from relprop.cli.models import Subject
from relprop.cli.output import Progress, conclude
from relprop.cli.targets import Selection, parse_target, short_label
from relprop.cli.texts import TextSubject, load_text_subject
from relprop.engine import explain
from relprop.errors import OutputError
from relprop.images import prepare_output
from relprop.methods import METHODS, find_method
from relprop.pictures.explanations import passages
from relprop.pictures.figures import require
from relprop.pictures.report import Report
from relprop.pictures.text import text_terminal
from relprop.survey import Survey, survey

__all__ = ["explain_texts", "report_images", "report_texts"]


def report_images(options: argparse.Namespace) -> int:
    """Write one page about all images; returns 0, or 1 where some could not be explained.

    Raises:
        RelpropError: nothing more can be explained (model, method, target, place of the page).
    """
    _prepare(options)
    paths, failed = collect(options.images)
    paths = [path for path in paths if path.resolve() != options.report.resolve()]
    if not paths:
        return conclude(failed, failed)
    subject, selection = image_subject(options)
    report, progress = Report(subject.name), Progress()
    labels = [short_label(subject.labels, index) for index in range(len(subject.labels))]
    with _bar(len(paths)) as bar:
        progress.bar = bar
        for batch in batches(paths, subject, options.batch_size, progress):
            inputs = torch.stack([prepared for _, prepared in batch]).to(next(subject.model.parameters()).device)
            pictures = [subject.picture(prepared) for _, prepared in batch]
            found, scores, chosen = _surveyed(subject, selection, options, bar, inputs)
            found = found.annotated(images=pictures, labels=labels)
            report.add(found, [path.name for path, _ in batch], scores, labels, chosen=chosen)
    if report.empty:
        return conclude(failed + progress.failed, len(paths) + failed)
    print(report.save(options.report))
    return conclude(failed + progress.failed, len(paths) + failed)


def report_texts(options: argparse.Namespace) -> int:
    """Write one page about all texts and return 0.

    Raises:
        RelpropError: as `report_images`.
    """
    _prepare(options)
    subject = load_text_subject(options.model, options.device)
    selection = parse_target(options.target, subject.labels, multi_label=subject.multi_label)
    report = Report(subject.name)
    with _bar(len(options.text)) as bar:
        for start in range(0, len(options.text), options.batch_size):
            texts = options.text[start : start + options.batch_size]
            found, scores, chosen = _surveyed(subject, selection, options, bar, **subject.prepare(texts))
            found = found.annotated(tokens=subject.tokenizer, labels=subject.labels)
            report.add(found, [_short(text) for text in texts], scores, subject.labels, chosen=chosen)
    print(report.save(options.report))
    return 0


def explain_texts(options: argparse.Namespace) -> int:
    """Print every text in the colours of its words' relevance, below its class and probability; returns 0.

    Raises:
        RelpropError: model, method, target.
    """
    method = find_method(options.method)
    method_options = parse_options(options.option)
    method.make_readout(method_options)
    subject = load_text_subject(options.model, options.device)
    selection = parse_target(options.target, subject.labels, multi_label=subject.multi_label)
    for start in range(0, len(options.text), options.batch_size):
        inputs = subject.prepare(options.text[start : start + options.batch_size])
        scores = subject.probabilities(inputs)
        chosen = selection(scores)
        found = explain(
            subject.model,
            **inputs,
            target=stack_targets(chosen),
            method=method.name,
            method_options=method_options,
            composite=options.composite,
            backend=options.backend,
        ).annotated(tokens=subject.tokenizer, labels=subject.labels)
        for sample, classes in enumerate(chosen):
            texts = passages(found, [sample])[: len(classes)]
            for text, index in zip(texts, classes, strict=True):
                said = "score" if subject.regression else "p"
                title = f"{subject.labels[index]}\t{said}={float(scores[sample, index]):.4f}"
                Progress().print(text_terminal([replace(text, title=title)]))
    return 0


def _prepare(options: argparse.Namespace) -> None:
    """Everything that can fail before a model is loaded."""
    find_method(options.method)
    require("matplotlib")
    prepare_output(options.report.parent)
    if options.report.is_dir():
        raise OutputError(f"{options.report}: expected the name of a page to write, got a folder")


def _bar(inputs: int) -> Any:
    return require("tqdm").tqdm(total=inputs * len(METHODS), unit="map", disable=None, leave=False, file=sys.stderr)


def _surveyed(
    subject: Subject | TextSubject,
    selection: Selection,
    options: argparse.Namespace,
    bar: Any,
    *args: Tensor,
    **kwargs: Tensor,
) -> tuple[Survey, Tensor, list[list[int]]]:
    """A batch by every method, its probabilities, and the classes of each sample that are explained."""
    scores = subject.probabilities(args[0] if args else kwargs)  # type: ignore[arg-type]
    chosen = selection(scores)
    said: Callable[[str], None] = lambda method: bar.update(len(chosen))  # noqa: E731
    found = survey(
        subject.model,
        *args,
        target=stack_targets(chosen),
        ledger=options.method,
        settings={"backend": options.backend},
        said=said,
        **kwargs,
    )
    return found, scores, chosen


def _short(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= 80 else words[:79] + "…"
