"""Evaluation data: every layout is found, and every error names file and line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from heldout import QUERIES, TOPICS, write_all, write_labels, write_lines, write_retrieval
from taskvec.errors import InvalidRequestError
from taskvec.evaluation.data import (
    NO_TEXT,
    ClassificationData,
    ClusteringData,
    PairData,
    RetrievalData,
    find_data,
)

QRELS = "query-id\tcorpus-id\tscore\n"


def test_every_layout_is_found(tmp_path: Path) -> None:
    """A folder gives all data sets below it, named by their path; other files are ignored."""
    root = write_all(tmp_path / "held")
    (root / "README.md").write_text("About this data.")
    write_lines(root / "texts.jsonl", [{"text": "of another use"}])
    found = {data.name: data for data in find_data([root])}
    kinds = {
        "held/groups": ClusteringData,
        "held/pairs": PairData,
        "held/search": RetrievalData,
        "held/topics": ClassificationData,
        "held/topics/test": ClusteringData,
    }
    assert {name: type(data) for name, data in found.items()} == kinds
    assert [data.kind for data in found.values()] == [
        "clustering",
        "sts",
        "retrieval",
        "classification",
        "clustering",
    ]
    assert [data.texts for data in found.values()] == [36, 66, 39, 36, 18]


def test_several_paths_may_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files and folders may be mixed, and the folder "." gets its real name."""
    root = write_all(tmp_path / "held")
    found = find_data([root / "groups.jsonl", root / "search"])
    assert [data.name for data in found] == ["held/groups", "held/search"]
    monkeypatch.chdir(root / "search")
    assert [data.name for data in find_data([Path()])] == ["held/search"]


def test_retrieval_is_read_as_beir_does(tmp_path: Path) -> None:
    """Titles are joined with texts, queries without an answer left out, grades below 0 are 0."""
    folder = tmp_path / "search"
    documents = [
        {"_id": "a", "title": "Title", "text": "and text"},
        {"_id": "b", "text": "only text"},
        {"_id": "c", "title": "", "text": ""},
    ]
    write_lines(folder / "corpus.jsonl", documents)
    queries = [{"_id": name, "text": f"query {name}", "metadata": {}} for name in "xbyz"]
    write_lines(folder / "queries.jsonl", queries)
    (folder / "qrels").mkdir()
    lines = "x\ta\t2\nx\tb\t-1\nb\tc\t1\ny\ta\t0\n"
    (folder / "qrels" / "test.tsv").write_text(QRELS + lines)
    (data,) = find_data([folder])
    assert isinstance(data, RetrievalData)
    assert data.documents == ["Title and text", "only text", NO_TEXT]
    assert data.queries == ["query x", "query b"]
    assert data.qrels == [{0: 2, 1: 0}, {2: 1}]
    assert data.identical_ids == [None, 1]


def test_byte_order_mark_and_crlf_are_read(tmp_path: Path) -> None:
    """A byte order mark and CR LF line ends are not part of the text."""
    file = tmp_path / "labels.jsonl"
    lines = [
        '{"text": "Täxt 第", "label": 1}',
        '{"text": "b", "label": 2}',
        '{"text": "c", "label": 2}',
    ]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    (data,) = find_data([file])
    assert isinstance(data, ClusteringData)
    assert data.labelled.texts == ("Täxt 第", "b", "c")
    assert data.labelled.labels == ("1", "2", "2")


CORPUS, QUERIES_FILE, TEST = "search/corpus.jsonl", "search/queries.jsonl", "search/qrels/test.tsv"
ERRORS: list[tuple[str, int, bytes | None, str]] = [
    (CORPUS, 0, None, " cannot be read: No such file"),
    (QUERIES_FILE, 0, None, " cannot be read: No such file"),
    (TEST, 0, None, " cannot be read: No such file"),
    ("topics/train.jsonl", 0, None, " cannot be read: No such file"),
    ("pairs.jsonl", 0, b"", " is empty"),
    ("pairs.jsonl", 3, b" ", ":3 is an empty line"),
    ("pairs.jsonl", 2, b'{"text_a": ', ":2 is not valid JSON: "),
    ("pairs.jsonl", 2, b"[1]", ":2 is not a JSON object"),
    ("groups.jsonl", 4, b'{"text": "\xe9"}', r":4 is not UTF-8 \(byte 11"),
    ("pairs.jsonl", 0, '{"text": "a"}'.encode("utf-16"), ":1 is not UTF-8"),
    ("pairs.jsonl", 9, b'{"text": "a", "label": "b"}', ":9 needs a text_a"),
    ("groups.jsonl", 2, b'{"text": 3, "label": "b"}', ":2 has a text that is not a string"),
    ("groups.jsonl", 2, b'{"text": "", "label": "b"}', ":2 needs a text"),
    ("groups.jsonl", 2, b'{"text": "a", "label": ["b"]}', ":2 needs a label"),
    ("pairs.jsonl", 2, b'{"text_a": "a", "text_b": "b", "score": "5"}', ":2 needs a score"),
    (
        "pairs.jsonl",
        0,
        b'{"text_a": "a", "text_b": "b", "score": 1}',
        ": all pairs have the same",
    ),
    ("groups.jsonl", 0, b'{"text": "a", "label": "b"}', " has only one label, 'b'"),
    (
        "groups.jsonl",
        0,
        b'{"text": "a", "label": 1}\n{"text": "b", "label": 2}',
        ": no two texts share a label",
    ),
    (
        "topics/test.jsonl",
        0,
        b'{"text": "a", "label": "sky"}',
        r" shares no label with train",
    ),
    ("topics/train.jsonl", 0, b'{"text": "a", "label": "sea"}', " has only one label"),
    (CORPUS, 7, b'{"_id": "d1", "text": "a"}', ":7 repeats the _id 'd1'"),
    (QUERIES_FILE, 2, b'{"text": "a"}', ":2 needs a _id"),
    (TEST, 1, b"q0\td0\t1", ":1 must be the header"),
    (TEST, 3, b"q0 d0 1", ":3 has 1 fields"),
    (TEST, 3, b"q0\td0\thigh", ":3 has the grade 'high'"),
    (TEST, 3, b"q9\td0\t1", r":3 names 'q9', which is not in queries\.jsonl"),
    (TEST, 3, b"q0\td99\t1", r":3 names 'd99', which is not in corpus\.jsonl"),
    (TEST, 5, b"q0\td0\t1", ":5 grades 'd0' for 'q0' again"),
    (TEST, 0, f"{QRELS}q0\td0\t0".encode(), " has no grade above 0"),
]
"""File, line (0 for the whole file), its new content (None deletes the file), expected message."""


@pytest.mark.parametrize(
    ("name", "line", "content", "message"), ERRORS, ids=[e[-1] for e in ERRORS]
)
def test_errors_name_file_and_line(
    tmp_path: Path, name: str, line: int, content: bytes | None, message: str
) -> None:
    """The message for an invalid file says where and what is wrong."""
    root = write_all(tmp_path / "held")
    assert len(find_data([root])) == 5
    file = root / name
    if content is None:
        file.unlink()
    elif line == 0:
        file.write_bytes(content)
    else:
        lines = file.read_bytes().splitlines()
        lines[line - 1] = content
        file.write_bytes(b"\n".join(lines))
    with pytest.raises(InvalidRequestError, match=re.escape(str(file)) + message):
        find_data([root])


def test_paths_without_data_are_refused(tmp_path: Path) -> None:
    """A missing folder and a folder without data have different messages."""
    with pytest.raises(InvalidRequestError, match="nowhere does not exist"):
        find_data([tmp_path / "nowhere"])
    other = write_lines(tmp_path / "other.jsonl", [{"anchor": "a"}])
    for path in (tmp_path, other):
        with pytest.raises(InvalidRequestError, match=r"contains no data\. Known are folders with"):
            find_data([path])


def test_two_data_sets_of_one_name_are_refused(tmp_path: Path) -> None:
    """Two data sets with the same name are refused, as their results could not be told apart."""
    file = write_labels(tmp_path / "held" / "groups.jsonl")
    with pytest.raises(InvalidRequestError, match="Two data sets are called held/groups"):
        find_data([file, file])


def test_the_tiny_data_has_the_expected_qrels(tmp_path: Path) -> None:
    """Each query has the twelve documents of its topic."""
    (data,) = find_data([write_retrieval(tmp_path / "search")])
    assert isinstance(data, RetrievalData)
    assert data.queries == QUERIES
    assert [len(grades) for grades in data.qrels] == [12] * len(TOPICS)
