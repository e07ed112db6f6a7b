"""Parse a large JSON body in pieces, because a parser holds the interpreter lock until it is done.

orjson takes 50 ms for 25 MB of texts, and while it does, no other thread runs Python. Here, long
strings and long arrays of numbers are cut out of the body, each is parsed in calls of at most
``PIECE`` bytes, and what remains of the body, with placeholders, in one call. How large that can be
is bounded by the number of values.
"""

from __future__ import annotations

import re
import secrets
from itertools import pairwise
from typing import Any

import orjson

PIECE = 1 << 16
"""Bytes parsed in one call: a fraction of a millisecond, for escapes and numbers one."""

SCAN_BYTES = 1 << 18
"""Bytes of a body in which values are counted at a time: a copy of them is made."""

LONG_STRING, LONG_ARRAY = 128, 32
"""Bytes of a string, or of an array of numbers, above which it is cut out."""

PADDING = 256
"""Bytes between strings above which white space is looked for."""

_QUOTE, _BACKSLASH = b'"'[0], b"\\"[0]

_LONGEST_ESCAPE = 12
"""Bytes of a surrogate pair."""

_CHARACTERS = re.compile(
    rb'(?:[^"\\]++|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[0-9a-fA-F]{4}'
    rb"|\\u(?![dD][89abAB])[0-9a-fA-F]{4}|\\[^u])*+"
)
"""Content of a string, which never ends inside of an escape or between two surrogates."""

_LONG_NUMBER = re.compile(rb"(?<![^ \t\r\n,:\[\]{}])[^ \t\r\n,:\[\]{}]{100}")
"""Matches only from the start of a number: from each of its digits, it takes 50 times as long."""

_SPACES = re.compile(rb"[ \t\r\n]{2,}+")
_NUMBERS = b"0123456789-+.eE, \t\r\n"


class InvalidJsonError(ValueError):
    """The body is not JSON."""


class TooManyValuesError(ValueError):
    """The body has more values than allowed."""


def parse_in_pieces(body: bytes, max_values: int, max_numbers: int, piece: int = PIECE) -> Any:
    """Parse JSON; the result is that of ``orjson.loads``.

    Args:
        body: any bytes.
        max_values: maximum number of strings and of arrays; a bound of the time for the rest.
        max_numbers: so many more values may be numbers in long arrays.
        piece: bytes parsed in one call, at least 32.

    Raises:
        InvalidJsonError: not JSON.
        TooManyValuesError: more values than a maximum.
    """
    cutter = _Cutter(body, max_values, max_numbers, piece)
    try:
        rest = cutter.cut()
        if has_more_values(rest, 2 * max_values):  # 16 numbers in each of 2,048 arrays, and more
            raise TooManyValuesError
        value = orjson.loads(rest)
        parts = {name: _parsed(body, cuts) for name, cuts in cutter.parts.items()}
    except orjson.JSONDecodeError as error:
        raise InvalidJsonError(error.msg) from None
    return _filled(value, parts) if parts else value


def has_more_values(body: bytes, limit: int) -> bool:
    """Return whether JSON has more values than a limit; takes milliseconds per megabyte.

    Every value and key except the outermost follows a comma, a colon or an opening bracket. A piece
    is searched at a time, so that no copy of the body is needed.
    """
    quotes = values = start = 0
    while start < len(body):
        piece = body[start : start + SCAN_BYTES]
        start += len(piece)
        if b"\\" in piece:  # an escaped quote does not end a string
            backslashes = len(piece) - len(piece.rstrip(b"\\"))
            start += backslashes % 2  # what the last one escapes
            piece = piece.replace(rb"\\", b"").replace(rb"\"", b"")
        parts = piece.split(b'"', 2 * limit + 3 - quotes)
        outside_strings = b"".join(parts[quotes % 2 :: 2])
        values += sum(map(outside_strings.count, (b",", b":", b"[", b"{")))
        quotes += len(parts) - 1
        if quotes > 2 * limit + 2 or values > limit:
            return True
    return False


class _Cutter:
    """Cuts the long parts out of a body.

    Attributes:
        parts: placeholder -> where the part is cut into pieces, as offsets of the body.
    """

    def __init__(self, body: bytes, max_values: int, max_numbers: int, piece: int) -> None:
        self.parts: dict[str, list[int]] = {}
        self._body = body
        self._rest: list[bytes] = []
        self._values_left = max_values
        self._numbers_left = max_values + max_numbers
        self._piece = piece
        self._name = secrets.token_hex(8)  # a body cannot contain it

    def cut(self) -> bytes:
        """Return what remains."""
        position, body = 0, self._body
        while (quote := body.find(b'"', position)) >= 0:
            self._keep_structure(position, quote)
            cuts = _string_cuts(body, quote + 1, self._piece)
            position = cuts[-1] + 1
            self._count()
            if position - quote > LONG_STRING:
                self._replace(cuts)
            else:
                self._rest.append(body[quote:position])
        self._keep_structure(position, len(body))
        return b"".join(self._rest)

    def _keep_structure(self, start: int, stop: int) -> None:
        """Keep what is outside of strings, but for long arrays of numbers."""
        body = self._body
        while stop - start > LONG_ARRAY and (close := body.find(b"]", start, stop)) >= 0:
            opening = body.rfind(b"[", start, close)
            self._count()
            if close - opening > LONG_ARRAY and opening >= 0:
                cuts = self._array_cuts(opening + 1, close)
                if cuts:
                    self._refuse_key(close + 1)
                    self._keep(start, opening)
                    self._replace(cuts)
                    start = close + 1
                    continue
            self._keep(start, close + 1)
            start = close + 1
        self._keep(start, stop)

    def _refuse_key(self, stop: int) -> None:
        """Check that an array is no key: its placeholder is a string, and could be one."""
        while (after := self._body[stop : stop + PADDING]).isspace():
            stop += PADDING
        if after.lstrip().startswith(b":"):
            raise InvalidJsonError("a key is an array")

    def _keep(self, start: int, stop: int) -> None:
        for first in range(start, stop, self._piece):
            kept = self._body[first : min(first + self._piece, stop)]
            if len(kept) > PADDING:
                kept = _SPACES.sub(b" ", kept)
                if _LONG_NUMBER.search(kept):
                    raise InvalidJsonError("a value that is no string has more than 100 characters")
            self._rest.append(kept)

    def _array_cuts(self, start: int, stop: int) -> list[int]:
        """Return where an array is cut, at commas; nothing if it has other things than numbers."""
        cuts = [start - 1]  # of the bracket, as if it were a comma
        while stop - cuts[-1] > self._piece:
            comma = self._body.rfind(b",", cuts[-1] + 1, cuts[-1] + self._piece)
            if comma < 0:
                return []
            cuts.append(comma)
        cuts.append(stop)
        for first, last in pairwise(cuts):
            piece = self._body[first + 1 : last]
            if piece.translate(None, _NUMBERS):
                return []
            self._numbers_left -= piece.count(b",") + 1
            if self._numbers_left < 0:
                raise TooManyValuesError
        return cuts

    def _replace(self, cuts: list[int]) -> None:
        name = f"{self._name}{len(self.parts)}"
        self.parts[name] = cuts
        self._rest.append(b'"%b"' % name.encode())

    def _count(self) -> None:
        self._values_left -= 1
        if self._values_left < 0:
            raise TooManyValuesError


def _string_cuts(body: bytes, start: int, piece: int) -> list[int]:
    """Return where a string is cut: its start, places between characters, and its end."""
    cuts = [start]
    while True:
        start = cuts[-1]
        limit = min(start + piece, len(body))
        end = body.find(b'"', start, limit)
        if end < 0 and limit == len(body):
            raise InvalidJsonError("a string does not end")
        if end < 0 and _BACKSLASH not in body[limit - _LONGEST_ESCAPE : limit]:
            end = limit
        elif end != start and (end < 0 or body[end - 1] == _BACKSLASH):
            found = _CHARACTERS.match(body, start, limit)
            end = found.end() if found is not None else start
        if end < len(body) and body[end] == _QUOTE:
            cuts.append(end)
            return cuts
        while start < end < len(body) and body[end] & 0xC0 == 0x80:  # inside of a character
            end -= 1
        if end == start:
            raise InvalidJsonError("a string has an invalid escape, or does not end")
        cuts.append(end)


def _parsed(body: bytes, cuts: list[int]) -> Any:
    """Parse a string or an array of numbers."""
    if body[cuts[0] - 1] == _QUOTE:
        pieces = [orjson.loads(b'"%b"' % body[a:b]) for a, b in pairwise(cuts)]
        return pieces[0] if len(pieces) == 1 else "".join(pieces)
    numbers: list[Any] = []
    for first, last in pairwise(cuts):
        piece = orjson.loads(b"[%b]" % body[first + 1 : last])
        if not piece and len(cuts) > 2:
            raise InvalidJsonError("a number is missing between two commas")
        numbers += piece
    return numbers


def _filled(value: Any, parts: dict[str, Any]) -> Any:
    """Put the parts in the places of their placeholders."""
    outermost = [value]
    waiting: list[Any] = [outermost]
    while waiting:
        container = waiting.pop()
        if type(container) is dict and not container.keys().isdisjoint(parts):
            items = list(container.items())
            container.clear()
            container.update((parts.get(key, key), item) for key, item in items)
        entries = enumerate(container) if type(container) is list else container.items()
        for place, item in entries:
            if type(item) is str:
                container[place] = parts.get(item, item)
            elif type(item) in (list, dict):
                waiting.append(item)
    return outermost[0]
