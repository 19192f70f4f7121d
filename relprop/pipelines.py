"""Hugging Face pipelines that also say why: label, score and relevance in one object.

`relprop.pipeline("text-classification", model=name)("A film that is never dull.")` has `.label`, `.score`, `.tokens`
and `.relevance` of each label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from relprop.compat.engines import Engines, needed
from relprop.composites import Composite, find_composite
from relprop.errors import OptionError, unknown_name
from relprop.explanation import Explanation
from relprop.methods import find_method

if TYPE_CHECKING:
    from relprop.pictures.view import View

__all__ = ["Explained", "Pipeline", "pipeline"]

_ENTRIES = ("label", "score", "relevance", "tokens", "relevances")


@dataclass(frozen=True, eq=False)
class Explained(Mapping[str, Any]):
    """One label of one input, and why.

    `result["label"]` reads as in a pipeline of transformers; as a mapping it has all but the last two attributes.

    Attributes:
        label, score: as transformers has them.
        relevance: of the text's tokens [N], padding left out, or of the image's pixels [H, W], at the size that the
            model sees.
        tokens: the text, token by token; of the label's sentence for zero-shot classification.
        relevances: the same by the model's inputs, where several are explained.
        explanation: of the whole batch that this input was in.
        sample: its place in that batch.
    """

    label: str
    score: float
    relevance: Tensor
    tokens: tuple[str, ...] = ()
    relevances: Mapping[str, Tensor] = field(default_factory=dict)
    explanation: Explanation | None = field(default=None, repr=False)
    sample: int = 0

    def view(self, **options: Any) -> View:
        """What `show` and `save` show: the image with its heat map, the text in colours, or both.

        Args:
            options: scale, signed, side and heading, as `Explanation.view` takes them.
        """
        from relprop.pictures.explanations import explained_view

        return explained_view(self, **options)

    def show(self, **options: Any) -> None:
        """Show `view`: as the output of a notebook, in the terminal (texts), or in the system's viewer (pictures)."""
        self.view(**options).show()

    def html(self, *, theme: str = "auto", **options: Any) -> str:
        """`view` as a fragment of HTML that stands alone. theme: "auto", "light" or "dark"."""
        return self.view(**options).html(theme)

    def save(self, path: str | Path, *, theme: str = "auto", **options: Any) -> Path:
        """Write `view` as a picture (.png, .jpg, .webp) or a page (.html).

        Raises:
            OptionError: another suffix. OutputError: it cannot be written.
        """
        return self.view(**options).save(path, theme)

    def _repr_html_(self) -> str | None:
        return self.view()._repr_html_()

    __eq__, __hash__ = object.__eq__, object.__hash__  # tensors have no one truth value

    def __getitem__(self, name: str) -> Any:
        if name not in _ENTRIES:
            raise unknown_name("entry", name, _ENTRIES)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(_ENTRIES)

    def __len__(self) -> int:
        return len(_ENTRIES)


def pipeline(
    task: str,
    model: Any = None,
    *,
    method: str | None = None,
    composite: str | Composite | None = None,
    method_options: Mapping[str, Any] | None = None,
    backend: str = "auto",
    precision: str = "highest",
    **kwargs: Any,
) -> Pipeline:
    """A pipeline of transformers whose results are explained.

    Args:
        task: "text-classification" ("sentiment-analysis"), "image-classification" or
            "zero-shot-image-classification".
        model: a name or a model, as `transformers.pipeline` takes it.
        method: "transformer_attribution" by default; "attnlrp" for zero-shot classification, whose model has two
            towers.
        composite, method_options, backend, precision: as `relprop.compile` takes them.
        kwargs: everything else is for `transformers.pipeline`: tokenizer, image_processor, device, ...
    Raises:
        UnknownNameError: the task, method or composite. OptionError: `method_options`. MissingDependencyError:
            transformers is not installed.

    Example, with a small model of random weights:
        >>> import transformers
        >>> sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
        >>> config = transformers.ViTConfig(image_size=32, patch_size=8, **sizes)
        >>> processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
        >>> model = transformers.ViTForImageClassification(config)
        >>> classifier = pipeline("image-classification", model, image_processor=processor)
        >>> from PIL import Image
        >>> why = classifier(Image.new("RGB", (40, 50)), top_k=1)[0]
        >>> why.label in ("LABEL_0", "LABEL_1"), why.relevance.shape
        (True, torch.Size([32, 32]))
    """
    if not isinstance(task, str) or task not in _TASKS:
        raise unknown_name("task", task, _TASKS)
    kind, usual = _TASKS[task]
    chosen = find_method(usual if method is None else method)
    chosen.make_readout(method_options)
    find_composite(chosen.composite if composite is None else composite)
    inner = needed("transformers", by="relprop.pipeline").pipeline(task, model=model, **kwargs)
    engines = Engines(inner.model.eval(), backend=backend, precision=precision)
    return kind(inner, engines, chosen.name, composite, method_options)


class Pipeline:
    """What the pipelines share; call one as its counterpart in transformers.

    Attributes:
        inner: the pipeline of transformers that reads inputs and names labels.
    """

    def __init__(
        self,
        inner: Any,
        engines: Engines,
        method: str,
        composite: str | Composite | None,
        options: Mapping[str, Any] | None,
    ) -> None:
        self.inner, self.model = inner, inner.model
        self.method, self.composite, self.options = method, composite, options
        self._engines = engines

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers."""
        raise NotImplementedError

    def _explain(self, inputs: Mapping[str, Any], target: Any, output: str | None = None) -> Explanation:
        given = {name: value.to(self.model.device) for name, value in inputs.items()}
        engine = self._engines(
            (), given, method=self.method, composite=self.composite, options=self.options, output=output
        )
        reader = getattr(self.inner, "image_processor", None)
        mean, std = (getattr(reader, name, None) for name in ("image_mean", "image_std"))
        return engine(**given, target=target).annotated(
            labels=getattr(self.model.config, "id2label", None),
            tokens=getattr(self.inner, "tokenizer", None),
            normalisation=(mean, std) if mean and std and getattr(reader, "do_normalize", True) else None,
        )

    def _best(self, inputs: Mapping[str, Any], count: int) -> Tensor | None:
        """The classes with the largest outputs, where more than one is asked for. [B, T]"""
        if count == 1:
            return None
        with torch.no_grad():
            logits = self.model(**{name: value.to(self.model.device) for name, value in inputs.items()}).logits
        return logits.topk(count, -1).indices

    def _settings(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What goes to the reading of inputs and to the naming of labels, this call's before the pipeline's own."""
        reading, _, naming = self.inner._sanitize_parameters(**given)
        return {**self.inner._preprocess_params, **reading}, {**self.inner._postprocess_params, **naming}

    def _batches(self, inputs: Sequence[Any], batch_size: int | None) -> Iterator[Sequence[Any]]:
        """Inputs that are explained together: all of them, where neither the call nor the pipeline says how many."""
        asked = self.inner._batch_size if batch_size is None else batch_size
        size = len(inputs) if asked is None else asked
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise OptionError(f"batch_size: expected None or a positive int, got {size!r}")
        return (inputs[start : start + size] for start in range(0, len(inputs), size))

    def _counted(self, top_k: int | None) -> int:
        labels = int(self.model.config.num_labels)
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
            raise OptionError(f"top_k: expected None or a positive int, got {top_k!r}")
        return labels if top_k is None else min(top_k, labels)

    def _labelled(
        self, found: Explanation, read: Callable[[int, int | None], tuple[Tensor, tuple[str, ...]]], **kwargs: Any
    ) -> Iterator[list[Explained]]:
        """Per sample its labels; read(sample, nth target) gives relevance and tokens."""
        assert found.target is not None
        several = found.target.ndim == 2
        for sample, logits in enumerate(found.logits.detach().cpu()):
            count = found.target.shape[1] if several else 1
            named = self.inner.postprocess({"logits": logits[None]}, top_k=count, **kwargs)
            yield [
                Explained(
                    str(one["label"]),
                    float(one["score"]),
                    *read(sample, nth if several else None),
                    explanation=found,
                    sample=sample,
                )
                for nth, one in enumerate(named)
            ]


class TextClassification(Pipeline):
    """`pipeline("text-classification")`."""

    def __call__(self, inputs: Any, *, batch_size: int | None = None, **kwargs: Any) -> Any:
        """Explained labels.

        Args:
            inputs: a text, a pair {"text": ..., "text_pair": ...}, or several of one kind.
            batch_size: how many are explained together; None for all.
            kwargs: top_k (how many labels of each, None for all), function_to_apply ("sigmoid", "softmax", "none"),
                and what is for the tokenizer, as transformers takes them.
        Returns:
            for one text a list of its best label, for one pair its best label, for several the best label of each;
            with `top_k` a list of labels in place of a label, for one text just that list.
        Raises:
            OptionError: inputs that are none of these.
        """
        texts, pairs = _read_texts(inputs)
        reading, naming = self._settings(kwargs)
        several = "top_k" in naming
        count = self._counted(naming.pop("top_k", 1))
        results: list[Any] = []
        for places in self._batches(range(len(texts)), batch_size):
            read = [texts[i] for i in places], pairs and [pairs[i] for i in places]
            for labels in self._explained(*read, count, reading, {**naming, "_legacy": False}):
                results.append(labels if several else labels[0])
        if isinstance(inputs, str) and "top_k" not in kwargs:
            return results
        return results[0] if isinstance(inputs, (str, Mapping)) else results

    def _explained(
        self, texts: list[str], pairs: list[str] | None, count: int, reading: dict[str, Any], naming: dict[str, Any]
    ) -> Iterator[list[Explained]]:
        options = {"padding": len(texts) > 1, **reading, "return_tensors": "pt"}
        given = dict(self.inner.tokenizer(texts, pairs, **options))
        found = self._explain(given, self._best(given, count))
        ids = given["input_ids"]
        mask = given.get("attention_mask", torch.ones_like(ids)).bool()

        def read(sample: int, nth: int | None) -> tuple[Tensor, tuple[str, ...]]:
            kept = mask[sample]
            tokens = tuple(self.inner.tokenizer.convert_ids_to_tokens(ids[sample][kept].tolist()))
            row = found.relevance[sample] if nth is None else found.relevance[sample, nth]
            return row.cpu()[kept], tokens

        return self._labelled(found, read, **naming)


def _read_texts(inputs: Any) -> tuple[list[str], list[str] | None]:
    """Texts, and for pairs what each of them goes with."""
    given = [inputs] if isinstance(inputs, (str, Mapping)) else list(inputs) if isinstance(inputs, Iterable) else []
    parts = [one if isinstance(one, Mapping) else {"text": one} for one in given]
    kinds = {frozenset(one) for one in parts}
    words = all(isinstance(text, str) for one in parts for text in one.values())
    if not words or kinds not in ({frozenset(["text"])}, {frozenset(["text", "text_pair"])}):
        raise OptionError(
            f"inputs: expected a text or several, or pairs {{'text': ..., 'text_pair': ...}}, got {inputs!r}"
        )
    pairs = [one["text_pair"] for one in parts] if "text_pair" in parts[0] else None
    return [one["text"] for one in parts], pairs


class ImageClassification(Pipeline):
    """`pipeline("image-classification")`."""

    def __call__(self, inputs: Any, *, batch_size: int | None = None, **kwargs: Any) -> list[Any]:
        """Explained labels.

        Args:
            inputs: an image, or several: PIL images, files, addresses, as in transformers.
            batch_size: how many are explained together; None for all.
            kwargs: top_k (how many labels of each, 5 if not given, None for all), function_to_apply and timeout, as
                transformers takes them.
        Returns:
            for one image its labels, for several a list of labels of each.
        """
        alone = not isinstance(inputs, (list, tuple))
        images = [inputs] if alone else list(inputs)
        if not images:
            raise OptionError("inputs: expected an image or several, got none")
        asked = kwargs.pop("top_k", self.inner._postprocess_params.get("top_k", 5))
        reading, naming = self._settings(kwargs)
        naming.pop("top_k", None)
        results: list[list[Explained]] = []
        for some in self._batches(images, batch_size):
            pixels = torch.cat([self.inner.preprocess(image, **reading)["pixel_values"] for image in some])
            results += self._explained(pixels, self._counted(asked), naming)
        return results[0] if alone else results

    def _explained(self, pixels: Tensor, count: int, naming: dict[str, Any]) -> Iterator[list[Explained]]:
        found = self._explain({"pixel_values": pixels}, self._best({"pixel_values": pixels}, count))
        maps = found.image_map().cpu()
        return self._labelled(found, lambda i, nth: (maps[i] if nth is None else maps[i, nth], ()), **naming)


class ZeroShotImageClassification(Pipeline):
    """`pipeline("zero-shot-image-classification")`."""

    def __call__(self, image: Any, candidate_labels: Sequence[str], **kwargs: Any) -> list[Any]:
        """Explained labels, best first: why the image goes with each of them.

        Args:
            image: an image, or several, as in transformers.
            candidate_labels: what it might show.
            kwargs: hypothesis_template (the sentence about it that the model reads), timeout and tokenizer_kwargs, as
                transformers takes them.
        Returns:
            for one image its labels, for several a list of labels of each.
        Raises:
            OptionError: no labels, or other keywords. One image and its labels are one batch: there is no batch_size.
        """
        known = ("hypothesis_template", "timeout", "tokenizer_kwargs")
        unknown = ", ".join(name for name in kwargs if name not in known)
        if unknown:
            raise OptionError(f"zero-shot-image-classification: expected {', '.join(known)}, got {unknown}")
        if not isinstance(candidate_labels, Sequence) or isinstance(candidate_labels, str) or not candidate_labels:
            raise OptionError(f"candidate_labels: expected a list of labels, got {candidate_labels!r}")
        reading = {**self.inner._preprocess_params, **kwargs, "candidate_labels": list(candidate_labels)}
        if isinstance(image, (list, tuple)):
            return [self._one(one, reading) for one in image]
        return self._one(image, reading)

    def _one(self, image: Any, reading: dict[str, Any]) -> list[Explained]:
        labels, read = reading["candidate_labels"], self.inner.preprocess(image, **reading)
        text = dict(read["text_inputs"][0])
        pixels = read["pixel_values"].expand(len(labels), -1, -1, -1).contiguous()
        found = self._explain({**text, "pixel_values": pixels}, None, "logits_per_image")
        logits = found.logits[0].detach().float().cpu()
        sigmoid = "siglip" in self.model.config.model_type
        scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
        mask = text.get("attention_mask", torch.ones_like(text["input_ids"])).bool()
        maps = found.image_map().cpu()
        results = []
        for i in scores.argsort(descending=True, stable=True).tolist():
            parts = {name: part[i].cpu() for name, part in found.relevances.items()} | {"pixel_values": maps[i]}
            if "input_ids" in parts:
                parts["input_ids"] = parts["input_ids"][mask[i]]
            tokens = tuple(self.inner.tokenizer.convert_ids_to_tokens(text["input_ids"][i][mask[i]].tolist()))
            results.append(Explained(labels[i], float(scores[i]), parts["pixel_values"], tokens, parts, found, i))
        return results


_TASKS: dict[str, tuple[type[Pipeline], str]] = {
    "text-classification": (TextClassification, "transformer_attribution"),
    "sentiment-analysis": (TextClassification, "transformer_attribution"),
    "image-classification": (ImageClassification, "transformer_attribution"),
    "zero-shot-image-classification": (ZeroShotImageClassification, "attnlrp"),
}
