"""Tiny evaluation data of every layout, for the evaluation's tests."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TOPICS = {
    "sea": ["ship", "harbour", "wave", "sailor", "fish", "tide"],
    "law": ["court", "judge", "contract", "lawyer", "trial", "verdict"],
    "food": ["bread", "oven", "butter", "recipe", "soup", "salt"],
}
LABELLED = [
    (f"The {words[i % 6]} and the {words[(i + 1 + i // 6) % 6]}, number {i}.", topic)
    for i in range(12)
    for topic, words in TOPICS.items()
]
QUERIES = ["a ship in the harbour", "the judge of a court", "bread from the oven"]


def write_lines(file: Path, records: Iterable[Any]) -> Path:
    """Write JSON lines; create the folder if needed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def write_retrieval(folder: Path) -> Path:
    """Write BEIR's layout: all texts, one query for each topic; the topic's texts are relevant."""
    documents = [
        {"_id": f"d{i}", "title": "", "text": text} for i, (text, _) in enumerate(LABELLED)
    ]
    write_lines(folder / "corpus.jsonl", documents)
    write_lines(
        folder / "queries.jsonl", [{"_id": f"q{i}", "text": text} for i, text in enumerate(QUERIES)]
    )
    lines = [
        f"q{list(TOPICS).index(topic)}\td{i}\t{1 + (i < 6)}\n"
        for i, (_, topic) in enumerate(LABELLED)
    ]
    (folder / "qrels").mkdir()
    header = "query-id\tcorpus-id\tscore\n"
    (folder / "qrels" / "test.tsv").write_text(header + "".join(lines))
    return folder


def write_pairs(file: Path) -> Path:
    """Write pairs that have higher scores if both texts have the same topic."""
    records = []
    for i, (text, topic) in enumerate(LABELLED[:-3]):
        other, other_topic = LABELLED[i + (3 if i % 2 else 1)]
        score = 5.0 * (topic == other_topic) + i % 3
        records.append({"text_a": text, "text_b": other, "score": score})
    return write_lines(file, records)


def write_labels(file: Path, start: int = 0, end: int | None = None) -> Path:
    """Write texts with their topic as the label."""
    return write_lines(
        file, [{"text": text, "label": topic} for text, topic in LABELLED[start:end]]
    )


def write_all(folder: Path) -> Path:
    """Write a data set of each layout into one folder."""
    write_retrieval(folder / "search")
    write_pairs(folder / "pairs.jsonl")
    write_labels(folder / "topics" / "train.jsonl", 0, 18)
    write_labels(folder / "topics" / "test.jsonl", 18)
    write_labels(folder / "groups.jsonl")
    return folder
