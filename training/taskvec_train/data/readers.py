"""Read training data from JSONL or Parquet; errors name the file and line.

A path is one file, or a folder of `*.jsonl` and `*.parquet` files, which are read in the order of
their names. All records of one path must have the same fields.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import orjson

from taskvec_train.data.records import DataError, Labelled, Pair, Scored

Record = TypeVar("Record")
Parse = Callable[[object], object]

MAX_LINE = 1 << 20
"""Maximum number of bytes of a line; a longer line probably means that the file is not JSONL."""


def read_texts(path: Path) -> list[str]:
    """Read `{"text"}` records. Raises DataError."""
    return _read(path, {"text": _text}, {}, str)


def read_pairs(path: Path) -> list[Pair]:
    """Read `{"anchor", "positive", "negatives"?}` records. Raises DataError."""
    return _read(path, {"anchor": _text, "positive": _text}, {"negatives": _texts}, Pair)


def read_scored(path: Path) -> list[Scored]:
    """Read `{"text_a", "text_b", "score"}` records. Raises DataError."""
    fields = {"text_a": _text, "text_b": _text, "score": _score}
    return _read(path, fields, {}, Scored)


def read_labelled(path: Path) -> list[Labelled]:
    """Read `{"text", "label"}` records. Raises DataError."""
    return _read(path, {"text": _text, "label": _text}, {}, Labelled)


def _read(
    path: Path,
    required: Mapping[str, Parse],
    optional: Mapping[str, Parse],
    make: Callable[..., Record],
) -> list[Record]:
    """Read all rows, and make a record of each row's values in the order of these fields.

    Raises DataError, also for a file without rows.
    """
    parsers = {**required, **optional}
    records: list[Record] = []
    first: tuple[frozenset[str], str] | None = None
    for file in data_files(path):
        before = len(records)
        rows = _parquet_rows(file) if file.suffix == ".parquet" else _json_rows(file)
        for location, row in rows:
            fields = frozenset(row)
            _check_fields(location, fields, required, optional)
            if first is None:
                first = (fields, location)
            elif fields != first[0]:
                raise DataError(
                    f"{location}: has the fields {_listed(fields)}, but {first[1]} has "
                    f"{_listed(first[0])}. Keep records of different fields in different folders."
                )
            values = [
                _parse(location, name, row[name], parse)
                for name, parse in parsers.items()
                if name in fields
            ]
            records.append(make(*values))
        if len(records) == before:
            raise DataError(f"{file}: has no records. Remove the file, or add records.")
    return records


def data_files(path: Path) -> list[Path]:
    """Return the files of a path in the order in which they are read. Raises DataError."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder. Give a *.jsonl, a *.parquet or a folder.")
    files = sorted(file for file in path.iterdir() if file.suffix in {".jsonl", ".parquet"})
    if not files:
        raise DataError(f"{path}: contains no *.jsonl or *.parquet file.")
    return files


def _json_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.open("rb") as stream:
        for number, line in enumerate(_lines(stream), start=1):
            location = f"{file}:{number}"
            if len(line) > MAX_LINE:
                raise DataError(
                    f"{location}: the line has more than {MAX_LINE:,} bytes. "
                    "Write one JSON object a line, and truncate texts to a model's length."
                )
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                raise DataError(f"{location}: starts with a byte order mark. Save as plain UTF-8.")
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{location}: byte {error.start} is not UTF-8. Save the file as UTF-8."
                ) from None
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise DataError(
                    f"{location}: malformed JSON ({error}). Write one JSON object a line; "
                    "JSON has no NaN and no Infinity."
                ) from None
            if not isinstance(row, dict):
                raise DataError(f"{location}: is not a JSON object. Write one JSON object a line.")
            yield location, row


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """Iterate over lines; of a line that is too long, read at most one byte too many."""
    return iter(lambda: stream.readline(MAX_LINE + 1), b"")


def _parquet_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        from pyarrow import ArrowException, parquet  # noqa: PLC0415 - an extra
    except ImportError:
        raise DataError(
            f"{file}: reading Parquet needs pyarrow. Install taskvec[train], or write JSONL."
        ) from None
    try:
        with parquet.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches(batch_size=4096):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}:{number}", row
    except ArrowException as error:
        raise DataError(
            f"{file}: is not a readable Parquet file ({error}). Write it again."
        ) from None


def _check_fields(
    location: str,
    fields: frozenset[str],
    required: Mapping[str, Parse],
    optional: Mapping[str, Parse],
) -> None:
    missing = required.keys() - fields
    extra = fields - required.keys() - optional.keys()
    if missing or extra:
        wanted = _listed(required) + (f" (and may have {_listed(optional)})" if optional else "")
        raise DataError(
            f"{location}: has the fields {_listed(fields)}, but must have {wanted}. "
            "Add the missing fields, and remove the others."
        )


def _parse(location: str, name: str, value: object, parse: Parse) -> object:
    try:
        return parse(value)
    except ValueError as error:
        raise DataError(f"{location}: {name} {error}.") from None


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"is {type(value).__name__}, make it a string")  # noqa: TRY004 - one type of error
    if not value.strip():
        raise ValueError("is blank, add text or remove the record")
    return value


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError(f"is {type(value).__name__}, make it a list of strings")  # noqa: TRY004
    return tuple(map(_text, value))


def _score(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"is {type(value).__name__}, make it a number")  # noqa: TRY004
    if not math.isfinite(value):
        raise ValueError(f"is {value}, make it a finite number")
    return float(value)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
