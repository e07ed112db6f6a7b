"""Write the held-out data: retrieval in BEIR's layout, scored pairs, labelled texts, texts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from taskvec_train.data.cleaning import SourceEntries
from taskvec_train.data.entries import Entry
from taskvec_train.data.split import unit_hash
from taskvec_train.data.trainset import (
    by_group,
    frequent_classes,
    graded_synsets,
    scored_record,
)
from taskvec_train.data.wordnet import Synset
from taskvec_train.files import write_jsonl

MAX_QUERIES = 1_000
"""Maximum number of queries of one group."""
MAX_MIXED_QUERIES = 400
"""Maximum number of queries of one group in the mixed set."""
MAX_DOCUMENTS = 15_000
"""Maximum number of documents of one retrieval set."""
MAX_GRADED = 3_000
MAX_LABELLED = 4_000
MAX_TEXTS = 5_000
MIN_CLASS_SIZE = 20

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Collection:
    """Documents by id, and queries with the ids of the documents that answer them."""

    documents: Mapping[str, str]
    queries: Mapping[str, frozenset[str]]

    def sample(self, queries: int, documents: int) -> Collection:
        """Return at most this number of queries and documents; all answers are kept."""
        sampled = {query: self.queries[query] for query in _sample(self.queries, str, queries)}
        needed: set[str] = set().union(*sampled.values())
        others = _sample(self.documents.keys() - needed, str, max(0, documents - len(needed)))
        kept = needed.union(others)
        texts = {key: text for key, text in self.documents.items() if key in kept}
        return Collection(texts, sampled)


def write_held_out(
    folder: Path, parts: Sequence[SourceEntries], synsets: dict[str, Synset], seen: frozenset[str]
) -> None:
    """Write `retrieval/`, `sts/`, `labelled/` and `texts.jsonl`.

    `seen` has every training text in lower case; these texts are left out.
    """
    parts = [replace(part, held_out=list(_unseen(part.held_out, seen))) for part in parts]
    collections = collect(parts)
    mixed = [
        collection.sample(MAX_MIXED_QUERIES, MAX_DOCUMENTS // 4)
        for collection in collections.values()
    ]
    for name, collection in collections.items():
        write_retrieval(folder / "retrieval" / name, collection.sample(MAX_QUERIES, MAX_DOCUMENTS))
    write_retrieval(folder / "retrieval" / "mixed", merge_collections(mixed))
    graded = [
        pair
        for pair in graded_synsets(synsets, held_out=True)
        if not seen & {pair.a.lower(), pair.b.lower()}
    ]
    graded = _sample(graded, lambda pair: f"{pair.a}\t{pair.b}", MAX_GRADED)
    write_jsonl(folder / "sts" / "wordnet.jsonl", map(scored_record, graded))
    for group, entries in by_group(parts, "held_out").items():
        _write_labelled(folder / "labelled" / group, entries)
    texts = {entry.text for part in parts for entry in part.held_out}
    write_jsonl(folder / "texts.jsonl", ({"text": text} for text in _sample(texts, str, MAX_TEXTS)))


def _unseen(entries: Iterable[Entry], seen: frozenset[str]) -> Iterator[Entry]:
    for entry in entries:
        if entry.text.lower() not in seen:
            anchors = tuple(anchor for anchor in entry.anchors if anchor.lower() not in seen)
            yield replace(entry, anchors=anchors)


def collect(parts: Sequence[SourceEntries]) -> dict[str, Collection]:
    """Return each group's held-out passages and queries, except groups without a query."""
    documents: dict[str, dict[str, str]] = defaultdict(dict)
    answers: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for part in parts:
        group = part.source.group
        for number, entry in enumerate(part.held_out):
            key = f"{part.source.name}-{number}"
            documents[group][key] = entry.text
            for anchor in entry.anchors:
                answers[group][anchor].add(key)
    return {
        group: Collection(
            documents[group], {query: frozenset(found) for query, found in asked.items()}
        )
        for group, asked in answers.items()
    }


def merge_collections(collections: Sequence[Collection]) -> Collection:
    """Merge collections; a query of several collections has all their answers."""
    documents: dict[str, str] = {}
    queries: dict[str, frozenset[str]] = {}
    for collection in collections:
        documents |= collection.documents
        for query, found in collection.queries.items():
            queries[query] = queries.get(query, frozenset()) | found
    return Collection(documents, queries)


def write_retrieval(folder: Path, collection: Collection) -> None:
    """Write one collection in BEIR's layout."""
    write_jsonl(
        folder / "corpus.jsonl",
        ({"_id": key, "title": "", "text": text} for key, text in collection.documents.items()),
    )
    ids = {query: f"q{number}" for number, query in enumerate(collection.queries)}
    write_jsonl(
        folder / "queries.jsonl", ({"_id": key, "text": query} for query, key in ids.items())
    )
    lines = ["query-id\tcorpus-id\tscore"]
    lines += [
        f"{ids[query]}\t{key}\t1"
        for query, found in collection.queries.items()
        for key in sorted(found)
    ]
    qrels = folder / "qrels"
    qrels.mkdir()
    (qrels / "test.tsv").write_text("\n".join(lines) + "\n", "utf-8")


def _write_labelled(folder: Path, entries: Sequence[Entry]) -> None:
    """Write `train.jsonl` and `test.jsonl` of labelled texts; they have no entity in common."""
    classes = frequent_classes(entries, MIN_CLASS_SIZE)
    usable = [entry for entry in entries if entry.label in classes]
    for name, wanted in (("train", True), ("test", False)):
        half = [entry for entry in usable if (unit_hash(entry.entity) < 0.5) == wanted]
        records = [
            {"text": entry.text, "label": entry.label}
            for entry in _sample(half, lambda entry: entry.text, MAX_LABELLED)
        ]
        if records:
            write_jsonl(folder / f"{name}.jsonl", records)


def _sample(items: Iterable[Item], name: Callable[[Item], str], max_items: int) -> list[Item]:
    """Return at most ``max_items`` items, chosen and ordered by a hash of their names."""
    return sorted(items, key=lambda item: unit_hash(name(item)))[:max_items]
