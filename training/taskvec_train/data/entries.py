"""Entries that the parsers yield, and functions that they share to make them."""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MAX_WORDS = 330
"""Maximum number of words of a passage: about 512 tokens of a WordPiece vocabulary."""

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[\"'(]?[A-Z0-9])")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\ufeff]")


@dataclass(frozen=True, slots=True)
class Entry:
    """One passage of a source.

    Attributes:
        entity: the subject of the passage; all passages of one entity are held out, or none.
        text: the passage.
        anchors: queries that the passage answers.
        label: its class; empty if it has none.
    """

    entity: str
    text: str
    anchors: tuple[str, ...] = ()
    label: str = ""


def normalise_text(text: str) -> str:
    """Normalise a text to NFC and single spaces, without control characters."""
    return " ".join(_CONTROL.sub(" ", unicodedata.normalize("NFC", text)).split())


def is_prose(text: str, min_words: int) -> bool:
    """Return whether a text has enough words and is mostly made of Latin letters."""
    letters = sum(char.isascii() and (char.isalpha() or char == " ") for char in text)
    return text.count(" ") + 1 >= min_words and letters >= 0.75 * len(text)


def sentences(text: str) -> list[str]:
    """Split a text after sentence ends that a capital letter or digit follows."""
    return _SENTENCE_END.split(text)


def passages(blocks: Sequence[str]) -> Iterator[str]:
    """Join blocks of text into passages of at most MAX_WORDS words, split between sentences."""
    words = 0
    current: list[str] = []
    for sentence in (part for block in blocks for part in sentences(block)):
        length = sentence.count(" ") + 1
        if current and words + length > MAX_WORDS:
            yield " ".join(current)
            current, words = [], 0
        current.append(" ".join(sentence.split()[:MAX_WORDS]))
        words += length
    if current:
        yield " ".join(current)


def summary_and_rest(text: str, min_words: int = 12) -> tuple[str, str]:
    """Split off the first sentence if enough words remain; otherwise return `("", text)`."""
    first, *rest = sentences(text)
    remaining = " ".join(rest)
    if remaining.count(" ") + 1 < min_words:
        return "", text
    return first.rstrip("."), remaining


def split_identifier(name: str) -> str:
    """Split an identifier into words: both `CreateHTTPQueue` and `create_http_queue`."""
    parts = re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+", name)
    return " ".join(parts).lower()


def fill_template(templates: Sequence[str], **values: str) -> str:
    """Fill one of the templates, chosen by a hash of the values."""
    key = zlib.crc32("|".join(values.values()).encode())
    return templates[key % len(templates)].format(**values)
