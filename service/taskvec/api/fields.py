"""Typed reads of JSON fields, shared by the API dialects.

A field may have several names: those that a request uses must agree. Errors name the field that the
client sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from taskvec.errors import InvalidRequestError

T = TypeVar("T")

_TYPE_NAMES = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def agreed(
    body: Mapping[str, Any], names: Sequence[str], read: Callable[[Any, str], T]
) -> T | None:
    """Return the one value that all names of a field give; None if none is present.

    Args:
        body: JSON object; null counts as absent.
        names: the field and its aliases.
        read: converts a value, given the name; see ``string``, ``integer``, ``boolean``.

    Raises:
        InvalidRequestError: two names disagree; or raised by ``read``.
    """
    return agreed_as(body, names, read)[0]


def agreed_as(
    body: Mapping[str, Any], names: Sequence[str], read: Callable[[Any, str], T]
) -> tuple[T | None, str]:
    """Return what ``agreed`` does, and the name that the client sent: for errors that come later.

    The name is the first one in ``names`` if none is present.
    """
    value: T | None = None
    first = ""
    for field in names:
        if body.get(field) is None:
            continue
        other = read(body[field], field)
        if first and other != value:
            raise InvalidRequestError(
                f"{first} and {field} are two spellings of one field and disagree: send one.",
                code="conflicting_fields",
                param=field,
            )
        value, first = other, first or field
    return value, first or names[0]


def string(value: Any, field: str, *, code: str | None = None) -> str | None:
    """Return a string or null.

    Raises:
        InvalidRequestError: neither.
    """
    if value is None or isinstance(value, str):
        return value
    raise InvalidRequestError(
        f"{field} must be a string, got {type_name(value)}.",
        code=code or f"invalid_{field}",
        param=field,
    )


def integer(value: Any, field: str, *, code: str | None = None) -> int:
    """Return a whole number; JSON has one type of numbers, so 32.0 is one as well.

    Raises:
        InvalidRequestError: not a whole number.
    """
    if type(value) is int:
        return value
    if type(value) is float and value.is_integer():
        return int(value)
    found = value if type(value) is float else type_name(value)
    raise InvalidRequestError(
        f"{field} must be a whole number, got {found}.",
        code=code or f"invalid_{field}",
        param=field,
    )


def boolean(value: Any, field: str, *, code: str | None = None) -> bool:
    """Return true or false.

    Raises:
        InvalidRequestError: neither.
    """
    if isinstance(value, bool):
        return value
    raise InvalidRequestError(
        f"{field} must be true or false, got {type_name(value)}.",
        code=code or f"invalid_{field}",
        param=field,
    )


def type_name(value: Any) -> str:
    """Return what JSON calls the type of a value, for error messages."""
    return _TYPE_NAMES[type(value)]
