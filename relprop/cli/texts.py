"""From `--model` to a text classifier of transformers that can be explained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from relprop.cli.models import names_a_place, place_of, probabilities_of
from relprop.compat.engines import needed
from relprop.errors import OptionError, WeightsError

__all__ = ["TextSubject", "load_text_subject"]

_LONGEST = 100_000  # tokens: a tokenizer without a limit says 1e30


@dataclass(frozen=True)
class TextSubject:
    """A text classifier to explain.

    Attributes:
        name: for people.
        model: in evaluation mode, from a tokenizer's tensors to an output with logits [B, C].
        tokenizer: of transformers.
        labels: per class.
        multi_label: logits are independent (sigmoid) rather than exclusive (softmax).
        regression: outputs are the numbers that were learnt, no logits of probabilities.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    labels: tuple[str, ...]
    multi_label: bool = False
    regression: bool = False

    def prepare(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The model's inputs for a batch, padded to its longest and cut at what the model reads. Each [B, N]"""
        limit = self.tokenizer.model_max_length
        cut = {"truncation": True, "max_length": limit} if limit < _LONGEST else {}
        padding = len(texts) > 1
        if padding and self.tokenizer.pad_token is None:
            raise OptionError(
                f"model {self.name}: expected a tokenizer that can pad for several texts, got one without"
            )
        found = self.tokenizer(list(texts), return_tensors="pt", padding=padding, **cut)
        place = next(self.model.parameters()).device
        return {name: tensor.to(place) for name, tensor in found.items()}

    def probabilities(self, inputs: dict[str, Tensor]) -> Tensor:
        """Probability of every class, or what a regression says. [B, C], float64 on the CPU"""
        with torch.no_grad():
            logits = self.model(**inputs).logits
        return logits.double().cpu() if self.regression else probabilities_of(logits, self.multi_label)


def load_text_subject(model: str, device: str = "cpu") -> TextSubject:
    """A classifier and its tokenizer, by the name of a repository or a folder with both.

    Raises:
        MissingDependencyError: transformers is not installed. OptionError: a file, or a folder that is not there.
            WeightsError: neither is to be had, or weights without a classifier. DeviceError
    """
    place = place_of(device)
    if names_a_place(model) and not Path(model).is_dir():
        raise OptionError(f"model {model}: expected a name or a folder of transformers with a tokenizer, got no folder")
    transformers = needed("transformers", by="relprop explain --text")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        found, report = transformers.AutoModelForSequenceClassification.from_pretrained(model, output_loading_info=True)
    except Exception as error:  # whatever transformers, the hub's client or the network have to say
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(
            f"model {model}: expected a text classifier with its tokenizer, from the hub, its local cache or a folder,"
            f" got {type(error).__name__}: {first}"
        ) from error
    if report["missing_keys"]:
        raise WeightsError(
            f"model {model}: expected the weights of a text classifier, got none for"
            f" {', '.join(sorted(report['missing_keys']))}"
        )
    config = found.config
    return TextSubject(
        model,
        found.eval().to(place),
        tokenizer,
        tuple(str(config.id2label[i]) for i in range(config.num_labels)),
        config.problem_type == "multi_label_classification",
        config.problem_type == "regression",
    )
