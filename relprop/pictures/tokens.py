"""Token strings as text that people read: word pieces joined, bytes decoded, special tokens told apart."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from relprop.errors import OptionError, ShapeError, unknown_name

_SPECIAL = re.compile(r"\[[A-Z]+\d*\]|<[^<>\s]+>")  # [CLS], <s>, <|endoftext|>
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a byte that SentencePiece has no piece for
_CLOSING, _OPENING, _JOINING = set(".,!?;:%)]}”"), set("([{“"), set("'’-")  # without a space before, after, at all
_NO_IDS = "tokens: expected a list of strings for each sample, as the model was given no token ids"


@dataclass(frozen=True)
class Piece:
    """One token.

    Attributes:
        text: as it is read. May be empty: the first bytes of a letter.
        before: what stands between it and the token before it.
        special: it is none of the text's own.
    """

    text: str
    before: str
    special: bool


def readable(tokens: Sequence[str], special: Iterable[str] = ()) -> list[Piece]:
    """Tokens with what joins them, by the marks that their tokenizer left.

    WordPiece ("em", "##bed"), byte-level BPE ("Ġword"), SentencePiece ("▁word") and CLIP's ("word</w>"). Tokens that
    begin or end with a space are taken as they are; others are words, joined by spaces save at punctuation.

    Args:
        special: tokens that are none of the text's own, besides those in [CAPITALS] or <angle brackets>.
    Raises:
        OptionError: a token is no string.
    """
    wrong = next((token for token in tokens if not isinstance(token, str)), None)
    if wrong is not None:
        raise OptionError(f"tokens: expected strings, got {wrong!r}")
    known = set(special)
    flags = [token in known or bool(_SPECIAL.fullmatch(token) and not _BYTE.fullmatch(token)) for token in tokens]
    own = [token for token, flag in zip(tokens, flags, strict=True) if not flag]
    texts = iter(_own_texts(own))
    pieces: list[Piece] = []
    for token, flag in zip(tokens, flags, strict=True):
        if flag:
            pieces.append(Piece(token, " " if pieces else "", True))
            continue
        text, before = next(texts)
        after_special = bool(pieces) and pieces[-1].special and not text[:1].isspace()
        pieces.append(Piece(text, (before or " " if after_special else before) if pieces else "", False))
    return pieces


def _own_texts(tokens: list[str]) -> list[tuple[str, str]]:
    """(text, what stands before it) of each."""
    if any(mark in token for token in tokens for mark in "ĠĊ"):
        return _leading_space(_decoded([_byte_level(token) for token in tokens]))
    if any("▁" in token for token in tokens):
        return _leading_space(_decoded([_sentence_piece(token) for token in tokens]))
    if any(token.endswith("</w>") for token in tokens):
        ended = [True, *(token.endswith("</w>") for token in tokens)]
        return [(token.removesuffix("</w>"), " " * ended[i]) for i, token in enumerate(tokens)]
    if any(token != token.strip() for token in tokens):
        return _leading_space(tokens)
    return [(_whole(token), _between(tokens[i - 1] if i else "", token)) for i, token in enumerate(tokens)]


def _whole(token: str) -> str:
    return token if token == "##" else token.removeprefix("##")


def _between(last: str, token: str) -> str:
    joined = token != _whole(token)
    tight = token[:1] in _CLOSING or last[-1:] in _OPENING or {token, last} & _JOINING
    return "" if joined or tight else " "


def _leading_space(texts: list[str]) -> list[tuple[str, str]]:
    """A space that a token begins with stands before it: its ground covers the word alone."""
    return [(text[1:], " ") if text.startswith(" ") and text.strip() else (text, "") for text in texts]


def _decoded(tokens: list[bytes]) -> list[str]:
    """Tokens as UTF-8; a letter of several tokens comes with the last of them."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(token, i == len(tokens) - 1) for i, token in enumerate(tokens)]


def _sentence_piece(token: str) -> bytes:
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()


def _byte_level(token: str) -> bytes:
    return b"".join(_byte_letters().get(letter, letter.encode()) for letter in token)


@cache
def _byte_letters() -> dict[str, bytes]:
    """The letters that byte-level BPE writes bytes with: printable Latin-1 as itself, others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): bytes([b]) for b in plain} | {chr(0x100 + i): bytes([b]) for i, b in enumerate(others)}


def token_strings(source: Any, ids: Sequence[Sequence[int]] | None, samples: int) -> tuple[list[list[str]], list[str]]:
    """Token strings of every sample.

    Args:
        source: a tokenizer of transformers, or any object with `convert_ids_to_tokens`; strings of each sample (of a
            single sample also without the outer list); or None for the ids themselves.
        ids: [B][N]
        samples: B
    Returns:
        tokens by sample, and the tokenizer's special tokens.
    Raises:
        OptionError: neither. ShapeError: strings for another number of samples.
    """
    if source is None or hasattr(source, "convert_ids_to_tokens"):
        if ids is None:
            raise OptionError(_NO_IDS)
        if source is None:
            return [[f"#{token}" for token in row] for row in ids], []
        return [list(source.convert_ids_to_tokens(list(row))) for row in ids], list(
            getattr(source, "all_special_tokens", ())
        )
    if isinstance(source, str) or not isinstance(source, Sequence):
        raise OptionError(f"tokens: expected a tokenizer or lists of strings, got {type(source).__name__}")
    lists = [list(source)] if all(isinstance(token, str) for token in source) else [list(row) for row in source]
    if len(lists) != samples:
        raise ShapeError(f"tokens: expected strings for {samples} sample(s), got {len(lists)}")
    return lists, []


def strings_by_input(
    source: Any, texts: Mapping[str, tuple[Sequence[Sequence[int]] | None, int]], samples: int
) -> dict[str, tuple[list[list[str]], list[str]]]:
    """Token strings of every sample of several inputs; what has neither ids nor strings is numbered: "regions 3".

    Args:
        source: as `token_strings` takes it, or a mapping to that by input. A tokenizer alone is for all inputs with
            ids, lists alone for the only one with ids, or the only one.
        texts: ids [B][N] or None, and the number of tokens, by input.
        samples: B
    Returns:
        as `token_strings`, by input.
    Raises:
        UnknownNameError: a mapping names another input. OptionError: it is not clear which input lists are of, or a
            tokenizer has no ids to name. Others as `token_strings`.
    """
    given = _by_input(source, {name: ids is not None for name, (ids, _) in texts.items()})
    found = {}
    for name, (ids, tokens) in texts.items():
        if ids is None and given.get(name) is None:
            found[name] = ([[f"{name or 'token'} {i}" for i in range(tokens)]] * samples, list[str]())
        else:
            found[name] = token_strings(given.get(name), ids, samples)
    return found


def _by_input(source: Any, texts: Mapping[str, bool]) -> Mapping[str, Any]:
    """Sources of token strings by input, of inputs that have ids or not."""
    if source is None:
        return {}
    if isinstance(source, Mapping):
        wrong = [name for name in source if name not in texts]
        if wrong:
            raise unknown_name("input with token strings", wrong[0], texts)
        return source
    named = [name for name, has_ids in texts.items() if has_ids]
    if hasattr(source, "convert_ids_to_tokens"):
        if not named:
            raise OptionError(_NO_IDS)
        return dict.fromkeys(named, source)
    candidates = named or list(texts)
    if len(candidates) > 1:
        raise OptionError(
            f"tokens: expected a tokenizer, or a mapping to strings by input, as there are {', '.join(candidates)}; got"
            f" a {type(source).__name__}"
        )
    return {candidates[0]: source}
