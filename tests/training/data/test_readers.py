"""Readers of JSONL and Parquet."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from taskvec_train.data import (
    DataError,
    Labelled,
    Pair,
    Scored,
    read_labelled,
    read_pairs,
    read_scored,
    read_texts,
)
from taskvec_train.data.readers import MAX_LINE


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def test_every_kind_of_record_is_read(tmp_path: Path):
    """Texts, pairs with and without negatives, scored pairs and labelled texts are read."""
    texts = write(tmp_path / "t.jsonl", {"text": "Zürich is a city."})
    pairs = write(tmp_path / "p.jsonl", {"anchor": "a", "positive": "b", "negatives": ["c", "d"]})
    plain = write(tmp_path / "q.jsonl", {"anchor": "a", "positive": "b"})
    scored = write(tmp_path / "s.jsonl", {"text_a": "a", "text_b": "b", "score": 3})
    labelled = write(tmp_path / "l.jsonl", {"text": "a", "label": "x"})
    assert read_texts(texts) == ["Zürich is a city."]
    assert read_pairs(pairs) == [Pair("a", "b", ("c", "d"))]
    assert read_pairs(plain) == [Pair("a", "b")]
    assert read_scored(scored) == [Scored("a", "b", 3.0)]
    assert read_labelled(labelled) == [Labelled("a", "x")]


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path):
    """All JSONL and Parquet files of a folder are read, by name; other files are not."""
    write(tmp_path / "b.jsonl", {"text": "second"})
    parquet.write_table(pa.table({"text": ["first"]}), tmp_path / "a.parquet")
    (tmp_path / "card.md").write_text("not data")
    assert read_texts(tmp_path) == ["first", "second"]


def test_parquet_lists_become_negatives(tmp_path: Path):
    """A Parquet column of lists is read as negatives."""
    file = tmp_path / "p.parquet"
    columns = {"anchor": ["a"], "positive": ["b"], "negatives": [["c"]]}
    parquet.write_table(pa.table(columns), file)
    assert read_pairs(file) == [Pair("a", "b", ("c",))]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": }\n', "bad.jsonl:2: malformed JSON"),
        (b'{"text": "a"}\n\n{"text": "b"}\n', "bad.jsonl:2: malformed JSON"),
        (b'{"text": "a"}\n["b"]\n', "bad.jsonl:2: is not a JSON object"),
        (b'{"text": "a"}\n{"text": "caf\xe9"}\n', "bad.jsonl:2: byte 13 is not UTF-8"),
        (b'\xef\xbb\xbf{"text": "a"}\n', "bad.jsonl:1: starts with a byte order mark"),
        ('{"text": "a"}\n'.encode("utf-16"), "bad.jsonl:1: byte 0 is not UTF-8"),
        (b'{"text": "a", "lang": "en"}\n', ":1: has the fields lang, text, but must have text"),
        (b'{"body": "a"}\n', "bad.jsonl:1: has the fields body, but must have text"),
        (b'{"text": 3}\n', "bad.jsonl:1: text is int, make it a string"),
        (b'{"text": null}\n', "bad.jsonl:1: text is NoneType, make it a string"),
        (b'{"text": " "}\n', "bad.jsonl:1: text is blank"),
        (b"", "bad.jsonl: has no records"),
        (b'{"text": "' + b"a" * MAX_LINE + b'"}\n', "bad.jsonl:1: the line has more than"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, content: bytes, message: str):
    """Each kind of invalid file is reported with file and line."""
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_texts(file)
    assert message in str(caught.value)


@pytest.mark.parametrize("score", ["NaN", "Infinity", '"1.0"', "true", "null", "1e999"])
def test_a_score_is_a_finite_number(tmp_path: Path, score: str):
    """Scores that are not finite numbers are refused with their line."""
    file = tmp_path / "s.jsonl"
    good = '{"text_a": "a", "text_b": "b", "score": 0.5}\n'
    file.write_text(good + good.replace("0.5", score))
    with pytest.raises(DataError, match=r"s\.jsonl:2: "):
        read_scored(file)


def test_a_nan_in_parquet_is_refused(tmp_path: Path):
    """A NaN, which Parquet can contain, is refused with its row."""
    file = tmp_path / "s.parquet"
    columns = {"text_a": ["a", "b"], "text_b": ["c", "d"], "score": [0.5, float("nan")]}
    parquet.write_table(pa.table(columns), file)
    with pytest.raises(DataError, match=r"s\.parquet:2: score is nan"):
        read_scored(file)


def test_damaged_parquet_is_refused(tmp_path: Path):
    """A damaged Parquet file is reported by its name."""
    file = tmp_path / "s.parquet"
    file.write_bytes(b"PAR1 but not really PAR1")
    with pytest.raises(DataError, match=r"s\.parquet: is not a readable Parquet"):
        read_texts(file)


def test_records_of_one_folder_have_the_same_fields(tmp_path: Path):
    """Pairs with and without negatives in one folder are refused, with both locations."""
    write(tmp_path / "a.jsonl", {"anchor": "a", "positive": "b"})
    write(tmp_path / "b.jsonl", {"anchor": "a", "positive": "b", "negatives": ["c"]})
    with pytest.raises(DataError) as caught:
        read_pairs(tmp_path)
    assert "b.jsonl:1: has the fields anchor, negatives, positive" in str(caught.value)
    assert "a.jsonl:1 has anchor, positive" in str(caught.value)


def test_negatives_are_a_list_of_strings(tmp_path: Path):
    """A string instead of a list is refused."""
    file = write(tmp_path / "p.jsonl", {"anchor": "a", "positive": "b", "negatives": "c"})
    with pytest.raises(DataError, match="negatives is str, make it a list of strings"):
        read_pairs(file)


def test_a_path_without_data_is_refused(tmp_path: Path):
    """A folder without data files and a missing path are errors."""
    with pytest.raises(DataError, match="contains no"):
        read_texts(tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        read_texts(tmp_path / "nowhere")
