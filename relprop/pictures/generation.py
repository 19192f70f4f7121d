"""What `show` and `save` of a generation show: a matrix of tokens, or the text once for each token that was written."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from relprop.errors import OptionError
from relprop.generation import Generation
from relprop.pictures.explanations import text_view
from relprop.pictures.matrix import matrix_html, token_matrix
from relprop.pictures.text import Passage
from relprop.pictures.tokens import readable, token_strings
from relprop.pictures.view import View

FORMS = ("matrix", "text")


def generation_view(
    generation: Generation, tokens: Any, sample: int, form: str, source: bool | None, source_tokens: Any
) -> View:
    """See `Generation.view`."""
    batch = len(generation.ids)
    if form not in FORMS:
        raise OptionError(f"form: expected one of {', '.join(FORMS)}, got {form!r}")
    if isinstance(sample, bool) or not isinstance(sample, int) or not 0 <= sample < batch:
        raise OptionError(f"sample: expected 0 to {batch - 1}, got {sample!r}")
    if source and generation.source is None:
        raise OptionError("source: expected an encoder's tokens, got the generation of a decoder alone")
    strings, special = token_strings(tokens, generation.ids.tolist(), batch)
    rows = generation.written[sample].nonzero().flatten().cpu()
    prompt = generation.prompt_length
    if source is None:
        source = generation.source is not None
    relevance, columns = generation.relevance, strings[sample]
    if source:
        assert generation.source is not None and generation.source_ids is not None
        given = tokens if source_tokens is None and hasattr(tokens, "convert_ids_to_tokens") else source_tokens
        columns = token_strings(given, generation.source_ids.tolist(), batch)[0][sample]
        relevance = generation.source
    values = relevance[sample].cpu()[rows]
    start = 0 if source else _padding(columns, getattr(tokens, "pad_token", None), values)
    columns, values = columns[start:], values[:, start:]
    written = [piece.text for piece in readable(strings[sample], special)][prompt:]
    written = [written[row] for row in rows.tolist()]
    title = "relevance of the source for what was written" if source else "relevance for what was written"
    if form == "text":
        passages = []
        for row, text in enumerate(written):
            end = len(columns) if source else prompt + int(rows[row]) - start
            passages.append(Passage(columns[:end], values[row, :end], f"→ {text.strip() or repr(text)}", 0, special))
        return text_view(passages, title)
    read = [piece.text for piece in readable(columns, special)]
    return View(
        title,
        picture=lambda: token_matrix(values, written, read),
        text=lambda theme: matrix_html(values, written, read, title=title, theme=theme),
        either=True,
    )


def _padding(columns: list[str], pad: str | None, values: Tensor) -> int:
    """How many tokens at the start are padding, which explains nothing."""
    start = 0
    while start < len(columns) - 1 and columns[start] == pad and not bool(values[:, start].any()):
        start += 1
    return start
