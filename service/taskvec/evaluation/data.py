"""Held-out data: found in folders by its shape, read and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from taskvec.errors import InvalidRequestError
from taskvec.evaluation.jsonl import Record, decoded, read_lines, read_records

CORPUS, QUERIES, QRELS = "corpus.jsonl", "queries.jsonl", "qrels/test.tsv"
TRAIN, TEST = "train.jsonl", "test.jsonl"
HEADER = "query-id\tcorpus-id\tscore"

SHAPES = (
    f"Known are folders with {CORPUS}, {QUERIES} and {QRELS} (retrieval), folders with {TRAIN} and "
    f"{TEST} of text and label (classification, clustering), and files of JSON lines with text_a, "
    "text_b and score (sts) or with text and label (clustering)"
)


@dataclass(frozen=True, slots=True)
class RetrievalData:
    """Queries, documents, and which of them belong together.

    Attributes:
        judged: for each query, document -> grade; each has one above 0, and none has below.
        twins: for each query, the document with the same id, which is no answer where it is not
            judged one; None where there is no such.
    """

    kind: ClassVar[str] = "retrieval"
    name: str
    documents: Sequence[str]
    queries: Sequence[str]
    judged: Sequence[Mapping[int, int]]
    twins: Sequence[int | None]

    @property
    def texts(self) -> int:
        """Number of texts."""
        return len(self.documents) + len(self.queries)


@dataclass(frozen=True, slots=True)
class PairData:
    """Pairs of texts, and how alike people found them."""

    kind: ClassVar[str] = "sts"
    name: str
    left: Sequence[str]
    right: Sequence[str]
    scores: Sequence[float]

    @property
    def texts(self) -> int:
        """Number of texts."""
        return 2 * len(self.scores)


@dataclass(frozen=True, slots=True)
class LabelledTexts:
    """Texts, each with its label."""

    texts: Sequence[str]
    labels: Sequence[str]


@dataclass(frozen=True, slots=True)
class ClassificationData:
    """Labelled texts to learn from, and others to prove it on.

    Some labels may be among the latter only: no probe can guess them.
    """

    kind: ClassVar[str] = "classification"
    name: str
    train: LabelledTexts
    test: LabelledTexts

    @property
    def texts(self) -> int:
        """Number of texts."""
        return len(self.train.texts) + len(self.test.texts)


@dataclass(frozen=True, slots=True)
class ClusteringData:
    """Labelled texts; the labels are to be found again without being seen."""

    kind: ClassVar[str] = "clustering"
    name: str
    labelled: LabelledTexts

    @property
    def texts(self) -> int:
        """Number of texts."""
        return len(self.labelled.texts)


Data = RetrievalData | PairData | ClassificationData | ClusteringData


def find_data(paths: Sequence[Path]) -> list[Data]:
    """Read all data at these places.

    Args:
        paths: folders and files; in a folder that is no data itself, everything below is taken.

    Raises:
        InvalidRequestError: naming the file and line at fault, or the place without any data.
    """
    found: dict[str, Data] = {}
    for path in paths:
        if not path.exists():
            raise InvalidRequestError(f"{path} does not exist: --data wants a folder or a file.")
        before = len(found)
        whole = path.resolve()  # the name of "." is that of the folder
        above = f"{whole.parent.name}/" if path.is_file() or _is_data(path) else ""
        for data in _below(path, above + (whole.stem if path.is_file() else whole.name)):
            if data.name in found:
                raise InvalidRequestError(
                    f"Two data sets are called {data.name}: name the folder above, or one of them "
                    "only."
                )
            found[data.name] = data
        if len(found) == before:
            raise InvalidRequestError(f"{path} holds no data. {SHAPES}.")
    return list(found.values())


def _is_data(folder: Path) -> bool:
    return any((folder / name).exists() for name in (CORPUS, QUERIES, TRAIN, TEST))


def _below(path: Path, name: str) -> Iterator[Data]:
    if path.is_file():
        yield from _labels_or_pairs(path, name)
    elif (path / CORPUS).exists() or (path / QUERIES).exists():
        yield _retrieval(path, name)
    elif _is_data(path):
        yield from _labelled_folder(path, name)
    else:
        for child in sorted(path.iterdir()):
            if child.is_dir():
                yield from _below(child, f"{name}/{child.name}")
            elif child.suffix == ".jsonl":
                yield from _below(child, f"{name}/{child.stem}")


def _labels_or_pairs(file: Path, name: str) -> Iterator[Data]:
    """Nothing where the first record has no field of ours: folders hold other files, too."""
    first = next(read_records(file)).fields
    if {"text_a", "text_b"} & first.keys():
        yield _pairs(file, name)
    elif "label" in first:
        labelled = _labelled(file)
        if not _shared(labelled):
            raise InvalidRequestError(f"{file}: no two texts share a label: nothing to cluster.")
        yield ClusteringData(name, labelled)


def _pairs(file: Path, name: str) -> PairData:
    records = [(r.text("text_a"), r.text("text_b"), r.number("score")) for r in read_records(file)]
    left, right, scores = zip(*records, strict=True)
    if len(set(scores)) == 1:
        raise InvalidRequestError(f"{file}: all pairs have one score: there is no order to find.")
    return PairData(name, left, right, scores)


def _labelled_folder(folder: Path, name: str) -> Iterator[Data]:
    """The test texts are clustered, too, where that makes sense."""
    train, test = _labelled(folder / TRAIN), _labelled(folder / TEST)
    if not set(train.labels) & set(test.labels):
        raise InvalidRequestError(f"{folder / TEST} has no label that {TRAIN} has, too.")
    yield ClassificationData(name, train, test)
    if len(set(test.labels)) > 1 and _shared(test):
        yield ClusteringData(f"{name}/{Path(TEST).stem}", test)


def _shared(labelled: LabelledTexts) -> bool:
    return len(set(labelled.labels)) < len(labelled.labels)


def _labelled(file: Path) -> LabelledTexts:
    records = [(record.text("text"), record.label("label")) for record in read_records(file)]
    texts, labels = zip(*records, strict=True)
    if len(set(labels)) == 1 and file.name != TEST:
        raise InvalidRequestError(
            f"{file} has one label only, {labels[0]!r}: there is nothing to tell apart."
        )
    return LabelledTexts(texts, labels)


def _retrieval(folder: Path, name: str) -> RetrievalData:
    documents = _by_id(folder / CORPUS, _document)
    queries = _by_id(folder / QUERIES, lambda record: record.text("text"))
    places = {name: place for place, name in enumerate(documents)}
    judged: dict[str, dict[int, int]] = {}
    for place, query, document, grade in _judgements(folder / QRELS):
        for known, wanted, file in ((queries, query, QUERIES), (documents, document, CORPUS)):
            if wanted not in known:
                raise InvalidRequestError(f"{place} names {wanted!r}, which is not in {file}.")
        grades = judged.setdefault(query, {})
        if places[document] in grades:
            raise InvalidRequestError(f"{place} judges {document!r} for {query!r} once more.")
        grades[places[document]] = max(grade, 0)
    asked = [query for query, grades in judged.items() if any(grades.values())]
    if not asked:
        raise InvalidRequestError(f"{folder / QRELS} calls no document relevant.")
    return RetrievalData(
        name,
        documents=list(documents.values()),
        queries=[queries[query] for query in asked],
        judged=[judged[query] for query in asked],
        twins=[places.get(query) for query in asked],
    )


def _document(record: Record) -> str:
    """Title and text, as BEIR joins them; public corpora hold documents with neither."""
    return f"{record.optional_text('title')} {record.optional_text('text')}".strip() or " "


def _by_id(file: Path, read: Callable[[Record], str]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for record in read_records(file):
        name = record.text("_id")
        if name in texts:
            record.refuse(f"repeats the _id {name!r}")
        texts[name] = read(record)
    return texts


def _judgements(file: Path) -> Iterator[tuple[str, str, str, int]]:
    """Place, query, document and grade of each line."""
    lines = read_lines(file)
    place, header = next(lines)
    if decoded(place, header) != HEADER:
        raise InvalidRequestError(f"{place} must be the header {HEADER!r}.")
    for place, line in lines:
        fields = decoded(place, line).split("\t")
        if len(fields) != len(HEADER.split("\t")):
            raise InvalidRequestError(
                f"{place} has {len(fields)} fields: query, document and grade, between tabs."
            )
        query, document, grade = fields
        try:
            yield place, query, document, int(grade)
        except ValueError:
            raise InvalidRequestError(
                f"{place} has the grade {grade[:80]!r}: it must be a whole number."
            ) from None
