"""JSON lines, one checked record at a time: what is wrong is named by file and line."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import orjson

from taskvec.errors import InvalidRequestError

_BOM = b"\xef\xbb\xbf"


def read_lines(file: Path) -> Iterator[tuple[str, bytes]]:
    """The lines of a file, each with its place, ``file:line``.

    Raises:
        InvalidRequestError: it cannot be read, is empty, or a line of it is.
    """
    place = str(file)
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                place = f"{file}:{number}"
                content = line.rstrip(b"\r\n")
                if number == 1:
                    content = content.removeprefix(_BOM)  # as some editors save UTF-8
                if not content.strip():
                    raise InvalidRequestError(f"{place} is an empty line: remove it.")
                yield place, content
    except OSError as error:
        raise InvalidRequestError(f"{file} cannot be read: {error.strerror}.") from None
    if place == str(file):
        raise InvalidRequestError(f"{file} is empty: there is nothing to evaluate on.")


def decoded(place: str, line: bytes) -> str:
    """A line as text.

    Raises:
        InvalidRequestError: it is not UTF-8.
    """
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"{place} is not UTF-8 (byte {error.start + 1} of the line): save the file as UTF-8."
        ) from None


@dataclass(frozen=True, slots=True)
class Record:
    """One object of a JSON lines file.

    Attributes:
        place: ``file:line``.
    """

    place: str
    fields: dict[str, Any]

    def text(self, field: str) -> str:
        """A string that is not empty."""
        value = self.optional_text(field)
        if not value:
            self.refuse(f"lacks {field}, or it is empty: a text is needed")
        return value

    def optional_text(self, field: str) -> str:
        """A string; empty where there is none."""
        value = self.fields.get(field)
        if value is None:
            return ""
        if not isinstance(value, str):
            self.refuse(f"has a {field} that is no string")
        return value

    def number(self, field: str) -> float:
        """A finite number."""
        value = self.fields.get(field)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(f"lacks {field}, or it is no number")
        if not math.isfinite(value):
            self.refuse(f"has a {field} that is not finite")
        return float(value)

    def label(self, field: str) -> str:
        """A string or a whole number, as a string."""
        value = self.fields.get(field)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            self.refuse(f"lacks {field}, or it is neither a string nor a whole number")
        return str(value)

    def refuse(self, fault: str) -> NoReturn:
        """Raise the error that names this record."""
        raise InvalidRequestError(f"{self.place} {fault}.")


def read_records(file: Path) -> Iterator[Record]:
    """The objects of a JSON lines file.

    Raises:
        InvalidRequestError: see ``read_lines``; or a line is no JSON object in UTF-8.
    """
    for place, line in read_lines(file):
        try:
            fields = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            decoded(place, line)
            raise InvalidRequestError(f"{place} is no JSON: {error.msg}.") from None
        if not isinstance(fields, dict):
            raise InvalidRequestError(f"{place} is no JSON object: one object a line is wanted.")
        yield Record(place, fields)
