"""Filter the entries of all sources, and remove near-duplicates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from taskvec_train.data.duplicates import DuplicateIndex
from taskvec_train.data.entries import MAX_WORDS, Entry, is_prose, normalise_text
from taskvec_train.data.sources import Source

MIN_WORDS = 4
"""Minimum number of words of a passage."""
MAX_ANCHOR = 200
"""Maximum number of characters of a query."""
MAX_CHARACTERS = 3_000
MAX_POSITIVES = 3
"""Maximum number of passages of a query: queries with more are too vague."""


@dataclass(slots=True)
class SourceEntries:
    """The entries of one source: for training, and held out."""

    source: Source
    train: list[Entry] = field(default_factory=list)
    held_out: list[Entry] = field(default_factory=list)


def clean(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Drop passages that are not prose or are too long, and anchors without content."""
    for entry in entries:
        text = normalise_text(entry.text)
        if len(text) > MAX_CHARACTERS or text.count(" ") >= MAX_WORDS:
            continue
        if is_prose(text, MIN_WORDS):
            anchors = map(normalise_text, entry.anchors)
            kept = tuple(a for a in anchors if 2 < len(a) <= MAX_ANCHOR and is_prose(a, 1))
            yield replace(entry, text=text, anchors=kept)


def deduplicate(parts: Sequence[SourceEntries]) -> list[SourceEntries]:
    """Keep only the first of texts that are near-duplicates, across all sources.

    Held-out entries are checked last: a held-out passage or query that is a near-duplicate of a
    training text is dropped, so that no stage sees a held-out text in another form.
    """
    index = DuplicateIndex()
    trained = _without_duplicates(index, [part.train for part in parts])
    trained = _without_vague_anchors(trained)
    index.add(_anchors(trained))
    train_size = index.size
    held_out = _without_duplicates(index, [part.held_out for part in parts])
    queries = _anchors(held_out)
    new = {
        query
        for query, earlier in zip(queries, index.add(queries), strict=True)
        if earlier is None or earlier >= train_size
    }
    held_out = [
        [replace(entry, anchors=tuple(a for a in entry.anchors if a in new)) for entry in entries]
        for entries in held_out
    ]
    return [
        SourceEntries(part.source, train, held)
        for part, train, held in zip(parts, trained, held_out, strict=True)
    ]


def _without_duplicates(
    index: DuplicateIndex, groups: Sequence[Sequence[Entry]]
) -> list[list[Entry]]:
    return [
        [
            entry
            for entry, earlier in zip(
                entries, index.add([entry.text for entry in entries]), strict=True
            )
            if earlier is None
        ]
        for entries in groups
    ]


def _without_vague_anchors(groups: Sequence[Sequence[Entry]]) -> list[list[Entry]]:
    entries = chain.from_iterable(groups)
    positives = Counter(anchor.lower() for entry in entries for anchor in set(entry.anchors))
    return [
        [
            replace(
                entry,
                anchors=tuple(a for a in entry.anchors if positives[a.lower()] <= MAX_POSITIVES),
            )
            for entry in group
        ]
        for group in groups
    ]


def _anchors(groups: Sequence[Sequence[Entry]]) -> list[str]:
    """Return every distinct anchor, in order."""
    entries = chain.from_iterable(groups)
    return list(dict.fromkeys(anchor for entry in entries for anchor in entry.anchors))
