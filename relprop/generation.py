"""Which tokens made a language model write each of its tokens: one row of relevance per generated token.

All targets of a chunk share one forward pass. A chunk sees the sequence up to its last target alone, and its logits are
computed where they are asked for, if the model's forward takes `logits_to_keep`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from relprop import memory
from relprop.composites import Composite
from relprop.engine import Engine, compile
from relprop.errors import DTypeError, OptionError, ShapeError, TargetError, UnsupportedTopologyError
from relprop.explanation import Explanation
from relprop.targets import contrast

if TYPE_CHECKING:
    from PIL import Image

    from relprop.pictures.view import View

WINDOW = 16  # targets that share a pass at most, where their number is chosen by memory


@dataclass(frozen=True)
class Generation:
    """Relevance of every earlier token for every generated one; zero for the token itself and all after it.

    Attributes:
        relevance: of the prompt's and the generated tokens; for an encoder-decoder of the decoder's. [B, G, P + G]
        source: of the encoder's tokens, None for a decoder alone. [B, G, S]
        ids: prompt and generated tokens, for an encoder-decoder those of the decoder. [B, P + G]
        logits: of the generated tokens, which is what is explained, or their differences to those of `against`. [B, G]
        written: whether a token was generated, not filled in after the sample's end; rows of others are 0. [B, G]
        targets_at_a_time: targets that shared a pass.
        memory: bytes that a pass was predicted to take beside the weights; None where nothing was predicted.
        source_ids: the encoder's tokens, None for a decoder alone. [B, S]
        others: of inputs beside those tokens, such as the pixels of images, by name. Each [B, G, ...]
    """

    relevance: Tensor
    source: Tensor | None
    ids: Tensor
    logits: Tensor
    written: Tensor
    targets_at_a_time: int
    memory: int | None = None
    source_ids: Tensor | None = None
    others: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def prompt_length(self) -> int:
        """Tokens before the first generated one."""
        return self.ids.shape[1] - self.relevance.shape[1]

    def view(
        self,
        tokens: Any = None,
        *,
        sample: int = 0,
        form: str = "matrix",
        source: bool | None = None,
        source_tokens: Any = None,
    ) -> View:
        """What `show` and `save` show of one sample.

        Args:
            tokens: a tokenizer of transformers, or a list of strings for each sample; the ids by default.
            sample: which of the batch.
            form: "matrix", a row for each generated token and a column for each that it was explained by, or "text",
                the text once for each generated token.
            source: the encoder's tokens as columns; by default where there are any.
            source_tokens: the same as `tokens` for these; by default `tokens` where that is a tokenizer.
        Raises:
            OptionError: sample, form or source. ShapeError: lists of strings that do not fit.
        """
        from relprop.pictures.generation import generation_view

        return generation_view(self, tokens, sample, form, source, source_tokens)

    def picture(self, tokens: Any = None, **options: Any) -> Image.Image:
        """The matrix of `view` as a picture."""
        return self.view(tokens, **options).image()

    def html(self, tokens: Any = None, *, theme: str = "auto", **options: Any) -> str:
        """`view` as a fragment of HTML that stands alone. theme: "auto", "light" or "dark"."""
        return self.view(tokens, **options).html(theme)

    def show(self, tokens: Any = None, **options: Any) -> None:
        """Show `view`: as the output of a notebook, in the terminal (texts), or in the system's viewer (pictures)."""
        self.view(tokens, **options).show()

    def save(self, path: str | Path, tokens: Any = None, *, theme: str = "auto", **options: Any) -> Path:
        """Write `view` as a picture (.png, .jpg, .webp) or a page (.html).

        Raises:
            OptionError: another suffix. OutputError: it cannot be written.
        """
        return self.view(tokens, **options).save(path, theme)

    def _repr_html_(self) -> str | None:
        return self.view()._repr_html_()


def explain_generation(
    model: nn.Module,
    input_ids: Tensor,
    generated_ids: Any,
    *,
    attention_mask: Tensor | None = None,
    against: int | Tensor | None = None,
    method: str = "attnlrp",
    composite: str | Composite | None = None,
    method_options: Mapping[str, Any] | None = None,
    backend: str = "auto",
    precision: str = "highest",
    targets_at_a_time: int | str = "auto",
    memory_limit: int | None = None,
    **kwargs: Any,
) -> Generation:
    """Explain every token that a decoder or an encoder-decoder of transformers generated.

    Args:
        model: in evaluation mode; its forward takes `input_ids`, and `decoder_input_ids` if it has an encoder.
        input_ids: the prompt, or the encoder's tokens. [B, P] or [B, S]
        generated_ids: what `model.generate` returned. [B, P + G], for an encoder-decoder [B, 1 + G]
        attention_mask: of `input_ids`, 0 for padding, which decoders have on the left. [B, P] or [B, S]
        against: explain why each token was written and not this one, by the difference of their logits: a token id, or
            one for each generated token. [B, G]
        method, composite, method_options, backend, precision: as `relprop.compile` takes them.
        targets_at_a_time: how many targets share a pass; "auto" takes as many as fit into the memory, up to 16.
        memory_limit: bytes that a pass may take beside the weights; by default most of the free memory.
        kwargs: other arguments of the model, as `generate` was given them.
    Raises:
        ShapeError: the generated tokens do not start with the prompt, or the mask is not one of the prompt, padded on
            the left. DTypeError: tokens or mask that are no integers. OptionError: targets_at_a_time, memory_limit.
            TargetError: `against` is not such ids.

    Example, with a small decoder of random weights:
        >>> import transformers
        >>> ends = dict(bos_token_id=1, eos_token_id=2)
        >>> config = transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, **ends)
        >>> model = transformers.GPT2LMHeadModel(config).eval()
        >>> prompt = torch.tensor([[1, 15, 7, 33]])
        >>> written = model.generate(prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
        >>> explain_generation(model, prompt, written).relevance.shape  # [B, generated, prompt + generated]
        torch.Size([1, 3, 7])
    """
    ids = getattr(generated_ids, "sequences", generated_ids)
    writing = _Writing(model, input_ids, ids, attention_mask, kwargs, against)
    if targets_at_a_time != "auto" and not _is_positive(targets_at_a_time):
        raise OptionError(f"targets_at_a_time: expected 'auto' or a positive int, got {targets_at_a_time!r}")
    if memory_limit is not None and not _is_positive(memory_limit):
        raise OptionError(f"memory_limit: expected None or a positive int, bytes, got {memory_limit!r}")
    most = WINDOW if targets_at_a_time == "auto" else int(targets_at_a_time)

    def engine(window: int) -> Engine:
        return compile(
            model,
            (),
            writing.inputs(writing.count, window),
            method=method,
            composite=composite,
            method_options=method_options,
            backend=backend,
            precision=precision,
        )

    window = min(most, writing.count)
    chosen, predicted = engine(window), None
    if targets_at_a_time == "auto" and writing.count >= max(memory.PROBES):
        forecast = memory.measure(lambda count: writing.last(chosen, window, count))
        budget = int(memory.SHARE * memory.available(ids.device))
        if memory_limit is not None:
            budget = memory_limit - chosen.derived_memory
        fitting = memory.largest_batch(forecast.peak, budget, range(1, window + 1))
        predicted = forecast.peak(fitting) + chosen.derived_memory
        if fitting < window:
            window, chosen = fitting, engine(fitting)
    return writing.gathered(chosen, window, predicted)


def _is_positive(found: Any) -> bool:
    return isinstance(found, int) and not isinstance(found, bool) and found > 0


class _Writing:
    """A model with what it wrote.

    Args:
        given: `input_ids`. [B, P] or [B, S]
        ids: all that the decoder reads and writes. [B, P + G]
    """

    def __init__(
        self,
        model: nn.Module,
        given: Tensor,
        ids: Tensor,
        mask: Tensor | None,
        others: Mapping[str, Any],
        against: int | Tensor | None = None,
    ) -> None:
        self.takes = inspect.signature(model.forward).parameters
        self.encodes = "decoder_input_ids" in self.takes
        self.given, self.ids, self.mask, self.others = given, ids, mask, others
        self._check()
        self.prompt = 1 if self.encodes else given.shape[1]
        self.count = ids.shape[1] - self.prompt
        if self.count < 1 or not (self.encodes or torch.equal(ids[:, : self.prompt], given)):
            raise ShapeError(
                f"generated_ids: expected the prompt's {self.prompt} tokens and at least one generated after them, got"
                f" {list(ids.shape)} that start otherwise"
            )
        self.ends = self._ends(model)
        self.against = None if against is None else self._rivals(against)

    def _rivals(self, against: int | Tensor) -> Tensor:
        """A token that was not written for each one that was. [B, G]"""
        shape = [len(self.ids), self.count]
        if isinstance(against, int) and not isinstance(against, bool):
            return torch.full(shape, against)
        if (
            not isinstance(against, Tensor)
            or list(against.shape) != shape
            or against.dtype not in (torch.int64, torch.int32)
        ):
            got = f"{list(against.shape)}, {against.dtype}" if isinstance(against, Tensor) else repr(against)
            raise TargetError(f"against: expected a token id, or a tensor of integers [B, G] = {shape}, got {got}")
        return against.cpu()

    def _check(self) -> None:
        """Raises:
        DTypeError, ShapeError: tokens or mask are none, or not of one batch.
        """
        for name, found in (("input_ids", self.given), ("generated_ids", self.ids), ("attention_mask", self.mask)):
            if not isinstance(found, Tensor):
                if found is None and name == "attention_mask":
                    continue
                raise DTypeError(f"{name}: expected a tensor of integers [B, N], got {type(found).__name__}")
            if found.dtype.is_floating_point or found.dtype.is_complex:
                raise DTypeError(f"{name}: expected integers [B, N], got {found.dtype}")
        given, ids = self.given.shape, self.ids.shape
        if len(given) != 2 or len(ids) != 2 or given[0] != ids[0]:
            many = len(given) == len(ids) == 2 and given[0] > 0 and ids[0] % given[0] == 0
            repeated = f"input_ids.repeat_interleave({ids[0] // given[0]}, 0)" if many else ""
            raise ShapeError(
                f"input_ids and generated_ids: expected shapes [B, N] of one batch, got {list(given)} and {list(ids)}"
                + (f"; for several sequences of a prompt repeat it (and its mask): {repeated}" if many else "")
            )
        if self.mask is None:
            return
        if self.mask.shape != given:
            raise ShapeError(
                f"attention_mask: expected one of input_ids alone, {list(given)}, got {list(self.mask.shape)}; what was"
                " generated is always seen"
            )
        unseen = [] if self.encodes else (self.mask[:, -1] == 0).nonzero().flatten().tolist()
        if unseen:
            raise ShapeError(
                f"attention_mask: expected a prompt padded on the left, got one that ends in padding in sample"
                f" {unseen[0]}; what is generated follows its last token"
            )

    @staticmethod
    def _ends(model: nn.Module) -> list[int]:
        """Ids of tokens that end a text."""
        settings = getattr(model, "generation_config", None) or getattr(model, "config", None)
        found = getattr(settings, "eos_token_id", None)
        return [found] if isinstance(found, int) else list(found or ())

    @property
    def windowed(self) -> bool:
        """Whether the model leaves out logits that nobody asks for."""
        return "logits_to_keep" in self.takes

    @property
    def decoder_entry(self) -> str:
        """The model's name of the tokens that the decoder reads."""
        return "decoder_input_ids" if self.encodes else "input_ids"

    def inputs(self, stop: int, window: int) -> dict[str, Any]:
        """The call in which the model writes generated tokens up to `stop`."""
        read = self.ids[:, : self.prompt + stop - 1]
        found = dict(self.others)
        if self.encodes:
            found |= {"input_ids": self.given, "decoder_input_ids": read}
        else:
            found["input_ids"] = read
        if self.mask is not None:
            found["attention_mask"] = self.mask if self.encodes else self._longer(self.mask, read.shape[1])
        if self.mask is not None and not self.encodes and "position_ids" in self.takes:
            found.setdefault("position_ids", (found["attention_mask"].cumsum(-1) - 1).clamp(min=0))
        if "use_cache" in self.takes:
            found.setdefault("use_cache", False)
        if self.windowed:
            found["logits_to_keep"] = window
        return found

    @staticmethod
    def _longer(mask: Tensor, length: int) -> Tensor:
        """Generated tokens are seen."""
        return torch.cat([mask, mask.new_ones(len(mask), length - mask.shape[1])], 1)

    def explained(self, engine: Engine, window: int, start: int, stop: int) -> tuple[Explanation, Tensor]:
        """Generated tokens from `start` to `stop` in one pass, by the logits of a window that ends there.

        Returns:
            the explanation, and where the tokens' logits are in its own. [B, T, 2]
        """
        places = torch.arange(start, stop)
        first = self.prompt + stop - 1 - window if self.windowed else 0
        rows = (self.prompt - 1 + places - first).expand(len(self.ids), -1)
        written = self.ids[:, self.prompt + start : self.prompt + stop].cpu()
        index = torch.stack([rows, written], -1)
        target: Any = index
        if self.against is not None:
            target = contrast(index, against=torch.stack([rows, self.against[:, start:stop]], -1))
        return engine(**self.inputs(stop, window), target=target), index

    def last(self, engine: Engine, window: int, count: int) -> None:
        """Explain as many of the last tokens."""
        self.explained(engine, window, self.count - count, self.count)

    def gathered(self, engine: Engine, window: int, predicted: int | None) -> Generation:
        """All generated tokens, chunk by chunk."""
        relevance: Tensor | None = None
        entries: dict[str, list[Tensor]] = {}
        logits: list[Tensor] = []
        for start in range(0, self.count, window):
            stop = min(start + window, self.count)
            found, index = self.explained(engine, window, start, stop)
            own = self.own(found)
            if relevance is None:
                relevance = own.new_zeros(len(self.ids), self.count, self.ids.shape[1])
            relevance[:, start:stop, : own.shape[-1]] = own
            for name in found.relevances.keys() - {self.decoder_entry}:
                entries.setdefault(name, []).append(found.relevances[name])
            index = index.to(found.logits.device)
            samples = torch.arange(len(self.ids), device=index.device).unsqueeze(-1)
            logits.append(found.logits[samples, index[..., 0], index[..., 1]])
            if self.against is not None:
                rivals = self.against[:, start:stop].to(index.device)
                logits[-1] = logits[-1] - found.logits[samples, index[..., 0], rivals]
        assert relevance is not None
        written = self.written()
        others = {name: _rows(torch.cat(parts, 1), written) for name, parts in sorted(entries.items())}
        source = others.pop("input_ids") if self.encodes else None
        return Generation(
            _rows(relevance, written),
            source,
            self.ids,
            torch.cat(logits, 1),
            written,
            window,
            predicted,
            self.given if self.encodes else None,
            others,
        )

    def own(self, found: Explanation) -> Tensor:
        """Relevance of the tokens that the decoder reads. [B, T, N]"""
        name = self.decoder_entry
        if found.relevances and name not in found.relevances:
            raise UnsupportedTopologyError(
                f"{name}: expected a model that embeds them by its largest vocabulary, got relevance of"
                f" {', '.join(found.relevances)}"
            )
        return found.relevances.get(name, found.relevance)

    def written(self) -> Tensor:
        """Up to and with a sample's first end. [B, G]"""
        generated = self.ids[:, self.prompt :]
        ended = torch.zeros_like(generated, dtype=torch.bool)
        for end in self.ends:
            ended |= generated == end
        return ended.cumsum(-1) - ended.to(torch.int64) == 0


def _rows(relevance: Tensor, written: Tensor) -> Tensor:
    """Rows [B, G, ...] of tokens that were written; those of others 0."""
    return relevance * written.reshape(*written.shape, *[1] * (relevance.ndim - 2)).to(relevance.device)
