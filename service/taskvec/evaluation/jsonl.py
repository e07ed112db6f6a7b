"""Read JSON lines one checked record at a time; errors name the file and line."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import orjson

from taskvec.errors import InvalidRequestError
from taskvec.permissions import read_failure

_BOM = b"\xef\xbb\xbf"


def read_lines(file: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the location, ``file:line``, and content of each line of a file.

    Raises:
        InvalidRequestError: it cannot be read, is empty, or has an empty line.
    """
    location = str(file)
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                location = f"{file}:{number}"
                content = line.rstrip(b"\r\n")
                if number == 1:
                    content = content.removeprefix(_BOM)  # some editors write a byte order mark
                if not content.strip():
                    raise InvalidRequestError(f"{location} is an empty line: remove it.")
                yield location, content
    except OSError as error:
        reason = read_failure(file, error)
        raise InvalidRequestError(f"{file} cannot be read: {reason}.") from None
    if location == str(file):
        raise InvalidRequestError(f"{file} is empty.")


def decode_line(location: str, line: bytes) -> str:
    """Decode a line.

    Raises:
        InvalidRequestError: it is not UTF-8.
    """
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"{location} is not UTF-8 (byte {error.start + 1} of the line): save the file as UTF-8."
        ) from None


@dataclass(frozen=True, slots=True)
class Record:
    """One object of a JSON lines file, with accessors that check a field.

    Each accessor raises InvalidRequestError if the field is missing or has another type.

    Attributes:
        location: ``file:line``.
    """

    location: str
    fields: dict[str, Any]

    def text(self, field: str) -> str:
        """Return a string that must not be empty."""
        value = self.optional_text(field)
        if not value:
            self.fail(f"needs a {field} that is not empty")
        return value

    def optional_text(self, field: str) -> str:
        """Return a string; empty if the field is missing or null."""
        value = self.fields.get(field)
        if value is None:
            return ""
        if not isinstance(value, str):
            self.fail(f"has a {field} that is not a string")
        return value

    def number(self, field: str) -> float:
        """Return a finite number."""
        value = self.fields.get(field)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(f"needs a {field} that is a number")
        if not math.isfinite(value):
            self.fail(f"has a {field} that is not finite")
        return float(value)

    def label(self, field: str) -> str:
        """Return a string or an integer as a string."""
        value = self.fields.get(field)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            self.fail(f"needs a {field} that is a string or an integer")
        return str(value)

    def fail(self, problem: str) -> NoReturn:
        """Raise InvalidRequestError with the location of this record."""
        raise InvalidRequestError(f"{self.location} {problem}.")


def read_records(file: Path) -> Iterator[Record]:
    """Yield the objects of a JSON lines file.

    Raises:
        InvalidRequestError: see ``read_lines``; or a line is not a JSON object in UTF-8.
    """
    for location, line in read_lines(file):
        try:
            fields = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            decode_line(location, line)
            raise InvalidRequestError(f"{location} is not valid JSON: {error.msg}.") from None
        if not isinstance(fields, dict):
            raise InvalidRequestError(f"{location} is not a JSON object: write one object a line.")
        yield Record(location, fields)
