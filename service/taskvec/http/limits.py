"""What one request may size, and what it asks of the schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from taskvec.access.keys import Key
from taskvec.errors import InvalidRequestError
from taskvec.priority import Priority

TIMEOUT_HEADER = "x-request-timeout-ms"
PRIORITY_HEADER = "x-priority"


class Limits(NamedTuple):
    """The limits of a route that embeds.

    Attributes:
        body_bytes: most bytes of a body.
        body_seconds: how long a body may take to arrive.
        values: most JSON values in a body, whatever they are.
        texts: most texts of a request.
        seconds: how long a request may take once its body is there.
        token_ids: whether ids are taken in place of text.
    """

    body_bytes: int
    body_seconds: float
    values: int
    texts: int
    seconds: float
    token_ids: bool


def seconds_allowed(headers: Mapping[str, str], most: float) -> float:
    """How long a request may take: what the client asks for, at most what the server allows.

    Raises:
        InvalidRequestError: the client's header is no number of milliseconds.
    """
    asked = headers.get(TIMEOUT_HEADER)
    if asked is None:
        return most
    if not asked.isdecimal() or not 0 < len(asked) < 12 or int(asked) == 0:
        raise InvalidRequestError(
            f"The header {TIMEOUT_HEADER} must be a whole number of milliseconds above 0.",
            code="invalid_timeout",
            param=TIMEOUT_HEADER,
        )
    return min(most, int(asked) / 1000)


def priority_asked(headers: Mapping[str, str], key: Key | None) -> Priority:
    """The class that the client puts its request into; where it says nothing, that of its key.

    Raises:
        InvalidRequestError: there is no such class.
    """
    asked = headers.get(PRIORITY_HEADER)
    if asked is None:
        return Priority.INTERACTIVE if key is None else key.priority
    try:
        return Priority(asked)
    except ValueError:
        raise InvalidRequestError(
            f"The header {PRIORITY_HEADER} must be one of {', '.join(Priority)}.",
            code="invalid_priority",
            param=PRIORITY_HEADER,
        ) from None
