"""Every way a server can fail a call, and what the pool does about it."""

from __future__ import annotations

import enum


class Outcome(enum.StrEnum):
    """How a call ended; the label of the metric."""

    OK = "ok"
    BUSY = "busy"
    UNREACHABLE = "unreachable"
    ERROR = "error"
    TIMEOUT = "timeout"
    WRONG = "wrong"
    ABANDONED = "abandoned"


OPENS_AT_ONCE = frozenset({Outcome.UNREACHABLE, Outcome.TIMEOUT, Outcome.WRONG})
"""After one of these a server gets no further call until it has proven itself again."""


class ServerFault(Exception):  # noqa: N818 - no error of ours: another server may do better
    """One call to one server failed.

    Attributes:
        outcome: how.
        message: what happened, after the server's name and a colon.
        retry_after: seconds after which a busy server wants to be asked again.
    """

    def __init__(self, outcome: Outcome, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.outcome = outcome
        self.message = message
        self.retry_after = retry_after
