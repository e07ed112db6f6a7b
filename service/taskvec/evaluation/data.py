"""Evaluation data: find data sets in folders by their file names and fields, read, check them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from taskvec.errors import InvalidRequestError
from taskvec.evaluation.jsonl import Record, decode_line, read_lines, read_records

CORPUS, QUERIES, QRELS = "corpus.jsonl", "queries.jsonl", "qrels/test.tsv"
TRAIN, TEST = "train.jsonl", "test.jsonl"
HEADER = "query-id\tcorpus-id\tscore"

NO_TEXT = "."
"""What is embedded instead of a text that has nothing to embed: public data contain such texts."""

KNOWN_LAYOUTS = (
    f"Known are folders with {CORPUS}, {QUERIES} and {QRELS} (retrieval), folders with {TRAIN} and "
    f"{TEST} of text and label (classification, clustering), and files of JSON lines with text_a, "
    "text_b and score (sts) or with text and label (clustering)"
)


@dataclass(frozen=True, slots=True)
class RetrievalData:
    """Queries, documents and relevance judgements.

    Attributes:
        qrels: for each query, document index -> grade; at least one is above 0, none is below.
        identical_ids: for each query, the index of the document with the same id, or None. It is
            not an answer unless it is in ``qrels``.
    """

    kind: ClassVar[str] = "retrieval"
    name: str
    documents: Sequence[str]
    queries: Sequence[str]
    qrels: Sequence[Mapping[int, int]]
    identical_ids: Sequence[int | None]

    @property
    def texts(self) -> int:
        """Number of texts."""
        return len(self.documents) + len(self.queries)


@dataclass(frozen=True, slots=True)
class PairData:
    """Pairs of texts with human similarity scores, in any unit."""

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
    """Texts and their labels, in the same order."""

    texts: Sequence[str]
    labels: Sequence[str]


@dataclass(frozen=True, slots=True)
class ClassificationData:
    """Labelled texts for training and testing a classifier.

    A label that occurs only in the test texts cannot be predicted, and counts as a mistake.
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
    """Labelled texts; the labels are only used to score the clusters."""

    kind: ClassVar[str] = "clustering"
    name: str
    labelled: LabelledTexts

    @property
    def texts(self) -> int:
        """Number of texts."""
        return len(self.labelled.texts)


Data = RetrievalData | PairData | ClassificationData | ClusteringData


def find_data(paths: Sequence[Path]) -> list[Data]:
    """Read all data sets at these paths.

    Args:
        paths: files and folders; a folder that is not a data set is searched recursively.

    Raises:
        InvalidRequestError: a file is invalid (file and line are named), or a path has no data.
    """
    found: dict[str, Data] = {}
    for path in paths:
        if not path.exists():
            raise InvalidRequestError(f"{path} does not exist: --data must be a folder or a file.")
        before = len(found)
        absolute = path.resolve()  # "." has no name
        prefix = f"{absolute.parent.name}/" if path.is_file() or _is_data(path) else ""
        for data in _find_below(
            path, prefix + (absolute.stem if path.is_file() else absolute.name)
        ):
            if data.name in found:
                raise InvalidRequestError(
                    f"Two data sets are called {data.name}: name their common folder, or only one "
                    "of them."
                )
            found[data.name] = data
        if len(found) == before:
            raise InvalidRequestError(f"{path} contains no data. {KNOWN_LAYOUTS}.")
    return list(found.values())


def _is_data(folder: Path) -> bool:
    return any((folder / name).exists() for name in (CORPUS, QUERIES, TRAIN, TEST))


def _find_below(path: Path, name: str) -> Iterator[Data]:
    if path.is_file():
        yield from _labels_or_pairs(path, name)
    elif (path / CORPUS).exists() or (path / QUERIES).exists():
        yield _retrieval(path, name)
    elif _is_data(path):
        yield from _labelled_folder(path, name)
    else:
        for child in sorted(path.iterdir()):
            if child.is_dir():
                yield from _find_below(child, f"{name}/{child.name}")
            elif child.suffix == ".jsonl":
                yield from _find_below(child, f"{name}/{child.stem}")


def _labels_or_pairs(file: Path, name: str) -> Iterator[Data]:
    """Read a JSON lines file; yield nothing if its first record has no known field."""
    first = next(read_records(file)).fields
    if {"text_a", "text_b"} & first.keys():
        yield _pairs(file, name)
    elif "label" in first:
        labelled = _labelled(file)
        if not _shared(labelled):
            raise InvalidRequestError(f"{file}: no two texts share a label.")
        yield ClusteringData(name, labelled)


def _pairs(file: Path, name: str) -> PairData:
    records = [(r.text("text_a"), r.text("text_b"), r.number("score")) for r in read_records(file)]
    left, right, scores = zip(*records, strict=True)
    if len(set(scores)) == 1:
        raise InvalidRequestError(f"{file}: all pairs have the same score.")
    return PairData(name, left, right, scores)


def _labelled_folder(folder: Path, name: str) -> Iterator[Data]:
    """Yield classification data, and the test texts as clustering data if labels repeat."""
    train, test = _labelled(folder / TRAIN), _labelled(folder / TEST)
    if not set(train.labels) & set(test.labels):
        raise InvalidRequestError(f"{folder / TEST} shares no label with {TRAIN}.")
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
            f"{file} has only one label, {labels[0]!r}: at least two are needed."
        )
    return LabelledTexts(texts, labels)


def _retrieval(folder: Path, name: str) -> RetrievalData:
    documents = _by_id(folder / CORPUS, _document)
    queries = _by_id(folder / QUERIES, lambda record: record.text("text"))
    positions = {name: position for position, name in enumerate(documents)}
    qrels: dict[str, dict[int, int]] = {}
    for location, query, document, grade in _read_qrels(folder / QRELS):
        for known, wanted, file in ((queries, query, QUERIES), (documents, document, CORPUS)):
            if wanted not in known:
                raise InvalidRequestError(f"{location} names {wanted!r}, which is not in {file}.")
        grades = qrels.setdefault(query, {})
        if positions[document] in grades:
            raise InvalidRequestError(f"{location} grades {document!r} for {query!r} again.")
        grades[positions[document]] = max(grade, 0)
    answerable = [query for query, grades in qrels.items() if any(grades.values())]
    if not answerable:
        raise InvalidRequestError(f"{folder / QRELS} has no grade above 0.")
    return RetrievalData(
        name,
        documents=list(documents.values()),
        queries=[queries[query] for query in answerable],
        qrels=[qrels[query] for query in answerable],
        identical_ids=[positions.get(query) for query in answerable],
    )


def embeddable(text: str) -> str:
    """Return the text, or ``NO_TEXT`` if it has only white space and control characters."""
    shown = any(character.isprintable() and not character.isspace() for character in text)
    return text if shown else NO_TEXT


def _document(record: Record) -> str:
    """Return title and text, joined as BEIR does; public corpora have documents with neither."""
    joined = f"{record.optional_text('title')} {record.optional_text('text')}"
    return embeddable(joined.strip())


def _by_id(file: Path, read: Callable[[Record], str]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for record in read_records(file):
        name = record.text("_id")
        if name in texts:
            record.fail(f"repeats the _id {name!r}")
        texts[name] = read(record)
    return texts


def _read_qrels(file: Path) -> Iterator[tuple[str, str, str, int]]:
    """Yield location, query, document and grade of each line."""
    lines = read_lines(file)
    location, header = next(lines)
    if decode_line(location, header) != HEADER:
        raise InvalidRequestError(f"{location} must be the header {HEADER!r}.")
    for location, line in lines:
        fields = decode_line(location, line).split("\t")
        if len(fields) != len(HEADER.split("\t")):
            raise InvalidRequestError(
                f"{location} has {len(fields)} fields: it must have query, document and grade, "
                "separated by tabs."
            )
        query, document, grade = fields
        try:
            yield location, query, document, int(grade)
        except ValueError:
            raise InvalidRequestError(
                f"{location} has the grade {grade[:80]!r}: it must be a whole number."
            ) from None
