"""`relprop explain`: images in, overlays out, batch by batch."""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from relprop.cli.models import Subject, load_subject
from relprop.cli.output import Progress, conclude, say
from relprop.cli.targets import LIKELY, Selection, parse_target, short_label
from relprop.composites import find_composite
from relprop.engine import explain
from relprop.errors import ImageError, NonFiniteError, OptionError
from relprop.explanation import Explanation
from relprop.images import find_images, load_image, prepare_output
from relprop.methods import Method, find_method
from relprop.pictures import enlarge, overlay, panel, require, save_png

__all__ = ["batches", "collect", "explain_images", "image_subject", "output_names", "parse_options", "stack_targets"]

OUTPUT = Path("relprop-output")  # where no folder is named
_SIDE = 320  # pixels of a picture's longer side, at least
_LONGEST = 80  # characters of an image's name that its outputs keep


def image_subject(options: argparse.Namespace) -> tuple[Subject, Selection]:
    """The image model that the options name, and which of its classes are explained.

    Raises:
        RelpropError: model or target.
    """
    subject = load_subject(
        options.model,
        arch=options.arch,
        weights=options.weights,
        image_size=options.image_size,
        device=options.device,
    )
    return subject, parse_target(options.target, subject.labels, multi_label=subject.multi_label)


def explain_images(options: argparse.Namespace) -> int:
    """Explain every image that the options name; returns 0, or 1 where some could not be explained.

    Raises:
        RelpropError: nothing more can be explained (model, method, target, output folder).
    """
    method = find_method(options.method)
    method_options = parse_options(options.option)
    method.make_readout(method_options)
    if options.composite is not None:
        find_composite(options.composite)
    require("matplotlib")
    out = prepare_output(options.out or OUTPUT)
    paths, failed = collect(options.images, out)
    if not paths:
        return conclude(failed, failed)
    subject, selection = image_subject(options)
    if not method.uses_target:
        if options.target is not None:
            say(f"note: {method.name} is the same for every class; --target is not used")
        selection = parse_target("top:1", subject.labels)
    settings: dict[str, Any] = {
        "method": method.name,
        "method_options": method_options,
        "composite": options.composite,
        "backend": options.backend,
        "check": options.check,
    }
    likely = options.target is None and subject.multi_label and method.uses_target
    run = _Run(subject, method, selection, settings, out, likely)
    names = dict(zip(paths, output_names(paths), strict=True))
    with require("tqdm").tqdm(total=len(paths), unit="image", disable=None, leave=False, file=sys.stderr) as bar:
        run.progress.bar = bar
        for batch in batches(paths, subject, options.batch_size, run.progress):
            run.explain_batch([(path, names[path], prepared) for path, prepared in batch])
    return conclude(failed + run.progress.failed, len(paths) + failed)


@dataclass
class _Run:
    """What stays the same from batch to batch."""

    subject: Subject
    method: Method
    selection: Selection
    settings: dict[str, Any]
    out: Path
    likely: bool  # whether the selection is every class with p > LIKELY
    progress: Progress = field(default_factory=Progress)

    def explain_batch(self, batch: Sequence[tuple[Path, str, Tensor]]) -> None:
        """Explain images (path, name of outputs, input [3, H, W]) with one call of the engine."""
        place = next(self.subject.model.parameters()).device
        inputs = torch.stack([prepared for _, _, prepared in batch]).to(place)
        probabilities = self.subject.probabilities(inputs)
        chosen = self.selection(probabilities)
        explanation = explain(self.subject.model, inputs, target=stack_targets(chosen), **self.settings)
        maps = explanation.image_map()
        for sample, (path, name, prepared) in enumerate(batch):
            if self.likely and float(probabilities[sample].max()) <= LIKELY:
                self.progress.say(f"note: {path}: no class with p > {LIKELY}, explaining the likeliest")
            picture = enlarge(self.subject.picture(prepared), _SIDE)
            try:
                for rank, index in enumerate(chosen[sample]):
                    stability = _stability(explanation, sample, rank)
                    heat, probability = maps[sample, rank], float(probabilities[sample, index])
                    self.write(path, name, picture, heat, index, probability, stability)
            except NonFiniteError as error:
                self.progress.fail(path, error)
            self.progress.done()

    def write(
        self, path: Path, name: str, picture: Image.Image, heat: Tensor, index: int, probability: float, stability: str
    ) -> None:
        """One overlay and its line."""
        if self.method.uses_target:
            label, score = short_label(self.subject.labels, index), f"p={probability:.4f}"
            title, slug = f"{label}   {score}", _slug(str(index), label)
        else:
            label, score, title, slug = "any class", "-", f"{self.method.name}, any class", "any_class"
        file = self.out / f"{name}.{slug}.png"
        warning = f"\n{stability}" if stability.startswith("unstable") else ""
        painted = overlay(picture, heat, signed=self.method.output == "input")
        save_png(panel([(path.name, picture), (title + warning, painted)]), file)
        self.progress.print("\t".join([str(path), label, score, str(file), *([stability] if stability else [])]))


def _stability(explanation: Explanation, sample: int, rank: int) -> str:
    if explanation.disagreement is None or explanation.trustworthy is None:
        return ""
    verdict = "stable" if bool(explanation.trustworthy[sample, rank]) else "unstable"
    return f"{verdict}, disagreement {float(explanation.disagreement[sample, rank]):.1e}"


def stack_targets(chosen: Sequence[Sequence[int]]) -> Tensor:
    """Classes per sample as one tensor; a sample with fewer repeats its first. [B, T]"""
    most = max(len(classes) for classes in chosen)
    return torch.tensor([[*classes, *[classes[0]] * (most - len(classes))] for classes in chosen])


def parse_options(texts: Iterable[str]) -> dict[str, Any]:
    """Options of a method from NAME=VALUE: true and false, whole numbers, numbers, other text as it is.

    Raises:
        OptionError: no "=".
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise OptionError(f"option: expected NAME=VALUE, got {text!r}")
        found[name] = _value(value)
    return found


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def output_names(paths: Sequence[Path]) -> list[str]:
    """A name per image for its outputs: its stem; where several have the same, with its suffix, then its folders."""
    names = [path.stem[:_LONGEST] for path in paths]
    depth = 0
    while depth <= max(len(path.parts) for path in paths):
        taken = Counter(name.casefold() for name in names)
        if len(taken) == len(names):
            return names
        for i, path in enumerate(paths):
            if taken[names[i].casefold()] > 1:
                folders = path.absolute().parts[-1 - depth : -1] if depth else ()
                names[i] = "_".join((*folders, path.name))[-2 * _LONGEST :]
        depth += 1
    return [f"{name}_{i}" for i, name in enumerate(names)]


def _slug(number: str, label: str) -> str:
    words = re.sub(r"[^\w]+", "_", label.casefold()).strip("_")[:_LONGEST]
    return number if words in ("", number) else f"{number}_{words}"


def collect(arguments: Sequence[str], skip: Path | None = None) -> tuple[list[Path], int]:
    """Images of all arguments, and how many arguments had none. skip: a folder as `find_images` takes it."""
    found: list[str | Path] = []
    failed = 0
    for argument in arguments:
        try:
            found += find_images([argument], skip=skip)
        except ImageError as error:
            say(f"error: {error}")
            failed += 1
    return find_images(found), failed


def batches(
    paths: Sequence[Path], subject: Subject, size: int, progress: Progress
) -> Iterator[list[tuple[Path, Tensor]]]:
    """Images read and prepared, at most `size` at a time; those that cannot be read are reported and left out."""
    batch: list[tuple[Path, Tensor]] = []
    for path in paths:
        try:
            image: Image.Image = load_image(path)
        except ImageError as error:
            progress.fail(path, error)
            progress.done()
            continue
        batch.append((path, subject.prepare(image)))
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
