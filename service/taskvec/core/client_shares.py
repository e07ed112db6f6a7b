"""Shares of clients in a full queue, so that one client's requests do not refuse all others'.

``api.endpoint`` names the client of a request; ``core.admission`` asks for its share.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

current_client: ContextVar[str] = ContextVar("current_client", default="")
"""Client of the request in progress: its API key or address; empty if it has neither."""


@dataclass(slots=True)
class _Held:
    """What a client has admitted and not yet answered."""

    tokens: int = 0
    requests: int = 0


class ClientShares:
    """What each client holds of one queue, in tokens and requests.

    While there is room, every client is admitted: alone it may fill the queue. A full queue still
    admits a client that holds less than its share, the budget divided by the number of clients.
    What is admitted in this way is at most one more budget, whatever the number of clients.
    """

    def __init__(self) -> None:
        """Start with an empty queue."""
        self._held: dict[str, _Held] = {}
        self._beyond = _Held()

    def admits(self, client: str, tokens: int, max_tokens: int, max_requests: int) -> bool:
        """Return whether a client's share has room for a request although the queue is full.

        Args:
            client: who asks.
            tokens: tokens of the request; 0 if they are not known yet.
            max_tokens: budget of the queue in tokens.
            max_requests: budget of the queue in requests.
        """
        own = self._held.get(client, _Held())
        clients = len(self._held) + (client not in self._held)
        if clients == 1:
            return False
        # A client's first request may be larger than its share, but not than the whole queue.
        share = max_tokens // clients if own.requests else max_tokens
        if own.tokens + tokens > share:
            return False
        if own.requests and own.requests >= max_requests // clients:
            return False
        return not self._beyond.requests or (
            self._beyond.tokens + tokens <= max_tokens and self._beyond.requests < max_requests
        )

    @contextmanager
    def hold(self, client: str, tokens: int, *, beyond: bool) -> Iterator[None]:
        """Count a request while it is embedded.

        Args:
            client: whose request it is.
            tokens: its tokens.
            beyond: admitted by its client's share, beyond the budget.
        """
        counted = [self._held.setdefault(client, _Held())]
        if beyond:
            counted.append(self._beyond)
        for held in counted:
            held.tokens += tokens
            held.requests += 1
        try:
            yield
        finally:
            for held in counted:
                held.tokens -= tokens
                held.requests -= 1
            if not counted[0].requests:
                del self._held[client]
