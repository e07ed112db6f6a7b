"""Write the training data: texts, pairs, scored pairs and labelled texts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from taskvec_train.data.cleaning import SourceEntries
from taskvec_train.data.entries import Entry, passages
from taskvec_train.data.records import Scored
from taskvec_train.data.split import is_held_out
from taskvec_train.data.wordnet import Synset, graded_pairs
from taskvec_train.files import write_jsonl

MIN_CLASS_SIZE = 30
"""Minimum number of passages of a class."""
MIN_LONG_WORDS = 150
"""Minimum number of words of a long text."""
SEED = 6


def write_training(
    folder: Path, parts: Sequence[SourceEntries], synsets: dict[str, Synset]
) -> frozenset[str]:
    """Write `texts/`, `long/`, `pairs/`, `scored/`, `labelled/`; return all texts, lower case."""
    seen: set[str] = set()
    for part in parts:
        name = f"{part.source.name}.jsonl"
        texts = list(_new_texts(part.train, seen))
        write_jsonl(folder / "texts" / name, ({"text": text} for text in texts))
        if joined := list(long_texts(part.train)):
            write_jsonl(folder / "long" / name, ({"text": text} for text in joined))
        if pairs := [(a, entry.text) for entry in part.train for a in entry.anchors]:
            write_jsonl(
                folder / "pairs" / name, ({"anchor": a, "positive": text} for a, text in pairs)
            )
    for group, labelled in by_group(parts, "train").items():
        classes = frequent_classes(labelled, MIN_CLASS_SIZE)
        records = ({"text": e.text, "label": e.label} for e in labelled if e.label in classes)
        if classes:
            write_jsonl(folder / "labelled" / f"{group}.jsonl", records)
    graded = list(graded_synsets(synsets, held_out=False))
    write_jsonl(folder / "scored" / "wordnet.jsonl", map(scored_record, graded))
    seen.update(text.lower() for pair in graded for text in (pair.a, pair.b))
    return frozenset(seen)


def _new_texts(entries: Iterable[Entry], seen: set[str]) -> Iterator[str]:
    for entry in entries:
        for text in (entry.text, *entry.anchors):
            if (key := text.lower()) not in seen:
                seen.add(key)
                yield text


def long_texts(entries: Iterable[Entry]) -> Iterator[str]:
    """Join consecutive passages of one entity, up to the length that a model reads."""
    for _, group in groupby(entries, key=lambda entry: entry.entity):
        for text in passages([entry.text for entry in group]):
            if text.count(" ") + 1 >= MIN_LONG_WORDS:
                yield text


def by_group(parts: Sequence[SourceEntries], side: str) -> dict[str, list[Entry]]:
    """Return the entries of one side, `train` or `held_out`, that have a label, by group."""
    groups: dict[str, list[Entry]] = defaultdict(list)
    for part in parts:
        entries: list[Entry] = getattr(part, side)
        groups[part.source.group] += [entry for entry in entries if entry.label]
    return groups


def frequent_classes(entries: Iterable[Entry], min_entries: int) -> set[str]:
    """Return the labels with enough entries; an empty set if there are fewer than two."""
    counts = Counter(entry.label for entry in entries)
    found = {label for label, count in counts.items() if count >= min_entries}
    return found if len(found) > 1 else set()


def graded_synsets(synsets: dict[str, Synset], *, held_out: bool) -> Iterator[Scored]:
    """Yield scored pairs among the held-out synsets, or among the others."""
    keys = [key for key in synsets if is_held_out("wordnet", key) == held_out]
    return graded_pairs(synsets, keys, SEED)


def scored_record(pair: Scored) -> dict[str, object]:
    """Return the JSON record of a pair."""
    return {"text_a": pair.a, "text_b": pair.b, "score": pair.score}
