"""What a source's parser gives: one passage, what asks for it, and what it is about."""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MAX_WORDS = 330
"""Words a passage may have: about 512 tokens of a WordPiece vocabulary."""

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[\"'(]?[A-Z0-9])")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\ufeff]")


@dataclass(frozen=True, slots=True)
class Entry:
    """One passage of a source.

    `entity` is what the passage tells about: all passages of one entity are trained on, or none.
    `anchors` are queries which the passage answers; `label` is its class, if it has one.
    """

    entity: str
    text: str
    anchors: tuple[str, ...] = ()
    label: str = ""


def tidy(text: str) -> str:
    """Composed characters, single spaces, no control characters."""
    return " ".join(_CONTROL.sub(" ", unicodedata.normalize("NFC", text)).split())


def is_prose(text: str, least: int) -> bool:
    """Whether a text has that many words and is mostly made of Latin letters."""
    letters = sum(char.isascii() and (char.isalpha() or char == " ") for char in text)
    return text.count(" ") + 1 >= least and letters >= 0.75 * len(text)


def sentences(text: str) -> list[str]:
    """Split after full stops that a capital letter follows."""
    return _SENTENCE_END.split(text)


def passages(blocks: Sequence[str]) -> Iterator[str]:
    """Join blocks of text to passages of at most MAX_WORDS words, cut between sentences."""
    words = 0
    kept: list[str] = []
    for sentence in (part for block in blocks for part in sentences(block)):
        length = sentence.count(" ") + 1
        if kept and words + length > MAX_WORDS:
            yield " ".join(kept)
            kept, words = [], 0
        kept.append(" ".join(sentence.split()[:MAX_WORDS]))
        words += length
    if kept:
        yield " ".join(kept)


def summary_and_rest(text: str, least: int = 12) -> tuple[str, str]:
    """Cut off the first sentence when enough words remain; else `("", text)`."""
    first, *rest = sentences(text)
    remaining = " ".join(rest)
    if remaining.count(" ") + 1 < least:
        return "", text
    return first.rstrip("."), remaining


def spoken(name: str) -> str:
    """Turn an identifier into words: `CreateHTTPQueue` and `create_http_queue` alike."""
    parts = re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+", name)
    return " ".join(parts).lower()


def ask(templates: Sequence[str], **values: str) -> str:
    """Fill one of the templates, the same one for the same values."""
    key = zlib.crc32("|".join(values.values()).encode())
    return templates[key % len(templates)].format(**values)
