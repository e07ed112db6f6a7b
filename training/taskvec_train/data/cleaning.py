"""Keep passages and queries worth learning from, each only once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from taskvec_train.data.duplicates import Index
from taskvec_train.data.entries import MAX_WORDS, Entry, is_prose, tidy
from taskvec_train.data.sources import Source

LEAST_WORDS = 4
"""Words a passage must have."""
MAX_ANCHOR = 200
"""Characters a query may have."""
MAX_CHARACTERS = 3_000
MAX_POSITIVES = 3
"""A query that asks for more passages than this asks for none in particular."""


@dataclass(slots=True)
class Part:
    """What one source gives: entries to train on, and entries held out."""

    source: Source
    train: list[Entry] = field(default_factory=list)
    held_out: list[Entry] = field(default_factory=list)


def cleaned(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Drop passages that are no prose or too long, and anchors that say nothing."""
    for entry in entries:
        text = tidy(entry.text)
        if len(text) > MAX_CHARACTERS or text.count(" ") >= MAX_WORDS:
            continue
        if is_prose(text, LEAST_WORDS):
            anchors = map(tidy, entry.anchors)
            kept = tuple(a for a in anchors if 2 < len(a) <= MAX_ANCHOR and is_prose(a, 1))
            yield replace(entry, text=text, anchors=kept)


def deduplicate(parts: Sequence[Part]) -> list[Part]:
    """Keep the first of texts that are nearly the same, across all sources.

    What is held out comes last: a held-out passage or query that nearly repeats something to
    train on is dropped, so that no stage sees a held-out text by another name.
    """
    index = Index()
    trained = _first_of_each(index, [part.train for part in parts])
    trained = _without_vague_anchors(trained)
    index.add(_anchors(trained))
    known = index.size
    held = _first_of_each(index, [part.held_out for part in parts])
    queries = _anchors(held)
    new = {
        query
        for query, earlier in zip(queries, index.add(queries), strict=True)
        if earlier is None or earlier >= known
    }
    held = [
        [replace(entry, anchors=tuple(a for a in entry.anchors if a in new)) for entry in entries]
        for entries in held
    ]
    return [
        Part(part.source, train, held_out)
        for part, train, held_out in zip(parts, trained, held, strict=True)
    ]


def _first_of_each(index: Index, groups: Sequence[Sequence[Entry]]) -> list[list[Entry]]:
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
    """Return every anchor once, in order."""
    entries = chain.from_iterable(groups)
    return list(dict.fromkeys(anchor for entry in entries for anchor in entry.anchors))
